r"""`accuracy_reward`: 1 for the right answer, 0 for any other.

The answer is found as `verifiers.extraction` says, both in the completion and in the expected
answer, and both are normalised (`verifiers.notation`). They are equal, by the first of these that
applies:

1. the same text or formula, except for spaces, and for capitals in words;
2. two numbers, exactly, as fractions: `\frac{3}{4}` is `0.75`, but `0.33` is not `\frac{1}{3}`. Units
   may be missing on one side; known ones must agree. `50%` is `50` and `0.5`;
3. lists, sets, tuples, intervals: the same brackets and equal parts, in any order in sets and lists;
4. an equation `x = 5` where the other side is not an equation: its right side;
5. anything else: math-verify decides (`verifiers.mathematics`, in bounded time).

Where nothing is marked and a number is expected, the last number of the text must be it.
docs/reference/rewards.md has an example of each.
"""

import re
from collections.abc import Sequence
from typing import Any

from rollforward.verifiers import mathematics
from rollforward.verifiers.exact import TooLarge
from rollforward.verifiers.extraction import find_answer, numbers_in
from rollforward.verifiers.mathematics import GaveUp
from rollforward.verifiers.notation import LONGEST, key, plain
from rollforward.verifiers.parts import only_member, parts_of, right_side
from rollforward.verifiers.quantities import Quantity, agree, quantity, without_unit

_QUESTIONS = 20
_WORD = re.compile(r"[^\W\d_]{2}")
# More than one answer (`17 or 18`, `between 17 and 18`), or the opposite of one (`not 18`).
_UNDECIDED = re.compile(r"\b(?:or|oder|either|between)\b|或|^\D*(?:\bnot\b|n't\b|不是)", re.IGNORECASE)
_RELATION = re.compile(r"[<>≠]|\\(?:[lg]eq?|neq?|[lg]t)(?![A-Za-z])|\d_\{?\d")
_OPERATOR = re.compile(r"\s*(?:[-+*/^=×÷,]|\\(?:times|cdot|div|sqrt|pi|frac))")


def accuracy_reward(
    *, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """1.0 for each completion whose answer is equal to the expected one, else 0.0."""
    del columns  # correctness is a matter of the completion and the answer
    return [
        float(is_correct(text, expected, prompt))
        for prompt, text, expected in zip(prompts, completions, answer, strict=True)
    ]


def is_correct(completion: str, expected: str, prompt: str = "") -> bool:
    """Whether the completion's answer is the expected one; the completion continues the prompt."""
    found, wanted = find_answer(completion, prompt), find_answer(expected).text or expected
    if not found.text:
        return False
    compare, target = Comparison(), plain(wanted)
    try:
        if found.kind == "text" and found.text != wanted.strip():
            return compare.prose(found.text, target)
        if compare.same(plain(found.text), target):
            return True
        # A box holds the answer alone; elsewhere it may be a sentence.
        return found.kind != "box" and _is_prose(found.text) and compare.prose(found.text, target, led=True)
    except (TooLarge, GaveUp):
        return False


class Comparison:
    """Compares one answer with another; math-verify is called a limited number of times in all.

    Raises TooLarge or GaveUp when no verdict was reached within the limits.
    """

    def __init__(self) -> None:
        self._asked = 0

    def same(self, given: str, expected: str) -> bool:
        """Whether two answers, both normalised, are equal."""
        given, expected = only_member(given), only_member(expected)
        if not given or not expected:
            return False
        if key(given) == key(expected) or _chosen(given, expected):
            return True
        if max(len(given), len(expected)) > LONGEST:
            return False
        numbers = quantity(given), quantity(expected)
        if numbers[0] is not None and numbers[1] is not None and agree(numbers[0], numbers[1]):
            return True
        parts = parts_of(given), parts_of(expected)
        if parts[0] is not None and parts[1] is not None:
            return parts[0].same(parts[1], self.same)
        if None not in numbers:
            return False
        if (parts[0] is None) != (parts[1] is None) and numbers != (None, None):
            return False  # a number is not a list
        if ("=" in given) != ("=" in expected):
            sides = right_side(given), right_side(expected)
            if sides != (None, None):
                return self.same(sides[0] or given, sides[1] or expected)
        if numbers[1] is not None and _RELATION.search(given):
            return False  # `x > 18` and `18_9` are not 18
        return self._mathematics(given, expected)

    def prose(self, text: str, target: str, *, led: bool = False) -> bool:
        """Whether running text gives this answer: by its last number, or its last formula.

        Text that is `led`, as what follows `Answer:` is, may begin with the answer and then explain it.
        """
        wanted, numbers = quantity(target), numbers_in(text)
        if wanted is not None and numbers:
            return _number_in_prose(text, numbers, wanted, led)
        formula = _last_formula(text)
        if formula and self.same(plain(formula), target):
            return True
        if wanted is not None:
            return False
        return self.same(plain(text), target) or (
            "$" in text[-LONGEST:] and self._ask(text[-LONGEST:], f"${target}$")
        )

    def _mathematics(self, given: str, expected: str) -> bool:
        """By math-verify, if both are formulas: words are equal as text or not at all."""
        (given, unit), (expected, other) = without_unit(given), without_unit(expected)
        if unit and other and unit != other:
            return False
        if not (_is_formula(given) and _is_formula(expected)):
            return False
        return self._ask(f"${given}$", f"${expected}$")

    def _ask(self, given: str, expected: str) -> bool:
        self._asked += 1
        if self._asked > _QUESTIONS:
            raise GaveUp
        return mathematics.equal(given, expected)


def _number_in_prose(text: str, numbers: list[str], wanted: Quantity, led: bool) -> bool:
    chosen = numbers[-1]
    if led and _UNDECIDED.search(text):
        return False
    if led and len(numbers) > 1:
        before, _, after = text.partition(numbers[0])
        if not re.search(r"\w", before) and not _OPERATOR.match(after):
            chosen = numbers[0]
    found = quantity(plain(chosen))
    return found is not None and agree(found, wanted)


def _chosen(given: str, expected: str) -> bool:
    """Whether the letter of a choice is the expected one, with or without what it stands for: `(C) 18`."""
    letter = re.fullmatch(r"\(?([A-J])\)?", expected)
    return letter is not None and re.match(rf"(?:\({letter[1]}\)|{letter[1]}[).:])(?!\S)", given) is not None


def _is_prose(text: str) -> bool:
    return _WORD.search(re.sub(r"\\[A-Za-z]+", "", text)) is not None


def _last_formula(text: str) -> str | None:
    found = re.findall(r"(?<!\\)\$([^$]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text[-LONGEST:], re.DOTALL)
    return next((part for part in found[-1] if part), None) if found else None


def _is_formula(text: str) -> bool:
    """A word must not be taken for a product of letters, or anagrams would be equal."""
    return _WORD.search(
        re.sub(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|pi|abs|max|min)\b", " ", text)
    ) is None or (re.fullmatch(r"[a-z]{2,3}(?:[-+*/^=]|\s).*|.*(?:[-+*/^=]|\s)[a-z]{2,3}", text) is not None)
