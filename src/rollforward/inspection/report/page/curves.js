// Curves: every figure of every run, over each other; what happened is marked on the axis.

const curves = {
  against: "step",
  smoothing: 0,
  marks: true,
  hidden: new Set(),
  plots: new Map(),
};

const DASHES = ["solid", "dash", "dot", "dashdot"];

/** How a checkpoint is drawn, by its state: symbol and colour. */
const CHECKPOINT = { valid: ["triangle-up", "good"], damaged: ["x", "bad"], pruned: ["triangle-up-open", "dim"] };

curves.build = function (panel) {
  const smoothing = el("input", {
    type: "range", min: 0, max: 0.98, step: 0.02, value: 0, "aria-label": say("smoothing"),
    oninput: () => { curves.smoothing = Number(smoothing.value); curves.draw(); },
  });
  const marks = el("input", {
    type: "checkbox", checked: true, onchange: () => { curves.marks = marks.checked; curves.draw(); },
  });
  const [against] = choice(say("against"), [["step", say("step")], ["time", say("time")]], "step", (value) => {
    curves.against = value;
    curves.range = null;
    curves.draw();
  });
  const whole = el("button", { type: "button", onclick: () => curves.zoom(null) }, say("show_all"));
  curves.grid = el("div", { class: "charts" });
  curves.others = el("div", { class: "charts" });
  curves.more = el("details", { ontoggle: () => curves.draw() }, el("summary", {}), curves.others);
  curves.notes = el("div", {});
  panel.append(
    el("div", { class: "controls" }, against, el("label", {}, say("smoothing"), smoothing),
      el("label", {}, marks, say("marks")), whole, curves.legend()),
    el("p", { class: "dim small" }, say("marks_key")),
    curves.grid, curves.more, curves.notes);
};

curves.legend = function () {
  if (page.runs.length < 2) return [];
  return page.runs.map((run, at) => {
    const box = el("input", {
      type: "checkbox", checked: true,
      onchange: () => { curves.hidden[box.checked ? "delete" : "add"](at); curves.draw(); },
    });
    const dot = el("span", { class: "dot" });
    dot.style.background = palette(at);
    return el("label", { class: "key" }, box, dot, run.name);
  });
};

/** Charts by name, in order; each with the runs that have it. */
curves.collect = function () {
  const found = new Map();
  page.runs.forEach((_, run) => {
    for (const chart of part(run, "curves")?.charts ?? []) {
      const name = chart.chart || `other:${chart.figures[0]}`;
      if (!found.has(name)) found.set(name, { name, known: Boolean(chart.chart), runs: [] });
      found.get(name).runs.push([run, chart]);
    }
  });
  return [...found.values()];
};

curves.draw = function () {
  const charts = curves.collect();
  const others = charts.filter((chart) => !chart.known);
  for (const chart of charts.filter((each) => each.known)) curves.one(chart, curves.grid);
  curves.more.hidden = !others.length;
  curves.more.firstChild.textContent = say("other_figures", others.length);
  if (curves.more.open) for (const chart of others) curves.one(chart, curves.others);
  const notes = page.runs.flatMap((run, at) => {
    const value = part(at, "curves");
    if (value?.error) return [failed(value)];
    if (value && !value.charts.length) return [el("p", { class: "dim" }, say("no_figures", run.name))];
    return value?.left_out.length ? [el("p", { class: "dim" }, say("left_out", value.left_out.length))] : [];
  });
  curves.notes.replaceChildren(...notes);
};

/** The place of a chart; made the first time. */
curves.place = function (chart, grid) {
  if (!curves.plots.has(chart.name)) {
    const title = chart.known ? say(`chart_${chart.name}`) : chart.name.slice("other:".length);
    const readout = el("p", { class: "dim small numbers readout", "aria-live": "polite" });
    const plot = el("div", { class: "plot", tabindex: 0, role: "img", "aria-label": title });
    grid.append(el("section", { class: "card chart" }, el("h3", {}, shown(title)), readout, plot));
    curves.plots.set(chart.name, { plot, readout, at: -1 });
    plot.addEventListener("keydown", (event) => curves.walk(curves.plots.get(chart.name), event));
  }
  return curves.plots.get(chart.name);
};

/** Draw a chart, or draw it again. */
curves.one = function (chart, grid) {
  const drawn = curves.place(chart, grid);
  const runs = chart.runs.filter(([run]) => !curves.hidden.has(run));
  const marks = curves.marks ? runs.map(([run]) => curves.events(run)) : [];
  // A page that follows a run must not take away what somebody points at, unless there is something new.
  const how = JSON.stringify([marks, curves.smoothing, curves.against, palette(0)]);
  const values = runs.map(([, value]) => value);
  const same = drawn.values?.length === values.length && values.every((value, at) => value === drawn.values[at]);
  if (same && drawn.how === how) return;
  Object.assign(drawn, { how, values });
  drawn.readout.textContent = curves.summary(runs);
  const traces = runs.flatMap(([run, value], order) => curves.traces(run, value, order));
  Plotly.react(drawn.plot, [...traces, ...marks.map((mark) => mark.trace)], curves.look(traces, marks), PLOTTING)
    .then(() => curves.listen(drawn.plot));
};

curves.look = function (traces, marks) {
  const x = curves.against === "time" ? { title: { text: say("elapsed") } } : {};
  // Below the curves, a lane of events for each run.
  const lanes = Math.min(0.1 * Math.max(1, marks.length), 0.3);
  const named = traces.filter((trace) => trace.showlegend).length > 1 && page.runs.length < 2;
  return layout({
    margin: { l: 52, r: 8, t: 6, b: curves.against === "time" ? 38 : 24 },
    hovermode: "x unified", hoversubplots: "axis",
    showlegend: named, legend: { orientation: "h", y: 1.02, yanchor: "bottom", font: { size: 11 } },
    uirevision: curves.against,
    xaxis: { ...x, unifiedhovertitle: { text: `${say(curves.against)} %{x}` }, anchor: "y2", range: curves.range ?? undefined, autorange: !curves.range },
    yaxis: { automargin: true, fixedrange: true, domain: [lanes + 0.04, 1] },
    yaxis2: { domain: [0, lanes], range: [0, 1], visible: false, fixedrange: true },
    shapes: marks.flatMap((mark) => mark.shapes),
  });
};

curves.summary = function (runs) {
  const whole = (each) => say("summary", figure(each.first), figure(each.last), figure(each.low), figure(each.high));
  const last = (each) => `→ ${figure(each.last)}`;
  return runs.map(([, value]) => value.summary.map(page.runs.length > 1 ? last : whole).join(", ")).join(" · ");
};

/** One zoom for all charts. */
curves.listen = function (plot) {
  if (plot.dataset.heard) return;
  plot.dataset.heard = "yes";
  plot.on("plotly_relayout", (change) => {
    if ("xaxis.range[0]" in change) curves.zoom([change["xaxis.range[0]"], change["xaxis.range[1]"]], plot);
    else if (change["xaxis.autorange"]) curves.zoom(null, plot);
  });
};

curves.zoom = function (range, from = null) {
  if (String(range) === String(curves.range ?? null)) return;
  curves.range = range;
  for (const { plot } of curves.plots.values()) {
    if (plot === from) continue;
    Plotly.relayout(plot, range ? { "xaxis.range": range } : { "xaxis.autorange": true });
  }
};

/** The arrow keys move along a curve. */
curves.walk = function (drawn, event) {
  const trace = drawn.plot.data?.find((each) => each.walked);
  const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (!trace || by === undefined) return;
  event.preventDefault();
  drawn.at = Math.max(0, Math.min(trace.x.length - 1, drawn.at + by));
  Plotly.Fx.hover(drawn.plot, [{ curveNumber: drawn.plot.data.indexOf(trace), pointNumber: drawn.at }]);
  drawn.readout.textContent = `${say(curves.against)} ${figure(trace.x[drawn.at])}: ${figure(trace.y[drawn.at])}`;
};

/** `order`: the run's place among those that are drawn. */
curves.traces = function (run, chart, order) {
  const many = page.runs.length > 1;
  const x = chart[curves.against];
  const traces = [];
  if (chart.spread && !many) {
    const [low, high] = [-1, 1].map((sign) => chart.values[0].map((value, at) =>
      (value === null || chart.spread[at] === null ? null : value + sign * chart.spread[at])));
    const band = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
    traces.push({ ...band, y: low }, { ...band, y: high, fill: "tonexty", fillcolor: `${palette(0)}22` });
  }
  chart.values.forEach((values, at) => {
    const shade = palette(many ? run : at);
    const name = harmless(curves.name(run, chart, at));
    // Runs may have the same curve to the last bit: the one below shows through the gaps of the one above.
    const line = { color: shade, width: 1.7, dash: DASHES[(many ? order + at : 0) % DASHES.length] };
    const mode = x.length > 1 ? "lines" : "markers";
    const alone = !many && chart.labels.length < 2;
    const hovertemplate = alone ? "%{y:.5~g}<extra></extra>" : "%{fullData.name}: %{y:.5~g}<extra></extra>";
    const raw = { x, y: values, name, mode, hovertemplate, line, marker: { color: shade }, walked: true };
    if (!curves.smoothing) {
      traces.push({ ...raw, showlegend: true });
      return;
    }
    const from = chart.means ? { x: chart.means[curves.against], y: chart.means.values[at] } : { x, y: values };
    traces.push({ ...raw, opacity: 0.3, showlegend: false, hoverinfo: "skip", walked: false });
    traces.push({ ...raw, x: from.x, y: curves.smooth(from.y), showlegend: true });
  });
  return traces;
};

curves.name = function (run, chart, at) {
  const several = chart.labels.length > 1;
  const titled = chart.chart && chart.chart !== "verifiers" && !several;
  const label = titled ? say(`chart_${chart.chart}`) : chart.labels[at];
  if (page.runs.length < 2) return label;
  return several ? `${page.runs[run].name}, ${label}` : page.runs[run].name;
};

/** The exponential moving average, corrected for its beginning. */
curves.smooth = function (values) {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    sum = curves.smoothing * sum + (1 - curves.smoothing) * value;
    weight = curves.smoothing * weight + (1 - curves.smoothing);
    return sum / weight;
  });
};

/** Kills, resumes and checkpoints of a run: points in its lane below the curves, and lines. */
curves.events = function (run) {
  const told = part(run, "timeline");
  if (!told || told.error) return { shapes: [], trace: curves.points([], 0) };
  const lane = 1 - (run + 0.5) / page.runs.length;
  const elapsed = (time) => (time === null || time === undefined ? null : time - told.began);
  const at = (step, time) => (curves.against === "step" ? step : elapsed(time));
  const points = told.checkpoints.map((point) => {
    const state = checkpointState(run, point);
    const [symbol, shade] = CHECKPOINT[state];
    const words = say("mark_checkpoint", point.position, say(state), bytes(point.size));
    return { x: at(point.step, point.time), symbol, shade, words };
  });
  const shapes = [];
  told.starts.forEach((start, number) => {
    const back = start.recovery;
    if (back) {
      const words = say("mark_resume", start.number, back.checkpoint, back.steps_replayed);
      points.push({ x: at(start.from, start.ready?.[0]), symbol: "circle-open", shade: "warn", words });
      if (curves.against === "step") shapes.push(curves.stretch(start.from, start.from + back.steps_replayed, lane));
    }
    if (ended(start)) {
      const x = at(start.reached, start.ended);
      const words = say("mark_end", start.number, say(start.ending), cost(told.starts[number + 1]));
      points.push({ x, symbol: "x-thin-open", shade: "bad", words });
      if (x !== null) shapes.push(curves.line(x, page.runs.length > 1 ? `c${run % 7}` : "bad"));
    }
  });
  return { shapes, trace: curves.points(points.filter(({ x }) => x !== null), lane) };
};

curves.points = function (points, lane) {
  const colours = points.map(({ shade }) => colour(shade));
  const size = page.runs.length > 2 ? 7 : 9;
  return {
    x: points.map(({ x }) => x), y: points.map(() => lane), yaxis: "y2", mode: "markers", showlegend: false,
    // A chart is not as wide as a sentence.
    text: points.map(({ words }) => words.split(/; |；/).map(harmless).join("<br>")), hovertemplate: "%{text}<extra></extra>",
    marker: { symbol: points.map(({ symbol }) => symbol), color: colours, size, line: { width: 2, color: colours } },
  };
};

/** The steps that were replayed. */
curves.stretch = function (from, to, lane) {
  const half = 0.4 / page.runs.length;
  return { type: "rect", yref: "y2", x0: from, x1: to, y0: lane - half, y1: lane + half,
    fillcolor: colour("warn"), opacity: 0.3, line: { width: 0 } };
};

curves.line = function (x, shade) {
  const line = { color: colour(shade), width: 1, dash: "dash" };
  return { type: "line", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line };
};
