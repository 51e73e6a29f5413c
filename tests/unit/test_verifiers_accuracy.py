"""Where answers are found, which of them count, and what form earns a reward."""

import json
import runpy
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from rollforward.verifiers.accuracy import accuracy_reward, is_correct
from rollforward.verifiers.extraction import find_answer, last_number, marked_answer, parse_number
from rollforward.verifiers.format import format_reward

PAIRS = Path(__file__).parents[1] / "golden/answers/pairs.jsonl"


def pairs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def test_every_pair_of_the_table_has_its_verdict() -> None:
    """Over a thousand completions in the forms of GSM8K, MATH, DAPO and Countdown."""
    table = pairs()
    assert len(table) > 1000
    differing = [row for row in table if is_correct(row["completion"], row["expected"]) is not row["right"]]
    assert not differing


def test_what_is_right_in_the_table_is_right_within_each_markup() -> None:
    """Completions and expected answers pass through the same normalisation: both ways round."""
    writings = {row["expected"] for row in pairs() if row["right"] and "\n" not in row["expected"]}
    for writing in sorted(writings):
        for markup in (
            "%s",
            "\\boxed{%s}",
            "<answer>%s</answer>",
            "#### %s",
            "$%s$",
            "<answer>\\boxed{%s}</answer>",
        ):
            if markup == "$%s$" and "$" in writing.replace("\\$", ""):
                continue
            assert is_correct(f"It is \\boxed{{{writing}}}", markup % writing), (writing, markup)
            assert is_correct(markup % writing, writing), (writing, markup)


def test_the_table_is_what_its_script_makes() -> None:
    made = runpy.run_path(str(PAIRS.with_name("make.py")))["rows"]()
    assert [tuple(row.values()) for row in pairs()] == list(made)


@pytest.mark.parametrize(
    ("text", "prompt", "found", "kind"),
    [
        ("\\boxed{7", "", "", "unfinished"),
        ("7 \\boxed", "", "", "unfinished"),
        ("\\boxed{6} then \\boxed{7", "", "", "unfinished"),
        ("<answer>7", "", "", "unfinished"),
        ("<answer>6</answer><answer>7", "", "", "unfinished"),
        ("<think>7", "", "", "unfinished"),
        ("7", "Think.<think>\n", "", "unfinished"),
        ("7</think>8", "Think.<think>\n", "8", "text"),
        ("8", "Do not think.<think>\n\n</think>\n\n", "8", "text"),
        ("7</answer>", "Go on: <answer>", "7", "tag"),
        ("7", "Go on: <answer>", "", "unfinished"),
        ("7}$.", "Go on: $\\boxed{", "7", "box"),
        ("\\boxed{\\left\\{1\\right\\}}", "", "\\left\\{1\\right\\}", "box"),
        ("\\boxed 7.", "", "7", "box"),
        ("#### 2. Second step\nIt is 7", "", "#### 2. Second step\nIt is 7", "text"),
        ("Answer:", "", "", "unfinished"),
        ("Answer: 7\nDone", "", "7", "sentence"),
    ],
)
def test_what_is_unfinished_is_not_answered(text: str, prompt: str, found: str, kind: str) -> None:
    answer = find_answer(text, prompt)
    assert (answer.text, answer.kind) == (found, kind)


def test_a_reward_knows_what_the_prompt_has_begun() -> None:
    rewards = accuracy_reward(
        prompts=["1+2=", "<think>\n", "<think>\n", "<answer>"],
        completions=["3", "3", "1+2</think>3", "3</answer>"],
        answer=["3"] * 4,
    )
    assert rewards == [1.0, 0.0, 1.0, 1.0]


def documented() -> list[tuple[str, str, str]]:
    """The examples of docs/reference/rewards.md: completion, expected, reward."""
    page = Path(__file__).parents[2] / "docs/reference/rewards.md"
    rows = [
        line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    return [tuple(cell.strip("| ").strip("`").strip() for cell in row) for row in rows if len(row) == 3]  # type: ignore[misc]


@pytest.mark.parametrize(("completion", "expected", "reward"), documented())
def test_the_documented_example_is_rewarded_as_documented(
    completion: str, expected: str, reward: str
) -> None:
    assert is_correct(completion.replace("⏎", "\n"), expected.replace("⏎", "\n")) is (reward == "1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{1} no, \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("<answer>3</answer> wait <answer> 4\n</answer>", "4"),
        ("<answer>3</answer> \\boxed{5}", "5"),
        ("#### 7\n#### 8 \nbye", "8"),
        ("nothing is marked here: 9", None),
        ("cut off \\boxed{12", None),
        ("<answer>cut off", None),
        ("####", ""),
    ],
)
def test_the_last_mark_of_the_strongest_kind_is_the_answer(text: str, expected: str | None) -> None:
    assert marked_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" 1,234,567 ", Fraction(1234567)),
        ("-0.50", Fraction(-1, 2)),
        ("−3", Fraction(-3)),
        ("+7.", Fraction(7)),
        ("$12", Fraction(12)),
        ("3/4", Fraction(3, 4)),
        ("1e3", Fraction(1000)),
        (".25", Fraction(1, 4)),
        ("1,23", None),
        ("3/0", None),
        ("12%", None),
        ("twelve", None),
        ("1 2", None),
        ("", None),
        ("1e9999999", None),
        ("9" * 5000, None),
    ],
)
def test_numbers_are_read_exactly_or_not_at_all(text: str, value: Fraction | None) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5-3=2", Fraction(2)),
        ("it is 10-3", Fraction(3)),
        ("so x = -3.", Fraction(-3)),
        ("first 4, then 1,200", Fraction(1200)),
        ("about 12km", Fraction(12)),
        ("1.5x", None),
        ("v2 of it", None),
        ("", None),
    ],
)
def test_the_last_number_of_running_text(text: str, value: Fraction | None) -> None:
    assert last_number(text) == value


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("19", "19", True),
        (" 19\n", "19.0", True),
        ("12+7=19", "19", True),
        ("19 or 20", "19", False),
        ("190", "19", False),
        ("", "19", False),
        ("0.1", "1/10", True),
        ("0.3333333333333333", "1/3", False),
        ("123456789012345679", "123456789012345678", False),
        ("I say 5. #### 6", "5", False),
        ("<answer>six</answer> 5", "5", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", True),
        ("\\boxed{x^2+2x}", "(x+1)^2", False),
        ("$\\sqrt{8}$", "2\\sqrt{2}", True),
        ("so we find $x=3$", "x=3", True),
        ("Paris", "Paris", True),
        ("Siena", "Inase", False),
        ("", "Paris", False),
    ],
)
def test_the_right_answer_and_no_other_is_rewarded(completion: str, answer: str, right: bool) -> None:
    assert is_correct(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>two and two</think>\n<answer>4</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<answer>4</answer><think>two</think>", 0.0),
        ("<think>two</think><answer>4</answer> and more", 0.0),
        ("<think>two</think> so <answer>4</answer>", 0.0),
        ("<think>a<think>b</think><answer>4</answer>", 0.0),
        ("<think>two</think><answer>4", 0.0),
        ("4", 0.0),
    ],
)
def test_only_the_asked_for_format_is_rewarded(completion: str, reward: float) -> None:
    assert format_reward(prompts=[""], completions=[completion], answer=["4"]) == [reward]


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        ("<think>\n", "1+2\n</think><answer>3</answer>", 1.0),
        ("User: 1+2?<|im_start|>assistant\n<think>\n", "easy</think>\n\n<answer>3</answer>", 1.0),
        ("<think>\n", "<think>1+2</think><answer>3</answer>", 1.0),
        ("<think>\n\n</think>\n\n", "<answer>3</answer>", 1.0),
        ("<think>\n", "1+2</think>", 0.0),
        ("<think>\n", "1+2</think><answer>3", 0.0),
        ("<think>\n", "<answer>3</answer>", 0.0),
        ("<think>\n", "1</think>2</think><answer>3</answer>", 0.0),
        ("Think in <think> and answer.", "1+2</think><answer>3</answer>", 0.0),
        ("", "1+2</think><answer>3</answer>", 0.0),
    ],
)
def test_what_the_prompt_has_begun_counts_for_the_format(prompt: str, completion: str, reward: float) -> None:
    assert format_reward(prompts=[prompt], completions=[completion], answer=["3"]) == [reward]


@pytest.mark.slow
def test_every_difference_from_math_verify_has_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    compare = runpy.run_path(str(PAIRS.with_name("compare.py")))["main"]
    assert compare() == 0, capsys.readouterr().out
