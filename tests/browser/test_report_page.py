"""The report page in Chromium: every view, at two sizes, of the example's run and of a damaged one."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from chromium import PICTURES, Browser
from example_run import STEPS
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from rollforward.inspection.history import read_past, timeline
from rollforward.inspection.report import past
from rollforward.inspection.report.curves import read_figures
from rollforward.inspection.rollouts import read_texts, worst
from rollforward.position import Position
from rollforward.replay.metrics import FILE, read
from rollforward.storage import LocalStorage

VIEWS = ("curves", "timeline", "rollouts", "health")
Report = Callable[..., Path]


@pytest.fixture(scope="module")
def page(example: Path, report: Report) -> Path:
    return report(example)


def points(browser: Browser, chart: str) -> tuple[list[float], list[float]]:
    """What a chart draws as its curve: x and y."""
    found = browser.run(
        """
        const section = [...document.querySelectorAll(".chart")]
            .find((each) => each.querySelector("h3").textContent === arguments[0]);
        const trace = section.querySelector(".plot").data.find((each) => each.walked);
        return [[...trace.x], [...trace.y]];
        """,
        chart,
    )
    return found[0], found[1]


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (390, 844, True)])
@pytest.mark.parametrize("view", VIEWS)
def test_each_view_fits_the_window_and_is_kept_as_a_picture(
    browser: Browser,
    page: Path,
    damaged: Path,
    report: Report,
    view: str,
    width: int,
    height: int,
    dark: bool,
) -> None:
    browser.size(width, height, dark=dark)
    for name, file in (("example", page), ("damaged", report(damaged))):
        browser.open(file, view)
        browser.wait(lambda: browser.one(f"#view-{view}").text)
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        picture = browser.picture(f"{name}-{view}-{width}")
        assert picture.stat().st_size > 10_000


def test_curves_are_the_figures_of_the_run(browser: Browser, page: Path, example: Path) -> None:
    browser.open(page)
    records = read(example / FILE)
    titles = browser.texts("#view-curves .chart h3")
    assert len(titles) == 9
    for title, name in (
        ("Loss", "loss"),
        ("Gradient norm", "grad_norm"),
        ("Tokens per second", "tokens_per_second"),
    ):
        x, y = points(browser, title)
        assert x == list(range(STEPS))
        assert y == pytest.approx([record[name] for record in records], rel=1e-6)
    browser.choose("Against", "time")
    x, _ = points(browser, "Loss")
    assert x == pytest.approx([record["time"] - records[0]["time"] for record in records], abs=1e-3)


def test_smoothing_keeps_the_beginning_and_calms_the_rest(browser: Browser, page: Path) -> None:
    browser.open(page)
    _, raw = points(browser, "Loss")
    browser.run(
        "const range = document.querySelector('input[type=range]');"
        "range.value = 0.8; range.dispatchEvent(new Event('input'));"
    )
    _, smooth = points(browser, "Loss")
    assert smooth[0] == pytest.approx(raw[0])

    def unrest(values: list[float]) -> float:
        return sum(abs(after - before) for before, after in itertools.pairwise(values))

    assert unrest(smooth) < unrest(raw) / 2


def test_kills_and_what_they_cost_are_marked_on_the_axis(browser: Browser, page: Path, example: Path) -> None:
    browser.open(page)
    plot = browser.one("#view-curves .plot")
    texts = browser.run("return arguments[0].data.find((each) => each.yaxis === 'y2').text", plot)
    ends = [text for text in texts if "was killed or stopped" in text]
    storage = LocalStorage(example)
    reports = read_past(storage).reports
    assert len(ends) == 2
    for end, found in zip(ends, reports.values(), strict=True):
        assert f"{found.steps_replayed} steps replayed" in end
        assert "nothing lost" in end
        seconds = float(re.findall(r"<br>([\d.]+) s from its restart to the first new step", end)[0])
        assert seconds == pytest.approx(found.seconds["total"], abs=0.06)
    lines = "return arguments[0].layout.shapes.filter((each) => each.type === 'line').map((each) => each.x0)"
    killed, again = browser.run(lines, plot)
    assert killed < again
    across = "const of = arguments[0]._fullLayout; return of.xaxis.l2p(arguments[1]) + of._size.l"
    left = browser.run(across, plot, killed) - plot.size["width"] / 2
    ActionChains(browser.driver).move_to_element_with_offset(plot, round(left), 0).perform()
    browser.wait(lambda: "nothing lost" in browser.one("#view-curves .plot .hoverlayer").text)
    browser.one("#view-curves input[type=checkbox]").click()
    assert browser.run("return (arguments[0].layout.shapes ?? []).length", plot) == 0


def test_one_zoom_is_for_all_charts_and_can_be_undone(browser: Browser, page: Path) -> None:
    browser.open(page)
    plot = browser.one("#view-curves .plot")
    drag = ActionChains(browser.driver).move_to_element_with_offset(plot, -40, -20).click_and_hold()
    drag.move_by_offset(60, 0).release().perform()
    ranges = """
        return [...document.querySelectorAll('#view-curves .plot')]
            .filter((each) => each.layout).map((each) => each.layout.xaxis.range);
    """
    browser.wait(lambda: all(0 < low < high < STEPS - 1 for low, high in browser.run(ranges)))
    low, high = browser.run(ranges)[0]
    assert browser.run(ranges) == [[low, high]] * 9
    next(each for each in browser.all("button") if each.text == "Show all steps").click()
    browser.wait(lambda: all(high >= STEPS - 1 for _, high in browser.run(ranges)))


def test_runs_are_drawn_over_each_other_and_can_be_hidden(
    browser: Browser, example: Path, damaged: Path, report: Report
) -> None:
    browser.open(report(example, damaged))
    plot = browser.one("#view-curves .plot")
    drawn = "return arguments[0].data.filter((each) => each.walked).length"
    assert browser.run(drawn, plot) == 2
    browser.all("#view-curves .key input")[0].click()
    browser.wait(lambda: browser.run(drawn, plot) == 1)
    browser.picture("two-runs-curves-1280")


def test_the_timeline_says_what_the_verbs_say(browser: Browser, page: Path, example: Path) -> None:
    browser.open(page, "timeline")
    storage = LocalStorage(example)
    told = past.as_json(read_past(storage), read_figures(storage), 0.0)["goodput"]
    assert browser.texts("#view-timeline .big") == [f"{100 * told['useful'] / told['wall']:.1f} %"]
    starts, checkpoints, entries = browser.run(
        """
        return [...document.querySelectorAll("#view-timeline table")].map((table) =>
            [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent)));
        """
    )
    assert [row[0] for row in starts] == ["1", "2", "3"]
    assert ["was killed or stopped" in row[5] for row in starts] == [True, True, False]
    assert starts[2][5] == "finished"
    assert [row[4] for row in checkpoints if row[4] == "valid"], checkpoints
    assert [row[4] for row in entries] == [entry.text for entry in timeline(storage)]


def test_the_worst_completion_of_the_last_step_is_one_click_away(
    browser: Browser, page: Path, example: Path
) -> None:
    browser.open(page)
    browser.view("rollouts")
    (lowest,) = worst(read_texts(LocalStorage(example), Position(0, STEPS - 1)).samples, 1)
    first = browser.one("#view-rollouts .completion")
    assert first.find_element("css selector", "strong").text == f"reward {lowest.reward:g}"
    samples = read_texts(LocalStorage(example), Position(0, STEPS - 1)).samples
    assert first.find_element("css selector", ".text").text in {
        sample.completion for sample in samples if sample.reward == lowest.reward
    }


def test_rollouts_are_sorted_and_filtered(browser: Browser, page: Path, example: Path) -> None:
    browser.open(page, "rollouts")
    samples = read_texts(LocalStorage(example), Position(0, STEPS - 1)).samples

    def rewards() -> list[str]:
        return browser.texts("#view-rollouts .completion strong")

    def told() -> str:
        return browser.texts("#view-rollouts p.dim.small")[1]

    groups = len({sample.prompt_index for sample in samples})
    assert told() == f"{groups} prompts, {len(samples)} completions"
    assert rewards()[0] == f"reward {min(sample.reward for sample in samples):g}"
    browser.choose("Sort", "highest")
    assert rewards()[0] == f"reward {max(sample.reward for sample in samples):g}"
    browser.type("from", "1")
    right = [sample for sample in samples if sample.reward >= 1]
    assert set(rewards()) == {"reward 1"}
    assert told().endswith(f", {len(right)} completions")
    browser.type("from", "")
    browser.choose("Ended", "cut")
    cut = [sample for sample in samples if not sample.stopped]
    assert told().endswith(f", {len(cut)} completions")
    browser.choose("Ended", "all")
    word = right[0].completion[:3]
    browser.type("Text contains ...", word)
    found = [sample for sample in samples if word in sample.completion or word in sample.prompt]
    assert told().endswith(f", {len(found)} completions")
    assert {mark.lower() for mark in browser.texts("#view-rollouts mark")} == {word.lower()}
    browser.type("Text contains ...", "there is no such text")
    assert told() == "0 prompts, 0 completions"


def test_older_and_newer_steps_are_a_click_away(browser: Browser, page: Path) -> None:
    browser.open(page, "rollouts")
    browser.one("button[aria-label='older step']").click()
    chosen = browser.run(
        "return document.querySelector('#view-rollouts select').selectedOptions[0].textContent"
    )
    assert chosen == f"step {STEPS - 2} (0_{STEPS - 2})"
    browser.one("button[aria-label='newer step']").click()
    chosen = browser.run(
        "return document.querySelector('#view-rollouts select').selectedOptions[0].textContent"
    )
    assert chosen == f"last: step {STEPS - 1} (0_{STEPS - 1})"


def test_a_damaged_run_says_what_is_damaged(browser: Browser, damaged: Path, report: Report) -> None:
    browser.open(report(damaged), "health")
    assert re.fullmatch(r"Problems: \d+", browser.one("#view-health .big").text)
    problems = [text for text in browser.texts("#view-health .finding") if text.startswith("PROBLEM")]
    assert any("Checkpoint" in text for text in problems)
    assert any("journal of rank 0" in text for text in problems)
    browser.view("timeline")
    assert any(text.startswith("damaged") for text in browser.texts("#view-timeline td span.bad"))


def test_health_shows_the_configuration_and_what_changed(browser: Browser, page: Path) -> None:
    browser.open(page, "health")
    assert browser.one("#view-health .big").text == "No problem found"
    changed = [text for text in browser.texts("#view-health .finding") if text.startswith("Start 3 changed")]
    assert changed == ["Start 3 changedrl_config.save_max_ckpt_num changed from 3 to 4"]
    browser.one("#view-health details summary").click()
    browser.type("Key or value contains ...", "lr_schedule.lr")
    rows = browser.texts("#view-health details tbody tr")
    assert rows
    assert all("lr_schedule.lr" in row for row in rows)


def test_the_keyboard_is_enough(browser: Browser, page: Path) -> None:
    browser.open(page)
    body = browser.one("#tab-curves")
    body.send_keys(Keys.ARROW_RIGHT)
    assert browser.one("#view-timeline").is_displayed()
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert browser.one("#view-curves").is_displayed()
    _, loss = points(browser, "Loss")
    chart = next(each for each in browser.all(".chart") if "Loss" in each.text)
    plot = chart.find_element("css selector", ".plot")
    for _ in range(3):
        plot.send_keys(Keys.ARROW_RIGHT)
    said = chart.find_element("css selector", ".readout").text
    assert said.startswith("Step 2: ")
    assert float(said.removeprefix("Step 2: ")) == pytest.approx(loss[2], rel=1e-3)


def test_nothing_moves_while_the_page_comes_up(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.wait(lambda: browser.run("return document.querySelectorAll('.plot .main-svg').length > 9"))
    shifts = browser.run(
        """
        return new Promise((done) => {
            const sum = (list) => done(list.getEntries().reduce((total, each) => total + each.value, 0));
            new PerformanceObserver(sum).observe({ type: "layout-shift", buffered: true });
            setTimeout(() => done(0), 1000);
        });
        """
    )
    assert shifts < 0.02


def test_nothing_is_loaded_from_anywhere(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("return performance.getEntriesByType('resource').map((each) => each.name)") == []


def test_the_page_is_in_chinese_where_it_is_asked_for(
    browser: Browser, example: Path, report: Report
) -> None:
    browser.open(report(example, options=("--language", "zh")))
    assert browser.texts("[role=tab]") == ["曲线", "时间线", "采样结果", "健康检查"]
    assert browser.run("return document.documentElement.lang") == "zh-Hans"
    for view in VIEWS:
        browser.view(view)
        browser.wait(lambda view=view: browser.one(f"#view-{view}").text)
        browser.picture(f"chinese-{view}-1280")


def test_colours_can_be_told_apart_and_texts_can_be_read(browser: Browser, page: Path) -> None:
    """Contrast of the texts to their background, as WCAG 2 wants it for small text: 4.5 to 1."""
    for dark in (False, True):
        browser.size(1280, 900, dark=dark)
        browser.open(page)
        colours = browser.run(
            """
            const style = getComputedStyle(document.documentElement);
            return Object.fromEntries(["back", "card", "text", "dim", "good", "bad", "warn"]
                .map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
            """
        )
        for back in ("back", "card"):
            for name in ("text", "dim", "good", "bad", "warn"):
                assert contrast(colours[name], colours[back]) >= 4.5, (name, back, dark)


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_pictures_are_there() -> None:
    kept = {path.stem for path in PICTURES.glob("*.png")}
    assert {f"example-{view}-{width}" for view in VIEWS for width in (1280, 390)} <= kept
