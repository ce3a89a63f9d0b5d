// A grid of any number of images, of which those near the window are in the document.

import { $, FILTERS, address, clamp, complain, element, imageOf, nameOf, pick, read, stamp } from "./core.js";

export const BLOCK = 100; // images that are asked for at a time
const MARGIN = 500; // pixels above and below the window
const KEPT = [...FILTERS, "others", "similarity", "why"]; // when one searches by what is found
const list = $("grid");
let source = null; // offset → {items, total}
let items = []; // sparse
let total = 0;
let asked = new Set(); // offsets of what is on its way
let columns = 1;
let row = 200; // pixels
let current = 0; // the one that the Tab key reaches

export const contents = () => ({ items, total, current });
export const indexOf = (id) => (id ? items.findIndex((item) => item?.id === id) : -1);
export const visible = () => [...list.children].filter(({ item, place }) => item && near(place));
const linkOf = (place) => [...list.children].find((node) => node.place === place)?.querySelector("a");

// Fills the grid from a source, whose first images are known.
export function fill(from, first) {
  [source, items, total, current] = [from, first.items, first.total, first.current ?? 0];
  asked = new Set();
  const held = list.contains(document.activeElement);
  list.replaceChildren();
  measure();
  if (held) refocus();
}

function measure() {
  const style = getComputedStyle(list);
  const widths = style.gridTemplateColumns.split(" ");
  columns = widths.length;
  row = parseFloat(widths[0]) + parseFloat(style.getPropertyValue("--caption")) + parseFloat(style.rowGap);
  list.style.height = `${Math.ceil(total / columns) * row}px`;
  draw();
}

const topOf = (place) => list.getBoundingClientRect().top + Math.floor(place / columns) * row;
const near = (place) => topOf(place) > -row && topOf(place) < innerHeight;

export function draw() {
  const { why } = read(); // is in the links
  const top = topOf(0);
  const rowAt = (y) => clamp((y - top) / row, 0, Math.ceil(total / columns));
  const first = Math.floor(rowAt(-MARGIN)) * columns;
  const last = Math.min(Math.ceil(rowAt(innerHeight + MARGIN)) * columns, total);
  const held = list.contains(document.activeElement);
  for (const node of [...list.children]) {
    const stale = node.item !== items[node.place] || node.why !== why;
    if (node.place < first || node.place >= last || stale) node.remove();
  }
  for (let place = first; place < last; place++) {
    const there = list.children[place - first];
    if (there?.place !== place) list.insertBefore(tile(place, items[place]), there);
  }
  list.style.paddingTop = `${(first / columns) * row}px`;
  if (held && !document.activeElement.closest("#grid li")) refocus();
  clearTimeout(draw.later); // what is only passed by is not asked for
  draw.later = setTimeout(load, 40, first, last);
  list.dispatchEvent(new Event("drawn"));
}

async function load(first, last) {
  const from = source;
  for (let offset = first - (first % BLOCK); offset < last; offset += BLOCK) {
    if (items[offset] || asked.has(offset)) continue;
    asked.add(offset);
    try {
      const found = await from(offset);
      if (from !== source) return;
      found.items.forEach((item, i) => (items[offset + i] = item));
      total = found.total;
      measure();
    } catch (error) {
      complain(error);
    } finally {
      setTimeout(() => asked.delete(offset), 1000);
    }
  }
}

// Most labels are folders.
export const whereOf = ({ label, folder }) =>
  [folder.split("/").includes(label) ? "" : label, folder].filter(Boolean).join(" · ");

function tile(place, item) {
  const node = item ? stamp("tile") : element("li", {});
  Object.assign(node, { place, item, why: read().why, ariaSetSize: total, ariaPosInSet: place + 1 });
  if (!item) return node;
  const part = (name) => node.querySelector(name);
  const dense = row * Math.min(devicePixelRatio, 2) > 350;
  Object.assign(part("img"), { src: imageOf(item.id, dense ? "medium" : "small"), alt: nameOf(item) });
  const href = address({ ...pick(read(), KEPT), id: item.id });
  Object.assign(part("a"), { href, title: item.path ?? nameOf(item), tabIndex: place === current ? 0 : -1 });
  part("a").dataset.id = item.id;
  part(".what").textContent = nameOf(item);
  part(".alike").textContent = item.similarity?.toFixed(3) ?? "";
  part(".where").textContent = whereOf(item);
  part(".look").href = address({ ...read(), view: item.id });
  part(".look").ariaLabel = `Look at ${nameOf(item)}`;
  return node;
}

// The keyboard. What is scrolled away loses the focus to the list, and gets it again.

const refocus = () => (linkOf(current) ?? list).focus({ preventScroll: true });

export function focus(place) {
  current = clamp(place, 0, total - 1);
  const top = topOf(current);
  if (top < 0 || top + row > innerHeight) scrollBy(0, top - innerHeight / 3);
  draw();
  for (const { place, firstElementChild: link } of list.children) if (link) link.tabIndex = place === current ? 0 : -1;
  refocus();
}

list.addEventListener("keydown", (event) => {
  const page = columns * Math.max(Math.floor(innerHeight / row) - 1, 1);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page,
    Home: -total, End: total };
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key in steps) focus(current + steps[event.key]);
  else if (event.key === "v" || event.key === " ") linkOf(current)?.nextElementSibling.click();
  else return;
  event.preventDefault();
});
list.addEventListener("focus", refocus);
list.addEventListener("focusin", (event) => (current = event.target.closest("li")?.place ?? current));
addEventListener("scroll", draw); // once a frame
new ResizeObserver(measure).observe(list);
