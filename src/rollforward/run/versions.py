"""What computes, by name and version: exact repetition is promised on the same versions only."""

import functools
import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import rollforward
from rollforward.engines.base import EnginePackage


def versions(package: EnginePackage) -> Mapping[str, str]:
    """Of this program, the engine's framework, NumPy, Python, and the kind of machine."""
    return {
        "rollforward": f"{rollforward.__version__}+{_sources_digest(package)}",
        **package.versions(),
        "numpy": _installed("numpy"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


@functools.cache
def _installed(package: str) -> str:
    # Reading what packages say of themselves takes 50 ms.
    return version(package)


def _sources_digest(package: EnginePackage) -> str:
    """Tells changed code apart where the version says nothing, as while it is being worked on."""
    grpo = Path(rollforward.__file__).parent / "grpo"
    found = hashlib.sha256()
    for source in (*sorted(grpo.glob("*.py")), *package.sources()):
        found.update(source.read_bytes())
    return found.hexdigest()[:8]
