"""Where an engine's framework is not installed, the tests that need it are left out, and counted.

A test needs it when its file imports it, or when it is marked `engine`: such tests start a trainer.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

_MISSING = find_spec("mindspore") is None
_IMPORTS_IT = re.compile(
    r"^(import|from) (mindspore\b|mindspore_case|golden_models|rollforward\.engines\.mindspore\.(?!package))",
    re.MULTILINE,
)
_left_out: list[str] = []


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if _MISSING and collection_path.match("test_*.py") and _IMPORTS_IT.search(collection_path.read_text()):
        _left_out.append(collection_path.name)
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _MISSING:
        return
    marked = [item for item in items if item.get_closest_marker("engine") is not None]
    config.hook.pytest_deselected(items=marked)
    items[:] = [item for item in items if item not in marked]


def pytest_report_collectionfinish() -> str | None:
    return f"no MindSpore: {len(_left_out)} files are left out, {', '.join(_left_out)}" if _left_out else None
