// The large view: an image, beside the query or the best of its copies.

import { $, FILTERS, about, address, ask, clamp, copy, go, imageOf, nameOf, number, pick, read } from "./core.js";
import { whereOf } from "./grid.js";
import * as heat from "./heat.js";
import { add } from "./query.js";

const view = $("view");
let shown = null; // id
let other = null; // what stands on the left: {id, text, crop}
let around = []; // ids of the one before and the one behind
let zoom = 1;

const size = (bytes) => (bytes < 1e6 ? `${Math.max(Math.round(bytes / 1e3), 1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
export const facts = (of) =>
  [`${number(of.width)} × ${number(of.height)}`, size(of.bytes), of.date.slice(0, 10)].join(" · ");

const imageIn = (side) => $(side).querySelector("img");
const canvasIn = (side) => $(side).querySelector("canvas");

function picture(side, id, text) {
  imageIn(side).src = imageOf(id, "large");
  caption(side, text);
  heat.clear(canvasIn(side));
}

function caption(side, text) {
  imageIn(side).alt = $(side).querySelector("figcaption").textContent = text;
}

export async function show(id, left, neighbours, similarity) {
  if (!view.open) {
    enlarge(1);
    view.showModal();
  }
  [shown, other, around] = [id, left, neighbours];
  [$("previous").disabled, $("next").disabled] = around.map((near) => !near);
  $("viewwhy").ariaPressed = heat.on();
  picture("right", id, "This image");
  if (other) picture("left", other.id, other.text);
  $("left").hidden = $("sides").hidden = !other;
  $("by").href = address({ ...pick(read(), FILTERS), id });
  $("open").href = `/original/${id}`;
  $("save").href = `/original/${id}?save=true`;
  $("viewname").textContent = $("facts").textContent = "";
  if (heat.on() && read().id) explain(id);
  try {
    const found = await ask(`/details/${encodeURIComponent(id)}`, { quiet: true });
    if (shown !== id) return;
    $("viewname").textContent = nameOf(found);
    caption("right", nameOf(found));
    const parts = [whereOf(found), facts(found), similarity && `similarity ${similarity.toFixed(3)}`];
    $("facts").textContent = parts.filter(Boolean).join(" · ");
    $("there").hidden = !found.folder;
    $("there").href = address({ folder: found.folder, order: "folder" });
    $("copy").onclick = () => copy(found.path, $("copy"));
  } catch (error) {
    $("facts").textContent = error.message;
  }
  for (const near of around) if (near) new Image().src = imageOf(near, "large");
}

// Closes; returns the id of what was looked at last, if anything was.
export function hide() {
  const last = shown;
  shown = null;
  view.close();
  return last;
}

async function explain(id) {
  try {
    const found = await heat.between(id);
    if (id !== shown) return;
    heat.draw(canvasIn("left"), imageIn("left"), found.query, found.inset, other.crop);
    heat.draw(canvasIn("right"), imageIn("right"), found.match, found.inset);
  } catch (error) {
    if (error.name !== "AbortError") $("facts").textContent = error.message;
  }
}

// Zooms both; from twice the size on, by the file itself where it is sent.
function enlarge(wanted) {
  zoom = clamp(wanted, 1, 8);
  $("panes").style.setProperty("--zoom", zoom);
  $("smaller").disabled = zoom === 1;
  const image = imageIn("right");
  if (zoom < 2 || !about.files || image.src.includes("/original/")) return;
  const file = Object.assign(new Image(), { src: `/original/${shown}` });
  file.onload = () => image.src.includes(shown) && (image.src = file.src);
}

const move = (id) => id && go({ ...read(), view: id }, { replace: true });

// Leaves by the way it came: Back does not open it again.
function leave() {
  const { view: looked, ...wanted } = read();
  if (!looked) return;
  const before = window.navigation?.entries()[navigation.currentEntry.index - 1];
  if (before?.url === new URL(address(wanted), location).href) navigation.back();
  else go(wanted, { replace: true });
}

view.addEventListener("close", leave);
view.addEventListener("keydown", (event) => {
  const scrolls = zoom > 1 && event.target.closest(".pane");
  if (event.key === "ArrowLeft" && !scrolls) move(around[0]);
  else if (event.key === "ArrowRight" && !scrolls) move(around[1]);
  else if (event.key === "+" || event.key === "=") enlarge(zoom * 1.5);
  else if (event.key === "-") enlarge(zoom / 1.5);
  else return;
  event.preventDefault();
});
$("previous").onclick = () => move(around[0]);
$("next").onclick = () => move(around[1]);
$("larger").onclick = () => enlarge(zoom * 1.5);
$("smaller").onclick = () => enlarge(zoom / 1.5);
$("panes").ondblclick = () => enlarge(zoom > 1 ? 1 : 2.5);
$("adding").onclick = () => add(shown);
$("viewwhy").onclick = () => $("heat").click();
