// What is chosen: controls, named as what they set in the address, and a trail of folders.

import { $, FILTERS, about, address, count, element, go, number, pick, read } from "./core.js";

const NAMES = [...FILTERS, "similarity", "others"];
const controls = document.querySelectorAll("input[name], select[name]");
const active = (wanted) => NAMES.filter((name) => wanted[name] && name !== "folder"); // it is shown beside
const without = (wanted) => address({ ...wanted, ...pick({}, NAMES) });

export function present(wanted) {
  for (const control of controls) {
    if (control.type === "checkbox") control.checked = wanted[control.name] === control.value;
    else if (document.activeElement !== control) control.value = wanted[control.name] ?? "";
  }
  const some = active(wanted).length;
  $("filter").textContent = some ? `Filters (${some})` : "Filters";
  $("clear").href = without(wanted);
  $("clear").hidden = !some;
}

// Says why there is nothing, and links to what there would be.
export function nothing(wanted) {
  if (!wanted.folder && !active(wanted).length) return ["The index has no images yet."];
  return ["No image fits these filters. ", element("a", { href: without(wanted), textContent: "Clear the filters" })];
}

export function labels() {
  const known = Object.entries(about.labels);
  const options = known.map(([value, images]) => element("option", { value, label: count(images, "image") }));
  $("labels").replaceChildren(...options);
}

// The folders above the one that is shown, and those in it.
export function folders(wanted, inside = {}) {
  const parts = wanted.folder?.split("/") ?? [];
  const to = (folder, ...content) =>
    element("a", { href: address({ ...wanted, folder: folder.join("/"), view: "" }) }, ...content);
  const trail = parts.map((part, i) => to(parts.slice(0, i + 1), part));
  if (trail.length) trail.at(-1).ariaCurrent = "page";
  $("trail").replaceChildren(to([], "All"), ...trail.flatMap((link) => [" › ", link]));
  const below = Object.entries(inside).map(([name, images]) =>
    element("li", {}, to([...parts, name], name, " ", element("span", { textContent: number(images) }))));
  $("inside").replaceChildren(...below);
  $("trail").hidden = !parts.length;
  $("folders").hidden = !parts.length && !below.length;
}

addEventListener("change", ({ target }) => {
  if (!target.name || !target.reportValidity()) return;
  const value = target.type === "checkbox" && !target.checked ? "" : target.value.trim();
  go({ ...read(), [target.name]: value }, { replace: target.name === "why" });
});
$("filtering").open = active(read()).length > 0;
