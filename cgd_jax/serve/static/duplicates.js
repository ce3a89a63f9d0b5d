// Images that are nearly the same: groups, of which all but the best are chosen, to be exported.

import { $, FILTERS, address, ask, count, element, imageOf, nameOf, pick, read, stamp } from "./core.js";
import { facts } from "./view.js";

let groups = []; // of copies, which are chosen or not
const buttons = document.querySelectorAll("[data-export]");

export const groupOf = (id) => groups.find((group) => group.some((one) => one.id === id)) ?? [];

export async function load(wanted, { signal }) {
  const path = address({ ...pick(wanted, FILTERS), similarity: wanted.near }, "/duplicates");
  const { groups, total } = await ask(path, { signal });
  const more = total > groups.length ? ` The first ${groups.length} are shown.` : "";
  const status = total
    ? `${count(total, "group")} of images that are nearly the same.${more}`
    : "No two images are as similar as that.";
  groups.forEach(({ copies }, group) =>
    copies.forEach((one, i) => Object.assign(one, { group: group + 1, best: !i, chosen: i > 0 })));
  return { items: [], total: 0, status: [status], groups };
}

export function present({ groups: found = [] }) {
  groups = found.map((group) => group.copies);
  $("groups").replaceChildren(...found.map(section));
  tally();
}

function tally() {
  $("chosen").textContent = `${count(groups.flat().filter((one) => one.chosen).length, "image")} chosen`;
  for (const button of buttons) button.disabled = !groups.length;
}

function section({ size, copies }) {
  const least = Math.min(...copies.map((one) => one.similarity)).toFixed(3);
  const title = `Group ${copies[0].group}: ${count(size, "image")}, similarity from ${least}`;
  return element("section", { className: "group" },
    element("h3", { textContent: title }), element("ul", {}, ...copies.map(copyOf)));
}

function copyOf(one) {
  const node = stamp("copyof");
  const part = (name) => node.querySelector(name);
  Object.assign(part("a"), { href: address({ ...read(), view: one.id }), ariaLabel: `Look at ${nameOf(one)}` });
  part("img").src = imageOf(one.id);
  part("label").append(nameOf(one));
  part("b").hidden = !one.best;
  part("p").append([one.folder, facts(one)].filter(Boolean).join(" · "));
  part("input").checked = one.chosen;
  part("input").onchange = ({ target }) => {
    one.chosen = target.checked;
    tally();
  };
  return node;
}

// What is saved. Names may hold anything but what ends a string.

const COLUMNS = ["group", "chosen", "best", "path", "width", "height", "bytes", "date", "similarity"];
const HEAD = `#!/bin/sh
# Moves images into a folder: sh duplicates.sh FOLDER
folder="\${1:-duplicates}"
mkdir -p -- "$folder" || exit
`;
const cell = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const moved = (one, i) =>
  `mv -n -- ${quoted(one.path)} "$folder"/${quoted(`${String(i + 1).padStart(5, "0")} ${one.name}`)}\n`;

const exported = {
  csv: (all) =>
    [COLUMNS, ...all.map((one) => COLUMNS.map((column) => cell(one[column])))].map((row) => `${row.join(",")}\r\n`),
  txt: (all) => all.filter((one) => one.chosen).map((one) => `${one.path}\n`),
  sh: (all) => [HEAD, ...all.filter((one) => one.chosen).map(moved)],
};

for (const button of buttons) {
  const kind = button.dataset.export;
  button.addEventListener("click", () => {
    const href = URL.createObjectURL(new Blob(exported[kind](groups.flat())));
    element("a", { href, download: `duplicates.${kind}` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10_000);
  });
}
