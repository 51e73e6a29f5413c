r"""Where the answer is in a completion. docs/reference/rewards.md says the same with examples.

Thoughts are not an answer: only the text after the last `</think>` counts. The answer in it is the
first of these that it has:

1. the last `\boxed{...}`, braces balanced (`\fbox{...}` and `\boxed 7` are boxes too);
2. the last `<answer>...</answer>`;
3. what follows the last `####`, up to the end of its line, unless that line is a heading;
4. what follows the last `Answer:`, `the answer is` or `答案：`, up to the end of its line;
5. nothing of the kind: the whole text. Where a number is expected, it is the last number in it.

What is found may be marked again (`<answer>\boxed{18}</answer>`), and is then extracted again. An
expected answer is extracted in the same way, up to 4.

**Unfinished is not answered.** A `<think>`, an `<answer>` or a box that was opened last and never closed
was cut off by the token limit, and nothing before it counts instead. What the prompt ends with
(`<think>`, `<answer>`, `\boxed{`) belongs to the completion, which continues it.

Left out: in running text, a number that was cut off in the middle looks like a whole one. Ask for a box.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from rollforward.verifiers.exact import parse_number
from rollforward.verifiers.notation import LONGEST, plain, without_text_commands

__all__ = ["Answer", "find_answer", "last_number", "marked_answer", "numbers_in", "parse_number"]

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is an ordinary character
_SENTENCE = re.compile(
    r"(?:\banswer\b[*_\s]*(?:\bis\b\s*[:：]?|[:：=])|答案\s*(?:[:：]|是|为)+)[*_]*[ \t]*", re.IGNORECASE
)
_BEGUN = re.compile(r"(?:<think>|<answer>|\\boxed\{)\s*\Z")
_UNIT_LIKE = r"(?:st|nd|rd|th|cm|mm|km|kg|mg|ml|mL|mph|m|g|s|h)\b"
_DIGITS = r"(?:\d{1,3}(?:(?:,\\!|\{,\}|\\,|[,'’\u00a0\u2009\u202f])\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_FRACTION = r"\\[dt]?frac\s*(?:\{\s*\d+\s*\}\s*\{\s*\d+\s*\}|\d\d)"
# A sign counts only if nothing before it could be what it is subtracted from.
_SIGN = r"(?:(?<![\w.)\]}^_{])[+\-−–]\s?(?:\\?\$)?)?"
_POWER = r"\s*(?:\\times|\\cdot|[×*xX])\s*10\s*\^\s*(?:\{\s*[+-]?\d{1,3}\s*\}|[+-]?\d{1,3})"
_IN_TEXT = re.compile(
    rf"{_SIGN}(?<![\w.^_{{\\])(?<![\^_{{][+\-−–])"
    rf"(?:{_FRACTION}|(?:{_DIGITS})(?:{_POWER}|[eE][+-]?\d{{1,3}}|\s?{_FRACTION}|\s?/\s?\d+|\s\d+/\d+)?)"
    rf"(?!(?!{_UNIT_LIKE})\w|[.,]\d|\^(?!\s*\{{?\\circ)|\s*\\(?:sqrt|pi)\b)(?:\s?\\?%)?",
    re.ASCII,
)
# Part of a formula that is not a plain number: the number before it is not the last of the text.
_FORMULA = re.compile(r"\\sqrt|\\pi\b|√|π|\^(?!\s*\{?\\circ)")
_HEADINGS = 50
_ROUNDS = 4


@dataclass(frozen=True)
class Answer:
    """What was found. If `text` is empty, nothing was answered."""

    text: str
    kind: str
    """`box`, `tag`, `line`, `sentence`, `text` (nothing is marked) or `unfinished`."""


def find_answer(completion: str, prompt: str = "") -> Answer:
    """Where the completion answers, according to the list above."""
    begun = _BEGUN.search(prompt[-200:])
    text = (begun.group().strip() if begun else "") + completion
    before, _, after = text.rpartition("</think>")
    if "<think>" in after:
        return Answer("", "unfinished")
    found = Answer(after.strip() if before or after != text else text.strip(), "text")
    for _ in range(_ROUNDS):
        inner = _marked(found.text)
        if inner is None:
            break
        found = inner
    return found


def marked_answer(text: str) -> str | None:
    r"""What the text marks as its answer; None when it marks none, or did not finish to."""
    found = find_answer(text)
    return None if found.kind in ("text", "unfinished") else found.text


def last_number(text: str) -> Fraction | None:
    """The last number in running text; None if there is none, or it is part of a formula."""
    found = numbers_in(text)
    return parse_number(plain(found[-1])) if found else None


def numbers_in(text: str) -> list[str]:
    """The numbers in running text as they are written; none if it ends in a formula."""
    text = without_text_commands(text)
    matches = list(_IN_TEXT.finditer(text))
    if not matches or _FORMULA.search(text, matches[-1].end()):
        return []
    return [match.group() for match in matches]


def _marked(text: str) -> Answer | None:
    opened = text.rfind("<answer>")
    closed = text.find("</answer>", opened) if opened >= 0 else -1
    if opened >= 0 and closed < 0:
        return Answer("", "unfinished")
    boxed = _last_box(text)
    if boxed is not None:
        return boxed
    if opened >= 0:
        return Answer(text[opened + len("<answer>") : closed].strip(), "tag")
    return _line(text) or _sentence(text)


def _last_box(text: str) -> Answer | None:
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    last = len(boxes) - 1
    while last > 0 and text[boxes[last - 1].end() : boxes[last].start()].strip(" $") == "{":
        last -= 1  # a box directly inside a box: the outer one must be closed too
    start = boxes[last].end()
    if text[start : start + 1] != "{":
        token = re.match(r"[^\s{}$<\\]+", text[start:])
        return Answer(token.group().rstrip(".,;") if token else "", "box" if token else "unfinished")
    depth = 0
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return Answer(text[start + 1 : match.start()].strip(), "box")
    return Answer("", "unfinished")


def _line(text: str) -> Answer | None:
    """What the last `####` marks, headings left out."""
    end = len(text)
    for _ in range(_HEADINGS):
        start = text.rfind("####", 0, end)
        if start < 0:
            return None
        line, _, after = text[start + 4 : start + 4 + LONGEST].partition("\n")
        line = line.strip()
        if not line or not after.strip() or parse_number(plain(line)) is not None or _is_value(line):
            return Answer(line, "line")
        end = start
    return None


def _is_value(line: str) -> bool:
    """Whether a line begins with a number followed by words only: `18 apples`, not `2. Second step`."""
    return re.fullmatch(r"[^\w.]{0,3}\d[\d,./]*(?<!\.)(?:\s+[^\W\d]+){0,3}[.!]?", line) is not None


def _sentence(text: str) -> Answer | None:
    said = list(_SENTENCE.finditer(text))
    if not said:
        return None
    rest = text[said[-1].end() :].lstrip(" \t*_:：")
    if not rest.strip():
        return Answer("", "unfinished")
    line = rest.lstrip().partition("\n")[0]
    # The sentence, not what is said after it: `The answer is 18. I hope it is correct.`
    sentence = re.split(r"(?<=[^\s])[.!。](?:\s|$)", line, maxsplit=1)[0]
    return Answer(sentence.strip().strip("*_").strip(), "sentence")
