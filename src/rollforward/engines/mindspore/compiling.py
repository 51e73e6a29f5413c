"""Compiled graphs, kept between starts of a run where that is safe.

A bug of MindSpore (seen in 2.10) decides how: its compile cache identifies a graph only as the n-th
that a process compiles. A process that compiles the same graphs in another order gets the wrong
ones, without an error and with wrong numbers; so does one whose graphs have other constants compiled
in, since only the source files are compared.

So the cache is on only during one phase, in which the engine compiles all its graphs in a fixed
order, before anything else is compiled; and each set of settings, versions, workers and sources has
a folder of its own, whose files are used only when each has the digest that was recorded when all
were there.

The sources that MindSpore compares are the script that started the process, and what it imports. So a
run that is restarted through another script (`rollforward`, `python -m`, a worker of `msrun`) would
compile again, and spoil the cache. Our folder's key covers what graphs are made from, so during this
phase MindSpore always sees the same script: this file.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mindspore as ms
from mindspore.graph import api

from rollforward.grpo.ports import Group
from rollforward.grpo.types import EngineSettings
from rollforward.inputs import parse_json, read_input

_DIGESTS = "digests.json"


@contextmanager
def kept_graphs(settings: EngineSettings, group: Group, root: Path) -> Iterator[Path]:
    """Within it, graphs are taken from the folder it gives, or put there; compile in a fixed order."""
    folder = root.absolute() / f"{_key(settings, group.world_size)}-{group.rank}"
    whole = _is_whole(folder)
    if not whole:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    script = api.entry_script_path
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(folder))
    api.entry_script_path = __file__
    # MindSpore collects garbage before each graph; imported objects need not be scanned each time.
    gc.freeze()
    try:
        yield folder
    finally:
        gc.unfreeze()
        api.entry_script_path = script
        ms.set_context(enable_compile_cache=False)
    if not whole:
        (folder / _DIGESTS).write_text(json.dumps(_digests(folder)))


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds, unchanged, what a process that finished put there."""
    try:
        noted = parse_json(read_input(folder / _DIGESTS, 1 << 26))
        return bool(noted == _digests(folder))
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    """Path below the folder -> digest, of every file but the list of digests itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _DIGESTS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _key(settings: EngineSettings, world_size: int) -> str:
    """Digest of everything that graphs are made from."""
    numbers = replace(settings, policy_folder=None, reference_folder=None, compile_cache_folder=None)
    found = hashlib.sha256(repr((numbers, world_size, ms.__version__)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        found.update(source.read_bytes())
    return found.hexdigest()[:16]
