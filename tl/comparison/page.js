"use strict";
/* The table of runs: sorting, filtering, columns, choosing. What is shown and chosen goes to the
   plots as events of the document. */
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const FIRST = 50; // rows at once: a screen has room for fewer, and each costs time at every key
const CARDS = 24; // pictures at once
const table = at("table");
const body = table.tBodies[0];
const rows = [...body.rows];
const columns = new Map(data.columns.map((column) => [column.key, column]));
const texts = data.runs.map((run, i) => // what the words of a filter are looked for in
  [run.name, run.id, ...data.columns.map((c) => c.texts[i])].join("\n").toLowerCase());
const state = { order: rows.map((_, i) => i), passing: [], all: false, chosen: new Set(), sort: "" };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/* A filter as a list of tests of a run's index: every word must hold. */
function tests(filter) {
  return (filter.toLowerCase().match(/(?:"[^"]*"|\S)+/g) ?? []).map((term) => {
    const negative = term.startsWith("-") && term.length > 1;
    const plain = (negative ? term.slice(1) : term).replaceAll('"', "");
    const test = setting(plain) ?? ((i) => texts[i].includes(plain));
    return negative ? (i) => !test(i) : test;
  });
}

/* `setting=word`, `setting<number`, `setting>number`, where a column has a name like that. */
function setting(term) {
  const [, name, sign, wanted] = /^([^=<>]+)([=<>])(.+)$/.exec(term) ?? [];
  const named = (test) => data.columns.find((c) => test(c.label.toLowerCase()));
  const column = name && (named((l) => l === name) ?? named((l) => l.split(".").at(-1) === name)
    ?? named((l) => l.includes(name)));
  if (!column) return null;
  const number = Number(wanted.replace("%", "")) / (wanted.endsWith("%") ? 100 : 1);
  if (sign === "<") return (i) => column.values[i] !== null && column.values[i] < number;
  if (sign === ">") return (i) => column.values[i] !== null && column.values[i] > number;
  if (column.kind === "number") {
    return (i) => column.values[i] === number || column.texts[i].toLowerCase() === wanted;
  }
  return (i) => column.texts[i].toLowerCase().includes(wanted);
}

function tell(name) {
  document.dispatchEvent(new CustomEvent(name, {
    detail: { passing: state.passing, chosen: [...state.chosen] },
  }));
}

function show() {
  const count = state.all ? state.passing.length : FIRST;
  body.replaceChildren(...state.passing.slice(0, count).map((i) => rows[i]));
  at("more-place").hidden = state.passing.length <= count;
  at("more").textContent = `show all ${state.passing.length.toLocaleString("en")} runs`;
}

function say(extra = "") {
  const [shown, all] = [state.passing.length, rows.length].map((n) => n.toLocaleString("en"));
  const parts = [shown === all ? `${all} runs` : `${shown} of ${all} runs`];
  if (state.chosen.size) parts.push(`${state.chosen.size} chosen`);
  if (state.chosen.size === 2) parts.push(between(...state.chosen));
  if (extra) parts.push(extra);
  at("count").textContent = parts.join("; ");
}

/* What is known of two chosen runs, or how to learn it. */
function between(first, second) {
  const [a, b] = [data.runs[first], data.runs[second]];
  const words = data.pairs[`${a.id} ${b.id}`] ?? data.pairs[`${b.id} ${a.id}`];
  return words ?? `to compare these two: tl compare runs=${a.id},${b.id}`;
}

function filter() {
  const wanted = tests(at("filter").value);
  state.passing = state.order.filter((i) => wanted.every((test) => test(i)));
  show();
  say();
  tell("filtered");
}

function sort(key) {
  const { values, kind, label } = key === "" ? names : columns.get(key);
  const header = [...table.tHead.rows[0].cells].find((cell) => (cell.dataset.key ?? "") === key);
  const before = header.getAttribute("aria-sort");
  const up = before ? before === "descending" : !(key === "value" && !data.lower);
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const compare = kind === "number" ? (a, b) => a - b : new Intl.Collator("en", { numeric: true }).compare;
  state.order.sort((i, j) => { // what is not known comes last, whichever way
    const [a, b] = [values[i], values[j]];
    if (a === null || b === null) return (a === null) - (b === null) || i - j;
    return (up ? compare(a, b) : compare(b, a)) || i - j;
  });
  filter();
  say(`sorted by ${label}, ${up ? "ascending" : "descending"}`);
}
const names = { values: data.runs.map((run) => run.name), kind: "text", label: "run" };

function choose(index, on) {
  if (on) state.chosen.add(index); else state.chosen.delete(index);
  rows[index].classList.toggle("chosen", on);
  rows[index].querySelector("input").checked = on;
}

function chosen() {
  at("clear").disabled = !state.chosen.size;
  say();
  tell("chosen");
}

/* Chosen in a plot: these and no others. */
function chooseOnly(indices) {
  for (const i of [...state.chosen]) choose(i, false);
  for (const i of indices) choose(i, true);
  chosen();
}

function header(cell) {
  const text = cell.textContent;
  const button = make("button", { type: "button" }, text);
  button.addEventListener("click", () => sort(cell.dataset.key ?? ""));
  cell.replaceChildren(button);
}

/* A column comes into the page when it is first wanted; later it is shown and hidden. */
function column(key, on) {
  const cells = table.tHead.rows[0].cells;
  let place = [...cells].findIndex((cell) => cell.dataset.key === key);
  if (place < 0) {
    const { label, kind, texts: own } = columns.get(key);
    const name = kind === "number" ? "number" : "";
    const cell = make("th", { scope: "col", className: name }, label);
    cell.dataset.key = key;
    table.tHead.rows[0].append(cell);
    header(cell);
    rows.forEach((row, i) => row.append(make("td", { className: name }, own[i])));
    place = cells.length - 1;
  }
  for (const row of [table.tHead.rows[0], ...rows]) row.cells[place].hidden = !on;
}

/* Cards of changed images: those of the chosen kind, the first of them at once. */
function flips(most) {
  const cards = [...at("cards").children];
  const wanted = at("flips-of").value;
  const kept = cards.filter((card) => !wanted || card.dataset.said === wanted);
  for (const card of cards) card.hidden = true;
  for (const card of kept.slice(0, most)) card.hidden = false;
  at("more-cards").hidden = kept.length <= most;
  at("more-cards").firstElementChild.textContent = `show all ${kept.length} images`;
}

function start() {
  for (const cell of table.tHead.rows[0].cells) header(cell);
  rows.forEach((row, i) => {
    const box = make("input", { type: "checkbox" });
    box.setAttribute("aria-label", `choose ${data.runs[i].name}`);
    box.addEventListener("change", () => { choose(i, box.checked); chosen(); });
    row.cells[0].prepend(box);
  });
  for (const { key, label, shown } of data.columns) {
    const box = make("input", { type: "checkbox", checked: shown });
    box.addEventListener("change", () => column(key, box.checked));
    at("choices").append(make("label", {}, box, label));
  }
  at("filter").addEventListener("input", () => { state.all = false; filter(); });
  at("clear").addEventListener("click", () => { chooseOnly([]); at("filter").focus(); });
  at("more").addEventListener("click", () => {
    state.all = true;
    const next = rows[state.passing[FIRST]];
    show();
    next.querySelector("input").focus();
  });
  if (at("cards")) {
    at("flips-of").addEventListener("change", () => flips(CARDS));
    at("more-cards").firstElementChild.addEventListener("click", () => flips(Infinity));
    flips(CARDS);
  }
  for (const part of document.querySelectorAll("[data-scripted], #controls, #choose")) part.hidden = false;
  filter();
  for (const cell of table.tHead.rows[0].cells) { // filters shall not make columns jump
    cell.style.minWidth = `${cell.offsetWidth}px`;
  }
}
start();
