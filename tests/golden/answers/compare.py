r"""Lists where our verdicts differ from math-verify's by itself, and why each of the differences is right.

    python tests/golden/answers/compare.py [--all]

math-verify is asked as its README does, `verify(parse(expected), parse(completion))`; an expected formula
without dollars gets some. Exit code 1 where a difference has no reason here. `--all` lists every pair.
"""

import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

Pair = dict[str, Any]

_UNFINISHED = re.compile(r"\\f?box(?:ed)?\{(?:[^{}]|\{[^{}]*\})*$|<think>|</think>$")


REASONS: list[tuple[str, Callable[[Pair], bool]]] = [
    (
        "cut off by the limit of tokens, or empty: nothing was answered, whatever stands before",
        lambda pair: (
            pair["form"] == "cut off"
            or (not pair["right"] and _UNFINISHED.search(pair["completion"]) is not None)
        ),
    ),
    (
        "an inequality, or a number in another base, is not the number in it; a thousand is a factor",
        lambda pair: (
            not pair["right"] and re.search(r"\{> |_\d|\\[gn]eq|thousand", pair["completion"]) is not None
        ),
    ),
    (
        "`not 18` and `18 or 19` do not say 18; a list with a part twice is another list",
        lambda pair: not pair["right"] and re.search(r"\bnot\b|\bor\b|1,1,2", pair["completion"]) is not None,
    ),
    (
        "units: 12 m is not 12 cm, and 5 a.m. is not 5 p.m.; math-verify takes units away",
        lambda pair: not pair["right"] and re.search(r"\\text|\bm\b|am\b", pair["expected"]) is not None,
    ),
    (
        "a tuple is not a set: its order matters",
        lambda pair: not pair["right"] and "\\{" in pair["expected"],
    ),
    (
        "two answers, or words, in <answer>: the number before or after the tags is not looked for",
        lambda pair: not pair["right"] and "<answer>" in pair["completion"],
    ),
    (
        "a number in a formula (2\\sqrt{3}, a denominator) is not the answer",
        lambda pair: not pair["right"] and pair["form"] == "prose",
    ),
    (
        "the expected answer is marked as datasets mark theirs: ####, <answer>, a solution",
        lambda pair: pair["right"] and re.search(r"####|<answer>", pair["expected"]) is not None,
    ),
    (
        "the expected number is written with separators or a sign of money ($32,\\!348)",
        lambda pair: pair["right"] and re.search(r",\\!|\\\$", pair["expected"]) is not None,
    ),
    (
        "the last of several boxes or tags is the answer; \\fbox and 答案 mark one too",
        lambda pair: pair["right"] and pair["form"] == "several",
    ),
    (
        "arithmetic in <answer>, as Countdown asks for, is read as a whole",
        lambda pair: pair["right"] and pair["form"] == "Countdown",
    ),
    (
        "a mark other than the box (####, Answer:, <answer>, `the answer is`) is a mark too",
        lambda pair: pair["right"] and pair["form"] in ("GSM8K", "DAPO", "tags", "sentence"),
    ),
    (
        "a number that is written as math-verify does not read it: 1 234, 1.234.567, 3 1/2, 1e5, ½, ７",
        lambda pair: (
            pair["right"]
            and re.search(
                r"\d[ _.'{},\\]+\d|[½¾７°⁵×∞∪−’\u2009\u202f]|\de-?\d|thousand|degree|\\\$|18\.\}|clips|cent",
                pair["completion"],
            )
            is not None
        ),
    ),
    (
        "a choice is its letter, in brackets or not, with or without what it stands for",
        lambda pair: pair["right"] and re.fullmatch("[A-J]", pair["expected"]) is not None,
    ),
    (
        "units after a percentage's or a power's digits, and marks without a space, are read",
        lambda pair: pair["right"] and re.search(r"%|eggs|m/s|Answer:\d|~|;", pair["completion"]) is not None,
    ),
    (
        "capitals in words do not matter, nor does a full stop",
        lambda pair: pair["right"] and re.search("[Yy]es|Monday|No sol", pair["completion"]) is not None,
    ),
    ("capitals in words do not matter", lambda pair: pair["right"] and "PM" in pair["completion"]),
]


def by_math_verify(pair: Pair) -> bool:
    """What math-verify says by itself."""
    from math_verify import parse, verify

    expected = pair["expected"]
    bare = "$" not in expected and ("\\" in expected or re.search(r"[^\W\d_]{2}", expected) is None)
    return bool(verify(parse(f"${expected}$" if bare else expected), parse(pair["completion"])))


def reason(pair: Pair) -> str | None:
    """Why our verdict is right where the other differs."""
    return next((why for why, applies in REASONS if applies(pair)), None)


def main() -> int:
    """Compare, and print a list in Markdown."""
    logging.disable(logging.CRITICAL)
    table = Path(__file__).with_name("pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in table]
    differing: dict[str | None, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if by_math_verify(pair) is not pair["right"]:
            differing[reason(pair)].append(pair)
    count = sum(map(len, differing.values()))
    print(f"{len(pairs)} pairs; math-verify decides {count} of them otherwise")
    for why, group in sorted(differing.items(), key=lambda item: -len(item[1])):
        print(f"\n## {len(group)}: {why or 'NO REASON IS KNOWN'}\n")
        for pair in group if "--all" in sys.argv or why is None else group[:5]:
            ours = "right" if pair["right"] else "wrong"
            print(f"- {pair['completion']!r}, expected {pair['expected']!r}: {ours} for us")
    return 1 if None in differing else 0


if __name__ == "__main__":
    sys.exit(main())
