"""Forks the ranks of `mortal_ranks` and carries what they exchange; starts come in on standard input.

A process of its own, so that forking is safe, which imports once what every rank needs. A rank that
waits for one that is gone is killed too, as `run.launch` does.
"""

import gc
import hashlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

import kill_points
import toy_session
from mortal_ranks import Start, diary_file, said_by
from toy_engine import ToyEngine

from rollforward.position import Position
from rollforward.processes import launch
from rollforward.replay.rollout_log import JournaledRollouts
from rollforward.run import session
from rollforward.run.versions import versions

PATIENCE = 300.0
"""Seconds without a word after which ranks that neither end nor die are a failure of the test."""

_places: dict[str, toy_session.Place] = {}


class _Exchange:
    """A rank's end of the exchange: `grpo.ports.Group`."""

    def __init__(self, wire: socket.socket, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._wire = wire

    def all_gather(self, value: Any) -> list[Any]:
        _send(self._wire, value)
        gathered = _receive(self._wire)
        assert isinstance(gathered, list)
        return gathered

    def sharing(self) -> AbstractContextManager[None]:
        return nullcontext()


def _send(wire: socket.socket, value: Any) -> None:
    data = json.dumps(value).encode()
    wire.sendall(len(data).to_bytes(4, "little") + data)


def _receive(wire: socket.socket) -> Any:
    """The other's value; None when it is gone, be it in the middle of one."""
    front = _exactly(wire, 4)
    data = _exactly(wire, int.from_bytes(front, "little")) if front else b""
    return json.loads(data) if data else None


def _exactly(wire: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        try:
            part = wire.recv(count - len(data))
        except ConnectionResetError:
            # It died before it had read what was sent to it.
            part = b""
        if not part:
            return b""
        data += part
    return data


def _serve(start: Start, pids: Sequence[int], wires: Sequence[socket.socket]) -> None:
    """Gather values for the ranks until all are gone, and kill who has to be."""
    began = heard = time.monotonic()
    due = start.after
    living = set(range(len(wires)))
    waiting: dict[int, Any] = {}
    with selectors.DefaultSelector() as selector:
        for rank, wire in enumerate(wires):
            selector.register(wire, selectors.EVENT_READ, rank)
        while living:
            now = time.monotonic()
            passed = now - began
            if due is not None and passed >= due:
                due = None
                _kill([pids[rank] for rank in start.victims if rank in living])
            if now - heard > PATIENCE:
                # The ranks die with this process, which their test is told by.
                raise TimeoutError(f"ranks {sorted(living)} hang; {sorted(waiting)} wait for the others")
            for key, _ in selector.select(PATIENCE if due is None else max(due - passed, 0)):
                rank, heard = key.data, time.monotonic()
                value = _receive(wires[rank])
                if value is None:
                    living.discard(rank)
                    waiting.pop(rank, None)
                    selector.unregister(wires[rank])
                else:
                    waiting[rank] = value
            if len(waiting) == len(wires):
                gathered = [waiting[rank] for rank in sorted(waiting)]
                waiting.clear()
                for wire in wires:
                    with suppress(ConnectionError):
                        _send(wire, gathered)
            elif waiting and living == set(waiting):
                _kill([pids[rank] for rank in living])


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _fork(start: Start, rank: int, wires: Sequence[Sequence[socket.socket]]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for other, (here, there) in enumerate(wires):
            here.close()
            if other != rank:
                there.close()
        _live(start, rank, wires[rank][1])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _live(start: Start, rank: int, wire: socket.socket) -> None:
    """A rank: the session, from the plan to the end."""
    launch.die_with_parent()
    root = Path(start.root)
    os.chdir(root)
    said = os.open(said_by(root, start.run, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    pages = os.open(diary_file(root, start.run, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(line: str) -> None:
        os.write(pages, f"{line}\n".encode())

    _keep_diary(note)
    point = start.points.get(str(rank))
    if point is not None:
        kill_points.arm(point, lambda: note(f"killed\t{point}"))

    def connect() -> _Exchange:
        """Returns when all ranks are there."""
        group = _Exchange(wire, rank, start.world_size)
        group.all_gather(rank)
        return group

    package = toy_session.ToyPackage(group=connect)
    asked = {"position": Position.parse(start.position)} if start.position else {}
    plan = _places[start.root].plan(
        start.run,
        resume=start.resume,
        source=start.source,
        world_size=start.world_size,
        rank=rank,
        asked=asked,
        **start.changes,
    )
    session.train(plan, package)


def _keep_diary(note: Any) -> None:
    """Chunks are told apart by their random numbers, each drawn from (seed, position, sample)."""
    generate, append = ToyEngine.generate, JournaledRollouts.append
    latest = ""

    def generated(self: Any, prompt_ids: Any, prompt_mask: Any, uniforms: Any) -> Any:
        nonlocal latest
        latest = hashlib.blake2b(uniforms.tobytes(), digest_size=8).hexdigest()
        note(f"generated\t{latest}")
        return generate(self, prompt_ids, prompt_mask, uniforms)

    def appended(self: Any, position: Any, chunk: int, rollouts: Any) -> None:
        append(self, position, chunk, rollouts)
        note(f"finished\t{latest}\t{position}")

    ToyEngine.generate = generated  # type: ignore[method-assign]
    JournaledRollouts.append = appended  # type: ignore[method-assign]


def main() -> None:
    """Starts come in and ends go out, a line of JSON each."""
    versions(toy_session.ToyPackage())
    gc.freeze()
    for line in sys.stdin:
        start = Start(**json.loads(line))
        if start.root not in _places:
            _places[start.root] = toy_session.Place(Path(start.root))
        wires = [socket.socketpair() for _ in range(start.world_size)]
        pids = [_fork(start, rank, wires) for rank in range(start.world_size)]
        for _, there in wires:
            there.close()
        _serve(start, pids, [here for here, _ in wires])
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        for here, _ in wires:
            here.close()
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
