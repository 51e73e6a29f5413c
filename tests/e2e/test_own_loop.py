"""The example's loop dies by SIGKILL wherever, in one process or two, and ends with the same bytes."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from rollforward.inspection.history import timeline
from rollforward.storage import LocalStorage
from rollforward.store import list_checkpoints

WORKER = Path(__file__).with_name("own_loop_worker.py")
EXAMPLE = WORKER.parents[2] / "examples" / "own_loop" / "train.py"
STEPS = 45
"""Checkpoints after 0, 20, 40 and 45."""


class Ended:
    """How the processes of one start ended."""

    def __init__(self, codes: list[int], outputs: list[str]) -> None:
        self.codes = codes
        self.outputs = outputs

    @property
    def states(self) -> list[str]:
        """The bytes that each ended with."""
        return [re.findall(r"^end (\w+)$", output, re.MULTILINE)[-1] for output in self.outputs]


def start(run: Path, world_size: int = 1, *, victim: int = 0, place: str = "") -> Ended:
    """One start of all processes; the victim dies at the place."""
    pairs = [socket.socketpair() if world_size > 1 else None for _ in range(world_size)]
    processes = []
    for rank, pair in enumerate(pairs):
        descriptor = pair[1].fileno() if pair else -1
        where = place if rank == victim else ""
        processes.append(
            subprocess.Popen(
                [sys.executable, WORKER, run, str(STEPS), where, str(rank), str(world_size), str(descriptor)],
                pass_fds=[descriptor] if pair else [],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for pair in filter(None, pairs):
        pair[1].close()
    hub = threading.Thread(target=exchange, args=([pair[0] for pair in pairs if pair],))
    hub.start()
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    hub.join(600)
    return Ended([process.returncode for process in processes], outputs)


def exchange(ends: list[socket.socket]) -> None:
    """Gather a line from each and give all of them to each, until one is gone; then all are told."""
    with ExitStack() as stack:
        streams = [stack.enter_context(stack.enter_context(end).makefile("rwb", 0)) for end in ends]
        with suppress(OSError):
            while ends and all(lines := [stream.readline() for stream in streams]):
                answer = (json.dumps([json.loads(line) for line in lines]) + "\n").encode()
                for stream in streams:
                    stream.write(answer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """World size -> the bytes that undisturbed processes end with."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for world_size in (1, 2):
        ended = start(folder / str(world_size), world_size)
        assert set(ended.codes) == {0}, ended.outputs
        found[world_size] = ended.states
    assert found[2][0] == found[2][1]
    assert found[1][0] != found[2][0]
    return found


PLACES = [
    ["example:sample:1"],
    ["numpy:norm:30"],
    ["example:gradient:7", "example:gradient:3"],
    ["files:fsync:5", "files:fsync:30"],
    ["files:write:9", "files:write:40", "files:write:12"],
    ["files:rename:2", "files:rename:3"],
    ["files:fsync_folder:13", "example:sample:4"],
]


@pytest.mark.parametrize(
    ("world_size", "places"),
    [
        *(pytest.param(1, places, id=", then ".join(places)) for places in PLACES),
        # Two cost twice as much: a kill in the example, one while files are written, one of each.
        *(pytest.param(2, places, id="2, " + ", then ".join(places)) for places in PLACES[2::2]),
    ],
)
def test_killed_there_and_resumed_it_ends_with_the_same_bytes(
    tmp_path: Path, whole: dict[int, list[str]], places: list[str], world_size: int
) -> None:
    died = 0
    for place in places:
        # Two ranks share the work: let the second die, which does not publish.
        victim = world_size - 1
        ended = start(tmp_path, world_size, victim=victim, place=place)
        if ended.codes[victim] == 0:
            continue  # nothing was left to do there
        died += 1
        assert ended.codes[victim] == -signal.SIGKILL, ended.outputs
        assert all(code not in (0, None) for code in ended.codes)
    assert died
    ended = start(tmp_path, world_size)
    assert set(ended.codes) == {0}, ended.outputs
    assert ended.states == whole[world_size]
    assert "warning" not in "".join(ended.outputs)
    storage = LocalStorage(tmp_path)
    assert all(info.valid for info in list_checkpoints(storage, deep=True))
    assert timeline(storage)[-1].what == "finished"


def test_the_example_is_short_and_spells_its_word(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.splitlines()[-1] == "ROLLFORWARD"
