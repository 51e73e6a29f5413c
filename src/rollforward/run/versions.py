"""What computes, by name and version: exact repetition is promised on the same versions only.

Environment variables that change the arithmetic count as versions, under their names behind a `$`: only those
that are set are there.
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
"""Variables by which another way of computing is chosen on the host, in libm and in NumPy.

Numbers of threads are not among them: they changed no bit where it was tried.
"""


def versions(package: EnginePackage, environment: Mapping[str, str] = os.environ) -> Mapping[str, str]:
    """Of this program, the framework, NumPy, Python and the kind of machine; and variables that are set."""
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
    # Reading what packages say of themselves takes 50 ms.
    return version(package)


def _sources_digest(package: EnginePackage) -> str:
    """Tells changed code apart where the version says nothing, as while it is being worked on."""
    grpo = Path(rollforward.__file__).parent / "grpo"
    found = hashlib.sha256()
    for source in (*sorted(grpo.glob("*.py")), *package.sources()):
        found.update(source.read_bytes())
    return found.hexdigest()[:8]
