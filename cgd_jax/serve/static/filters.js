// The filters: a form that is always as the address.

import { $, about, count, element, follow, go, pick, read, FILTERS } from "./core.js";

const form = $("filters");
const NAMES = [...FILTERS, "similarity", "others"];

export const active = (wanted) => Object.keys(pick(wanted, NAMES));

export function present(wanted) {
  for (const field of form.elements) {
    if (field.type === "checkbox") field.checked = wanted[field.name] === field.value;
    else if (field.name && document.activeElement !== field) field.value = wanted[field.name] ?? "";
  }
  for (const field of form.querySelectorAll(".asking")) field.hidden = !wanted.id;
  const some = active(wanted).filter((name) => name !== "folder").length; // which is shown beside
  $("filter").textContent = some ? `Filters (${some})` : "Filters";
  $("clear").disabled = !some;
}

export function open(shown) {
  form.hidden = !shown;
  $("filter").ariaExpanded = shown;
}

export const clear = () => go({ ...read(), ...Object.fromEntries(NAMES.map((name) => [name, ""])) });

export function labels() {
  const known = Object.entries(about.labels);
  $("labels").replaceChildren(...known.map(([value, images]) => element("option", { value, label: count(images, "image") })));
}

// The folders above the one that is shown, and those in it.
export function folders(wanted, inside) {
  const parts = wanted.folder ? wanted.folder.split("/") : [];
  const to = (folder, text, ...more) => {
    const link = element("a", { textContent: text }, ...more);
    follow(link, { ...wanted, folder, view: "" });
    return link;
  };
  const trail = parts.map((part, i) => to(parts.slice(0, i + 1).join("/"), part));
  if (trail.length) trail.at(-1).ariaCurrent = "page";
  const above = element("p", { className: "trail" }, to("", "All"), ...trail.flatMap((link) => [" › ", link]));
  const below = Object.entries(inside ?? {}).map(([name, images]) =>
    element("li", {}, to([...parts, name].join("/"), name, " ", element("span", { textContent: images.toLocaleString("en") }))));
  $("folders").hidden = !parts.length && !below.length;
  $("folders").replaceChildren(...(parts.length ? [above] : []), ...(below.length ? [element("ul", {}, ...below)] : []));
}

form.addEventListener("change", () => {
  if (!form.reportValidity()) return;
  const values = Object.fromEntries(new FormData(form));
  go({ ...read(), others: "", ...values, label: values.label.trim(), view: "" });
});
form.addEventListener("submit", (event) => event.preventDefault());
$("clear").addEventListener("click", clear);
$("filter").addEventListener("click", () => open(form.hidden));
