// The query: images that are brought, one or several of them, and the parts that are searched by.

import { $, FILTERS, about, address, ask, clamp, complain, go, imageOf, pick, read, root, stamp } from "./core.js";
import { BLOCK } from "./grid.js";

const MOST = 8; // images of a query
const TOO_MANY = `A query has ${MOST} images at most.`;
const ASKED = ["id", "crop", "others", "similarity", ...FILTERS];
let ids = [];
let crops = [];
let active = -1; // the one that is shown large

export const example = () => ({ id: ids[active], crop: crops[active] });

export function search(wanted, { offset, ...options }) {
  const path = address({ ...pick(wanted, ASKED), k: BLOCK, offset }, "/search");
  return ask(path, { method: "POST", ...options });
}

// Shows the images of a query.
export function present(wanted) {
  const before = ids[active];
  const held = $("examples").contains(document.activeElement);
  ids = wanted.id?.split(",") ?? [];
  crops = ids.map((_, i) => wanted.crop?.split(";")[i] || undefined);
  active = Math.min(wanted.active ?? Infinity, ids.length - 1);
  root.dataset.shows = ids.length ? "results" : wanted.near ? "duplicates" : "collection";
  $("examples").replaceChildren(...(ids.length > 1 ? ids.map(thumbnail) : []));
  if (held) $("examples").querySelector("[aria-current]")?.focus();
  if (!ids.length) $("image").removeAttribute("src");
  else if (ids[active] !== before) $("image").src = imageOf(ids[active], "large");
  select(false);
}

function thumbnail(id, i) {
  const node = stamp("example");
  const [choose, remove] = node.children;
  choose.firstElementChild.src = imageOf(id);
  choose.ariaLabel = `Image ${i + 1} of the query`;
  choose.ariaCurrent = i === active || null;
  choose.href = address({ ...read(), active: `${i}` });
  remove.ariaLabel = `Remove image ${i + 1}`;
  remove.href = address(changed(ids.toSpliced(i, 1), crops.toSpliced(i, 1)));
  return node;
}

const changed = (newIds, newCrops, more) =>
  ({ ...read(), id: newIds.join(","), crop: newCrops.join(";").replace(/;+$/, ""), active: "", view: "", ...more });

// Adds images of the index to the query, or makes it of them.
export function add(...more) {
  const all = [...new Set([...ids, ...more])];
  if (all.length > MOST) complain(TOO_MANY);
  else go(changed(all, crops));
}

// Uploads, of which a later one replaces what is under way. Of several files each is an example.

let sending = new AbortController();
export const stop = () => sending.abort();

async function upload(files, joined = false) {
  const large = files.find((file) => file.size > about.max_bytes);
  if (large) return complain(`${large.name} is larger than ${about.max_bytes / 1e6} MB.`);
  if (files.length + (joined ? ids.length : 0) > MOST) return complain(TOO_MANY);
  complain();
  stop();
  const { signal } = (sending = new AbortController());
  let wanted = joined ? read() : pick(read(), FILTERS);
  let answer;
  if (!joined) {
    root.dataset.shows = "results";
    $("image").src = URL.createObjectURL(files[0]); // long before the server has it
  }
  try {
    for (const body of files) {
      answer = await search(wanted, { body, signal });
      wanted = { ...wanted, id: answer.query };
    }
    go({ ...wanted, active: "", view: "" }, { info: answer });
  } catch (error) {
    if (signal.aborted) return;
    ids = [];
    present(read());
    complain(error);
  }
}

// Takes an address if it is that of an image of this page; others are not fetched.
function take(text) {
  const found = URL.parse(text.trim().split("\n")[0]);
  if (!found) return complain("That is no image. Paste or drop an image, or its file.");
  const id = found.searchParams.get("id") ?? found.pathname.match(/^\/(?:image|original)\/([\w-]+)$/)?.[1];
  if (found.origin === location.origin && id) return add(...id.split(","));
  complain("Addresses are not fetched: save the image and drop its file, or copy the image itself.");
}

function bring(data, joined) {
  const link = data.getData("text/uri-list");
  const files = link.startsWith(location.origin) ? [] : [...data.files]; // of a tile, which has both
  if (files.length) upload(files, joined);
  else take(link || data.getData("text"));
}

for (const input of [$("file"), $("another")]) {
  input.addEventListener("change", () => {
    upload([...input.files], input === $("another"));
    input.value = "";
  });
}
addEventListener("paste", (event) => {
  if (event.target.closest?.("input, select")) return;
  event.preventDefault();
  bring(event.clipboardData);
});
addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.some((kind) => kind === "Files" || kind === "text/uri-list")) return;
  event.preventDefault();
  root.classList.add("dragging");
});
addEventListener("dragleave", (event) => event.relatedTarget || root.classList.remove("dragging"));
addEventListener("drop", (event) => {
  event.preventDefault();
  root.classList.remove("dragging");
  bring(event.dataTransfer, $("add").contains(event.target));
});

// A part of the image: a box in fractions of it. A mouse drags one at once; fingers scroll, unless
// a part is being selected.

const frame = $("frame");
const STEP = 0.04;
let box = null; // x, y, width, height
let selecting = false;
let drag = null; // from where the pointer is to the box

function draw(wanted) {
  box = wanted;
  $("box").hidden = !box;
  ["left", "top", "width", "height"].forEach((name, i) => ($("box").style[name] = `${100 * (box?.[i] ?? 0)}%`));
}

// Begins or ends the mode in which a part is selected.
function select(begun) {
  selecting = begun;
  root.classList.toggle("cropping", begun);
  $("whole").hidden = !crops[active];
  if ($("actions").contains(document.activeElement)) frame.focus({ preventScroll: true });
  draw(crops[active]?.split(",").map(Number) ?? (begun ? [0.25, 0.25, 0.5, 0.5] : null));
}

const searchBy = (crop) => go(changed(ids, crops.with(active, crop), { active: read().active }));
const searchBox = () => searchBy(box.map((part) => +part.toFixed(4)).join(","));
const between = (a, b) => [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.abs(a.x - b.x), Math.abs(a.y - b.y)];
const moved = ([x, y, w, h], dx, dy) => [clamp(x + dx, 0, 1 - w), clamp(y + dy, 0, 1 - h), w, h];
const resized = ([x, y, w, h], dx, dy) => [x, y, clamp(w + dx, STEP, 1 - x), clamp(h + dy, STEP, 1 - y)];

function pointAt(event) {
  const { left, top, width, height } = frame.getBoundingClientRect();
  return { x: clamp((event.clientX - left) / width), y: clamp((event.clientY - top) / height) };
}

frame.onpointerdown = (event) => {
  if (event.button || (event.pointerType === "touch" && !selecting)) return;
  const [from, before, corner] = [pointAt(event), box, [...$("box").children].indexOf(event.target)];
  const opposite = () => ({ x: before[0] + (corner % 2 ? 0 : before[2]), y: before[1] + (corner > 1 ? 0 : before[3]) });
  if (corner >= 0) drag = (to) => between(opposite(), to);
  else if (selecting && event.target === $("box")) drag = (to) => moved(before, to.x - from.x, to.y - from.y);
  else drag = (to) => between(from, to);
  frame.setPointerCapture(event.pointerId);
};
frame.onpointermove = (event) => drag && draw(drag(pointAt(event)));
frame.onlostpointercapture = () => {
  drag = null;
  const click = $("box").offsetWidth < 8 || $("box").offsetHeight < 8;
  if (click) select(selecting);
  else if (!selecting) searchBox();
};
frame.onkeydown = (event) => {
  const moves = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
  if (event.key === "Enter") selecting ? searchBox() : select(true);
  else if (event.key === "Escape" && selecting) select(false);
  else if (selecting && event.key in moves) draw((event.shiftKey ? resized : moved)(box, ...moves[event.key]));
  else return;
  event.preventDefault();
};
$("part").onclick = () => select(true);
$("whole").onclick = () => searchBy("");
$("done").onclick = searchBox;
$("cancel").onclick = () => select(false);
$("image").onload = ({ target }) => {
  frame.style.setProperty("--shape", target.naturalWidth / target.naturalHeight);
  URL.revokeObjectURL(target.src);
};
$("image").onerror = ({ target }) => target.removeAttribute("src");
