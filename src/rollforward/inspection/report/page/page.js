"use strict";
// What all views share: elements, words, numbers. Text of a run only ever becomes text nodes.

/** What was unpacked: {runs, parts, texts, ...}; a part is named `0/curves`, by the number of its run. */
let page;

function part(run, name) {
  return page.parts[`${run}/${name}`];
}

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** The words for a key in the page's language; {0}, {1}, ... stand for the values. */
function say(key, ...values) {
  const words = page.texts[key] ?? key;
  return words.replace(/\{(\d)\}/g, (_, at) => String(values[at]));
}

const MOST_ROWS = 300;

const CONTROLS = /([\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]|\p{Cs})/u;

/** Text of a run as nodes: what would act on the reader's screen is shown by its number; `found` is marked. */
function shown(text, found = "") {
  return text.split(new RegExp(CONTROLS, "gu")).map((piece, at) => {
    if (at % 2 === 0) return found ? marked(piece, found) : piece;
    const code = piece.codePointAt(0);
    const number = code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16)}`;
    return el("span", { class: "control" }, number);
  });
}

function marked(text, found) {
  const nodes = [];
  const low = text.toLowerCase();
  let from = 0;
  for (let at = low.indexOf(found); at >= 0; at = low.indexOf(found, from)) {
    nodes.push(text.slice(from, at), el("mark", {}, text.slice(at, at + found.length)));
    from = at + found.length;
  }
  return [...nodes, text.slice(from)];
}

function figure(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString(page.language);
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 120) return `${Number(seconds.toFixed(seconds < 10 ? 2 : 1))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 120) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function bytes(count) {
  for (const unit of ["B", "kB", "MB"]) {
    if (count < 1000) return unit === "B" ? `${count} B` : `${count.toFixed(1)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(2)} GB`;
}

/** A time of the run's machine, as the verbs write it: UTC. */
function moment(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ");
}

/** A table; of a long one the last rows, until all are asked for. */
function table(heads, rows, kinds = []) {
  // On a phone a row is a list, and each cell says what it is.
  const cell = (value, at) => el("td", { class: kinds[at] ?? "plain", "data-head": heads[at] }, value);
  const line = (row) => el("tr", {}, row.map(cell));
  const body = el("tbody", {}, rows.slice(-MOST_ROWS).map(line));
  const earlier = rows.length - MOST_ROWS;
  const more = el("button", { type: "button" }, say("earlier_rows", earlier));
  more.onclick = () => {
    body.replaceChildren(...rows.map(line));
    more.remove();
  };
  return el("div", { class: "scroll", tabindex: 0, role: "group" }, earlier > 0 ? more : null,
    el("table", {}, el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))), body));
}

function choice(label, options, value, change) {
  const select = el("select", { onchange: () => change(select.value) });
  fill(select, options, value);
  return [el("label", {}, label, select), select];
}

function fill(select, options, value) {
  select.replaceChildren(...options.map(([name, words]) => el("option", { value: name }, words)));
  select.value = value;
}

/** For views of one run at a time: which; null when there is only one run. */
function runChoice(change) {
  if (page.runs.length < 2) return null;
  const runs = page.runs.map((run, at) => [String(at), run.name]);
  return choice(say("run"), runs, "0", (value) => change(Number(value)))[0];
}

function failed(value) {
  return el("p", { class: "bad finding" }, say("unreadable"), " ", shown(value.error));
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function palette(at) {
  return colour(`c${at % 7}`);
}

/** Words for Plotly, which takes some tags in texts. */
function harmless(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function layout(more) {
  const axis = { gridcolor: colour("grid"), zerolinecolor: colour("line"), linecolor: colour("line") };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { color: colour("text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: {
      bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") }, namelength: -1,
    },
    ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}

const PLOTTING = { displayModeBar: false, responsive: true, doubleClick: "reset" };

async function unpack(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
