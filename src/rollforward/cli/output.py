"""What verbs print: lines, warnings, JSON, cells of tables.

Texts from a run's folder are anybody's. Here they are made plain (`wording.plain`), and are never read as
rich's markup. JSON needs neither: its texts are ASCII with escapes.
"""

import json
import sys
from typing import Any

from rich.text import Text

from rollforward.wording import plain, plain_lines


def print_line(*fields: object) -> None:
    """One line on standard output, tabs between the fields."""
    sys.stdout.write("\t".join(plain(str(field)) for field in fields) + "\n")


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value) + "\n")


def warn(text: str) -> None:
    """A warning on standard error."""
    sys.stderr.write(f"warning: {plain_lines(text)}\n")


def cell(text: str, style: str = "") -> Text:
    """A cell of a table, or another piece of text on a terminal."""
    return Text(plain_lines(text), style=style)
