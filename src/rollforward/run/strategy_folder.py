"""Strategy files in `--save_strategy_dir`: old ones cleared, one written for each rank.

Only regular files with the names that the contract's trainers give to strategy files are
cleared: the folder may belong to anyone.
"""

import re
from pathlib import Path

from rollforward.storage import LocalStorage

_NAME = re.compile(r"(?:ckpt_)?strategy(?:_rank)?(?:_\d+)?\.ckpt", re.ASCII)


def clear(folder: Path) -> list[str]:
    """Remove old strategy files; returns their names. A missing folder has none."""
    storage = LocalStorage(folder)
    names = [entry.name for entry in storage.scan("") if entry.kind == "file" and _NAME.fullmatch(entry.name)]
    for name in names:
        storage.remove(name)
    return names


def write(folder: Path, rank: int, content: bytes) -> None:
    """Write a rank's file, durably."""
    LocalStorage(folder).write(f"strategy_{rank}.ckpt", [content])
