r"""Numbers with what is written beside them: `18 cm`, `50%`, `5 million`, `18 dollars per hour`.

A unit missing on one side is not a mistake (the problem names it), and words that are not a known
unit are ignored (`18 paper clips`). Two known units must be the same: `18 cm` is not `18 m`. A
percentage is equal to its number with or without the sign, and to the hundredth part of it.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from rollforward.verifiers.exact import evaluate

_UNITS = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "g": "gram",
    "kg": "kilogram kilo",
    "mg": "milligram",
    "lb": "pound",
    "oz": "ounce",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr",
    "l": "liter litre",
    "ml": "milliliter millilitre mL",
    "mph": "",
    "km/h": "kph kmh",
    "m/s": "",
    "dollar": "buck usd",
    "cent": "¢",
    "degree": "deg",
    "radian": "rad",
    "gal": "gallon",
    "cup": "",
    "unit": "",
}
_KNOWN = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_QUANTITY = re.compile(
    r"(?P<core>.*?[\d)}\].!])(?P<gap>\s*)(?P<beside>(?:%|[^\W\d_]|¢)[^\d=<>\\]*(?:\^\s*\{?[23]\}?)?)",
    re.DOTALL,
)
# Not units: what follows these words changes the number, or makes a second answer.
_NOT_BESIDE = re.compile(
    r"\b(?:or|and|not|is|if|than|to|plus|minus|times|more|less|mod|over)\b|[,;&|+*^(\[]", re.IGNORECASE
)
_POWERS = re.compile(r"\s*\^\s*\{?([23])\}?$")


@dataclass(frozen=True)
class Quantity:
    """A number and what is written beside it."""

    value: Fraction
    unit: str | None = None
    """One of the known units; None if there is none, or it is not known."""
    percent: bool = False


def quantity(text: str) -> Quantity | None:
    """The number, with its unit, that the whole text is; None when it is anything else. Raises TooLarge."""
    value = evaluate(text)
    if value is not None:
        return Quantity(value)
    text = re.sub(r"^(?:\\approx|≈|about|approximately|a total of)\s*", "", text, flags=re.IGNORECASE)
    match = _QUANTITY.fullmatch(text)
    if match is None:
        value = evaluate(text)
        return None if value is None else Quantity(value)
    core, beside = match.group("core"), match.group("beside").strip()
    value = evaluate(core)
    if value is None:
        return None
    if beside.startswith("%") or re.match(r"per\s?cent\b", beside, re.IGNORECASE):
        return Quantity(value, percent=True)
    multiple, _, rest = beside.partition(" ")
    if multiple.lower() in _MULTIPLES:
        value, beside = value * _MULTIPLES[multiple.lower()], rest.strip()
    if not beside:
        return Quantity(value)
    unit, words = _unit(beside), beside.split()
    # `5x` and `5 x` are algebra; `18cm`, `5 m`, `18 paper clips` and `18元` are a number and a unit.
    apart = bool(match.group("gap")) or not beside.isascii()
    letter = len(beside) == 1 and beside.isascii()
    if unit is not None:
        return Quantity(value, unit=unit) if apart or not letter else None
    ordinal = beside in ("st", "nd", "rd", "th")
    if letter or not (apart or ordinal) or len(words) > 4 or _NOT_BESIDE.search(beside):
        return None
    return Quantity(value)


def agree(one: Quantity, other: Quantity) -> bool:
    """Whether they are the same, as far as both specify it."""
    if one.unit and other.unit and one.unit != other.unit:
        return False
    if one.value == other.value:
        return True
    return (one.percent and not other.percent and one.value == other.value * 100) or (
        other.percent and not one.percent and other.value == one.value * 100
    )


def without_unit(text: str) -> tuple[str, str | None]:
    r"""A formula and the known unit after it: `2\pi` and `cm` of `2\pi cm`."""
    words = text.split(" ")
    for start in range(max(1, len(words) - 3), len(words)):
        unit = _unit(" ".join(words[start:]))
        # A single letter may as well be a factor.
        if unit is not None and (len(words[start]) > 1 or start < len(words) - 1):
            return " ".join(words[:start]), unit
    return text, None


def _unit(beside: str) -> str | None:
    """The known unit that the words are, its power with it: `square inches` is `in2`."""
    power = _POWERS.search(beside)
    words = _POWERS.sub("", beside)
    named = re.match(r"(square|sq\.?|cubic|cu\.?)\s+", words, re.IGNORECASE)
    exponent = power.group(1) if power else ""
    if named:
        exponent, words = "2" if named.group(1).lower().startswith("s") else "3", words[named.end() :]
    words = words.strip().rstrip(".").strip()
    for name in (words, words.lower(), words.lower().removesuffix("s")):
        if name in _KNOWN:
            return _KNOWN[name] + exponent
    return None
