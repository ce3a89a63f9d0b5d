// The large view: an image, beside the query or the best of its copies.

import { $, FILTERS, about, address, clamp, complain, copy, element, go, imageOf, nameOf, number, pick, read } from "./core.js";
import { whereOf } from "./grid.js";
import * as heat from "./heat.js";
import { add } from "./query.js";

const view = $("view");
let shown = null; // the image
let around = []; // ids of the one before and the one behind
let zoom = 1;

const size = (bytes) => (bytes < 1e6 ? `${Math.max(Math.round(bytes / 1e3), 1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
export const facts = (of) =>
  [`${number(of.width)} × ${number(of.height)}`, size(of.bytes), of.date.slice(0, 10)].join(" · ");

const within = (side) => $(side).querySelectorAll("img, canvas, figcaption");

function picture(side, id, text) {
  const [image, canvas, caption] = within(side);
  image.src = imageOf(id, "large");
  image.alt = caption.textContent = text;
  canvas.replaceWith(element("canvas", {})); // what is on its way to the former one is not seen
}

export function show(item, left, neighbours) {
  if (!view.open) {
    enlarge(1);
    view.showModal();
  }
  [shown, around] = [item, neighbours];
  [$("previous").disabled, $("next").disabled] = around.map((near) => !near);
  $("viewwhy").ariaPressed = heat.on();
  picture("right", item.id, nameOf(item));
  if (left) picture("left", left.id, left.text);
  $("left").hidden = $("sides").hidden = !left;
  if (heat.on() && read().id) heat.between(item.id, within("right"), within("left")).catch(complain);
  $("viewname").textContent = nameOf(item);
  const parts = [whereOf(item), facts(item), item.similarity && `similarity ${item.similarity.toFixed(3)}`];
  $("facts").textContent = parts.filter(Boolean).join(" · ");
  $("by").href = address({ ...pick(read(), FILTERS), id: item.id });
  $("open").href = $("save").href = `/original/${item.id}`;
  $("save").download = nameOf(item);
  $("there").hidden = !item.folder;
  $("there").href = address({ folder: item.folder, order: "folder" });
  for (const near of around) if (near) new Image().src = imageOf(near, "large");
}

// Closes; returns the id of what was looked at last, if anything was.
export function hide() {
  const last = shown;
  shown = null;
  view.close();
  return last?.id;
}

// Zooms both; from twice the size on, by the file itself where it is sent.
function enlarge(wanted) {
  zoom = clamp(wanted, 1, 8);
  $("panes").style.setProperty("--zoom", zoom);
  $("smaller").disabled = zoom === 1;
  const [image] = within("right");
  if (zoom < 2 || !about.files || image.src.includes("/original/")) return;
  const file = Object.assign(new Image(), { src: `/original/${shown.id}` });
  file.onload = () => image.src.includes(shown.id) && (image.src = file.src);
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
const keys = {
  ArrowLeft: () => move(around[0]),
  ArrowRight: () => move(around[1]),
  "+": () => enlarge(zoom * 1.5),
  "-": () => enlarge(zoom / 1.5),
};
view.addEventListener("keydown", (event) => {
  const scrolls = zoom > 1 && event.target.closest(".pane") && event.key.startsWith("Arrow");
  const act = keys[event.key === "=" ? "+" : event.key];
  if (!act || scrolls) return;
  act();
  event.preventDefault();
});
view.addEventListener("click", ({ target }) => keys[target.dataset.key]?.());
$("panes").ondblclick = () => enlarge(zoom > 1 ? 1 : 2.5);
$("adding").onclick = () => add(shown.id);
$("copy").onclick = () => copy(shown.path, $("copy"));
$("viewwhy").onclick = () => $("heat").click();
