// Rollouts: what the model wrote, step by step; sorted, filtered, and two steps side by side.

const rollouts = {
  run: 0, step: "last", other: "", sort: "lowest", filter: "", ended: "all", low: null, high: null, most: 30,
};
/** A text of more characters, or of more lines than fit, is folded. */
const FOLDED = 1500;

rollouts.build = function (panel) {
  const change = (name) => (value) => { rollouts[name] = value; rollouts.most = 30; rollouts.draw(); };
  const number = (name, label) => {
    const input = el("input", { type: "number", step: "any", "aria-label": label, placeholder: label,
      oninput: () => change(name)(input.value === "" ? null : Number(input.value)) });
    return input;
  };
  const [step, steps] = choice(say("step"), [], "last", change("step"));
  const [other, others] = choice(say("compare_with"), [], "", change("other"));
  const sorts = ["lowest", "highest", "longest", "order"].map((key) => [key, say(`sort_${key}`)]);
  const [sort] = choice(say("sort"), sorts, "lowest", change("sort"));
  const endings = ["all", "stopped", "cut"].map((key) => [key, say(`ended_${key}`)]);
  const [ending] = choice(say("ended"), endings, "all", change("ended"));
  const text = el("input", { type: "search", placeholder: say("filter_text"), "aria-label": say("filter_text"),
    oninput: () => change("filter")(text.value.toLowerCase()) });
  const move = (by) => () => {
    const at = steps.selectedIndex + by;
    if (at >= 0 && at < steps.options.length) change("step")(steps.value = steps.options[at].value);
  };
  Object.assign(rollouts, { steps, others, rule: el("p", { class: "dim small" }), list: el("div", {}) });
  panel.append(
    el("div", { class: "controls" },
      runChoice((run) => { Object.assign(rollouts, { run, step: "last", other: "" }); rollouts.draw(); }),
      step,
      el("button", { type: "button", title: say("newer"), "aria-label": say("newer"), onclick: move(-1) }, "◀"),
      el("button", { type: "button", title: say("older"), "aria-label": say("older"), onclick: move(1) }, "▶"),
      other),
    el("div", { class: "controls" }, sort, ending,
      el("span", { class: "key" }, say("reward_range"), number("low", say("at_least")), number("high", say("at_most"))), text),
    rollouts.rule, rollouts.list);
};

/** The steps that the page has, newest first. */
rollouts.available = function () {
  const prefix = `${rollouts.run}/rollouts/`;
  const names = Object.keys(page.parts).filter((name) => name.startsWith(prefix));
  return names.map((name) => page.parts[name]).sort((a, b) => b.step - a.step);
};

rollouts.draw = function () {
  const about = part(rollouts.run, "rollouts");
  const there = rollouts.available();
  if (!about || about.error || !there.length) {
    rollouts.rule.replaceChildren(about?.error ? failed(about) : say(about ? "no_rollouts" : "reading"));
    rollouts.list.replaceChildren(...rollouts.problems(about));
    rollouts.drawn = null;
    return;
  }
  const [one, other] = rollouts.chosen(there);
  const rule = say(about.all ? "rule_all" : "rule_some", there.length, about.there, about.first, about.last);
  const part_of = one.groups.length < one.of ? ` ${say("rule_groups", one.groups.length, one.of)}` : "";
  rollouts.rule.textContent = rule + part_of;
  const asked = JSON.stringify(["run", "sort", "filter", "ended", "low", "high", "most"].map((name) => rollouts[name]));
  // A page that follows a run must not fold again what somebody is reading.
  if (rollouts.drawn?.one === one && rollouts.drawn.other === other && rollouts.drawn.asked === asked) return;
  rollouts.drawn = { one, other, asked };
  rollouts.show(one, other);
  rollouts.list.append(...rollouts.problems(about));
};

rollouts.words = function (step) {
  return say("step_n", figure(step.step), step.position);
};

/** The step to show, and the one to compare it with, as the lists say; the lists offer what there is. */
rollouts.chosen = function (there) {
  const { words } = rollouts;
  const older = there.slice(1).map((step) => [step.position, words(step)]);
  if (!older.some(([position]) => position === rollouts.step)) rollouts.step = "last";
  fill(rollouts.steps, [["last", say("last_step", words(there[0]))], ...older], rollouts.step);
  const one = there.find((step) => step.position === rollouts.step) ?? there[0];
  const prompts = new Set(one.groups.map((group) => group.prompt));
  const common = there.filter((step) => step !== one)
    .map((step) => [step, step.groups.filter((group) => prompts.has(group.prompt)).length])
    .filter(([, count]) => count);
  if (!common.some(([step]) => step.position === rollouts.other)) rollouts.other = "";
  const offered = common.map(([step, count]) => [step.position, say("in_common", words(step), count)]);
  fill(rollouts.others, [["", say(common.length ? "nothing" : "no_other")], ...offered], rollouts.other);
  return [one, there.find((step) => step.position === rollouts.other)];
};

rollouts.show = function (one, other) {
  const { words } = rollouts;
  const cards = other
    ? rollouts.sideBySide(one, other)
    : rollouts.sorted(one.groups).map((group) => () => rollouts.group(group, one.verifiers));
  const heading = other ? say("compared", cards.length, words(one), words(other)) : say("shown", cards.length, rollouts.count);
  const rest = cards.length - rollouts.most;
  const more = el("button", { type: "button" }, say("show_more", rest));
  more.onclick = () => {
    rollouts.most += 100;
    rollouts.draw();
  };
  rollouts.list.replaceChildren(
    el("p", { class: "dim small" }, heading), ...cards.slice(0, rollouts.most).map((card) => card()), rest > 0 ? more : "");
};

rollouts.problems = function (about) {
  return (about?.problems ?? []).map((line) => el("p", { class: "warn small finding" }, shown(line)));
};

/** The groups with the completions that the filters leave, in the chosen order. */
rollouts.sorted = function (groups) {
  const { filter, ended, low, high, sort } = rollouts;
  const fits = (group) => (each) =>
    (!filter || each.text.toLowerCase().includes(filter) || group.prompt.toLowerCase().includes(filter)) &&
    (ended === "all" || each.stopped === (ended === "stopped")) &&
    (low === null || each.reward >= low) && (high === null || each.reward <= high);
  const order = {
    lowest: (a, b) => a.reward - b.reward, highest: (a, b) => b.reward - a.reward,
    longest: (a, b) => b.tokens - a.tokens, order: () => 0,
  }[sort];
  const found = groups
    .map((group) => ({ ...group, all: group.completions, completions: group.completions.filter(fits(group)) }))
    .filter((group) => group.completions.sort(order).length);
  rollouts.count = found.reduce((sum, group) => sum + group.completions.length, 0);
  return found.sort((a, b) => order(a.completions[0], b.completions[0]));
};

rollouts.mean = function (group) {
  const all = group.all ?? group.completions;
  return all.reduce((sum, each) => sum + each.reward, 0) / all.length;
};

rollouts.group = function (group, verifiers) {
  const about = say("group_about", ...group.where, group.all.length, figure(rollouts.mean(group)));
  return el("section", { class: "card group" },
    el("p", { class: "dim small" }, about),
    rollouts.text(group.prompt, group.more, "prompt"),
    rollouts.completions(group.completions, verifiers));
};

/** Completions that say the same and ended alike are shown once, with their number. */
rollouts.completions = function (completions, verifiers) {
  const found = new Map();
  for (const each of completions) {
    const same = JSON.stringify([each.text, each.more, each.reward, each.rewards, each.stopped]);
    if (found.has(same)) found.get(same).times += 1;
    else found.set(same, { ...each, times: 1 });
  }
  return [...found.values()].map((each) => rollouts.completion(each, verifiers));
};

rollouts.completion = function (each, verifiers) {
  const several = verifiers.length > 1 || (verifiers.length === 1 && each.rewards[0] !== each.reward);
  return el("div", { class: "completion" },
    el("div", { class: "about numbers" },
      el("strong", {}, say("reward_is", figure(each.reward))),
      each.times > 1 ? el("span", {}, say("times", each.times)) : null,
      several ? verifiers.map((name, at) => el("span", {}, shown(name), ` ${figure(each.rewards[at])}`)) : null,
      each.advantage === null ? null : el("span", {}, say("advantage_is", figure(each.advantage))),
      each.tokens ? el("span", {}, say("tokens_are", figure(each.tokens))) : null,
      el("span", { class: each.stopped ? "" : "warn" }, say(each.stopped ? "did_stop" : "was_cut"))),
    each.text ? rollouts.text(each.text, each.more, "text") : el("p", { class: "dim" }, say("empty")));
};

/** A text; a long one is folded, and a huge one put into the page only when it is asked for. */
rollouts.text = function (text, more, kind) {
  const cut = more ? el("p", { class: "dim small" }, say("more_characters", figure(more))) : null;
  if (text.length < FOLDED && text.split("\n").length < 15) {
    return [el("div", { class: kind }, shown(text, rollouts.filter)), cut];
  }
  const body = el("div", { class: `${kind} folded` }, shown(text.slice(0, 2 * FOLDED), rollouts.filter));
  const button = el("button", { type: "button", "aria-expanded": "false", onclick: () => {
    const open = body.classList.toggle("folded");
    body.replaceChildren(...[shown(open ? text.slice(0, 2 * FOLDED) : text, rollouts.filter)].flat(Infinity));
    button.textContent = say(open ? "unfold" : "fold", figure(text.length));
    button.setAttribute("aria-expanded", String(!open));
  } }, say("unfold", figure(text.length)));
  return [body, button, cut];
};

/** The prompts that two steps have in common, the largest change of the mean reward first. */
rollouts.sideBySide = function (one, other) {
  const before = new Map(other.groups.map((group) => [group.prompt, group]));
  const common = rollouts.sorted(one.groups).filter((group) => before.has(group.prompt));
  const pairs = common.map((group) => [group, before.get(group.prompt)]);
  const change = ([now, then]) => rollouts.mean(now) - rollouts.mean(then);
  const [first, second] = one.step < other.step ? [one, other] : [other, one];
  return pairs.sort((a, b) => Math.abs(change(b)) - Math.abs(change(a))).map(([now, then]) => () => {
    const of = new Map([[one, now], [other, then]]);
    const side = (step) => el("div", {},
      el("h3", {}, rollouts.words(step), " · ", say("mean_is", figure(rollouts.mean(of.get(step))))),
      rollouts.sorted([of.get(step)]).map((group) => rollouts.completions(group.completions, step.verifiers)));
    return el("section", { class: "card group" }, rollouts.text(now.prompt, now.more, "prompt"),
      el("div", { class: "sides" }, side(first), side(second)));
  });
};
