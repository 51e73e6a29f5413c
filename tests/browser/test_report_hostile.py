"""Whatever a completion, a name or a folder says is shown as text: it never becomes markup or script."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Browser

import rollforward

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'><style>body { display: none }</style>",
    '"}]};window.hacked = 1;//',
    "<a href='javascript:window.hacked = 1'>a</a>",
    "]]><!-- -->",
    "{{constructor.constructor('window.hacked = 1')()}} ${window.hacked = 1}",
]
SHOWN = {
    "one\u2028two\u2029three": "one\\u2028two\\u2029three",
    "a lone \ud800 surrogate": "a lone \\ud800 surrogate",
    "\x1b[2J\x1b[31mred": "\\x1b[2J\\x1b[31mred",
    "right \u202eto left\u2066": "right \\u202eto left\\u2066",
    "\x00 and \r": "\\x00 and \\x0d",
    "an emoji \U0001f600 is a character": "an emoji \U0001f600 is a character",
}
"""What would act on the reader's screen -> what is shown in its place."""
LONG = "long " * 200_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "<i>save</i>"  # a slash in it: two folders
    completions = [*HOSTILE, *SHOWN, LONG]
    info: dict[str, Any] = {
        "prompts": [f"{text[:300]} {number}" for number, text in enumerate(completions)],
        "completions": completions,
        "rewards": {
            "<img src=x onerror='window.hacked=1'>": [float(number) for number in range(len(completions))]
        },
        "advantages": [0.0] * len(completions),
    }
    tensors = {"policy": {"w": np.zeros(2, dtype=np.float32)}}
    facts = {"<script>window.hacked = 1</script>": "</style><script>window.hacked = 1</script>"}
    with rollforward.open_run(folder, facts=facts, log=lambda _: None) as loop:
        loop.restore(tensors)
        for step in range(3):
            loop.once(step, "rollouts", lambda: (np.zeros(1), info))
            with loop.updating(step):
                tensors["policy"]["w"] += 1
            loop.outcome(step, loss=0.0)
            loop.metrics(
                step, **{"reward": 1.0, "<a href='javascript:window.hacked=1'>figure</a>": 1.0 + step}
            )
        loop.checkpoint(3, tensors)
    return folder


@pytest.fixture
def page(browser: Browser, run: Path, report: Callable[..., Path]) -> Browser:
    browser.open(report(run, options=("--language", "en", "--all_rollouts", "0_2")))
    return browser


def test_completions_are_shown_as_they_are(page: Browser) -> None:
    page.view("rollouts")
    shown = page.texts("#view-rollouts .completion .text")
    assert [text for text in shown if text in HOSTILE] == HOSTILE, "lowest reward first, as they were made"
    assert set(SHOWN.values()) <= set(shown)
    inside = page.run(
        "return [...document.querySelectorAll('.text *, .prompt *')]"
        ".map((each) => each.outerHTML.slice(0, 22))"
    )
    assert all(each == '<span class="control">' for each in inside)
    hold(page)


def test_a_completion_of_a_megabyte_is_folded_and_opens(page: Browser) -> None:
    page.view("rollouts")
    page.choose("Sort", "highest")
    assert page.texts("#view-rollouts .completion .text")[0] == LONG[:3000]
    button = page.one("#view-rollouts .completion button")
    assert button.text == "Show all 1,000,000 characters"
    button.click()
    assert page.texts("#view-rollouts .completion .text")[0] == LONG
    hold(page)


def test_names_of_figures_folders_and_keys_are_text_too(page: Browser) -> None:
    page.one("#view-curves details summary").click()
    page.wait(lambda: "<a href='javascript:window.hacked=1'>figure</a>" in page.texts(".chart h3"))
    assert page.texts("header .heading span")[0] == "<i>save</i>"
    page.view("timeline")
    page.view("health")
    page.one("#view-health details summary") if not page.all("#view-health tbody tr") else None
    assert any("</style><script>" in text for text in page.texts("#view-health tbody tr"))
    hold(page)


def test_two_steps_are_compared_side_by_side(page: Browser) -> None:
    page.view("rollouts")
    page.choose("Compare with", "0_0")
    sides = page.all("#view-rollouts .sides > div")
    assert len(sides) == 2 * (len(HOSTILE) + len(SHOWN) + 1)
    assert [side.find_element("css selector", "h3").text[:6] for side in sides[:2]] == ["step 0", "step 2"]
    page.picture("hostile-compared-1280")
    hold(page)


def test_the_policy_stops_what_should_ever_get_through(page: Browser) -> None:
    """Were there a hole, the browser would still refuse: a script, a handler, an address put in by force."""
    page.run(
        """
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src='x.png' onerror='window.hacked = 1'>");
        """
    )
    refused: list[str] = []
    page.wait(lambda: refused.extend(page.console()) or len(refused) >= 3)
    hold(page)
    for what in ("Executing inline script", "Loading the image", "Executing inline event handler"):
        assert any(what in line and "Content Security Policy" in line for line in refused), (what, refused)


def hold(page: Browser) -> None:
    assert page.run("return window.hacked") is None
    assert page.run("return document.querySelectorAll('img, a, iframe, object, form').length") in (0, 1)
    assert page.run("return document.title").startswith("<i>save</i>")
