"""Where answers are found, which of them count, and what form earns a reward."""

from fractions import Fraction

import pytest

from rollforward.verifiers.accuracy import is_correct
from rollforward.verifiers.extraction import last_number, marked_answer, parse_number
from rollforward.verifiers.format import format_reward


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
