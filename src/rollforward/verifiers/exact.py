r"""Numbers and arithmetic, exactly: as fractions, never as floats, and in bounded time.

`parse_number` reads one number: `1,234`, `0.50`, `-3/4`, `+7.`, `$12`, `1e3`, `3\frac{1}{2}`, `3 1/2`.
`evaluate` reads what is made of numbers by `+ - * / ^ !`, fractions and parentheses, as `2^{10}`,
`1.2 \times 10^{5}` and the expressions of Countdown are. Left out: roots and everything else that
is not a fraction, and number words.
"""

import math
import re
from fractions import Fraction

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"([+\-−]?)\s*\$?\s*({_UNSIGNED})(?:[eE]([+-]?\d{{1,3}})|\s*/\s*(\d+))?\.?", re.ASCII)
_MIXED = re.compile(
    r"([+-]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s(\d+)\s*/\s*(\d+))", re.ASCII
)
_FRACTION = re.compile(r"([+-]?)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", re.ASCII)
_REPEATING = re.compile(r"([+-]?)\s*(\d*)\.(\d*)\s*\\overline\s*\{?\s*(\d+)\s*\}?", re.ASCII)
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>(?:{_UNSIGNED})(?:[eE][+-]?\d{{1,3}})?)|(?P<times>\\times|\\cdot|\\ast|[xX](?=\s*10\s*\^)|(?<=[\d)]\s)[xX](?=\s+[\d(]))"
    r"|(?P<over>\\div)|(?P<power>\*\*)|(?P<frac>\\frac)|(?P<sign>[-+*/^!(){}\[\]]))",
    re.ASCII,
)
# A longer number is not an answer, and reading one takes time quadratic in its length.
_LONGEST = 1000
_BITS = 20_000
_DEPTH = 40


class TooLarge(Exception):
    """Arithmetic that no answer needs: a number of more than thousands of digits, or nested too deeply."""


def parse_number(text: str) -> Fraction | None:
    """The number that the whole text is, exactly; None if it is anything else."""
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    value: Fraction | None
    if match := _MIXED.fullmatch(text):  # 3\frac{1}{2} or 3 1/2
        sign, whole, *parts = match.groups()
        part = _ratio(*(digits for digits in parts if digits is not None))
        value = None if part is None else int(whole) + part
    elif match := _FRACTION.fullmatch(text):
        sign, upper, lower = match.groups()
        value = _ratio(upper, lower)
    elif match := _REPEATING.fullmatch(text):  # 0.1\overline{6}
        sign, whole, fixed, again = match.groups()
        repeated = Fraction(int(again), 10 ** len(again) - 1) / 10 ** len(fixed)
        value = Fraction(f"{whole or 0}.{fixed or 0}") + repeated
    elif match := _NUMBER.fullmatch(text):
        sign, digits, exponent, denominator = match.groups()
        value = _literal(digits + ("" if exponent is None else f"e{exponent}"))
        if denominator is not None:
            value = None if int(denominator) == 0 else value / int(denominator)
    else:
        return None
    return value if value is None or sign in ("", "+") else -value


def _ratio(over: str, under: str) -> Fraction | None:
    return None if int(under) == 0 else Fraction(int(over), int(under))


def evaluate(text: str) -> Fraction | None:
    """The value of an arithmetic expression; None if it is not one. Raises TooLarge."""
    number = parse_number(text)
    if number is not None:
        return number
    tokens = _tokens(text)
    if tokens is None:
        return None
    try:
        return _Arithmetic(tokens).whole()
    except (_NotArithmetic, ZeroDivisionError):
        return None


def _literal(text: str) -> Fraction:
    digits, _, exponent = text.lower().partition("e")
    value = Fraction(digits.replace(",", "").replace(" ", ""))
    return value * Fraction(10) ** int(exponent) if exponent else value


def _tokens(text: str) -> list[str] | None:
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        if match.group("number") and len(match.group("number")) > _LONGEST:
            raise TooLarge
        tokens.append(
            {"times": "*", "over": "/", "power": "^"}.get(match.lastgroup or "", match.group().strip())
        )
        at = match.end()
    return tokens or None


class _NotArithmetic(Exception):
    pass


class _Arithmetic:
    """A recursive-descent parser: sum > product > sign > power > atom."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def whole(self) -> Fraction:
        value = self._sum()
        if self._next() is not None:
            raise _NotArithmetic
        return value

    def _next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self, *wanted: str) -> str | None:
        token = self._next()
        if token not in wanted:
            return None
        self._at += 1
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while True:
            if sign := self._take("*", "/"):
                other = self._signed()
                value = _bounded(value * other if sign == "*" else value / other)
            elif self._next() in ("(", "["):  # 2(3), (1)(2)
                value = _bounded(value * self._power())
            else:
                return value

    def _signed(self) -> Fraction:
        self._deeper()
        sign = self._take("+", "-")
        value = self._signed() if sign else self._power()
        self._depth -= 1
        return -value if sign == "-" else value

    def _power(self) -> Fraction:
        base = self._atom()
        while self._take("!"):
            if base.denominator != 1 or base < 0:
                raise _NotArithmetic
            if base > 1000:
                raise TooLarge
            base = _bounded(Fraction(math.factorial(int(base))))
        if not self._take("^"):
            return base
        exponent = self._signed()
        if exponent.denominator != 1:
            raise _NotArithmetic
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * size > _BITS and abs(base) != 1 and base != 0:
            raise TooLarge
        return base if exponent == 1 else base ** int(exponent % 2 if abs(base) == 1 else exponent)

    def _atom(self) -> Fraction:
        self._deeper()
        try:
            if self._take("\\frac"):
                over, under = self._group("{"), self._group("{")
                return _bounded(over / under)
            token = self._next()
            if token in ("(", "[", "{"):
                return self._group(token)
            if token is None or not (token[0].isdigit() or token[0] == "."):
                raise _NotArithmetic
            self._at += 1
            value = _literal(token)
            if self._next() == "\\frac":  # 3\frac{1}{2}
                part = self._atom()
                if value.denominator != 1 or not 0 <= part < 1:
                    raise _NotArithmetic
                value += part
            return value
        finally:
            self._depth -= 1

    def _group(self, opening: str) -> Fraction:
        if not self._take(opening):
            raise _NotArithmetic
        value = self._sum()
        if not self._take({"(": ")", "[": "]", "{": "}"}[opening]):
            raise _NotArithmetic
        return value

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > _DEPTH * 2:
            raise TooLarge


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS:
        raise TooLarge
    return value
