"use strict";
/* Each plot of the page. */
const PAUSE = 150; // milliseconds
const NAMED = 8; // runs of the front in words

/* Runs that no other shown run beats in both quality and cost; cheapest first. Only runs on the same
   test images as the best can beat each other. */
function front(values) {
  const home = data.best === null ? null : data.runs[data.best].group;
  const sign = data.lower ? -1 : 1;
  const able = passing.filter((i) => values[i] !== null && data.runs[i].value !== null && data.runs[i].group === home);
  able.sort((i, j) => values[i] - values[j] || sign * (data.runs[j].value - data.runs[i].value));
  let most = -Infinity;
  return able.filter((i) => {
    const better = sign * data.runs[i].value > most;
    if (better) most = sign * data.runs[i].value;
    return better;
  });
}

let steps = null; // source of the front

function drawFront() {
  const cost = data.costs.find((c) => c.key === at("cost-of").value);
  const found = front(cost.values);
  steps.data = { x: found.map((i) => cost.values[i]), y: found.map((i) => data.runs[i].value) };
  const more = found.length > NAMED ? `; and ${found.length - NAMED} more` : "";
  at("front").textContent = found.length
    ? `On the front, the best first: ${found.reverse().slice(0, NAMED).map((i) => data.runs[i].name).join("; ")}${more}` : "";
}

async function drawCost() {
  const cost = data.costs.find((c) => c.key === at("cost-of").value);
  const known = cost.values.filter((v) => v !== null);
  const log = Math.min(...known) > 0 && Math.max(...known) / Math.min(...known) > 20;
  steps = new Bokeh.ColumnDataSource({ data: { x: [], y: [] } });
  const runs = runsSource("cost");
  const fig = figure({
    x_axis_type: log ? "log" : "linear", x_axis_label: cost.label, y_axis_label: data.label,
  }, [...TIP, ["", "@paid"]]);
  if (innerWidth < 600) fig.below[0].ticker.desired_num_ticks = 4; // texts of more lie on each other
  fig.segment({ field: "cost" }, { field: "low" }, { field: "cost" }, { field: "high" }, {
    ...runs, line_color: { field: "colour" }, line_alpha: { field: "whisker" }, line_width: 1.5,
    selection_line_alpha: 1, nonselection_line_alpha: 0.08,
  });
  const line = fig.step({ field: "x" }, { field: "y" }, "after", { source: steps, line_dash: "dashed", line_width: 1.5 });
  follow(line, { line_color: "soft" });
  const points = fig.scatter({ field: "cost" }, { field: "value" }, {
    ...runs, size: { field: "size" }, marker: { field: "marker" }, fill_color: { field: "colour" },
    fill_alpha: { field: "alpha" }, line_alpha: 0.8, selection_fill_alpha: 1, selection_line_width: 2,
    nonselection_fill_alpha: 0.2, hover_fill_alpha: 1,
  });
  follow(points, { line_color: "back" });
  pick(fig, [points]);
  drawFront();
  await place("cost", fig);
}

/* One line for each run; those of the best and the baseline once more, above the others. */
function threads(fig, { source, view }, xs, ys) {
  const above = new Bokeh.CDSView({ filter: new Bokeh.IndexFilter({
    indices: [data.baseline, data.best].filter((i) => i !== null),
  }) });
  const drawn = fig.multi_line({ field: xs }, { field: ys }, { source, view, ...lines, ...marked });
  fig.multi_line({ field: xs }, { field: ys }, { source, view: above, ...lines, ...marked });
  return drawn;
}

/* Only these answer to the pointer. */
function pick(fig, renderers) {
  for (const tool of fig.toolbar.tools) if ("renderers" in tool.properties) tool.renderers = renderers;
}

let marks = null; // source of the beginnings of phases
let lowest = Infinity; // of all curves: the names of phases stand there
for (const { curve } of data.runs) for (const y of curve?.y ?? []) if (y !== null) lowest = Math.min(lowest, y);

function drawMarks() {
  const run = data.runs[chosenNow.length === 1 ? chosenNow[0] : data.best ?? 0];
  const found = run?.curve?.marks ?? [];
  marks.data = { x: found.map((m) => m.x), y: found.map(() => lowest), phase: found.map((m) => m.phase) };
}

async function drawCurves() {
  const metric = data.runs.find((r) => r.curve).curve.metric;
  marks = new Bokeh.ColumnDataSource({ data: { x: [], y: [], phase: [] } });
  const runs = runsSource("curves");
  const fig = figure({ x_axis_label: "epoch, over all phases", y_axis_label: metric }, TIP);
  const drawn = threads(fig, runs, "xs", "ys");
  const uprights = fig.vspan({ field: "x" }, { source: marks, line_dash: "dotted" });
  follow(uprights, { line_color: "soft" });
  const phases = fig.text({ field: "x" }, { field: "y" }, { field: "phase" }, {
    source: marks, text_font_size: "12px", x_offset: 3,
  });
  follow(phases, { text_color: "soft" });
  pick(fig, [drawn]);
  drawMarks();
  await place("curves", fig);
}

async function drawVaried() {
  const count = data.axes.length;
  const ticks = data.axes.flatMap((axis, k) => axis.ticks.map(([y, text]) => ({ k, y, text })));
  const runs = runsSource("varied");
  at("plot-varied").style.setProperty("--least", `${count * 7.5}rem`);
  const fig = figure({
    height: 420, x_range: new Bokeh.Range1d({ start: -0.25, end: count - 0.4 }),
    y_range: new Bokeh.Range1d({ start: -0.06, end: 1.06 }),
  }, TIP, { percent: false });
  follow(fig.vspan(data.axes.map((_, k) => k), { line_width: 1.5 }), { line_color: "soft" });
  const drawn = threads(fig, runs, "ax", "ay");
  const values = fig.text(ticks.map((t) => t.k), ticks.map((t) => t.y), ticks.map((t) => short(t.text)), {
    text_font_size: "12px", x_offset: 6, text_baseline: "middle", background_fill_alpha: 0.75,
  });
  follow(values, { text_color: "text", background_fill_color: "back" });
  for (const axis of [...fig.left]) axis.visible = false;
  for (const grid of fig.center) if ("grid_line_color" in grid.properties) grid.visible = false;
  for (const axis of fig.below) {
    axis.ticker = new Bokeh.FixedTicker({ ticks: data.axes.map((_, k) => k) });
    axis.major_label_overrides = new Map(data.axes.map((a, k) => [k, short(a.label, 26)]));
    axis.axis_line_color = null;
  }
  pick(fig, [drawn]);
  await place("varied", fig);
}

const short = (text, most = 18) => text.length > most ? `${text.slice(0, most - 1)}…` : text;

/* Calibration side by side: the chosen runs, then the best and the baseline. */
let panels = [];

async function startPanels() {
  panels = Array.from({ length: PANELS }, () => ({ source: new Bokeh.ColumnDataSource({ data: { x: [], y: [], images: [], size: [] } }) }));
  for (const [k, panel] of panels.entries()) {
    const fig = figure({
      height: 240, x_range: new Bokeh.Range1d({ start: 0, end: 1.06 }), y_range: new Bokeh.Range1d({ start: -0.05, end: 1.07 }),
      x_axis_label: "how sure it was", y_axis_label: "share right",
    }, [["sure", "@x{0.00}"], ["right", "@y{0.00}"], ["images", "@images"]], { tools: "", percent: false });
    const columns = [{ field: "x" }, { field: "y" }];
    follow(fig.line([0, 1], [0, 1], { line_dash: "dashed" }), { line_color: "soft" });
    follow(fig.line(...columns, { source: panel.source, line_width: 2 }), { line_color: "blue" });
    const points = fig.scatter(...columns, { source: panel.source, size: { field: "size" } });
    follow(points, { fill_color: "blue", line_color: "back" });
    pick(fig, [points]);
    panel.title = make("h3");
    panel.element = make("div", {}, panel.title, make("div", { className: "plot", id: `plot-panel${k}` }));
    at("panels").append(panel.element);
    await place(`panel${k}`, fig);
  }
}

function drawPanels() {
  const wanted = [...chosenNow, data.best, data.baseline, ...passing];
  const able = [...new Set(wanted)].filter((i) => i !== null && data.runs[i].reliability);
  panels.forEach(({ source: own, title, element }, k) => {
    const run = data.runs[able[k]];
    element.hidden = !run;
    if (!run) return;
    const { confidence, accuracy, images } = run.reliability;
    const kept = confidence.map((_, i) => i).filter((i) => images[i] > 0);
    const most = Math.max(...images);
    const ece = run.ece === null ? "" : `, error ${run.ece.toFixed(3)}`;
    title.textContent = run.name + ece;
    const plot = at(`plot-panel${k}`);
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `calibration of ${run.name}: ${kept.map((i) =>
      `${(100 * confidence[i]).toFixed(0)} % sure, ${(100 * accuracy[i]).toFixed(0)} % right`).join("; ")}`);
    own.data = {
      x: kept.map((i) => confidence[i]), y: kept.map((i) => accuracy[i]), images: kept.map((i) => images[i]),
      size: kept.map((i) => 5 + 11 * Math.sqrt(images[i] / most)),
    };
  });
}

async function draw() {
  await Promise.all([at("cost-of") && drawCost(), at("plot-curves") && drawCurves(),
    at("plot-varied") && drawVaried(), at("panels") && startPanels()]);
  if (at("panels")) drawPanels();
  document.documentElement.dataset.drawn = "yes";
}

/* The same plots with other colours, or other runs. */
function refresh() {
  const columns = content();
  for (const { source, view } of sources.values()) {
    view.filter = seen();
    source.data = columns;
  }
  if (at("cost-of")) drawFront();
  if (at("panels")) drawPanels();
}

let waiting = 0;
/* The table answers each key at once; the plots follow when the typing pauses. */
document.addEventListener("filtered", ({ detail }) => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    passing = [...detail.passing];
    refresh();
  }, PAUSE);
});

let following = false; // the plots follow a choice: they do not tell it again
document.addEventListener("chosen", ({ detail }) => {
  chosenNow = detail.chosen;
  following = true;
  for (const { source } of sources.values()) source.selected.indices = chosenNow;
  following = false;
  if (at("plot-curves")) drawMarks();
  if (at("panels")) drawPanels();
});

/* A run was clicked in a plot. */
function picked(source) {
  if (!following) chooseOnly(source.selected.indices);
}

if (at("cost-of")) {
  at("cost-of").append(...data.costs.map((c) => make("option", { value: c.key }, c.label)));
  at("cost-of").addEventListener("change", drawCost);
}
at("colour")?.addEventListener("change", refresh);
let onScreen = style("back"); // the print styles have another
dark.addEventListener("change", () => { onScreen = style("back"); recolour(); refresh(); });

/* Paper has another width, and the browser does not wait for a canvas: print pictures of the plots,
   as they are on the screen. */
addEventListener("beforeprint", () => {
  for (const [id, view] of figures) {
    const { canvas } = view.export("png");
    const picture = make("canvas", { width: canvas.width, height: canvas.height });
    const pen = picture.getContext("2d");
    pen.fillStyle = onScreen;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(canvas, 0, 0);
    at(`plot-${id}`).append(make("img", { className: "still", src: picture.toDataURL(), alt: "" }));
  }
});
addEventListener("afterprint", () => {
  for (const still of document.querySelectorAll(".still")) still.remove();
});
Bokeh.set_log_level("warn");
draw();
