// The page: a heading, a tab for each view, and, when it is served, news of the runs.

const VIEWS = { curves, timeline, rollouts, health };
const NEWS_EVERY = 2000;

function start() {
  const tabs = {};
  const panels = {};
  const show = (name) => {
    for (const each of Object.keys(VIEWS)) {
      tabs[each].setAttribute("aria-selected", String(each === name));
      tabs[each].tabIndex = each === name ? 0 : -1;
      panels[each].hidden = each !== name;
    }
    showing = name;
    if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
    drawIfStale(name);
  };
  for (const [at, name] of Object.keys(VIEWS).entries()) {
    tabs[name] = el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `view-${name}`,
      onclick: () => show(name), onkeydown: (event) => step(event, at) }, say(`view_${name}`));
    panels[name] = el("div", { role: "tabpanel", id: `view-${name}`, "aria-labelledby": `tab-${name}`, hidden: true });
    VIEWS[name].build(panels[name]);
  }
  const step = (event, at) => {
    const names = Object.keys(VIEWS);
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const next = names[(at + by + names.length) % names.length];
    tabs[next].focus();
    show(next);
  };
  document.getElementById("top").append(
    el("div", { class: "heading" }, el("h1", {}, say("title")),
      page.runs.map((run) => el("span", { class: "dim", title: run.folder }, run.name)),
      status),
    el("div", { role: "tablist", "aria-label": say("views") }, Object.values(tabs)));
  document.getElementById("views").append(...Object.values(panels));
  document.title = `${page.runs.map((run) => run.name).join(", ")} – ${say("title")}`;
  status.textContent = page.live ? say("live") : say("made", page.made.slice(0, 16).replace("T", " "), page.version);
  const wanted = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "curves");
  show(wanted());
  addEventListener("hashchange", () => show(wanted()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(Object.keys(VIEWS)));
  if (page.live) setTimeout(news, NEWS_EVERY);
}

const status = el("span", { class: "dim small", role: "status" });
const stale = new Set(Object.keys(VIEWS));
let showing = "curves";

function drawIfStale(name) {
  if (stale.delete(name)) VIEWS[name].draw();
}

function redraw(names) {
  for (const name of names) stale.add(name);
  drawIfStale(showing);
}

/** Which views show a part: marks on the curves are from the timeline, states of checkpoints from health. */
const SHOWN_IN = {
  curves: ["curves"], timeline: ["curves", "timeline"], rollouts: ["rollouts"], health: ["curves", "timeline", "health"],
};

async function news() {
  try {
    const answer = await fetch(`/data?session=${page.session}&after=${page.after}`);
    if (!answer.ok) throw new Error(answer.statusText);
    const told = await answer.json();
    const gone = Object.keys(page.parts).filter((name) => !told.names.includes(name));
    const changed = [...gone, ...Object.keys(told.parts)].map((name) => name.split("/")[1]);
    for (const name of gone) delete page.parts[name];
    Object.assign(page.parts, told.parts);
    Object.assign(page, { session: told.session, after: told.after });
    redraw(new Set(changed.flatMap((name) => SHOWN_IN[name])));
    status.textContent = say("live");
    status.className = "dim small";
  } catch {
    status.textContent = say("server_gone");
    status.className = "bad small";
  }
  setTimeout(news, NEWS_EVERY);
}

async function open() {
  const [library, data] = await Promise.all([unpack("library"), unpack("data")]);
  page = JSON.parse(data);
  document.body.append(el("script", {}, library));
  start();
}

open();
