// The large view: an image, beside the query or the best of its copies.

import { $, about, ask, copy, follow, go, imageOf, number, pick, read, FILTERS } from "./core.js";
import * as grid from "./grid.js";
import * as heat from "./heat.js";
import { add } from "./query.js";

const view = $("view");
let other = null; // what stands on the left: {id, text}
let shown = null; // id
let zoom = 1;
let around = { before: null, after: null };

const size = (bytes) => (bytes < 1e6 ? `${Math.max(Math.round(bytes / 1e3), 1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
export const facts = (of) =>
  [`${number(of.width)} × ${number(of.height)}`, size(of.bytes), of.date.slice(0, 10)].join(" · ");

function picture(side, id, text) {
  const image = $(side).querySelector("img");
  image.src = imageOf(id, "large");
  image.alt = text;
  $(side).querySelector("figcaption").textContent = text;
  heat.clear($(side).querySelector("canvas"));
}

export async function show(id, left, neighbours) {
  if (!view.open) {
    enlarge(1);
    view.showModal();
  }
  [shown, other, around] = [id, left, neighbours];
  $("previous").disabled = !around.before;
  $("next").disabled = !around.after;
  $("left").hidden = !other || $("sides").ariaPressed !== "true";
  $("sides").hidden = !other;
  $("viewwhy").hidden = !about.explains || !other?.explained;
  $("viewwhy").ariaPressed = Boolean(read().why);
  picture("right", id, "This image");
  if (other) picture("left", other.id, other.text);
  follow($("by"), { ...pick(read(), FILTERS), id });
  $("owner").hidden = !about.files;
  $("open").href = `/original/${id}`;
  $("save").href = `/original/${id}?save=true`;
  $("viewname").textContent = $("facts").textContent = "";
  explain();
  try {
    const found = await ask(`/details/${encodeURIComponent(id)}`, { quiet: true });
    if (shown !== id) return;
    const name = grid.nameOf(found);
    const alike = left?.similarity?.(id);
    $("viewname").textContent = name;
    $("right").querySelector("img").alt = name;
    $("right").querySelector("figcaption").textContent = name;
    $("facts").textContent = [grid.whereOf(found), facts(found), alike && `similarity ${alike}`].filter(Boolean).join(" · ");
    $("there").hidden = !found.folder;
    follow($("there"), { folder: found.folder, order: "folder" });
    $("copy").onclick = () => copy(found.path, $("copy"));
  } catch (error) {
    $("facts").textContent = error.message;
  }
  for (const near of Object.values(around)) if (near) new Image().src = imageOf(near, "large");
}

// Closes; returns the id of what was looked at last.
export function hide() {
  if (!view.open) return null;
  view.close();
  return shown;
}

async function explain() {
  if ($("viewwhy").hidden || $("viewwhy").ariaPressed !== "true") return;
  const id = shown;
  try {
    const found = await heat.between(id);
    for (const [side, grid] of [["left", found.query], ["right", found.match]]) {
      const image = $(side).querySelector("img");
      await image.decode().catch(() => {});
      if (id === shown) heat.draw($(side).querySelector("canvas"), image, grid, found.inset, side === "left" ? other.crop : "");
    }
  } catch (error) {
    if (error.name !== "AbortError") $("facts").textContent = error.message;
  }
}

// Zooms both; from twice the size on, by the file itself where it is sent.
function enlarge(wanted) {
  zoom = Math.min(Math.max(wanted, 1), 8);
  $("panes").style.setProperty("--zoom", zoom);
  $("smaller").disabled = zoom === 1;
  const image = $("right").querySelector("img");
  if (zoom < 2 || !about.files || image.src.includes("/original/")) return;
  const file = new Image();
  file.onload = () => image.src.includes(shown) && (image.src = file.src);
  file.src = `/original/${shown}`;
}

function move(id) {
  if (id) go({ ...read(), view: id }, { replace: true, pushed: history.state?.pushed });
}

// Leaves by the way it came: Back does not open it again.
function leave() {
  if (history.state?.pushed) history.back();
  else go({ ...read(), view: "" }, { replace: true });
}

view.addEventListener("cancel", (event) => {
  event.preventDefault();
  leave();
});
view.addEventListener("close", () => read().view && leave()); // a browser may insist
view.addEventListener("keydown", (event) => {
  const scrolls = zoom > 1 && event.target.closest(".pane");
  if (event.key === "ArrowLeft" && !scrolls) move(around.before);
  else if (event.key === "ArrowRight" && !scrolls) move(around.after);
  else if (event.key === "+" || event.key === "=") enlarge(zoom * 1.5);
  else if (event.key === "-") enlarge(zoom / 1.5);
  else return;
  event.preventDefault();
});
$("previous").onclick = () => move(around.before);
$("next").onclick = () => move(around.after);
$("larger").onclick = () => enlarge(zoom * 1.5);
$("smaller").onclick = () => enlarge(zoom / 1.5);
$("close").onclick = leave;
$("panes").ondblclick = () => enlarge(zoom > 1 ? 1 : 2.5);
$("adding").onclick = () => add(shown);
$("sides").onclick = () => {
  $("sides").ariaPressed = $("sides").ariaPressed !== "true";
  $("left").hidden = $("sides").ariaPressed !== "true";
};
$("viewwhy").onclick = () => go({ ...read(), why: read().why ? "" : "1" }, { replace: true, pushed: history.state?.pushed });
