// What all parts of the page share: its address, requests, and what is said.

export const $ = (id) => document.getElementById(id);
export const root = document.documentElement;
export const about = { labels: {}, explains: false, files: false, max_bytes: Infinity };
export const number = (value) => value.toLocaleString("en");
export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
export const clamp = (value, low = 0, high = 1) => Math.min(Math.max(value, low), high);
export const imageOf = (id, size) => `/image/${encodeURIComponent(id)}${size ? `?size=${size}` : ""}`;

export function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// The address: all that is shown follows from it.

export const FILTERS = ["folder", "label", "after", "before", "pixels", "orientation"];
const ASKING = ["id", "crop", "others", "similarity", ...FILTERS]; // what the server is asked
export const read = () => Object.fromEntries(new URLSearchParams(location.search));
export const pick = (wanted, names) =>
  Object.fromEntries(names.filter((name) => wanted[name]).map((name) => [name, wanted[name]]));
export const asking = (wanted) => pick(wanted, ASKING);

export function address(wanted, path = "/") {
  const text = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value)).toString();
  return text ? `${path}?${text}` : path;
}

let show;
export const whenGone = (listener) => (show = listener);
export const key = () => history.state?.key;

// Goes to what is wanted, as if its link had been followed.
export function go(wanted, { replace = false, answer, pushed } = {}) {
  show.leaving();
  const state = { key: replace ? key() : crypto.getRandomValues(new Uint32Array(2)).join("-"), pushed };
  history[replace ? "replaceState" : "pushState"](state, "", address(wanted));
  return show(answer);
}

export function follow(link, wanted) {
  link.href = address(wanted);
  link.onclick = (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
    event.preventDefault();
    go(wanted);
  };
}

// Requests. Those that somebody waits for show that they are under way, from the beginning.

let waiting = 0;

function wait(change) {
  waiting += change;
  $("progress").hidden = !waiting;
  root.classList.toggle("busy", waiting > 0);
  if (!waiting) $("progress").removeAttribute("value");
}

export async function ask(path, { method = "GET", body = null, signal, quiet = false } = {}) {
  if (!quiet) wait(1);
  try {
    return await send(path, method, body, signal);
  } finally {
    if (!quiet) wait(-1);
  }
}

function send(path, method, body, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not say how far an upload is
    request.open(method, path);
    if (body) request.setRequestHeader("Content-Type", "application/octet-stream");
    if (body) request.upload.onprogress = (event) => ($("progress").value = event.loaded / event.total);
    request.upload.onload = () => $("progress").removeAttribute("value");
    request.onload = () => {
      let answer = request.responseText;
      try {
        answer = JSON.parse(answer);
      } catch { /* plain text */ }
      if (request.status < 300) return resolve(answer);
      const detail = answer?.detail ?? (answer || request.statusText);
      reject(new Error(typeof detail === "string" ? detail : detail.map((one) => one.msg).join(" ")));
    };
    request.onerror = () => reject(new Error("The server does not answer. Is it still running?"));
    request.onabort = () => reject(new DOMException("replaced", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

export function complain(error) {
  if (error.name === "AbortError") return;
  $("error").textContent = error.message ?? error;
  $("error").hidden = false;
}

export function calm() {
  $("error").hidden = true;
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
