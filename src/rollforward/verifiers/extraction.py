r"""Where the answer stands in a completion.

A completion is taken apart by the first of these that it has:

1. the last `\boxed{...}`, braces balanced;
2. the last `<answer>...</answer>`;
3. what follows the last `####`, up to the end of its line;
4. nothing of the kind: the whole text.

Also here: what counts as a number. Numbers are read exactly, as fractions, never as floats:
`1,234`, `0.50`, `-3/4`, `+7.`, `$12`, `1e3`. Left out: percent signs, units and number words.
"""

import re
from fractions import Fraction

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"([+\-−]?)\s*\$?({_UNSIGNED})(?:[eE]([+-]?\d{{1,3}})|\s*/\s*(\d+))?\.?", re.ASCII)
# A sign counts as one only where nothing stands before it that it could be subtracted from.
_SIGN_IN_TEXT = r"(?:(?<![\w.)\]])[+\-−]\$?)?"
_IN_TEXT = re.compile(
    rf"{_SIGN_IN_TEXT}(?<![\w.])(?:{_UNSIGNED})(?:[eE][+-]?\d{{1,3}}|/\d+)?(?![\w%]|[.,]\d)", re.ASCII
)
# A longer number is no answer, and reading one takes time that grows with the square of its length.
_LONGEST = 1000


def marked_answer(text: str) -> str | None:
    r"""What the text marks as its answer, by `\boxed{}`, `<answer>` or `####`; None when it marks none."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    tagged = _ANSWER.findall(text)
    if tagged:
        return str(tagged[-1]).strip()
    _, marker, rest = text.rpartition("####")
    return rest.partition("\n")[0].strip() if marker else None


def parse_number(text: str) -> Fraction | None:
    """The number that the whole text is, exactly; None when it is anything else."""
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None:
        return None
    sign, digits, exponent, denominator = match.groups()
    value = Fraction(digits.replace(",", ""))
    if exponent is not None:
        value *= Fraction(10) ** int(exponent)
    if denominator is not None:
        if int(denominator) == 0:
            return None
        value /= int(denominator)
    return value if sign in ("", "+") else -value


def last_number(text: str) -> Fraction | None:
    """The last number in running text; None when there is none."""
    found = [match.group() for match in _IN_TEXT.finditer(text)]
    return parse_number(found[-1]) if found else None


def _last_boxed(text: str) -> str | None:
    opening = "\\boxed{"
    start = text.rfind(opening)
    if start < 0:
        return None
    depth = 1
    for end in range(start + len(opening), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(opening) : end]
    return None  # cut off before the brace was closed: nothing was answered
