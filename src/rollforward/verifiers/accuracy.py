"""`accuracy_reward`: 1 for the right answer, 0 for any other.

The answer is found in the completion as `verifiers.extraction` says. Where the expected answer
is a number, numbers are compared exactly: what the completion marks as its answer must be that
number, or, when it marks nothing, the last number in it must be. Anything else is mathematics:
equal text, or equal in the judgement of `math-verify`, which reads LaTeX and compares expressions
with SymPy.

`math-verify` gives up on an expression after five seconds, which counts as wrong. Such a reward
depends on the clock; it is reproduced on a resume because it is in the journal, not because it
would come out the same.
"""

import re
import threading
from collections.abc import Sequence
from typing import Any

from rollforward.verifiers.extraction import last_number, marked_answer, parse_number

_SECONDS = 5
_WORD = re.compile(r"[^\W\d_]{2}")


def accuracy_reward(
    *, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """1.0 for each completion whose answer is equal to the expected one, else 0.0."""
    del prompts, columns  # correctness is a matter of the completion and the answer
    return [float(is_correct(text, expected)) for text, expected in zip(completions, answer, strict=True)]


def is_correct(completion: str, expected: str) -> bool:
    """Whether the completion's answer is the expected one."""
    marked = marked_answer(completion)
    number = parse_number(expected)
    if number is not None:
        found = last_number(completion) if marked is None else parse_number(marked)
        if marked is None or found is not None:
            return found == number
    given = completion.strip() if marked is None else marked
    if not given:
        return False
    return given == expected.strip() or _equal_mathematics(given, expected)


def _equal_mathematics(given: str, expected: str) -> bool:
    # Imported here: SymPy takes most of a second, and problems with plain numbers never need it.
    from math_verify import parse, verify

    # Its time-out is SIGALRM, which Python allows in the main thread only.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    reference = parse(_as_latex(expected), parsing_timeout=seconds)
    candidate = parse(_as_latex(given), parsing_timeout=seconds)
    return bool(reference and candidate and verify(reference, candidate, timeout_seconds=seconds))


def _as_latex(text: str) -> str:
    r"""Put a bare expression between dollars, where alone LaTeX is recognised.

    Bare are `\frac{1}{2}` and `(x+1)^2`; prose, known by its words, is left for `math-verify` to
    look through. A word must not be taken for a product of letters, or anagrams would be equal.
    """
    bare = "$" not in text and ("\\" in text or _WORD.search(text) is None)
    return f"${text}$" if bare else text
