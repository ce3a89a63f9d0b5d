// Why two images are alike: what adds most to their similarity is lit, what adds little is dimmed.

import { $, address, ask, clamp, complain, element } from "./core.js";
import { visible } from "./grid.js";

// From dark blue, which dims, over violet and orange to yellow, which lights: red, green, blue, opacity.
const color = (value) => [18 + 237 * value * (2 - value), 22 + 213 * value ** 2, 60 + 200 * value * (1 - value) ** 2,
  255 * (0.66 - 0.95 * value + 0.75 * value ** 2)];
let query = {}; // id, crop, and what was explained, by the other's id
let running = false;

export const on = () => $("heat").checked;

$("grid").addEventListener("drawn", explain);

export function begin(example) {
  query = { ...example, known: new Map() };
  $("queryheat").width = 1;
}

// Explains an image on the canvas over it, and the query on that over its.
export async function between(match, [image, canvas], ours) {
  const { id, crop, known } = query;
  const path = address({ query: id, match, crop }, "/explanation");
  if (!known.has(match)) known.set(match, await ask(path, { quiet: true }));
  if (known !== query.known) throw new DOMException("another query", "AbortError");
  const heat = known.get(match);
  draw([image, canvas], heat.match, heat.inset);
  if (ours) draw(ours, heat.query, heat.inset, crop);
}

// Explains what is in the window, one after the other, so that searches get through.
async function explain() {
  const { id, known } = query;
  if (running || !on() || !id) return;
  running = true;
  try {
    let node;
    while (on() && (node = visible().find((one) => !one.querySelector("canvas")))) {
      const canvas = element("canvas", {});
      node.querySelector(".tile").append(canvas);
      const ours = node.place === 0 && $("frame").children;
      await between(node.item.id, [node.querySelector("img"), canvas], ours);
    }
  } catch (error) {
    if (error.name !== "AbortError") $("heat").checked = false;
    complain(error);
  } finally {
    running = false;
    if (known !== query.known) explain();
  }
}

// Draws a grid, which lies in the middle of an image, or of the part that was searched by.
async function draw([image, canvas], grid, inset, crop) {
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
