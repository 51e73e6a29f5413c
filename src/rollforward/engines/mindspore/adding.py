"""The gradients of a step's chunks, added in the order of `grpo.addition`, over all workers.

Within a worker the memory adds (`memory.Sums`). Between two workers it is an AllReduce in a group of these
two: a + b, the same bits on both. Of more workers MindSpore's AllReduce adds in an order of its own (seen in
2.10 on the CPU: with four, 65 % of the elements are those of a balanced tree), so there is none.
"""

from collections.abc import Callable

import mindspore as ms
from mindspore import nn, ops

from rollforward.engines.mindspore.compiling import Graphs
from rollforward.engines.mindspore.memory import Memory
from rollforward.engines.mindspore.shards import FromReplica, group_of
from rollforward.grpo.addition import Add, Exchange, Gradient, Keep, Spread, Take, programs
from rollforward.grpo.group import Replicas


class AddOther(nn.Cell):
    """Each buffer becomes the sum of it and the other worker's. Collective for the two of the group."""

    def __init__(self, buffers: ms.ParameterTuple, group: str) -> None:
        super().__init__()
        self.buffers = buffers
        self.all_reduce = ops.AllReduce(group=group)

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for buffer in self.buffers:
            # One after the other: both workers must meet in the same order.
            done = ops.depend(done, ops.assign(buffer, self.all_reduce(ops.depend(buffer, done))))
        return done


class TakeFrom(nn.Cell):
    """Each buffer becomes that of one replica. Collective for all."""

    def __init__(self, buffers: ms.ParameterTuple, replicas: Replicas, source: int) -> None:
        super().__init__()
        self.buffers = buffers
        self.sent = FromReplica(replicas, source)

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for buffer in self.buffers:
            done = ops.depend(done, ops.assign(buffer, self.sent(ops.depend(buffer, done))))
        return done


class TotalGradient:
    """Adds up the gradients of `chunks` chunks of each replica in the buffers. Creating one is collective."""

    def __init__(self, buffers: ms.ParameterTuple, chunks: int, group: Replicas, memory: Memory) -> None:
        self._group = group
        self._chunks = chunks
        self._program = programs(chunks * group.world_size, group.world_size)[group.rank]
        self._sums = memory.sums(buffers, self._program.slots)
        self._others: dict[Exchange | Spread, nn.Cell] = {}
        cells: dict[int, nn.Cell] = {}
        for step in self._program.instructions:
            match step:
                case Exchange(peer):
                    if peer not in cells:
                        cells[peer] = AddOther(buffers, _pair(group, peer))
                    self._others[step] = cells[peer]
                case Spread(source):
                    self._others[step] = TakeFrom(buffers, group, source)

    def compile(self, graphs: Graphs) -> None:
        """Compile every graph, always in this order."""
        self._sums.compile(graphs)
        for number, cell in enumerate(dict.fromkeys(self._others.values())):
            graphs.compile(f"other_{number}", cell)

    def add_up(self, add_gradient: Callable[[int], None]) -> None:
        """The buffers become the sum over all chunks of all workers. Collective.

        `add_gradient` adds the gradient of a chunk to them, by its number among this worker's.
        """
        sums = self._sums
        for step in self._program.instructions:
            match step:
                case Gradient(chunk):
                    sums.clear()
                    add_gradient(chunk - self._chunks * self._group.rank)
                case Keep(slot):
                    sums.keep(slot)
                case Take(slot):
                    sums.take(slot)
                case Add(slot):
                    sums.add(slot)
                case Exchange() | Spread():
                    with self._group.sharing():
                        self._others[step]().asnumpy()


def _pair(group: Replicas, peer: int) -> str:
    """The group of this worker and another. Collective for the two."""
    first, second = sorted((group.workers[group.rank], group.workers[peer]))
    return group_of(group.all, range(first, second + 1, second - first))
