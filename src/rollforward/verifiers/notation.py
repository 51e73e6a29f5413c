r"""The normalisation of answers: one way of writing for what people and models write in many ways.

`plain` is applied both to a completion's answer and to the expected one. It changes how something is
written, never what it means: markup around an answer (`$...$`, `\text{...}`, `**...**`), spacing
(`\!`, `\,`, `{,}`, `\left`), look-alikes (`−`, `½`, full-width digits), sizes of fractions, currency
signs, degrees, the full stop at the end.
"""

import re
import unicodedata

LONGEST = 2000
"""The longest answer, in characters, that is analysed. A longer one equals only the same text."""

_LOOKALIKES = str.maketrans(
    {
        **dict.fromkeys("−–—﹣‐‑", "-"),
        **dict.fromkeys("⁄∕", "/"),
        **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u2005\u3000", " "),
        **dict.fromkeys("\u200b\u2060\ufeff", ""),
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": r"\div ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "±": r"\pm ",
        "°": r"^\circ",
        "。": ".",
        "、": ",",
        "’": "'",
        **{f"{digit}": f"^{{{value}}}" for value, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    }
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}"
)
_NOTHING = re.compile(
    r"\\!|\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|textstyle|limits)(?![A-Za-z])\.?"
)
_SPACE = re.compile(r"(?<!\\)\\[,;: ]|~|\\(?:quad|qquad|thinspace|space)(?![A-Za-z])|\\\\$")
_MONEY = re.compile(r"\\?\$|[€£¥₹]|(?<![A-Za-z])(?:US|USD|EUR|Rs\.?)(?=\s*\d)|\\(?:pounds|euro)(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])")
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:(\d)\s*(\d)(?![\d{])|(\d)\s*\{([^{}]+)\}|\{([^{}]+)\}\s*(\d))")
_GROUPS = re.compile(r"(?<![\d.,'_])\d{1,3}(?:(?:\\?_|')\d{3})+(?![\d])")
_DOTTED_GROUPS = re.compile(r"[+-]?\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|[+-]?\d{1,3}(?:\.\d{3})+,\d{1,2}")


def plain(text: str) -> str:
    """The normalised text; text of more than `LONGEST` characters is returned as it is."""
    text = text.strip()
    if len(text) > LONGEST:
        return text
    text = "".join(map(_character, text)).translate(_LOOKALIKES)
    text = _unwrapped(text)
    text = without_text_commands(text)
    text = _NOTHING.sub("", text).replace("{,}", ",")
    text = re.sub(r"(?<=\d)\\,(?=\d{3})", ",", text)
    text = _SPACE.sub(" ", text)
    text = re.sub(r"\\[dtcs]frac", r"\\frac", text)
    text = re.sub(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset", text)
    text = _SHORT_FRACTION.sub(_full_fraction, text)
    text = _MONEY.sub(" ", text).replace("\\%", "%")
    text = re.sub(r"(?<=\d)\s*\^?\s*\{?\s*\b(st|nd|rd|th)\b\s*\}?", r" \1", text)
    if not _ANGLE.search(text):
        text = _DEGREES.sub(" degrees ", text)
    text = _GROUPS.sub(lambda match: re.sub(r"\\?_|'", "", match.group()), text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(?<=\d)_\{10\}$", "", text)
    text = re.sub(r"\\([{}])\s*", r"\\\1", re.sub(r"\s+", " ", text)).strip()
    if _DOTTED_GROUPS.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    return re.sub(r"(?<=[^\s.])\s*[.,;]$", "", text).strip()


def without_text_commands(text: str) -> str:
    r"""The text without `\text{...}`, `\mathbf{...}` and the like: what they hold stays."""
    for _ in range(4):  # one within the other
        text = _TEXT.sub(r" \1 ", text)
    return text


def key(text: str) -> str:
    """What two writings of the same words or formula have in common: no spaces, and no capitals in words."""
    spelled = re.sub(r"\\[A-Za-z]+", "", text)
    choice = re.fullmatch(r"\(?([A-Z])\)?\.?", text)
    if choice:
        return choice.group(1)
    packed = re.sub(r"\s", "", text)
    if re.search(r"[^\W\d_]{2}", spelled.replace(".", "")) is None:
        return packed
    return re.sub(r"(?<!\d)\.|\.(?!\d)", "", packed.casefold())


def _character(character: str) -> str:
    if "\uff00" <= character <= "\uffef":  # full-width forms
        return unicodedata.normalize("NFKC", character)
    if unicodedata.category(character) == "No":
        apart = unicodedata.normalize("NFKC", character)
        if "\u2044" in apart:  # ½
            return " " + apart
    return character


def _unwrapped(text: str) -> str:
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = re.sub(r"(?<!\\)\$(?=[^$]*(?<!\\)\$)|(?<!\\)\$$", "", text)
    return re.sub(r"^(\*\*|__|`|\*)(.*)\1$", r"\2", text.strip(), flags=re.DOTALL).strip()


def _full_fraction(match: re.Match[str]) -> str:
    over, under = [part for part in match.groups() if part is not None]
    return rf"\frac{{{over}}}{{{under}}}"
