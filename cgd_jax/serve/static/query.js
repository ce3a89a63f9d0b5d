// The query: images that are brought, one or several of them, and the parts that are searched by.

import { $, FILTERS, about, address, asking, ask, calm, clamp, complain, element, go, imageOf, pick, read, root } from "./core.js";

export const MOST = 8; // images of a query
const HINT = matchMedia("(pointer: coarse)").matches
  ? "Drag the corners, or the part."
  : "Arrows move, Shift and arrows resize, Enter searches, Esc cancels.";
const PAGE = 100;
let ids = [];
let crops = [];
let active = 0; // the one that is shown large
let latest = null; // the AbortController of the search that counts

export const example = () => ({ id: ids[active], crop: crops[active] });
export const searchPath = (wanted, offset = 0) => address({ ...asking(wanted), k: PAGE, offset }, "/search");

// Sends a search that replaces the one under way.
export function search(wanted, offset, body) {
  if (!offset) latest?.abort();
  const mine = offset ? undefined : (latest = new AbortController()).signal;
  return ask(searchPath(wanted, offset), { method: "POST", body, signal: mine, quiet: offset > 0 });
}

export const stop = () => latest?.abort();

// Shows the images of a query.
export function present(wanted) {
  const before = example().id;
  ids = wanted.id?.split(",") ?? [];
  crops = (wanted.crop ?? "").split(";");
  if (active >= ids.length || ids[active] !== before) active = Math.max(ids.length - 1, 0);
  $("query").hidden = $("add").hidden = !ids.length;
  $("add").hidden ||= ids.length >= MOST;
  $("examples").hidden = ids.length < 2;
  $("examples").replaceChildren(...ids.map(thumbnail));
  $("hint").textContent = ids.length > 1 ? "Searched by the mean of these." : "";
  crop(false);
  if (!ids.length || example().id !== before) $("image").removeAttribute("src");
  if (ids.length && !$("image").src) $("image").src = imageOf(ids[active], "large");
  drawBox(parse(crops[active]));
}

function thumbnail(id, i) {
  const choose = element("button", { type: "button", ariaLabel: `Image ${i + 1} of the query`, ariaPressed: i === active },
    element("img", { src: imageOf(id), alt: "" }));
  choose.onclick = () => {
    active = i;
    present(read());
    $("examples").children[i].firstChild.focus();
  };
  const remove = element("button", { type: "button", className: "remove", textContent: "✕", ariaLabel: `Remove image ${i + 1}` });
  remove.onclick = () => change(ids.toSpliced(i, 1), crops.toSpliced(i, 1));
  return element("li", {}, choose, remove);
}

function change(newIds, newCrops) {
  const crop = newIds.map((_, i) => newCrops[i] ?? "").join(";").replace(/;+$/, "");
  return go({ ...read(), id: newIds.join(","), crop, view: "" });
}

// Adds images of the index to the query, or makes it of them.
export function add(...more) {
  const all = [...new Set([...ids, ...more])];
  if (all.length > MOST) return complain(`A query has ${MOST} images at most.`);
  return change(all, crops);
}

// Uploads. Of several files each is an example.

async function upload(files, joined = false) {
  const before = joined ? read() : pick(read(), FILTERS);
  calm();
  if (!files.length) return;
  const large = files.find((file) => file.size > about.max_bytes);
  if (large) return complain(`${large.name} is larger than ${about.max_bytes / 1e6} MB.`);
  if (files.length + (joined ? ids.length : 0) > MOST) return complain(`A query has ${MOST} images at most.`);
  if (!joined) {
    root.classList.add("asked");
    $("query").hidden = false;
    $("image").src = URL.createObjectURL(files[0]); // long before the server has it
    drawBox(null);
  }
  try {
    let wanted = before;
    let answer;
    for (const file of files) {
      answer = await search(wanted, 0, file);
      wanted = { ...wanted, id: answer.query };
    }
    await go({ ...wanted, view: "" }, { answer });
  } catch (error) {
    present(read());
    root.classList.toggle("asked", ids.length > 0);
    complain(error);
  } finally {
    $("file").value = $("another").value = "";
  }
}

// Takes an address if it is that of an image of this page; others are not fetched.
function take(text) {
  let found;
  try {
    found = new URL(text.trim().split("\n")[0]);
  } catch {
    return complain("That is no image. Paste or drop an image, or its file.");
  }
  const id = found.searchParams.get("id") ?? found.pathname.match(/^\/(?:image|original)\/([\w-]+)$/)?.[1];
  if (found.origin === location.origin && id) return add(...id.split(","));
  complain("Addresses are not fetched: save the image and drop its file, or copy the image itself.");
}

$("file").addEventListener("change", () => upload([...$("file").files]));
$("another").addEventListener("change", () => upload([...$("another").files], true));
addEventListener("paste", (event) => {
  if (event.target.closest?.("input, select")) return;
  const files = [...event.clipboardData.files];
  const text = event.clipboardData.getData("text");
  event.preventDefault();
  if (files.length) upload(files);
  else if (text) take(text);
});
const carries = (event) => ["Files", "text/uri-list"].some((kind) => event.dataTransfer?.types.includes(kind));
let inside = 0;
addEventListener("dragenter", (event) => {
  if (carries(event) && ++inside) root.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (carries(event) && --inside <= 0) (inside = 0), root.classList.remove("dragging");
});
addEventListener("dragover", (event) => carries(event) && event.preventDefault());
addEventListener("drop", (event) => {
  inside = 0;
  root.classList.remove("dragging");
  if (!carries(event)) return;
  event.preventDefault();
  const files = [...event.dataTransfer.files];
  const link = event.dataTransfer.getData("text/uri-list");
  if (files.length && !link.startsWith(location.origin)) upload(files, $("add").contains(event.target));
  else take(link);
});

// A part of the image: a box in fractions of it. A mouse drags one at once; fingers scroll, unless
// a part is being selected.

let box = null;
let cropping = false;
let drag = null; // what the pointer does: from where, and the box before

function parse(text) {
  const [x, y, w, h] = (text || "").split(",").map(Number);
  return w > 0 && h > 0 ? { x, y, w, h } : null;
}

const write = ({ x, y, w, h }) => [x, y, w, h].map((v) => +v.toFixed(4)).join(",");

// Where the image lies in its frame, in CSS pixels.
function area() {
  const { width, height } = $("frame").getBoundingClientRect();
  const { naturalWidth: w = 0, naturalHeight: h = 0 } = $("image");
  if (!w || !h) return { left: 0, top: 0, width, height };
  const scale = Math.min(width / w, height / h);
  return { left: (width - w * scale) / 2, top: (height - h * scale) / 2, width: w * scale, height: h * scale };
}

function drawBox(wanted) {
  box = wanted;
  $("box").hidden = !box;
  $("whole").hidden = !cropping && !crops[active];
  if (!box) return;
  const inner = area();
  $("box").style.left = `${inner.left + box.x * inner.width}px`;
  $("box").style.top = `${inner.top + box.y * inner.height}px`;
  $("box").style.width = `${box.w * inner.width}px`;
  $("box").style.height = `${box.h * inner.height}px`;
}

// Begins or ends the mode in which a part is selected.
function crop(begun) {
  cropping = begun;
  root.classList.toggle("cropping", begun);
  $("part").textContent = begun ? "Search this part" : "Select a part";
  $("whole").textContent = begun ? "Cancel" : "Whole image";
  if (begun) $("hint").textContent = HINT;
  drawBox(begun ? box ?? { x: 0.25, y: 0.25, w: 0.5, h: 0.5 } : parse(crops[active]));
}

const searchBox = () => change(ids, ids.map((_, i) => (i === active ? write(box) : crops[i])));

function pointAt(event) {
  const frame = $("frame").getBoundingClientRect();
  const inner = area();
  const x = clamp((event.clientX - frame.left - inner.left) / inner.width);
  return { x, y: clamp((event.clientY - frame.top - inner.top) / inner.height) };
}

$("frame").addEventListener("pointerdown", (event) => {
  if (event.button || (event.pointerType === "touch" && !cropping)) return;
  const at = pointAt(event);
  const corner = [...$("box").children].indexOf(event.target);
  const moves = cropping && event.target === $("box");
  const opposite = corner >= 0 && { x: box.x + (corner % 2 ? 0 : box.w), y: box.y + (corner > 1 ? 0 : box.h) };
  drag = { from: opposite || at, before: moves ? box : null };
  $("frame").setPointerCapture(event.pointerId);
});
$("frame").addEventListener("pointermove", (event) => {
  if (!drag) return;
  const { from, before } = drag;
  const to = pointAt(event);
  if (before) {
    const x = clamp(before.x + to.x - from.x, 0, 1 - before.w);
    return drawBox({ ...before, x, y: clamp(before.y + to.y - from.y, 0, 1 - before.h) });
  }
  const [x, y] = [Math.min(from.x, to.x), Math.min(from.y, to.y)];
  drawBox({ x, y, w: Math.abs(to.x - from.x), h: Math.abs(to.y - from.y) });
});
$("frame").addEventListener("pointerup", () => {
  if (!drag) return;
  drag = null;
  const inner = area();
  const large = box && box.w * inner.width > 8 && box.h * inner.height > 8;
  if (!large) drawBox(parse(crops[active])); // a click, not a drag
  else if (!cropping) searchBox();
});
$("frame").addEventListener("pointercancel", () => {
  drag = null;
  drawBox(parse(crops[active]));
});
$("frame").addEventListener("keydown", (event) => {
  const step = 0.04;
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.key === "Enter") cropping ? searchBox() : crop(true);
  else if (event.key === "Escape" && cropping) crop(false);
  else if (move && cropping) {
    const [dx, dy] = move.map((one) => one * step);
    const resized = { w: clamp(box.w + dx, step, 1 - box.x), h: clamp(box.h + dy, step, 1 - box.y) };
    const moved = { x: clamp(box.x + dx, 0, 1 - box.w), y: clamp(box.y + dy, 0, 1 - box.h) };
    drawBox({ ...box, ...(event.shiftKey ? resized : moved) });
  } else return;
  event.preventDefault();
});
$("part").addEventListener("click", () => (cropping ? searchBox() : crop(true)));
$("whole").addEventListener("click", () => cropping ? crop(false) : change(ids, ids.map((_, i) => (i === active ? "" : crops[i]))));
$("image").addEventListener("load", () => {
  $("frame").style.setProperty("--shape", $("image").naturalWidth / $("image").naturalHeight);
  drawBox(box);
});
$("image").addEventListener("error", () => $("image").removeAttribute("src"));
new ResizeObserver(() => drawBox(box)).observe($("frame"));
