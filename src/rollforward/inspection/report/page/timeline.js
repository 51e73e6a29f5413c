// Timeline: each start as a bar, its checkpoints, what each kill cost, and goodput.

const timeline = { run: 0 };

/** Whether a start ended before the run did. */
function ended(start) {
  return ["stopped", "killed", "failed"].includes(start.ending);
}

/** What verifying found counts, where every byte was read. */
function checkpointState(run, point) {
  return verdict(run, point)?.reason ? "damaged" : point.state;
}

function verdict(run, point) {
  return part(run, "health")?.checkpoints?.find((each) => each.position === point.position);
}

/** What the end of a start cost, as the next one reported it. */
function cost(next) {
  const back = next?.recovery;
  if (!back) return say("cost_unknown");
  const lost = back.lost.length ? say("lost_some", back.steps_lost, back.chunks_generated_again) : say("lost_nothing");
  return say("cost", duration(back.seconds.total), back.steps_replayed, duration(back.seconds.replay), lost);
}

timeline.build = function (panel) {
  const choose = runChoice((run) => { timeline.run = run; timeline.draw(); });
  timeline.body = el("div", {});
  panel.append(choose ? el("div", { class: "controls" }, choose) : "", timeline.body);
};

timeline.draw = function () {
  const told = part(timeline.run, "timeline");
  if (!told || told.error) {
    timeline.body.replaceChildren(told ? failed(told) : say("reading"));
    return;
  }
  const plot = el("div", { class: "plot bars", role: "img", "aria-label": say("starts") });
  timeline.body.replaceChildren(
    timeline.goodput(told),
    el("h2", {}, say("starts")), el("p", { class: "dim small" }, say("bars_key")),
    el("div", { class: "card" }, plot), timeline.starts(told),
    el("h2", {}, say("checkpoints")), timeline.checkpoints(told),
    el("h2", {}, say("history")), el("p", { class: "dim small" }, say("history_key")), timeline.entries(told));
  timeline.bars(told, plot);
};

timeline.goodput = function (told) {
  const { wall, useful, steps, estimated } = told.goodput;
  if (!wall) return el("p", { class: "dim" }, say("no_goodput"));
  return el("section", { class: "card" },
    el("h3", {}, say("goodput")),
    el("p", { class: "big numbers" }, `${((100 * useful) / wall).toFixed(1)} %`),
    el("p", {}, say("goodput_is", duration(useful), duration(wall), duration(wall - useful), figure(steps))),
    estimated ? el("p", { class: "dim small" }, say("goodput_estimated", figure(estimated))) : null);
};

/** How a part of a start is drawn: colour and pattern. */
const SPANS = {
  starting: ["dim", "/"], replaying: ["warn", "x"], training: ["c0", ""], down: ["line", "."], unknown: ["line", "\\"],
};
/** A run that is restarted often has more starts than bars that anybody looks at: the newest are drawn. */
const MOST_BARS = 60;

timeline.bars = function (told, plot) {
  const starts = told.starts.slice(-MOST_BARS);
  const height = 120 + 34 * starts.length;
  plot.style.height = `${height}px`;
  Plotly.newPlot(plot, [...timeline.spans(told, starts), timeline.points(told, starts)], layout({
    barmode: "overlay", margin: { l: 70, r: 8, t: 36, b: 44 }, height, hovermode: "closest",
    showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", font: { size: 11 } },
    xaxis: { type: "date" },
    yaxis: {
      autorange: "reversed", fixedrange: true, categoryorder: "array", categoryarray: starts.map(timeline.name),
    },
  }), PLOTTING);
};

timeline.name = function (start) {
  return say("start_n", start.number);
};

timeline.end = function (told, start) {
  return start.ending === "running" ? told.now : start.ended;
};

/** What each start did when, and the time until the next one, as bars. */
timeline.spans = function (told, starts) {
  const spans = Object.keys(SPANS).map(() => []);
  const [starting, replaying, training, down, unknown] = spans;
  starts.forEach((start, at) => {
    const end = timeline.end(told, start);
    if (start.began === null || end === null) return;
    const [replay, fresh] = start.ready ?? [start.began, start.began];
    starting.push([start, start.began, replay]);
    replaying.push([start, replay, fresh]);
    training.push([start, fresh, Math.max(fresh, end)]);
    const next = starts[at + 1]?.began ?? null;
    if (next !== null && next > end) (start.end_known ? down : unknown).push([start, end, next]);
  });
  return Object.entries(SPANS).map(([what, [shade, shape]], at) => ({
    type: "bar", orientation: "h", name: say(`bar_${what}`), visible: spans[at].length > 0,
    y: spans[at].map(([start]) => timeline.name(start)),
    base: spans[at].map(([, from]) => timeline.date(from)), x: spans[at].map(([, from, to]) => 1000 * (to - from)),
    marker: {
      color: colour(shade), pattern: { shape, fgcolor: colour("card"), size: 6, solidity: 0.4, fillmode: "overlay" },
    },
    text: spans[at].map(([, from, to]) => `${say(`bar_${what}`)}: ${duration(to - from)}`), textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  }));
};

/** The checkpoints, each on the bar of the start that ran when it was saved. */
timeline.points = function (told, starts) {
  const saved = told.checkpoints.flatMap((point) => {
    const during = (start) => start.began <= point.time && point.time <= timeline.end(told, start) + 1;
    const start = point.time === null ? undefined : starts.find((each) => each.began !== null && during(each));
    return start ? [{ point, start, state: checkpointState(timeline.run, point) }] : [];
  });
  const words = ({ point, state }) => harmless(say("mark_checkpoint", point.position, say(state), bytes(point.size)));
  return {
    type: "scatter", mode: "markers", name: say("checkpoints"),
    x: saved.map(({ point }) => timeline.date(point.time)), y: saved.map(({ start }) => timeline.name(start)),
    text: saved.map(words),
    hovertemplate: "%{text}<extra></extra>",
    marker: {
      size: 10, line: { width: 1.5, color: colour("card") },
      symbol: saved.map(({ state }) => CHECKPOINT[state][0]),
      color: saved.map(({ state }) => colour(CHECKPOINT[state][1])),
    },
  };
};

timeline.date = function (seconds) {
  return new Date(seconds * 1000).toISOString();
};

timeline.starts = function (told) {
  const heads = ["start", "began", "from", "steps", "workers", "ending", "what_it_cost"].map((key) => say(key));
  return table(heads, told.starts.map((start, at) => [
    start.number,
    moment(start.began),
    start.from === null ? "–" : start.recovery ? say("checkpoint_at", figure(start.from)) : say("beginning"),
    start.steps[0] === null ? "–" : `${figure(start.steps[0])} – ${figure(start.reached ?? start.steps[1])}`,
    start.workers === null ? "–" : el("span", {}, `${start.workers} × `, shown(start.device)),
    el("span", { class: start.ending === "finished" ? "good" : ended(start) ? "bad" : "" },
      say(start.ending), start.end_known ? "" : ` ${say("end_unknown")}`),
    ended(start) ? cost(told.starts[at + 1]) : "",
  ]), ["plain", "plain", "plain", "plain", "plain", "words", "words"]);
};

timeline.checkpoints = function (told) {
  const heads = ["checkpoint", "steps_done", "saved", "size", "state"].map((key) => say(key));
  return table(heads, told.checkpoints.map((point) => {
    const state = checkpointState(timeline.run, point);
    const reason = point.reason || verdict(timeline.run, point)?.reason || "";
    return [point.position, figure(point.step), moment(point.time), point.size ? bytes(point.size) : "–",
      el("span", { class: CHECKPOINT[state][1] }, say(state), reason ? ": " : "", shown(reason))];
  }), ["plain", "plain", "plain", "plain", "words"]);
};

timeline.entries = function (told) {
  const heads = ["time_utc", "start", "what", "position", "in_words"].map((key) => say(key));
  return table(heads, told.entries.map(([time, what, start, position, text]) =>
    [time.slice(0, 19).replace("T", " "), start || "", what, position, shown(text)]), ["plain", "plain", "plain", "plain", "words"]);
};
