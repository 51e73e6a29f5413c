"""Formatting for people: counts, bytes, durations; and text that comes from a file."""

import re

_CONTROLS = re.compile(
    # C0, DEL and C1; line and paragraph separators; characters that change the writing direction; lone
    # surrogates, which stand for non-UTF-8 bytes in a name and which no encoding can write.
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def plain(text: str) -> str:
    """One line of text from a file, safe to show: anything a terminal would act on is escaped.

    `\\x1b[2J` stands for the four characters that clear a screen. Anything printed or logged that contains
    text from a run's folder, a file or a name on disk goes through here, or through `plain_lines`.
    """
    return _CONTROLS.sub(_escaped, text)


def plain_lines(text: str) -> str:
    """`plain` for text of several lines: keeps line endings and tabs."""
    return _CONTROLS.sub(lambda match: match[0] if match[0] in "\n\t" else _escaped(match), text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def counted(count: int, what: str) -> str:
    """`no steps`, `1 step`, `2 steps`."""
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def in_bytes(count: float) -> str:
    """`3.1 MB`, powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def in_minutes(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
