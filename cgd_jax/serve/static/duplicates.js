// Images that are nearly the same: groups, of which all but the best are chosen, to be exported.

import { $, FILTERS, about, address, ask, count, element, go, imageOf, pick, read } from "./core.js";
import { nameOf } from "./grid.js";
import { facts } from "./view.js";

const PIECE = 40; // groups that are put into the document at a time
let groups = [];
let chosen = new Set(); // ids

export const groupOf = (id) => groups.find((group) => group.some((one) => one.id === id)) ?? [];

export async function find(wanted) {
  const found = await ask(address({ ...pick(wanted, FILTERS), similarity: wanted.near }, "/duplicates"));
  groups = found.groups.map((group) => Object.assign(group.copies, { size: group.size }));
  chosen = new Set(groups.flatMap((group) => group.filter((one) => !one.best).map((one) => one.id)));
  const more = found.total > groups.length ? ` The first ${groups.length} are shown.` : "";
  $("groups").replaceChildren(tools(wanted), element("div", {}));
  grow();
  if (!groups.length) return "No two images are as similar as that.";
  return `${count(found.total, "group")} of images that are nearly the same.${more}`;
}

function tools(wanted) {
  const least = element("input", { type: "number", min: 0.5, max: 1, step: 0.001, value: wanted.near });
  least.onchange = () => least.reportValidity() && go({ ...read(), near: least.value });
  const kinds = { "Save as CSV": csv, "Save paths": paths, "Save a script": script };
  const buttons = Object.entries(kinds).map(([text, write]) => {
    const button = element("button", { type: "button", textContent: text, className: "export" });
    button.onclick = () => save(...write(groups.flatMap((group, i) => group.map((one) => [i + 1, one]))));
    return button;
  });
  const hint = about.files
    ? "Nothing is deleted: the script moves what is chosen into a folder."
    : "Lists have paths where the server runs, or with --show_paths; here none can be saved.";
  const bar = element("div", { className: "tools" }, element("label", {}, "Similarity from ", least),
    element("span", { id: "chosen" }), ...(about.files ? buttons : []), element("p", { textContent: hint }));
  return bar;
}

function tally() {
  $("chosen").textContent = `${count(chosen.size, "image")} chosen`;
  for (const button of document.querySelectorAll(".export")) button.disabled = !chosen.size;
}

function grow() {
  if (!$("groups").children[1]) return;
  const place = $("groups").children[1];
  const from = place.children.length;
  place.append(...groups.slice(from, from + PIECE).map(row));
  tally();
}

function row(group, i) {
  const number = $("groups").children[1].children.length + i + 1;
  const copies = group.map((one) => {
    const box = element("input", { type: "checkbox", checked: chosen.has(one.id) });
    box.onchange = () => (chosen[box.checked ? "add" : "delete"](one.id), tally());
    const look = element("button", { type: "button", className: "picture", ariaLabel: `Look at ${nameOf(one)}` },
      element("img", { src: imageOf(one.id), alt: "", loading: "lazy" }));
    look.onclick = () => go({ ...read(), view: one.id }, { pushed: true });
    const name = element("label", {}, box, " ", nameOf(one));
    const best = one.best ? [element("b", { textContent: "Best copy" })] : [];
    const text = [one.folder, facts(one)].filter(Boolean).join(" · ");
    return element("li", {}, look, name, element("p", {}, ...best, ` ${text}`));
  });
  const least = Math.min(...group.map((one) => one.similarity)).toFixed(3);
  const title = element("h3", { textContent: `Group ${number}: ${count(group.size, "image")}, similarity from ${least}` });
  return element("section", { className: "group" }, title, element("ul", {}, ...copies));
}

// What is saved. Names may hold anything but what ends a string.

const cell = (value) => (/[",\r\n]/.test(value) ? `"${`${value}`.replaceAll('"', '""')}"` : value);
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const picked = (all) => all.filter(([, one]) => chosen.has(one.id)).map(([, one]) => one);

function csv(all) {
  const head = ["group", "chosen", "best", "path", "width", "height", "bytes", "date", "similarity"];
  const rows = all.map(([i, one]) =>
    [i, chosen.has(one.id), one.best, one.path, one.width, one.height, one.bytes, one.date, one.similarity]);
  return ["duplicates.csv", [head, ...rows].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n"];
}

const paths = (all) => ["duplicates.txt", picked(all).map((one) => `${one.path}\n`).join("")];

function script(all) {
  const moves = picked(all).map((one, i) => {
    const name = `${String(i + 1).padStart(5, "0")} ${one.name}`;
    return `mv -n -- ${quoted(one.path)} "$folder"/${quoted(name)}`;
  });
  const head = ["#!/bin/sh", "# Moves images into a folder: sh duplicates.sh FOLDER", 'folder="${1:-duplicates}"', 'mkdir -p -- "$folder" || exit'];
  return ["duplicates.sh", [...head, ...moves, ""].join("\n")];
}

function save(name, text) {
  const url = URL.createObjectURL(new Blob([text]));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

new IntersectionObserver(([entry]) => entry.isIntersecting && grow(), { rootMargin: "800px" }).observe(
  $("found").appendChild(element("div", { id: "end" })),
);
