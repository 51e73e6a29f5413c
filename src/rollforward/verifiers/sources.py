"""What a verifier's rewards depend on besides its arguments, as far as that can be known.

Known is the source text of the module that the configuration names, and of the one that defines the
function, if that is a different one; for verifiers of this program, all of their sources, and the versions
of the libraries that judge. Not known: what a module imports, reads, or requests over a network.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rollforward.inputs import read_input
from rollforward.verifiers.registry import BUILT_IN, NamedFunction

_MOST_BYTES = 1 << 26
_LIBRARIES = {
    "accuracy_reward": ("math-verify", "latex2sympy2_extended", "sympy"),
    "reasoning_gym_score": ("reasoning-gym",),
}


def describe(verifiers: Sequence[Any]) -> Mapping[str, str]:
    """Name of each verifier, and of each library -> digest of its sources, or version."""
    found: dict[str, str] = {}
    for verifier in verifiers:
        if isinstance(verifier, NamedFunction):
            found[verifier.name] = _digest(_files(verifier))
            found |= {name: _version(name) for name in _LIBRARIES.get(verifier.name, ())}
    return found


def _files(verifier: NamedFunction) -> Sequence[Path | None]:
    if verifier.name in BUILT_IN:
        return sorted(Path(__file__).parent.glob("*.py"))
    function: Callable[..., Any] = inspect.unwrap(verifier.function)
    modules = {verifier.name.partition(":")[0], getattr(function, "__module__", None) or ""}
    return [_source(name) for name in sorted(modules) if name]


def _source(module: str) -> Path | None:
    found = getattr(sys.modules.get(module), "__file__", None)
    return Path(found) if found is not None and found.endswith(".py") else None


def _digest(files: Sequence[Path | None]) -> str:
    """Of all files; `unknown` when one cannot be read."""
    whole = hashlib.sha256()
    for path in files:
        try:
            if path is None:
                return "unknown"
            content = read_input(path, _MOST_BYTES)
        except OSError:
            return "unknown"
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
