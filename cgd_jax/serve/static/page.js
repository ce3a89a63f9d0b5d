// The page: shows what its address says, and comes back to it as it was.

import { $, FILTERS, about, address, ask, complain, copy, count, nameOf, pick, read, root } from "./core.js";
import * as duplicates from "./duplicates.js";
import * as filters from "./filters.js";
import * as grid from "./grid.js";
import * as heat from "./heat.js";
import * as query from "./query.js";
import * as view from "./view.js";

const NOTHING = { items: [], total: 0, status: [] };
const MOST = 20; // addresses that Back finds as they were
const kept = new Map(); // what was found, by address
let wanted = {};
let shown = null; // the address, but for what is only looked at
let found = null; // what is shown; nothing while it is on its way
let loading = new AbortController();

function core(url) {
  const { view, why, ...rest } = read(url);
  return address(rest);
}

async function show(answer, back) {
  wanted = read();
  complain();
  filters.present(wanted);
  if (core() !== shown) await load(answer, back);
  grid.draw();
  await look();
}

// Loads what is to be shown, but for the answer to an upload, and what Back finds as it was.
async function load(answer, back) {
  loading.abort();
  query.stop();
  const { signal } = (loading = new AbortController());
  [shown, found] = [core(), null];
  query.present(wanted);
  heat.begin(query.example());
  const kind = root.dataset.shows;
  const place = wanted.folder?.split("/").at(-1) ?? "All images";
  $("heading").textContent = { results: "Most similar", duplicates: "Near-duplicates", collection: place }[kind];
  $("near").href = address({ ...pick(wanted, FILTERS), near: wanted.near ?? "0.94" });
  $("near").ariaCurrent = kind === "duplicates" ? "page" : null;
  const from = wanted;
  const source = (offset, known) => sources[kind](from, { offset, signal, quiet: offset > 0 }, known);
  if (kind === "duplicates") $("status").textContent = "Comparing all with all…";
  try {
    found = (back && kept.get(shown)) || (await source(0, answer));
  } catch (error) {
    if (signal.aborted) return;
    shown = null;
    const stale = /no such image|no longer kept/.test(error.message);
    complain(stale ? `This link is stale. ${error.message}` : error);
  }
  if (signal.aborted) return;
  const { items, folders, status } = found ?? NOTHING;
  const itself = items.find((item) => item?.id === query.example().id);
  document.title = `${itself ? `Like ${nameOf(itself)}` : $("heading").textContent} · Image search`;
  filters.folders(wanted, folders);
  duplicates.present(found ?? NOTHING);
  grid.fill(source, found ?? NOTHING);
  $("status").replaceChildren(...status);
}

// What is found of what is wanted, from some offset on.
const sources = {
  async collection(from, { offset, ...options }) {
    const asked = { ...pick(from, [...FILTERS, "order"]), k: grid.BLOCK, offset };
    const { images, total, folders } = await ask(address(asked, "/collection"), options);
    const status = total ? [count(total, "image")] : filters.nothing(from);
    return { items: images, total, folders, status };
  },
  async results(from, options, answer) {
    const { hits, more, searched, exact, milliseconds } = answer ?? (await query.search(from, options));
    const how = `${Math.max(Math.round(milliseconds), 1)}\u00a0ms, ${exact ? "exact" : "approximate"}`;
    const status = hits.length ? [`${count(searched, "image")} searched in ${how}`] : filters.nothing(from);
    return { items: hits, total: options.offset + hits.length + (more ? grid.BLOCK : 0), status };
  },
  duplicates: duplicates.load,
};

// Opens the large view, or closes it.
async function look() {
  const { view: id } = wanted;
  if (!id) {
    const place = grid.indexOf(view.hide());
    if (place >= 0) grid.focus(place);
    return;
  }
  const all = wanted.near ? duplicates.groupOf(id) : grid.contents().items;
  const at = all.findIndex((one) => one?.id === id);
  const item = all[at] ?? (await ask(`/details/${encodeURIComponent(id)}`).catch(complain));
  if (!item || id !== wanted.view) return;
  const best = all.find((one) => one?.best && one.id !== id);
  const twin = best && { id: best.id, text: `Best copy: ${nameOf(best)}` };
  const other = wanted.id ? { id: query.example().id, text: "Query" } : twin;
  view.show(item, other, [all[at - 1]?.id, at >= 0 && all[at + 1]?.id]);
}

// Every change of the address, but for those that leave the page.
window.navigation?.addEventListener("navigate", (event) => {
  const to = new URL(event.destination.url);
  const leaves = to.pathname !== "/" || event.navigationType === "reload";
  if (!event.canIntercept || event.hashChange || leaves) return;
  if (found) {
    kept.delete(shown);
    kept.set(shown, { ...found, ...grid.contents() });
    if (kept.size > MOST) kept.delete(kept.keys().next().value);
  }
  if (to.href === location.href) shown = null; // once more
  event.intercept({
    handler: () => show(event.info, event.navigationType === "traverse"),
    focusReset: "manual",
    scroll: core(to) === shown ? "manual" : "after-transition",
  });
});

// The count is live, and an update says how far it is.
async function live() {
  try {
    const before = { ...about };
    Object.assign(about, await ask("/about", { quiet: true }));
    const { running, done, files, said } = about.update;
    root.classList.toggle("files", about.files);
    root.classList.toggle("explains", about.explains);
    if (about.images !== before.images) filters.labels();
    $("size").textContent = count(about.images, "image");
    $("update").disabled = running;
    $("update").textContent = !running ? "Update" : files ? `${done} of ${files}` : "Looking…";
    if (before.update?.running && !running) {
      kept.clear();
      shown = null;
      await show();
      $("status").textContent = said;
    }
  } catch { /* it is said when something is asked for */ }
  clearTimeout(live.next);
  live.next = setTimeout(live, about.update?.running ? 500 : document.hidden ? 60_000 : 10_000);
}

$("update").onclick = async () => {
  about.update = await ask("/update", { method: "POST" }).catch(complain);
  live();
};
$("link").onclick = () => copy(location.href, $("link"));
addEventListener("pagehide", () => window.navigation?.updateCurrentEntry({ state: scrollY }));
show().then(() => scrollTo(0, window.navigation?.currentEntry.getState() ?? 0)); // as before a reload
live();
