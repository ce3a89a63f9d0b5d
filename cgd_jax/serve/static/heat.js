// Why two images are alike: what adds most to their similarity is lit, what adds little is dimmed.

import { $, address, ask, clamp, complain, element } from "./core.js";
import { visible } from "./grid.js";

// From what adds nothing to what adds most: red, green, blue, opacity.
const STOPS = [[18, 22, 60, 0.66], [150, 40, 110, 0.42], [250, 130, 60, 0.3], [255, 235, 90, 0.46]];
const known = new Map(); // of the query that is shown, by id
let query = {}; // id, crop
let running = false;

export const on = () => $("heat").checked;

export function begin(id, crop) {
  query = { id, crop };
  known.clear();
  clear($("queryheat"));
}

export async function between(match) {
  if (!known.has(match)) {
    const mine = query;
    const found = await ask(address({ query: mine.id, match, crop: mine.crop }, "/explanation"), { quiet: true });
    if (mine !== query) throw new DOMException("replaced", "AbortError");
    known.set(match, found);
  }
  return known.get(match);
}

// Explains what is in the window, one after the other, so that searches get through.
export async function explain() {
  if (running || !on() || !query.id) return;
  running = true;
  try {
    for (;;) {
      const node = visible().find((one) => !one.querySelector("canvas"));
      if (!node || !on()) break;
      const image = node.querySelector("img");
      const canvas = element("canvas", {});
      node.querySelector(".tile").append(canvas);
      const heat = await between(node.item.id);
      await image.decode().catch(() => {});
      draw(canvas, image, heat.match, heat.inset);
      if (node.place === 0) drawQuery(heat);
    }
  } catch (error) {
    if (error.name !== "AbortError") $("heat").checked = false;
    complain(error);
  } finally {
    running = false;
  }
}

export function drawQuery(heat) {
  draw($("queryheat"), $("image"), heat.query, heat.inset, query.crop);
}

export function clear(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

function color(value) {
  const at = clamp(value) * (STOPS.length - 1);
  const low = STOPS[Math.floor(at)];
  const high = STOPS[Math.ceil(at)];
  return low.map((part, i) => part + (high[i] - part) * (at % 1));
}

export function draw(canvas, image, grid, inset, crop) {
  const most = Math.max(...grid.flat(), 1e-9);
  const pixels = new ImageData(grid[0].length, grid.length);
  grid.flat().forEach((value, i) => {
    const [r, g, b, opacity] = color(Math.sqrt(clamp(value / most)));
    pixels.data.set([r, g, b, 255 * opacity], 4 * i);
  });
  const small = element("canvas", { width: pixels.width, height: pixels.height });
  small.getContext("2d").putImageData(pixels, 0, 0);
  const [x, y, w, h] = crop ? crop.split(",").map(Number) : [0, 0, 1, 1];
  const margin = (1 - inset) / 2;
  const { naturalWidth: width = 1, naturalHeight: height = 1 } = image;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, width * (x + margin * w), height * (y + margin * h), width * w * inset, height * h * inset);
}

export function remove() {
  clear($("queryheat"));
  for (const canvas of document.querySelectorAll("#grid canvas")) canvas.remove();
}
