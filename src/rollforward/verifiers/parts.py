r"""Answers of several parts: lists, sets, tuples, intervals, unions; and the right side of an equation."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_AND = re.compile(r"\s*,?\s+(?:and|or|und|oder)\s+|\s*[;；]\s*|\s*(?:\\cup|\\vee|\\lor)(?![A-Za-z])\s*")
_MEMBER = re.compile(r"^[A-Za-z]\w*\s*\\in(?![A-Za-z])\s*")
_ARGUMENTS = r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\)"
_NAME = re.compile(rf"\s*(?:\\?[A-Za-z]+(?:_\{{?\w+\}}?)?'?(?:\s*{_ARGUMENTS})?|[A-Za-z\\][A-Za-z\\ ]*)\s*")
_MOST = 200


@dataclass(frozen=True)
class Parts:
    """The parts in their order, and the brackets around them: `()`, `[)`, `{}`; nothing for a bare list."""

    brackets: str
    items: tuple[str, ...]

    def same(self, other: "Parts", equal: Callable[[str, str], bool]) -> bool:
        """Whether the parts of both are equal: in order within round or square brackets, else in any."""
        unordered = {"", "{}"}
        if self.brackets != other.brackets and not {self.brackets, other.brackets} <= unordered:
            return False
        if len(self.items) != len(other.items):
            return False
        if self.brackets not in unordered:
            return all(map(equal, self.items, other.items))
        left, unmatched = list(other.items), []
        for item in self.items:  # the easy ones first: the others are compared in all combinations
            if item in left:
                left.remove(item)
            else:
                unmatched.append(item)
        for item in unmatched:
            twin = next((index for index, candidate in enumerate(left) if equal(item, candidate)), None)
            if twin is None:
                return False
            del left[twin]
        return True


def parts_of(text: str) -> Parts | None:
    """The parts, or None for an answer of one piece."""
    text = _MEMBER.sub("", text.strip()).replace("\\{", "\ue000").replace("\\}", "\ue001")
    text = re.sub(r"\\l?[vV]ert|\\mid(?![A-Za-z])", "|", text)
    brackets = ""
    if re.search(r"\\(?:cup|vee|lor)(?![A-Za-z])", text) is None:
        enclosed = _enclosed(text)
        if enclosed is not None:
            brackets, text = enclosed
    items = [item for piece in _split(text) for item in _both_signs(piece)]
    if not 1 < len(items) <= _MOST or not all(items):
        return None
    restored = (item.replace("\ue000", "\\{").replace("\ue001", "\\}") for item in items)
    return Parts(brackets, tuple(restored))


def right_side(text: str) -> str | None:
    """`5` of `x = 5`, `18` of `3 + 15 = 18`; None if there is no equation of that kind."""
    sides = [side.strip() for side in re.split(r"(?<![<>!=:\\])=(?!=)", text)]
    if len(sides) < 2 or not sides[-1] or re.search(r"[<>]|\\[lg]eq?\b|\\neq?\b", text):
        return None
    if len(sides) == 2 and _NAME.fullmatch(sides[1]) and sides[0] and not _NAME.fullmatch(sides[0]):
        sides.reverse()  # 5 = x
    if (
        len(sides) == 2
        and not _NAME.fullmatch(sides[0])
        and re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", sides[0]))
    ):
        return None  # an equation of a curve, which needs both of its sides
    return sides[-1]


def only_member(text: str) -> str:
    r"""`5` of `\{5\}`; any other text as it is."""
    match = re.fullmatch(r"\\\{([^{}]+)\\\}", text)
    return match.group(1).strip() if match and "," not in text else text


def _enclosed(text: str) -> tuple[str, str] | None:
    if len(text) < 2 or text[0] not in "([\ue000" or text[-1] not in ")]\ue001":
        return None
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([\ue000{") - (character in ")]\ue001}")
        if depth == 0 and index < len(text) - 1:
            return None
    brackets = (text[0] + text[-1]).replace("\ue000", "{").replace("\ue001", "}")
    return brackets, text[1:-1]


def _split(text: str) -> list[str]:
    """At the commas, and the words between parts, that are not in brackets."""
    text = _AND.sub(" , ", text)
    items, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{\ue000") - (character in ")]}\ue001")
        if character == "," and depth == 0:
            items.append(text[start:index].strip())
            start = index + 1
    items.append(text[start:].strip())
    return items


def _both_signs(item: str) -> list[str]:
    parts = re.split(r"\\pm(?![A-Za-z])\s*", item)
    if len(parts) != 2:
        return [item]
    before, after = parts
    return [
        f"{before}+ {after}" if before.strip() else after,
        f"{before}- {after}" if before.strip() else f"-{after}",
    ]
