"""The software that computes, by name and version: exact repetition is promised only on the same versions.

Environment variables that change the arithmetic count as versions, under `$NAME`: only those that are set
are included.
"""

import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import rollforward
from rollforward.engines.base import EnginePackage

HOST_ARITHMETIC = ("GLIBC_TUNABLES", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES")
"""Variables that select a different way of computing on the host, in libm and in NumPy.

Thread counts are not among them: they changed no bit where tried.
"""


def versions(package: EnginePackage, environment: Mapping[str, str] = os.environ) -> Mapping[str, str]:
    """Of this program, the framework, NumPy, Python and the machine type; and the variables that are set."""
    names = (*HOST_ARITHMETIC, *package.arithmetic_variables())
    return {
        "rollforward": f"{rollforward.__version__}+{_sources_digest(package)}",
        **package.versions(),
        "numpy": _installed("numpy"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{f"${name}": environment[name] for name in names if name in environment},
    }


@functools.cache
def _installed(package: str) -> str:
    # Reading package metadata takes 50 ms.
    return version(package)


def _sources_digest(package: EnginePackage) -> str:
    """Detects changed code where the version stays the same, as during development."""
    grpo = Path(rollforward.__file__).parent / "grpo"
    found = hashlib.sha256()
    for source in (*sorted(grpo.glob("*.py")), *package.sources()):
        found.update(source.read_bytes())
    return found.hexdigest()[:8]
