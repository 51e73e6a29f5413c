"""What verbs print: lines, warnings, JSON, table cells.

Text from a run's folder is not trusted. It is made plain here (`wording.plain`), and is never parsed as
rich markup. JSON needs neither: its strings are ASCII with escapes.
"""

import json
import sys
from typing import Any

from rich.text import Text

from rollforward.wording import plain, plain_lines


def print_line(*fields: object) -> None:
    """One line on standard output, fields separated by tabs."""
    sys.stdout.write("\t".join(plain(str(field)) for field in fields) + "\n")


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value) + "\n")


def warn(text: str) -> None:
    """A warning on standard error."""
    sys.stderr.write(f"warning: {plain_lines(text)}\n")


def cell(text: str, style: str = "") -> Text:
    """A table cell, or another piece of text on a terminal."""
    return Text(plain_lines(text), style=style)
