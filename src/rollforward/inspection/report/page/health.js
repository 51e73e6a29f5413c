// Health: what `verify` and `doctor` say; the configuration and what changed; versions.

const MOST_LINES = 30;
const health = { run: 0, filter: "" };

health.build = function (panel) {
  const choose = runChoice((run) => { health.run = run; health.draw(); });
  health.body = el("div", {});
  panel.append(choose ? el("div", { class: "controls" }, choose) : "", health.body);
};

health.draw = function () {
  const told = part(health.run, "health");
  if (!told || told.error) {
    health.body.replaceChildren(told ? failed(told) : say("reading"));
    return;
  }
  health.body.replaceChildren(
    health.verdict(told),
    el("h2", {}, say("verify_says")),
    el("p", { class: "dim small" }, say(told.deep ? "deep" : "not_deep", bytes(told.bytes))),
    ...health.lines(health.verify(told)),
    el("h2", {}, say("doctor_says")), ...health.lines(told.findings.map(health.finding)),
    el("h2", {}, say("configuration")), ...health.configuration(told),
    el("h2", {}, say("versions")), health.versions(told));
};

health.problems = function (told) {
  return told.checkpoints.filter((each) => each.reason).length + told.files.length +
    told.journals.reduce((sum, each) => sum + each.problems.length, 0) +
    told.findings.filter((each) => each.level === "problem").length;
};

health.verdict = function (told) {
  const count = health.problems(told);
  const words = count ? say("problems", count) : say("all_well");
  return el("section", { class: "card" }, el("p", { class: `big ${count ? "bad" : "good"}` }, words));
};

/** Problems first; of many lines, those that say that something is well can be unfolded. */
health.lines = function (lines) {
  const bad = (line) => line.querySelector(".level.bad, .level.warn");
  const sorted = [...lines.filter(bad), ...lines.filter((line) => !bad(line))];
  const most = Math.max(MOST_LINES, lines.filter(bad).length);
  const rest = sorted.slice(most);
  const folded = rest.length ? [el("details", {}, el("summary", {}, say("more_lines", rest.length)), rest)] : [];
  return [...sorted.slice(0, most), ...folded];
};

health.line = function (good, what, text) {
  return el("div", { class: "finding" },
    el("span", { class: `level ${good ? "good" : "bad"}` }, say(good ? "ok" : "problem")), what, ": ", shown(text));
};

health.verify = function (told) {
  const checkpoint = ({ position, reason }) =>
    health.line(!reason, `${say("checkpoint")} ${position}`, reason || say("valid"));
  const journal = ({ rank, problems, torn }) => {
    const what = say("journal_of", rank);
    if (problems.length) return problems.map((line) => health.line(false, what, line));
    return [health.line(true, what, torn.length ? `${say("valid")}; ${say("torn")}: ${torn.join("; ")}` : say("valid"))];
  };
  return [
    ...told.checkpoints.map(checkpoint),
    ...told.journals.flatMap(journal),
    ...told.files.map((each) => health.line(false, shown(each.file), each.reason)),
  ];
};

health.finding = function (each) {
  const shade = { ok: "good", note: "warn", problem: "bad" }[each.level];
  return el("div", { class: "finding" },
    el("span", { class: `level ${shade}` }, say(each.level)), each.check, ": ", shown(each.text),
    each.hint && each.level !== "ok" ? el("div", { class: "dim small" }, say("try"), " ", shown(each.hint)) : null);
};

health.configuration = function (told) {
  if (!told.configurations.length) return [el("p", { class: "dim" }, say("no_configuration"))];
  const changes = told.configurations.slice(1).map((each) => el("div", { class: "finding" },
    el("strong", {}, say("changed_at", each.start)), each.changed.map((line) => el("div", { class: "small" }, shown(line)))));
  const newest = told.configurations[told.configurations.length - 1];
  const keys = Object.entries(newest.keys);
  const rows = el("div", {});
  const fillRows = () => {
    const kept = keys.filter(([name, value]) => `${name} ${value}`.toLowerCase().includes(health.filter));
    const cells = kept.map(([name, value]) => [shown(name), shown(value)]);
    rows.replaceChildren(table([say("key"), say("value")], cells, ["", ""]));
  };
  const filter = el("input", {
    type: "search", value: health.filter, placeholder: say("filter_keys"), "aria-label": say("filter_keys"),
    oninput: () => { health.filter = filter.value.toLowerCase(); fillRows(); },
  });
  fillRows();
  return [
    ...(changes.length ? changes : [el("p", { class: "dim" }, say("never_changed"))]),
    el("details", { open: keys.length < 15 }, el("summary", {}, say("all_keys", keys.length, newest.start)), filter, rows),
  ];
};

health.versions = function (told) {
  const names = [...new Set(told.versions.flatMap((each) => Object.keys(each.versions)))];
  const of = (each, name) => each.versions[name] ?? "–";
  return table([say("component"), ...told.versions.map((each) => say("start_n", each.start))], names.map((name) => [
    shown(name), ...told.versions.map((each, at) => {
      const changed = at > 0 && of(each, name) !== of(told.versions[at - 1], name);
      return el("span", { class: changed ? "warn" : "" }, shown(of(each, name)), changed ? ` ${say("changed")}` : "");
    }),
  ]));
};
