"""One process of the example's loop, which may kill itself at a call: PLACE is `module:attribute:number`.

    python own_loop_worker.py RUN STEPS PLACE RANK WORLD_SIZE SOCKET

SOCKET is a file descriptor over which `all_gather` goes, a line of JSON each way; -1 for one process.
"""

import importlib.util
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rollforward.storage.local import OsFiles

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_loop" / "train.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arm(example: Any, place: str) -> None:
    """Die at the call of that number: before it, or, of a write, in the middle of it."""
    owner_name, attribute, number = place.split(":")
    owner = {"example": example, "files": OsFiles, "numpy": np.linalg}[owner_name]
    original = getattr(owner, attribute)
    left = int(number)

    def armed(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if attribute == "write":
                original(*given[:-1], given[-1][: len(given[-1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(owner, attribute, armed)


def gathering(descriptor: int) -> Any:
    if descriptor < 0:
        return lambda value: [value]
    stream = socket.socket(fileno=descriptor).makefile("rw", encoding="utf-8")

    def all_gather(value: Any) -> list[Any]:
        stream.write(json.dumps(value) + "\n")
        stream.flush()
        answer = stream.readline()
        if not answer:
            raise ConnectionError("another process is gone")
        found: list[Any] = json.loads(answer)
        return found

    return all_gather


if __name__ == "__main__":
    run, steps, place, rank, world_size, descriptor = sys.argv[1:]
    example = load_example()
    if place:
        arm(example, place)
    logits = example.train(run, int(steps), int(rank), int(world_size), gathering(int(descriptor)))
    print("end", logits.tobytes().hex())
