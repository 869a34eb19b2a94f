"use strict";
/* What all plots share: what is chosen in one is chosen in all and in the table, and colours come
   from the page's styles, so that they follow light and dark. Drawn by Bokeh. */
const { Plotting } = Bokeh;
// Okabe and Ito, "Color universal design", 2008; black and yellow left out: one of them vanishes
const PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999"];
const WHISKERS = 60; // runs up to which each shows its interval: more are a thicket
const PANELS = 4;
const coarse = matchMedia("(pointer: coarse)").matches;
const dark = matchMedia("(prefers-color-scheme: dark)");
const figures = new Map();
let chosenNow = [];
let passing = data.runs.map((_, i) => i);

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const inks = []; // [model, { property: name of a colour }]: what changes with light and dark
const shownValue = (value) => value === null ? "–"
  : data.percent ? `${(100 * value).toFixed(1)} %` : value.toPrecision(4);
const missing = (value) => value ?? NaN;

/* Colour of each run, and what the colours mean. */
function colours() {
  const by = data.columns.find((c) => c.varied && c.label === at("colour")?.value);
  if (!by) return roles();
  const known = by.values.filter((v) => v !== null);
  const distinct = [...new Set(known)].sort((a, b) => (by.kind === "number" ? a - b : a < b ? -1 : 1));
  const text = (value) => by.texts[by.values.indexOf(value)];
  const few = distinct.length <= PALETTE.length;
  if (!few && by.kind !== "number") { // more names than one can tell apart by colour
    const kept = distinct.slice(0, PALETTE.length - 1);
    const colour = (v) => PALETTE[kept.indexOf(v) < 0 ? PALETTE.length - 1 : kept.indexOf(v)];
    return [by.values.map(colour), [...kept.map((v) => [colour(v), text(v)]), [PALETTE.at(-1), "others"]]];
  }
  const scale = few ? PALETTE : Plotting.cividis ?? Bokeh.Palettes.cividis(distinct.length);
  const colour = (v) => v === null ? PALETTE.at(-1) : scale[distinct.indexOf(v)];
  const marked = few ? distinct : [distinct[0], distinct[distinct.length >> 1], distinct.at(-1)];
  return [by.values.map(colour), marked.map((v) => [colour(v), text(v)])];
}

function roles() {
  const home = data.best === null ? null : data.runs[data.best].group;
  const plain = style("blue"), other = PALETTE.at(-1), best = PALETTE[4], base = PALETTE[2];
  const found = data.runs.map((run, i) =>
    i === data.best ? best : i === data.baseline ? base : run.group === home ? plain : other);
  const words = [[best, "best (star)"], [base, "baseline (diamond)"], [plain, "others"], [other, "not comparable with the best"]];
  return [found, words.filter(([colour]) => found.includes(colour))];
}

/* Columns of the runs, the same for each plot. */
function content() {
  const [colour, meaning] = colours();
  const cost = data.costs.find((c) => c.key === at("cost-of")?.value);
  const many = passing.length > WHISKERS;
  const special = (i) => i === data.best || i === data.baseline;
  const runs = data.runs;
  for (const list of document.querySelectorAll("[data-legend]")) legend(list, meaning);
  return {
    name: runs.map((r) => r.name),
    said: runs.map((r) => `${shownValue(r.value)}${r.low === null ? "" : ` (${shownValue(r.low)} to ${shownValue(r.high)})`}`),
    cost: runs.map((_, i) => cost ? missing(cost.values[i]) : NaN),
    paid: runs.map((_, i) => cost ? `${cost.label}: ${missing(cost.values[i]).toLocaleString("en")}` : ""),
    value: runs.map((r) => missing(r.value)),
    low: runs.map((r) => missing(r.low)),
    high: runs.map((r) => missing(r.high)),
    whisker: runs.map((_, i) => (!many || special(i) ? 0.6 : 0)),
    colour,
    size: runs.map((_, i) => i === data.best ? 20 : i === data.baseline ? 16 : many ? 7 : 10),
    marker: runs.map((_, i) => i === data.best ? "star" : i === data.baseline ? "diamond" : "circle"),
    alpha: runs.map((_, i) => special(i) ? 1 : many ? 0.55 : 0.8),
    thread: runs.map((_, i) => special(i) ? 1 : many ? 0.25 : 0.65),
    width: runs.map((_, i) => special(i) ? 2.5 : 1.2),
    xs: runs.map((r) => r.curve ? r.curve.x : []),
    ys: runs.map((r) => r.curve ? r.curve.y.map(missing) : []),
    ax: runs.map(() => data.axes.map((_, k) => k)),
    ay: runs.map((_, i) => data.axes.map((axis) => missing(axis.places[i]))),
  };
}

function legend(list, meaning) {
  list.replaceChildren(...meaning.map(([colour, text]) => {
    const mark = make("i");
    mark.style.background = colour;
    return make("li", {}, mark, text);
  }));
}

const TIP = [["", "@name"], [data.label, "@said"]];

/* A source of all runs of which those that pass the filter are seen. */
function runsSource(id) {
  const source = new Bokeh.ColumnDataSource({ data: content() });
  source.selected.indices = chosenNow;
  source.selected.properties.indices.change.connect(() => picked(source));
  const view = new Bokeh.CDSView({ filter: seen() });
  sources.set(id, { source, view });
  return { source, view };
}
const sources = new Map();
const seen = () => passing.length === data.runs.length ? new Bokeh.AllIndices()
  : new Bokeh.IndexFilter({ indices: passing });

function figure(options, tips, { tools = "tap", percent = true } = {}) {
  const fig = Plotting.figure({
    background_fill_color: null, border_fill_color: null, outline_line_color: null,
    sizing_mode: "stretch_width", height: 380, toolbar_location: null, output_backend: "canvas",
    tools: coarse ? tools : `${tools},box_zoom`, ...options,
  });
  if (data.percent && percent) for (const axis of fig.left) axis.formatter = new Bokeh.NumeralTickFormatter({ format: "0.[0] %" });
  fig.add_tools(new Bokeh.HoverTool({ tooltips: tips, line_policy: "nearest", point_policy: "follow_mouse" }));
  return fig;
}

const lines = { line_color: { field: "colour" }, line_alpha: { field: "thread" }, line_width: { field: "width" } };
const marked = { selection_line_alpha: 1, selection_line_width: 3.5, nonselection_line_alpha: 0.2, hover_line_alpha: 1, hover_line_width: 3 };

/* Give a part of a plot colours of the page, now and when they change. */
function follow({ glyph }, names) {
  inks.push([glyph, names]);
  ink(glyph, names);
}

function ink(glyph, names) {
  glyph.setv(Object.fromEntries(Object.entries(names).map(([key, name]) => [key, { value: style(name) }])));
}

function paint(fig) {
  const [text, soft, line] = ["text", "soft", "line"].map(style);
  for (const axis of [...fig.below, ...fig.left]) {
    axis.setv({
      axis_label_text_color: text, major_label_text_color: soft, axis_line_color: soft,
      major_tick_line_color: soft, minor_tick_line_color: null, axis_label_text_font_style: "normal",
      axis_label_text_font_size: "14px", major_label_text_font_size: "12px",
    });
  }
  for (const grid of fig.center) if ("grid_line_color" in grid.properties) grid.grid_line_color = line;
}

function recolour() {
  for (const view of figures.values()) paint(view.model);
  for (const [glyph, names] of inks) ink(glyph, names);
}

/* Show a figure in its place on the page, instead of the one before. */
async function place(id, fig) {
  const target = at(`plot-${id}`);
  figures.get(id)?.remove();
  paint(fig);
  target.replaceChildren();
  figures.set(id, await Plotting.show(fig, target));
  target.ondblclick = () => figures.get(id).reset();
}
