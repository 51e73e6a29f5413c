"""The workers of a run, over MindSpore's communication library.

What passes between them are sums of gradients (`adding`), sums and parts of what a model computes that is cut
over workers (`shards`), small values in JSON (`Group.all_gather`) and sums of integers (`all_sum`). `connect`
checks whether this process was started by `msrun`; if not, no communication library is started.

Left out: what MindSpore cuts by itself. On the CPU neither ReduceScatter nor semi-automatic parallelism
exists, so a cut model is built from explicit collectives.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import communication as comm
from mindspore import nn, ops
from mindspore._c_expression import CollectiveManager
from numpy.typing import NDArray

from rollforward.engines.mindspore.denormals import flushed
from rollforward.engines.mindspore.memory import use_device
from rollforward.engines.mindspore.shards import Gathered, Place, place_of
from rollforward.errors import EngineError
from rollforward.grpo.group import OneProcess, encoded
from rollforward.grpo.ports import Group, Meeting
from rollforward.grpo.types import Floats, Ints

FRAME_WORDS = 1024
"""int32 words of the first frame of an exchange, its length word included: 4 KiB hold most values."""


class MsrunGroup:
    """The workers that `msrun` started. Made by `connect`, which starts the communication library."""

    def __init__(self, meeting: Meeting = nullcontext) -> None:
        self._meeting = meeting
        self.rank: int = comm.get_rank()
        self.world_size: int = comm.get_group_size()
        self._gather = _Gather()
        self._sum = _Sum()

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value, in rank order. EngineError for a value that JSON cannot hold.

        Every rank sends a frame of FRAME_WORDS words that opens with the length of its message in
        bytes. When a message is longer than that, the rest follows in a second exchange as long
        as the longest rest. Sizes are rounded up to powers of two, since each size is a graph to
        compile.
        """
        payload = encoded(value)
        room = (FRAME_WORDS - 1) * 4
        first = np.zeros(FRAME_WORDS, dtype=np.int32)
        first[0] = len(payload)
        first[1:] = _words(payload[:room], FRAME_WORDS - 1)
        frames = self._exchange(first)
        lengths = [int(frame[0]) for frame in frames]
        messages = [frame[1:].tobytes() for frame in frames]
        longest_rest = max(lengths) - room
        if longest_rest > 0:
            words = 1 << (-(-longest_rest // 4) - 1).bit_length()
            rests = self._exchange(_words(payload[room:], max(words, FRAME_WORDS)))
            messages = [head + rest.tobytes() for head, rest in zip(messages, rests, strict=True)]
        return [json.loads(message[:length]) for message, length in zip(messages, lengths, strict=True)]

    @flushed()
    def all_sum(self, numbers: Sequence[int]) -> Sequence[int]:
        """The sum of each number over the workers: see `channel.AllSum`.

        An AllReduce: what a worker sends and receives does not depend on how many there are.
        """
        words = np.array(numbers, dtype=np.float32)
        with self.sharing():
            total: list[int] = self._sum(ms.Tensor(words)).asnumpy().astype(np.int64).tolist()
        return total

    @flushed()
    def _exchange(self, words: Ints) -> NDArray[np.int32]:
        with self.sharing():
            gathered: NDArray[np.int32] = self._gather(ms.Tensor(words)).asnumpy()
        return gathered.reshape(self.world_size, -1)

    def team(self, size: int) -> "Team":
        """See `grpo.ports.Teams`."""
        return Team(self, place_of(self, size))

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """EngineError when the collective within does not succeed."""
        try:
            with self._meeting():
                yield
        except RuntimeError as error:
            raise EngineError(
                f"worker {self.rank} and the others could not exchange data: {first_line(error)}",
                hint="look for the first error in the other workers' logs; resume with --resume_training",
            ) from error


class Team:
    """The workers that hold a model together, as a `Group`. Made by `MsrunGroup.team`."""

    def __init__(self, everyone: MsrunGroup, place: Place) -> None:
        self.rank, self.world_size = place.index, place.count
        self._everyone = everyone
        self._gathered = Gathered(place)

    @flushed()
    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value, in rank order. EngineError for a value that JSON cannot hold.

        Two bytes of a message in each float32: the CPU build adds up nothing else. Lengths go first; sizes
        are powers of two, as for `MsrunGroup.all_gather`.
        """
        payload = encoded(value)
        lengths = self._exchange(np.array([len(payload)], np.float32)).astype(np.int64).reshape(-1).tolist()
        size = 2 << (max(lengths) - 1).bit_length()
        halves = np.frombuffer(payload.ljust(size, b"\0"), np.uint16).astype(np.float32)
        found = self._exchange(halves).astype(np.uint16)
        return [json.loads(each.tobytes()[:length]) for each, length in zip(found, lengths, strict=True)]

    def sharing(self) -> AbstractContextManager[None]:
        """That of all workers."""
        return self._everyone.sharing()

    def _exchange(self, numbers: Floats) -> Floats:
        with self.sharing():
            gathered: Floats = self._gathered(ms.Tensor(numbers)).asnumpy()
        return gathered


class _Gather(nn.Cell):
    """AllGather along the first axis.

    As a graph, because the CPU build of MindSpore 2.10 has no kernel for it outside of one
    ("InnerCommAllGather unregistered"); of int32, because it has none for bytes or int64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all_gather = ops.AllGather()

    def construct(self, words: ms.Tensor) -> ms.Tensor:
        """int32 [n] -> int32 [workers * n]."""
        return self.all_gather(words)


class _Sum(nn.Cell):
    """AllReduce, as a graph too; of float32, since the CPU build has no other kernels but float16."""

    def __init__(self) -> None:
        super().__init__()
        self.all_reduce = ops.AllReduce()

    def construct(self, words: ms.Tensor) -> ms.Tensor:
        """float32 [n] -> float32 [n], the sum over the workers."""
        return self.all_reduce(words)


def started_by_msrun() -> bool:
    """Whether this process is one of several workers that `msrun` started."""
    return os.environ.get("MS_ROLE") == "MS_WORKER" and int(os.environ.get("MS_WORKER_NUM", "1")) > 1


def connect(device_target: str = "CPU", meeting: Meeting = nullcontext) -> Group:
    """The group this process belongs to. Collective under `msrun`: returns when all workers are there.

    `meeting` is entered around every later collective. EngineError when the other workers do not come.
    """
    if not started_by_msrun():
        return OneProcess()
    use_device(device_target)
    try:
        comm.init()
    except RuntimeError as error:
        address = f"{os.environ.get('MS_SCHED_HOST')}:{os.environ.get('MS_SCHED_PORT')}"
        raise EngineError(
            f"worker {os.environ.get('RANK_ID', '?')} could not join its group at {address}: "
            f"{first_line(error)}",
            hint="look for the first error in the other workers' logs; see that the port is free "
            "(msrun --master_port)",
        ) from error
    return MsrunGroup(meeting)


def lost_contact() -> bool:
    """Whether MindSpore has ended the group, or not started it.

    It ends it by itself when a worker has not answered for MS_NODE_TIMEOUT (30 s), and then sends
    this process SIGTERM (seen in 2.10).
    """
    return not CollectiveManager.get_instance().initialized()


def serve_scheduler(device_target: str = "CPU") -> None:
    """Bring the workers of `msrun` together, as its scheduler; ends the process when they are done.

    MindSpore does that within `init`, and leaves it by `sys.exit`.
    """
    use_device(device_target)
    comm.init()


def first_line(error: BaseException) -> str:
    """The essential part of MindSpore's message, which runs to pages."""
    return str(error).strip().split("\n")[0]


def _words(payload: bytes, words: int) -> Ints:
    """The bytes as int32 words, zeros after them."""
    return np.frombuffer(payload.ljust(words * 4, b"\0"), dtype=np.int32)
