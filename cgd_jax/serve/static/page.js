// The page: what it shows follows from its address, ?id=...&crop=...&label=....

const PAGE = 40; // images a request
const $ = (id) => document.getElementById(id);
const root = document.documentElement;

let about = { explains: false, max_bytes: Infinity };
let shown = {}; // the query whose results are shown: id, crop, label
let offset = 0;
let latest = null; // the AbortController of the request that counts

const read = () => Object.fromEntries(new URLSearchParams(location.search));

function address(query) {
  const given = Object.entries(query).filter(([, value]) => value);
  const text = new URLSearchParams(given).toString();
  return text ? `/?${text}` : "/";
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response.json();
  const text = await response.text();
  let detail = text || response.statusText;
  try {
    const parsed = JSON.parse(text).detail;
    detail = typeof parsed === "string" ? parsed : parsed.map((e) => e.msg).join(" ");
  } catch { /* plain text */ }
  throw new Error(detail);
}

function complain(error) {
  if (error.name === "AbortError") return;
  $("error").textContent = error.message;
  $("error").hidden = false;
}

// Goes to a query, as if its link had been followed.
function go(query, answer) {
  history.pushState(null, "", address(query));
  return show(query, answer);
}

// Shows a query, and what it found, which is asked for unless it is known.
async function show(query, answer) {
  latest?.abort();
  root.classList.remove("busy");
  root.classList.toggle("asked", Boolean(query.id));
  $("error").hidden = true;
  $("query").hidden = $("found").hidden = !query.id;
  $("label").value = query.label || "";
  if (query.id !== shown.id) {
    $("image").removeAttribute("src");
    if (query.id) $("image").src = `/image/${encodeURIComponent(query.id)}?size=large`;
  }
  shown = query;
  drawBox(parseCrop(query.crop));
  clearCanvas($("queryheat"));
  scrollTo({ top: 0 });
  if (!query.id) $("results").replaceChildren();
  else if (answer) present(answer, 0);
  else await search(0);
}

// Sends a request that replaces the one under way; undefined if it fails or is replaced.
async function latestOf(path, options) {
  latest?.abort();
  const mine = (latest = new AbortController());
  root.classList.add("busy");
  $("error").hidden = true;
  try {
    return await ask(path, { method: "POST", signal: mine.signal, ...options });
  } catch (error) {
    complain(error);
  } finally {
    if (latest === mine) root.classList.remove("busy");
  }
}

function searchPath(query, from) {
  const given = Object.entries({ ...query, k: PAGE, offset: from }).filter(([, value]) => value);
  return `/search?${new URLSearchParams(given)}`;
}

async function search(from) {
  const query = shown;
  $("more").hidden = true;
  const answer = await latestOf(searchPath(query, from));
  if (query !== shown) return;
  if (answer) present(answer, from);
  else if (from) $("more").hidden = false;
  else $("results").replaceChildren(), ($("status").textContent = "");
}

function present(answer, from) {
  const tiles = answer.hits.map(tile);
  if (from) $("results").append(...tiles);
  else {
    $("results").replaceChildren(...tiles);
    const noun = answer.searched === 1 ? "image" : "images";
    const how = answer.exact ? "exact" : "approximate";
    const count = answer.searched.toLocaleString("en");
    const time = Math.max(Math.round(answer.milliseconds), 1);
    $("status").textContent = `${count} ${noun} searched in ${time}\u00a0ms, ${how}`;
  }
  offset = from + answer.hits.length;
  $("more").hidden = !answer.more;
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function tile(hit) {
  const label = hit.label ?? "";
  const alike = hit.similarity.toFixed(3);
  const link = element(
    "a",
    { href: address({ id: hit.id, label: shown.label }), title: label, draggable: false },
    element(
      "div",
      { className: "tile" },
      element("img", {
        src: `/image/${encodeURIComponent(hit.id)}`,
        alt: label || "image without a label",
        loading: "lazy",
        decoding: "async",
      }),
    ),
    element(
      "div",
      { className: "caption" },
      element("span", { className: "what", textContent: label }),
      element("span", { className: "alike", textContent: alike, title: "cosine similarity" }),
    ),
  );
  if (hit.path) link.append(element("div", { className: "path", textContent: `\u200e${hit.path}` }));
  link.dataset.id = hit.id;
  link.addEventListener("click", (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
    event.preventDefault();
    go({ id: hit.id, label: shown.label });
  });
  for (const kind of ["mouseenter", "focus"]) {
    link.addEventListener(kind, () => $("heat").checked && link.heat && drawQueryHeat(link.heat));
  }
  const item = element("li", {}, link);
  visible.observe(item);
  return item;
}

// Uploads.

async function upload(file) {
  if (!file) return;
  if (file.size > about.max_bytes) {
    complain(new Error(`The file is larger than ${about.max_bytes / 1e6} MB.`));
    return;
  }
  const label = $("label").value.trim();
  const headers = { "Content-Type": "application/octet-stream" };
  const answer = await latestOf(searchPath({ label }, 0), { body: file, headers });
  $("file").value = "";
  if (answer) go({ id: answer.query, label }, answer);
}

$("file").addEventListener("change", () => upload($("file").files[0]));
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  upload(file);
});
let inside = 0;
const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => {
  if (carriesFile(event) && ++inside) root.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (carriesFile(event) && --inside <= 0) (inside = 0), root.classList.remove("dragging");
});
addEventListener("dragover", (event) => carriesFile(event) && event.preventDefault());
addEventListener("drop", (event) => {
  inside = 0;
  root.classList.remove("dragging");
  if (!carriesFile(event)) return;
  event.preventDefault();
  upload(event.dataTransfer.files[0]);
});

// A part of the query: a box in fractions of the image.

let box = null;

function parseCrop(text) {
  const [x, y, w, h] = (text || "").split(",").map(Number);
  return w > 0 && h > 0 ? { x, y, w, h } : null;
}

const cropText = ({ x, y, w, h }) => [x, y, w, h].map((v) => +v.toFixed(4)).join(",");

// Where the image lies in its frame, in CSS pixels.
function area() {
  const { width, height } = $("frame").getBoundingClientRect();
  const { naturalWidth: w = 0, naturalHeight: h = 0 } = $("image");
  if (!w || !h) return { left: 0, top: 0, width, height };
  const scale = Math.min(width / w, height / h);
  return {
    left: (width - w * scale) / 2,
    top: (height - h * scale) / 2,
    width: w * scale,
    height: h * scale,
  };
}

function drawBox(wanted) {
  box = wanted;
  $("box").hidden = !box;
  $("whole").disabled = !box;
  if (!box) return;
  const inner = area();
  Object.assign($("box").style, {
    left: `${inner.left + box.x * inner.width}px`,
    top: `${inner.top + box.y * inner.height}px`,
    width: `${box.w * inner.width}px`,
    height: `${box.h * inner.height}px`,
  });
}

const clamp = (value) => Math.min(Math.max(value, 0), 1);
let start = null;

function pointAt(event) {
  const frame = $("frame").getBoundingClientRect();
  const inner = area();
  return {
    x: clamp((event.clientX - frame.left - inner.left) / inner.width),
    y: clamp((event.clientY - frame.top - inner.top) / inner.height),
  };
}

$("frame").addEventListener("pointerdown", (event) => {
  if (event.button) return;
  start = pointAt(event);
  try {
    $("frame").setPointerCapture(event.pointerId);
  } catch { /* the pointer has left already */ }
});
$("frame").addEventListener("pointermove", (event) => {
  if (!start) return;
  const end = pointAt(event);
  drawBox({
    x: Math.min(start.x, end.x),
    y: Math.min(start.y, end.y),
    w: Math.abs(end.x - start.x),
    h: Math.abs(end.y - start.y),
  });
});
$("frame").addEventListener("pointerup", () => {
  if (!start) return;
  start = null;
  const inner = area();
  if (box && box.w * inner.width > 8 && box.h * inner.height > 8) searchBox();
  else drawBox(parseCrop(shown.crop)); // a click, not a drag
});
$("frame").addEventListener("pointercancel", () => {
  start = null;
  drawBox(parseCrop(shown.crop));
});
$("frame").addEventListener("keydown", (event) => {
  const step = 0.04;
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.key === "Enter") {
    if (box && cropText(box) !== shown.crop) searchBox();
    else if (!box) drawBox({ x: 0.25, y: 0.25, w: 0.5, h: 0.5 });
    $("hint").textContent = "Arrows move, Shift and arrows resize, Enter searches, Esc cancels.";
  } else if (event.key === "Escape") {
    drawBox(parseCrop(shown.crop));
  } else if (move && box) {
    const [dx, dy] = move.map((one) => one * step);
    if (event.shiftKey) {
      const w = Math.min(Math.max(box.w + dx, step), 1 - box.x);
      drawBox({ ...box, w, h: Math.min(Math.max(box.h + dy, step), 1 - box.y) });
    } else {
      const x = Math.min(Math.max(box.x + dx, 0), 1 - box.w);
      drawBox({ ...box, x, y: Math.min(Math.max(box.y + dy, 0), 1 - box.h) });
    }
  } else return;
  event.preventDefault();
});

const searchBox = () => go({ ...shown, crop: cropText(box) });
$("whole").addEventListener("click", () => go({ ...shown, crop: undefined }));
$("image").addEventListener("load", () => {
  const { naturalWidth: width, naturalHeight: height } = $("image");
  $("frame").style.setProperty("--shape", width / height);
  drawBox(box);
});
$("image").addEventListener("error", () => $("image").removeAttribute("src"));
addEventListener("resize", () => drawBox(box));

// Why two images are alike: what adds nothing to their similarity is darkened.

const visible = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.inView = entry.isIntersecting;
  explainVisible();
});
let explaining = false;

async function explainVisible() {
  if (explaining || !$("heat").checked) return;
  explaining = true; // one at a time, so that searches get through
  try {
    for (;;) {
      const query = shown;
      const item = [...$("results").children].find((one) => one.inView && !one.firstChild.heat);
      if (!item || !$("heat").checked) break;
      const link = item.firstChild;
      const given = { query: query.id, match: link.dataset.id };
      if (query.crop) given.crop = query.crop;
      const heat = await ask(`/explanation?${new URLSearchParams(given)}`);
      if (query !== shown) continue;
      link.heat = heat;
      const image = link.querySelector("img");
      const canvas = element("canvas", {});
      await image.decode().catch(() => {});
      drawHeat(canvas, image, heat.match, heat.inset);
      link.querySelector(".tile").append(canvas);
      if (item === $("results").firstChild) drawQueryHeat(heat);
    }
  } catch (error) {
    $("heat").checked = false;
    complain(error);
  } finally {
    explaining = false;
  }
}

const clearCanvas = (canvas) => canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);

function drawQueryHeat(heat) {
  drawHeat($("queryheat"), $("image"), heat.query, heat.inset, box);
}

function drawHeat(canvas, image, grid, inset, part) {
  const most = Math.max(...grid.flat(), 1e-9);
  const rows = grid.length;
  const columns = grid[0].length;
  const dark = new ImageData(columns, rows);
  grid.flat().forEach((value, i) => {
    dark.data[4 * i + 3] = Math.round(170 * (1 - Math.sqrt(clamp(value / most))));
  });
  const small = element("canvas", { width: columns, height: rows });
  small.getContext("2d").putImageData(dark, 0, 0);
  canvas.width = image.naturalWidth || 1;
  canvas.height = image.naturalHeight || 1;
  const { x, y, w, h } = part || { x: 0, y: 0, w: 1, h: 1 };
  const margin = (1 - inset) / 2;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(
    small,
    canvas.width * (x + margin * w),
    canvas.height * (y + margin * h),
    canvas.width * w * inset,
    canvas.height * h * inset,
  );
}

$("heat").addEventListener("change", () => {
  if ($("heat").checked) return explainVisible();
  clearCanvas($("queryheat"));
  for (const link of $("results").querySelectorAll("a")) {
    link.heat = undefined;
    link.querySelector("canvas")?.remove();
  }
});

// The rest.

$("label").addEventListener("change", () => {
  const label = $("label").value.trim();
  if (shown.id && label !== (shown.label || "")) go({ ...shown, label });
});
$("link").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    $("link").textContent = "Copied";
  } catch { // only secure origins may write to the clipboard
    prompt("The link to this search:", location.href);
  }
  setTimeout(() => ($("link").textContent = "Copy link"), 1500);
});
const more = () => $("more").hidden || root.classList.contains("busy") || search(offset);
$("more").addEventListener("click", more);
new IntersectionObserver(([entry]) => entry.isIntersecting && more(), { rootMargin: "600px" }).observe(
  $("more"),
);
addEventListener("popstate", () => show(read()));

async function begin() {
  show(read());
  try {
    about = await ask("/about");
    $("size").textContent = `${about.images.toLocaleString("en")} images`;
    const labels = Object.entries(about.labels);
    $("filter").hidden = !labels.length;
    $("labels").append(...labels.map(([value, count]) => element("option", { value, label: `${value} (${count})` })));
    $("why").hidden = !about.explains;
  } catch (error) {
    complain(error);
  }
}

begin();
