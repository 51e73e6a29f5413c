"""The simulated disk and the ranks in lock step are shared with the conformance suite."""

import functools
import sys
from pathlib import Path

import pytest

from rollforward.store import table, versions
from rollforward.store.journal import reading

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))


@pytest.fixture(autouse=True)
def parsed_once(monkeypatch):
    """Thousands of crash states hold the same few manifests and records; parsing is a pure function."""
    monkeypatch.setattr(versions, "parse", functools.cache(versions.parse))
    monkeypatch.setattr(table, "parse", functools.cache(table.parse))
    for name in ("decode_header", "decode_record"):
        monkeypatch.setattr(reading, name, functools.cache(getattr(reading, name)))
