"""Rollforward: reinforcement-learning post-training that recovers like a database.

`open_run` gives the recovery to a training loop of your own; `rollforward.library` says how.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollforward.library import Piece, Run, Start, open_run

__version__ = "0.1.0"
__all__ = ["Piece", "Run", "Start", "__version__", "open_run"]


def __getattr__(name: str) -> Any:
    # Late: who wants the version only, or starts the command line, is not to wait for NumPy.
    if name in __all__:
        return getattr(import_module("rollforward.library"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
