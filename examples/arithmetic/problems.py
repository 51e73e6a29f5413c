"""The problems of the demo, who is asked which, and how those solve them whom the base model learns from.

A problem is a sum or a difference of two whole numbers below 100, written `48+76=`; no difference
is negative. There are 15,050. They are dealt out once, from a fixed seed: some to measure on
(held out from everything else, also with the summands swapped), some to practise on with GRPO,
and all but the held-out ones to the corpus of the base model.

The corpus is full of mistakes, as corpora are. Three hands have written it:

    careful      does tens and units apart, writes both down, then the right answer:  48+76=110+14=124
    forgetful    works digit by digit in the head, never carries, never borrows:      48+76=14
    hasty        gets one digit of the right answer wrong:                            48+76=134

So who shows the working is right, and who does not is right only where nothing is carried.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEED = 20260101
LIMIT = 100
HELD_OUT = 400
PRACTICE = 960

HANDS = ("careful", "forgetful", "hasty")
SHARES = (0.25, 0.40, 0.35)
"""How much of the corpus each hand has written."""


@dataclass(frozen=True, order=True)
class Problem:
    """`left` and `right` in 0..99, `sign` one of + and -."""

    left: int
    sign: str
    right: int

    @property
    def prompt(self) -> str:
        """As the model is shown it."""
        return f"{self.left}{self.sign}{self.right}="

    @property
    def answer(self) -> int:
        """The right one."""
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def swapped(self) -> "Problem":
        """The same sum the other way round; a difference is itself."""
        return Problem(self.right, "+", self.left) if self.sign == "+" else self


@dataclass(frozen=True)
class Split:
    """Who is asked what."""

    held_out: Sequence[Problem]
    practice: Sequence[Problem]
    corpus: Sequence[Problem]
    """Everything that is not held out; the practice problems are among them."""


def deal() -> Split:
    """The same split every time."""
    numbers = range(LIMIT)
    problems = [Problem(left, "+", right) for left in numbers for right in numbers]
    problems += [Problem(left, "-", right) for left in numbers for right in range(left + 1)]
    order = np.random.Generator(np.random.Philox(SEED)).permutation(len(problems))
    shuffled = [problems[index] for index in order]
    held_out = shuffled[:HELD_OUT]
    kept_apart = {*held_out, *(problem.swapped for problem in held_out)}
    corpus = [problem for problem in shuffled if problem not in kept_apart]
    return Split(held_out, corpus[:PRACTICE], corpus)


def forgetful_answer(problem: Problem) -> int:
    """Each column by itself, nothing carried and nothing borrowed."""
    sign = 1 if problem.sign == "+" else -1
    tens = (problem.left // 10 + sign * (problem.right // 10)) % 10
    return 10 * tens + (problem.left + sign * problem.right) % 10


def hasty_answer(problem: Problem, random: np.random.Generator) -> int:
    """The right answer with one of its digits replaced by another."""
    digits = list(str(problem.answer))
    place = random.integers(len(digits))
    digits[place] = str((int(digits[place]) + random.integers(1, 10)) % 10)
    return int("".join(digits))


def working(problem: Problem) -> str:
    """Tens and units apart, then the right answer: `110+14=124`, and `40-5=35` for 52-17."""
    sign = 1 if problem.sign == "+" else -1
    tens = 10 * (problem.left // 10 + sign * (problem.right // 10))
    units = problem.left % 10 + sign * (problem.right % 10)
    return f"{tens}{units:+d}={problem.answer}"


def written_by_hand(problem: Problem, random: np.random.Generator) -> str:
    """What stands behind the problem's `=` in the corpus."""
    hand = HANDS[random.choice(len(HANDS), p=SHARES)]
    if hand == "careful":
        return working(problem)
    if hand == "forgetful":
        return str(forgetful_answer(problem))
    return str(hasty_answer(problem, random))
