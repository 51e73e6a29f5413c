"""Kill a process that saves and prunes, at random instants: python kill_loop.py FOLDER KILLS SEED

Each child takes the lock, resumes what it finds, and saves as fast as it can, every second one in
the shadow of its training, telling through a pipe what was committed. It is killed with SIGKILL;
then the folder is opened with the recovery code: what was told must be there, every visible
checkpoint must be whole, and hold what its step says. Prints a JSON object with the counts. A
process of its own, so that forking is safe.
"""

import json
import os
import random
import signal
import sys
import time
from typing import Any

import numpy as np

from rollforward.errors import NothingToResume
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import (
    CheckpointStore,
    Retention,
    RunLock,
    ShadowCheckpoints,
    find,
    list_checkpoints,
    read_tensors,
)
from rollforward.store.saved import About

FEW = 4
"""Saves after which the first children are killed."""
LONGEST = 0.2
"""Seconds that the others have at most, so that all of it ends on a disk that is busy too."""


def state(step: int) -> dict[str, dict[str, np.ndarray]]:
    """What step leaves: a few hundred KiB, so that kills fall into writes too."""
    base = np.arange(20_000, dtype=np.float32) + step
    return {
        "policy_model": {f"w{i}": base * i for i in range(4)},
        "optimizer": {"m": base / 2, "global_step": np.array(step)},
        "ref": {"w": np.full(1000, step // 7, np.float32)},
    }


def train(folder: str, told: int, shadow: bool) -> None:
    """The child: never returns. In the shadow, arrays change while a thread still writes."""
    lock = RunLock.acquire(folder)
    storage = LocalStorage(folder)
    try:
        previous = find(storage).manifest
        step = previous.global_step + 1
    except NothingToResume:
        previous, step = None, 1
    store = CheckpointStore(storage, retention=Retention(newest=2), previous=previous, fence=lock.check)
    about = {"run_id": "killed", "incarnation": lock.incarnation, "state": {}}
    about |= {"attachments": {"config.json": b"{}"}}
    if shadow:
        train_in_the_shadow(store, about, step, told)
    while True:
        store.save(Position(0, step), state(step), global_step=step, **about)
        os.write(told, step.to_bytes(8, "little"))
        step += 1


def train_in_the_shadow(store: CheckpointStore, about: dict[str, Any], step: int, told: int) -> None:
    """Updates in place, as an engine does them, between checkpoints that a thread writes."""
    live = state(step)
    checkpoints = ShadowCheckpoints(
        store,
        lambda: live,
        About(**about),
        saved=lambda saved: os.write(told, saved.manifest.global_step.to_bytes(8, "little")) and None,
        failed=lambda error: sys.exit(str(error)),
        warned=lambda warning: sys.exit(warning),
    )
    while True:
        checkpoints.begin(Position(0, step), step)
        time.sleep(0.002)
        checkpoints.before_update()
        step += 1
        for role, named in state(step).items():
            for name, array in named.items():
                live[role][name][...] = array
        checkpoints.boundary()


def look(folder: str, committed: int) -> None:
    """What a kill left must be right; AssertionError otherwise."""
    storage = LocalStorage(folder)
    listed = list_checkpoints(storage, deep=True)
    assert all(item.valid for item in listed), [item.reason for item in listed]
    if committed:
        manifest = find(storage).manifest
        assert manifest.global_step >= committed, (committed, manifest.global_step)
        for role, name, array in read_tensors(storage, manifest):
            assert np.array_equal(array, state(manifest.global_step)[role][name]), (role, name)


def start(folder: str, shadow: bool) -> tuple[int, int]:
    """A child: its process, and where it tells what it committed."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        train(folder, told, shadow)
    os.close(told)
    return child, heard


def end(child: int, heard: int) -> list[int]:
    """Kill it; the steps that it still told."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    words = b""
    while part := os.read(heard, 1 << 16):
        words += part
    os.close(heard)
    return [int.from_bytes(words[i : i + 8], "little") for i in range(0, len(words), 8)]


def main(folder: str, kills: int, seed: int) -> None:
    """Kill, look, and go on. A child has at most the time that the slower of two took to save a few times."""
    drawn = random.Random(seed)
    committed = saves = 0
    longest = 0.0
    for number in range(kills):
        began = time.monotonic()
        child, heard = start(folder, shadow=number % 2 == 1)
        if number < 2:
            steps = [int.from_bytes(os.read(heard, 8), "little") for _ in range(FEW)]
            longest = max(longest, time.monotonic() - began)
        else:
            time.sleep(drawn.uniform(0, min(longest, LONGEST)))
            steps = []
        steps += end(child, heard)
        saves += len(steps)
        committed = max([committed, *steps])
        look(folder, committed)
    print(json.dumps({"kills": kills, "saves": saves, "committed": committed}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
