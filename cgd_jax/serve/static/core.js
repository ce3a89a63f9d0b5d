// What all parts of the page share: its address, requests, and what is said.

export const $ = (id) => document.getElementById(id);
export const root = document.documentElement;
export const about = { labels: {}, explains: false, files: false, max_bytes: Infinity };
export const clamp = (value, low = 0, high = 1) => Math.min(Math.max(value, low), high);
export const number = (value) => value.toLocaleString("en");
export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
export const nameOf = (item) => item.name || item.label || item.id;
export const imageOf = (id, size = "small") => `/image/${encodeURIComponent(id)}?size=${size}`;
export const stamp = (template) => $(template).content.firstElementChild.cloneNode(true);

export function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// The address: all that is shown follows from it.

export const FILTERS = ["folder", "label", "after", "before", "pixels", "orientation"];
export const read = (url = location) => Object.fromEntries(new URL(url).searchParams);
export const pick = (wanted, names) => Object.fromEntries(names.map((name) => [name, wanted[name]]));

export function address(wanted, path = "/") {
  const text = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value));
  return text.size ? `${path}?${text}` : path;
}

// Goes to what is wanted, as by a link. Browsers without the Navigation API load the page anew.
export function go(wanted, { replace = false, info } = {}) {
  const history = replace ? "replace" : "auto";
  if (window.navigation) navigation.navigate(address(wanted), { history, info });
  else location[replace ? "replace" : "assign"](address(wanted));
}

// Requests. Those that somebody waits for show it.

let waiting = 0;
const wait = (more) => root.classList.toggle("busy", (waiting += more) > 0);

export async function ask(path, { quiet = false, ...options } = {}) {
  wait(quiet ? 0 : 1);
  try {
    const answer = await fetch(path, options);
    if (answer.ok) return await answer.json();
    const text = await answer.text();
    const { detail } = text.startsWith("{") ? JSON.parse(text) : { detail: text };
    throw new Error([detail].flat().map((one) => one.msg ?? one).join(" ")); // of every parameter
  } catch (error) {
    throw error instanceof TypeError ? new Error("The server does not answer. Is it still running?") : error;
  } finally {
    wait(quiet ? 0 : -1);
  }
}

// Says what is wrong; nothing calms. What was given up is not wrong.
export function complain(error = "") {
  if (error.name !== "AbortError") $("error").textContent = error.message ?? error;
}

// Copies a text, or shows it where the browser lets no page copy: without https, but on localhost.
export async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = before), 1500);
  } catch {
    prompt("Copy this:", text);
  }
}
