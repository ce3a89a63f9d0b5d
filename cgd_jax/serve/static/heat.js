// Why two images are alike: what adds most to their similarity is lit, what adds little is dimmed.

import { $, address, ask, clamp, complain, element } from "./core.js";
import { visible } from "./grid.js";

// From what adds nothing to what adds most: red, green, blue, opacity.
const STOPS = [[18, 22, 60, 0.66], [150, 40, 110, 0.42], [250, 130, 60, 0.3], [255, 235, 90, 0.46]];
let query = {}; // id, crop, and what was explained, by the other's id
let running = false;

export const on = () => $("heat").checked;

export function begin(example) {
  query = { ...example, known: new Map() };
  clear($("queryheat"));
}

// Asks for the maps of the query and another image.
export async function between(match) {
  const { id, crop, known } = query;
  const path = address({ query: id, match, crop }, "/explanation");
  if (!known.has(match)) known.set(match, await ask(path, { quiet: true }));
  if (known !== query.known) throw new DOMException("another query", "AbortError");
  return known.get(match);
}

// Explains what is in the window, one after the other, so that searches get through.
export async function explain() {
  if (running || !on() || !query.id) return;
  running = true;
  const { crop, known } = query;
  try {
    let node;
    while (on() && (node = visible().find((one) => !one.querySelector("canvas")))) {
      const canvas = element("canvas", {});
      node.querySelector(".tile").append(canvas);
      const heat = await between(node.item.id);
      draw(canvas, node.querySelector("img"), heat.match, heat.inset);
      if (node.place === 0) draw($("queryheat"), $("image"), heat.query, heat.inset, crop);
    }
  } catch (error) {
    if (error.name !== "AbortError") $("heat").checked = false;
    complain(error);
  } finally {
    running = false;
    if (known !== query.known) explain();
  }
}

export function clear(canvas) {
  canvas.width = 1;
}

function color(value) {
  const at = clamp(value) * (STOPS.length - 1);
  const [low, high] = [STOPS[Math.floor(at)], STOPS[Math.ceil(at)]];
  const [r, g, b, opacity] = low.map((part, i) => part + (high[i] - part) * (at % 1));
  return [r, g, b, 255 * opacity];
}

// Draws a grid, which lies in the middle of an image, or of the part that was searched by.
export async function draw(canvas, image, grid, inset, crop) {
  await image.decode().catch(() => {});
  const most = Math.max(...grid.flat(), 1e-9);
  const colors = grid.flat().flatMap((value) => color(Math.sqrt(clamp(value / most))));
  const cells = await createImageBitmap(new ImageData(new Uint8ClampedArray(colors), grid[0].length));
  const [x, y, w, h] = crop ? crop.split(",").map(Number) : [0, 0, 1, 1];
  const margin = (1 - inset) / 2;
  const { naturalWidth: width, naturalHeight: height } = image;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(cells, width * (x + margin * w), height * (y + margin * h), width * w * inset, height * h * inset);
}
