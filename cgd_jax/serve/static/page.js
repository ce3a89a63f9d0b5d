// The page: shows what its address says, and comes back to it as it was.

import { $, FILTERS, about, address, ask, calm, complain, copy, count, element, follow, go, key, pick, read, root, whenGone } from "./core.js";
import * as duplicates from "./duplicates.js";
import * as filters from "./filters.js";
import * as grid from "./grid.js";
import * as heat from "./heat.js";
import * as query from "./query.js";
import * as view from "./view.js";

const BLOCK = 100; // images of the collection that are asked for at a time
const KEPT = 20; // pages that Back finds as they were
const kept = new Map(); // by the key of the history: what the grid held
let wanted = {};
let shown = null; // the address, but for what is only looked at
let filled = null; // the address whose images the grid holds
let now = null; // the key of the history
let inside = {}; // folders

const core = ({ view, why, ...rest }) => address(rest);

function leaving() {
  if (filled !== shown) return; // it was still on its way
  kept.delete(now);
  kept.set(now, { ...grid.contents(), status: $("status").textContent, folders: inside, top: scrollY });
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  sessionStorage.setItem(`top ${now}`, scrollY);
}

async function show(answer) {
  wanted = read();
  now = key();
  calm();
  if (core(wanted) !== shown) await load(answer);
  $("heat").checked = Boolean(wanted.why) && about.explains;
  heat.on() ? heat.explain() : heat.remove();
  $("legend").hidden = !heat.on() || !wanted.id;
  look();
}

show.leaving = leaving;

async function load(answer) {
  const before = kept.get(key());
  const mine = (shown = core(wanted));
  filled = null;
  const asks = Boolean(wanted.id);
  if (root.classList.contains("asked") !== asks) scrollTo({ top: 0 }); // the grid becomes another
  root.classList.toggle("asked", asks);
  query.stop();
  query.present(wanted);
  filters.present(wanted);
  heat.begin(query.example().id, query.example().crop);
  $("groups").hidden = !wanted.near;
  $("ordering").hidden = asks || Boolean(wanted.near);
  $("update").hidden = $("ordering").hidden || !about.files;
  $("why").hidden = !asks || !about.explains;
  $("near").ariaCurrent = wanted.near ? "page" : null;
  follow($("near"), { ...pick(wanted, FILTERS), near: wanted.near ?? "0.94" });
  $("order").value = wanted.order ?? "newest";
  const place = wanted.folder?.split("/").at(-1) ?? "All images";
  $("heading").textContent = asks ? "Most similar" : wanted.near ? "Near-duplicates" : place;
  document.title = `${$("heading").textContent} · Image search`;
  const source = asks ? results(wanted) : wanted.near ? empty : collection(wanted);
  try {
    if (wanted.near) {
      grid.fill(empty, { items: [], total: 0 }, BLOCK);
      filters.folders(wanted);
      $("status").textContent = "Comparing all with all…";
      const found = await duplicates.find(wanted);
      if (mine !== shown) return;
      $("status").textContent = found;
    } else {
      const first = before ?? (await source.load(0, answer));
      if (mine !== shown) return;
      grid.fill(source, first, BLOCK);
      filters.folders(wanted, (inside = first.folders));
      $("status").textContent = first.status;
      if (!first.total) nothing();
    }
    filled = shown;
    const top = before ? before.top : answer ? 0 : sessionStorage.getItem(`top ${key()}`) ?? 0;
    scrollTo({ top });
    if (asks) name();
  } catch (error) {
    if (error.name === "AbortError" || mine !== shown) return;
    grid.fill(empty, { items: [], total: 0 }, BLOCK);
    $("status").textContent = "";
    complain(/no such image|no longer kept/.test(error.message) ? `This link is stale. ${error.message}` : error);
  }
}

function nothing() {
  const some = filters.active(wanted).length > 0;
  $("status").textContent = some ? "No image fits these filters." : "The index has no images yet.";
  if (!some) return;
  const clear = element("button", { type: "button", textContent: "Clear the filters" });
  clear.onclick = filters.clear;
  $("status").append(" ", clear);
}

// What the grid shows.

const open = (place) => {
  const item = grid.contents().items[place];
  if (item) go({ ...wanted, view: item.id }, { pushed: true });
};
const empty = { load: () => ({ items: [], total: 0 }), wanted: () => ({}), look: () => {} };

const collection = (from) => ({
  look: open,
  wanted: (item) => ({ ...pick(from, FILTERS), id: item.id }),
  async load(offset) {
    const path = address({ ...pick(from, FILTERS), order: from.order, k: BLOCK, offset }, "/collection");
    const found = await ask(path, { quiet: offset > 0 });
    return { items: found.images, total: found.total, folders: found.folders, status: count(found.total, "image") };
  },
});

const results = (from) => ({
  look: open,
  wanted: (item) => ({ ...pick(from, [...FILTERS, "others", "similarity"]), id: item.id, why: read().why }),
  async load(offset, answer) {
    const found = answer ?? (await query.search(from, offset));
    const time = Math.max(Math.round(found.milliseconds), 1);
    const how = found.exact ? "exact" : "approximate";
    const status = `${count(found.searched, "image")} searched in ${time}\u00a0ms, ${how}`;
    return { items: found.hits, total: offset + found.hits.length + (found.more ? BLOCK : 0), status };
  },
});

// Says in the title what is searched by.
async function name() {
  const { id } = query.example();
  if (id.startsWith("upload-")) return;
  const found = await ask(`/details/${encodeURIComponent(id)}`, { quiet: true }).catch(() => null);
  if (!found || id !== query.example().id || !read().id) return;
  $("image").alt = `The image searched by: ${grid.nameOf(found)}`;
  document.title = `Like ${grid.nameOf(found)} · Image search`;
}

function look() {
  if (!wanted.view) {
    const place = grid.indexOf(view.hide());
    if (place >= 0) grid.focus(place);
    return;
  }
  const id = wanted.view;
  const place = grid.indexOf(id);
  const all = wanted.near ? duplicates.groupOf(id) : grid.contents().items;
  const at = wanted.near ? all.findIndex((one) => one.id === id) : place;
  const around = { before: at > 0 ? all[at - 1]?.id : null, after: at >= 0 ? all[at + 1]?.id : null };
  const similarity = (of) => grid.contents().items.find((one) => one?.id === of)?.similarity?.toFixed(3);
  const { id: example, crop } = query.example();
  const best = wanted.near && all.find((one) => one.best && one.id !== id);
  const other = example ? { id: example, crop, text: "Query", explained: true, similarity } : best && { id: best.id, text: `Best copy: ${best.name}` };
  view.show(id, other || null, around);
}

// The rest.

$("heat").addEventListener("change", () => go({ ...read(), why: $("heat").checked ? "1" : "" }, { replace: true }));
$("order").addEventListener("change", () => go({ ...read(), order: $("order").value }));
$("link").addEventListener("click", () => copy(location.href, $("link")));
grid.whenDrawn(() => heat.explain());
for (const kind of ["mouseover", "focusin"]) {
  $("grid").addEventListener(kind, async (event) => {
    const item = event.target.closest("li")?.item;
    if (heat.on() && item) heat.drawQuery(await heat.between(item.id).catch(() => ({ query: [[0]], inset: 1 })));
  });
}
whenGone(show);
history.scrollRestoration = "manual";
addEventListener("popstate", () => {
  leaving(); // under the key of what is left
  show();
});
addEventListener("pagehide", leaving);

// The count is live, and an update says how far it is.
let updating = false;

async function live() {
  try {
    const { images, update } = await ask("/state", { quiet: true });
    $("size").textContent = count(images, "image");
    $("update").disabled = update.running;
    $("update").textContent = update.running ? (update.files ? `${update.done} of ${update.files}` : "Looking…") : "Update";
    if (updating && !update.running) {
      $("status").textContent = update.said;
      Object.assign(about, await ask("/about", { quiet: true }));
      filters.labels();
      kept.clear();
      if (!wanted.id && !wanted.near) (shown = null), await show(), ($("status").textContent = update.said);
    }
    updating = update.running;
  } catch { /* it is said when something is asked for */ }
  clearTimeout(live.next);
  live.next = setTimeout(live, updating ? 500 : document.hidden ? 60_000 : 10_000);
}

$("update").addEventListener("click", async () => {
  try {
    await ask("/update", { method: "POST" });
    updating = true;
    live();
  } catch (error) {
    complain(error);
  }
});

async function begin() {
  if (!key()) history.replaceState({ key: `${Math.random()}` }, "", location.href);
  const known = ask("/about", { quiet: true }).then((found) => Object.assign(about, found));
  if (wanted.why || read().why || read().view) await known.catch(() => {});
  filters.open(filters.active(read()).some((filter) => filter !== "folder"));
  show();
  try {
    await known;
    filters.labels();
    $("why").hidden = !wanted.id || !about.explains;
    $("update").hidden = $("ordering").hidden || !about.files;
  } catch (error) {
    complain(error);
  }
  live();
}

begin();
