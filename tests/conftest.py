"""What all tests share: which are left out, in which order files are taken, and what property tests draw.

Where a framework is not installed, the tests that need it are left out, and counted. A test needs MindSpore
when its file imports it, or when it is marked `engine`, since it starts a trainer; PyTorch with TRL, a
browser, or object stores, when it is in the folder of these.

Property tests draw the same examples each time, so that a change fails for what it changed, and none fails
because the machine is busy. `--hypothesis-profile=explore` draws others each time: CONTRIBUTING.md.
"""

import gc
import re
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from rollforward.replay import saving

pytest.register_assert_rewrite("storage_case")

settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("suite"), derandomize=False, max_examples=1000)
settings.load_profile("suite")

_MISSING = find_spec("mindspore") is None
_IMPORTS_IT = re.compile(
    r"^(import|from) (mindspore\b|mindspore_case|golden_models|rollforward\.engines\.mindspore\.(?!package))",
    re.MULTILINE,
)
_FOLDERS = {"pytorch": "trl", "browser": "selenium", "objects": "moto"}
"""A folder as a whole, since its conftest may need it too: what all of its tests need."""
_LONGEST = (
    "e2e/test_model_parallel.py",
    "e2e/test_lora.py",
    "e2e/test_two_workers.py",
    "e2e/test_model_parallel_lora.py",
    "conformance/test_engines.py",
    "e2e/test_model_parallel_run.py",
    "e2e/test_engine_workers.py",
    "crash/test_kill_points.py",
    "e2e/test_cli_train.py",
    "unit/engine/test_engine_adapters.py",
    "e2e/test_kept_graphs.py",
    "unit/engine/test_engine_compiling.py",
    "e2e/test_prove.py",
    "unit/engine/test_engine_generation.py",
    "crash/test_fuzz.py",
    "e2e/test_own_loop.py",
    "unit/engine/test_engine_decoding.py",
    "crash/test_crash_states.py",
)
"""The files that take longest, and so begin first: two at a time, the rest then fills up what is left."""
_left_out: dict[str, list[str]] = {}


@pytest.fixture(autouse=True)
def _every_save_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is slow for a moment leaves no save out: which there are is a matter of steps alone."""
    monkeypatch.setattr(saving, "PATIENCE", 300.0)


def pytest_configure() -> None:
    """Who starts the tests in the background ignores SIGINT, and all that they start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    needed = _FOLDERS.get(collection_path.name)
    if needed and collection_path.parent == Path(__file__).parent and find_spec(needed) is None:
        _left_out[needed] = [path.name for path in sorted(collection_path.glob("test_*.py"))]
        return True
    if _MISSING and collection_path.match("test_*.py") and _IMPORTS_IT.search(collection_path.read_text()):
        _left_out.setdefault("mindspore", []).append(collection_path.name)
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    if not _MISSING:
        return
    marked = [item for item in items if item.get_closest_marker("engine") is not None]
    config.hook.pytest_deselected(items=marked)
    items[:] = [item for item in items if item not in marked]


def pytest_collection_finish() -> None:
    """MindSpore collects garbage before each graph: what was imported need not be scanned each time."""
    gc.freeze()


def pytest_report_collectionfinish() -> list[str]:
    return [
        f"no {name}: {len(files)} files are left out, {', '.join(files)}" for name, files in _left_out.items()
    ]
