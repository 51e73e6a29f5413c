"""docs/reference/library.md is what the library says of itself.

python tests/unit/test_library_reference.py     writes it anew
"""

import inspect
import re
from pathlib import Path
from typing import Any

import rollforward
from rollforward import library

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "library.md"

HEAD = """\
# The library

Written by `python tests/unit/test_library_reference.py` from what the library says of itself. How it is used:
[Your own training loop](../how-to/your-own-loop.md).

`rollforward` offers `open_run`, `Run`, `Start`, `Piece` and `__version__`. Every error is one of
`rollforward.errors`.
"""


def page() -> str:
    parts = [
        HEAD,
        "## The whole loop\n",
        _text(library),
        _function("rollforward.open_run", rollforward.open_run),
    ]
    parts += [f"## `Run`\n\n{_text(rollforward.Run)}"]
    parts += [
        _function(f"Run.{name}", getattr(rollforward.Run, name), level="###")
        for name in ("restore", "once", "updating", "outcome", "metrics", "checkpoint", "close")
    ]
    parts += [f"## `Start`\n\n{_text(rollforward.Start)}", *_fields(rollforward.Start)]
    for name in ("step", "epoch"):
        parts.append(f"- `{name}`: {_text(getattr(rollforward.Start, name)).strip()}")
    parts += [f"\n## `Piece`\n\n{_text(rollforward.Piece)}", *_fields(rollforward.Piece)]
    return "\n".join(parts) + "\n"


def _fields(kind: Any) -> list[str]:
    source = inspect.getsource(kind).splitlines()
    found = []
    for name in kind.__dataclass_fields__:
        line = next(index for index, text in enumerate(source) if text.strip().startswith(f"{name}:"))
        found.append(f"- `{name}`: {source[line + 1].strip().strip(chr(34))}")
    return found


def _function(name: str, function: Any, level: str = "##") -> str:
    parameters = [
        one.replace(annotation=inspect.Parameter.empty)
        for one in inspect.signature(function).parameters.values()
        if one.name != "self"
    ]
    return f"{level} `{name}{inspect.Signature(parameters)}`\n\n{_text(function)}"


def _text(item: Any) -> str:
    # Each parameter in a line of its own, as a list.
    return re.sub(r"^(?=`[\w`, ]+`: )", "- ", inspect.getdoc(item) or "", flags=re.MULTILINE) + "\n"


def test_the_page_is_not_stale() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"run python {__file__}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
