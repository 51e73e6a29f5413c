"""The simulated disk and the ranks in lock step are shared with the conformance suite."""

import functools
import sys
from pathlib import Path

import pytest

from rollforward.store import manifest as manifests

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))


@pytest.fixture(autouse=True)
def manifests_parsed_once(monkeypatch):
    """Thousands of crash states hold the same few manifests, and parsing is a pure function of the bytes."""
    monkeypatch.setattr(manifests, "parse", functools.cache(manifests.parse))
