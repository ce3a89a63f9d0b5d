// A grid of any number of images, of which those near the window are in the document.

import { $, clamp, complain, element, follow, imageOf, number } from "./core.js";

const list = $("grid");
let source = null; // {load(offset) → {items, total}, wanted(item), look(index)}
let items = []; // sparse
let total = 0;
let block = 100; // images that are asked for at a time
let nodes = new Map(); // by index
let asked = new Set(); // offsets
let shape = { columns: 1, tile: 164, row: 200, gap: 16 };
let current = 0; // the one that the Tab key reaches
let drawn = () => {};

export const whenDrawn = (listener) => (drawn = listener);
export const contents = () => ({ items, total, current });
export const visible = () => [...nodes.values()].filter((node) => node.item && near(node.place));
export const indexOf = (id) => items.findIndex((item) => item?.id === id);

// Fills the grid from a source, whose first images are known.
export function fill(from, first, size) {
  const focused = list.contains(document.activeElement);
  for (const node of nodes.values()) node.remove();
  [source, items, total, block, current] = [from, first.items, first.total, size, first.current ?? 0];
  [nodes, asked] = [new Map(), new Set()];
  list.hidden = !total;
  if (total) measure();
  if (focused) nodes.get(current)?.querySelector("a")?.focus({ preventScroll: true });
}

export function measure() {
  const style = getComputedStyle(list);
  const gap = parseFloat(style.columnGap) || 12;
  const width = list.clientWidth;
  const columns = Math.max(Math.floor((width + gap) / (parseFloat(style.getPropertyValue("--least")) + gap)), 2);
  const tile = Math.floor((width - gap * (columns - 1)) / columns);
  const row = tile + Math.ceil(3.1 * parseFloat(style.fontSize)) + gap;
  shape = { columns, tile, row, gap };
  list.style.height = `${Math.ceil(total / columns) * row}px`;
  list.style.setProperty("--tile", `${tile}px`);
  for (const node of nodes.values()) put(node);
  draw();
}

const near = (place, margin = 0) => {
  const top = list.getBoundingClientRect().top + Math.floor(place / shape.columns) * shape.row;
  return top > -shape.row - margin && top < innerHeight + margin;
};

function put(node) {
  const x = (node.place % shape.columns) * (shape.tile + shape.gap);
  node.style.transform = `translate(${x}px, ${Math.floor(node.place / shape.columns) * shape.row}px)`;
}

export function draw() {
  if (!source) return;
  const top = list.getBoundingClientRect().top;
  const rows = Math.ceil(total / shape.columns);
  const first = clamp(Math.floor((-top - 500) / shape.row), 0, rows) * shape.columns;
  const last = Math.min(clamp(Math.ceil((innerHeight + 500 - top) / shape.row), 0, rows) * shape.columns, total);
  for (const [place, node] of nodes) {
    const gone = place < first || place >= last || (node.item !== items[place]);
    if (!gone || (node.contains(document.activeElement) && place < total)) continue;
    node.remove();
    nodes.delete(place);
  }
  let behind = null;
  for (let place = last - 1; place >= first; place--) {
    if (!nodes.has(place)) {
      nodes.set(place, tile(place, items[place]));
      list.insertBefore(nodes.get(place), behind);
    }
    behind = nodes.get(place);
  }
  clearTimeout(draw.later); // what is only passed by is not asked for
  draw.later = setTimeout(() => load(first, last), 40);
  const above = clamp(Math.ceil(-top / shape.row), 0, Math.max(rows - 1, 0)) * shape.columns;
  const place = items[above];
  const text = place && above ? `${number(above + 1)} of ${number(total)}  ${place.folder}` : "";
  if ($("place").textContent !== text) $("place").textContent = text;
  drawn();
}

async function load(first, last) {
  for (let offset = Math.floor(first / block) * block; offset < last; offset += block) {
    const end = Math.min(offset + block, last);
    let missing = Math.max(offset, first);
    while (missing < end && items[missing]) missing++;
    if (missing >= end || asked.has(offset)) continue;
    asked.add(offset);
    const from = source;
    try {
      const found = await from.load(offset);
      if (from !== source) return;
      found.items.forEach((item, i) => (items[offset + i] = item));
      if (found.total !== total) [total, items.length] = [found.total, Math.min(items.length, found.total)];
      measure();
    } catch (error) {
      complain(error);
    } finally {
      setTimeout(() => asked.delete(offset), 1000);
    }
  }
}

const dense = () => (shape.tile * Math.min(devicePixelRatio, 2) > 300 ? "medium" : "");
export const nameOf = (item) => item.name || item.label || item.id;
export const whereOf = (item) => // most labels are folders
  [item.folder.split("/").includes(item.label) ? "" : item.label, item.folder].filter(Boolean).join(" · ");

function tile(place, item) {
  const node = element("li", { place, item, className: item ? "" : "empty" });
  put(node);
  node.ariaSetSize = total;
  node.ariaPosInSet = place + 1;
  if (!item) return node;
  const name = nameOf(item);
  const alike = item.similarity?.toFixed(3);
  const picture = element("div", { className: "tile" }, element("img", { src: imageOf(item.id, dense()), alt: name, decoding: "async" }));
  const caption = element("div", { className: "caption" }, element("span", { className: "what", textContent: name, ariaHidden: true }));
  if (alike) caption.append(element("span", { className: "unseen", textContent: "similarity" }), element("span", { className: "alike", textContent: alike, title: "cosine similarity" }));
  const link = element("a", { title: item.path ?? name }, picture, caption, element("div", { className: "where", textContent: whereOf(item) }));
  link.tabIndex = place === current ? 0 : -1;
  link.dataset.id = item.id;
  follow(link, source.wanted(item));
  const look = element("button", { type: "button", className: "look", textContent: "⤢", title: "Look at it (V)", tabIndex: -1 });
  look.ariaLabel = `Look at ${name}`;
  look.onclick = () => source.look(place);
  node.append(link, look);
  return node;
}

export function focus(place) {
  current = clamp(place, 0, total - 1);
  if (!near(current, -shape.row)) {
    const top = list.getBoundingClientRect().top + scrollY + Math.floor(current / shape.columns) * shape.row;
    scrollTo({ top: top - innerHeight / 3 });
    draw();
  }
  for (const node of nodes.values()) {
    const link = node.querySelector("a");
    if (link) link.tabIndex = node.place === current ? 0 : -1;
  }
  nodes.get(current)?.querySelector("a")?.focus({ preventScroll: true });
}

list.addEventListener("keydown", (event) => {
  const { columns } = shape;
  const page = columns * Math.max(Math.floor(innerHeight / shape.row) - 1, 1);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page,
    Home: -total, End: total };
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key in steps) focus(current + steps[event.key]);
  else if (event.key === "v" || event.key === " ") source.look(current);
  else return;
  event.preventDefault();
});
list.addEventListener("focusin", (event) => {
  const node = event.target.closest("li");
  if (node) current = node.place;
  else if (event.target === list) focus(current);
});
addEventListener("scroll", () => (draw.frame ??= requestAnimationFrame(() => ((draw.frame = undefined), draw()))), { passive: true });
new ResizeObserver(() => source && measure()).observe(list);
