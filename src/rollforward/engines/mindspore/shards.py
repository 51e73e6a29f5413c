"""Collectives between the workers that hold a model together, as `models.sharding` cuts it.

    Gathered    what each has, one after the other
    Added       the sum, in the forward pass;  backward, the gradient of the sum is that of each part
    Shared      what all have alike, on its way into their parts;  backward, the parts' gradients are added

`Added` stands behind what is cut by columns, `Shared` before what is cut by rows: Megatron's g and f. The
gradient that MindSpore has of AllReduce would be another one, of a sum of everybody's losses: here the loss
is one number, that all compute.

Promises: the same bits on all workers, and an element's bits depend on that element of each part only. Of
two, an AllReduce is a + b. Of more, MindSpore's AllReduce adds in an order that depends on where in the array
an element is (seen in 2.10 on the CPU), so everybody gets every part, as rows of an array of zeros that are
added up exactly, and adds the parts in order.

Replicas of one part send each other theirs (`FromReplica`).

Every worker runs the same graphs in the same order, or they wait for each other for ever. Within a graph each
collective needs the result of the one before.
"""

from dataclasses import dataclass
from functools import cache

import mindspore as ms
from mindspore import communication as comm
from mindspore import nn, ops

from rollforward.errors import EngineError
from rollforward.grpo.group import Replicas
from rollforward.grpo.ports import Group
from rollforward.models.sharding import Shard


@dataclass(frozen=True)
class Place(Shard):
    """A worker's part of the model, and how it reaches the workers that have the others."""

    name: str = ""
    """MindSpore's name of their group."""


WHOLE = Place()


class Nothing(nn.Cell):
    """What changes no bit where it is added, in the shape of `x`: -0, since -0 + 0 is 0.

    Of primitives: `ops.zeros_like` beside a collective, in a cell with a gradient of its own, does not
    compile in MindSpore 2.10 ("The func graph is empty").
    """

    def __init__(self) -> None:
        super().__init__()
        self.zeros, self.minus = ops.ZerosLike(), ops.Neg()

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """float32 of any shape."""
        return self.minus(self.zeros(x))


class Gathered(nn.Cell):
    """float32 [...] -> [workers, ...], the same on all. Collective."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.before, self.after = place.index, place.count - 1 - place.index
        self.nothing = Nothing()
        self.all_reduce = ops.AllReduce(group=place.name)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """What each has, in order."""
        none = self.nothing(x)
        return self.all_reduce(ops.stack((none,) * self.before + (x,) + (none,) * self.after))


class Total(nn.Cell):
    """The sum of what each has, the same on all. Collective; without a gradient."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.count = place.count
        self.all_reduce = ops.AllReduce(group=place.name)
        self.gathered = Gathered(place)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """float32 of any shape."""
        if self.count == 2:
            total = self.all_reduce(x)
        else:
            parts = self.gathered(x)
            total = parts[0]
            for index in range(1, self.count):
                total = total + parts[index]
        # Without this, gradients that several operators take from a sum were wrong, alike in every run: in
        # MindSpore 2.10 on the CPU, with a `bprop` and with AllReduce's own gradient alike.
        return ops.depend(total * 1.0, total)


class Added(nn.Cell):
    """See the module."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.total = Total(place)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """The sum of what each has."""
        return self.total(x)

    def bprop(self, x: ms.Tensor, _: ms.Tensor, dout: ms.Tensor) -> tuple[ms.Tensor]:  # noqa: ARG002
        """The sum's."""
        return (dout,)


class Shared(nn.Cell):
    """See the module."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.total = Total(place)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """The same."""
        return x

    def bprop(self, x: ms.Tensor, _: ms.Tensor, dout: ms.Tensor) -> tuple[ms.Tensor]:  # noqa: ARG002
        """The sum of what each part of the layer gave."""
        return (self.total(dout),)


class AddParts(nn.Cell):
    """Each buffer becomes the sum of it over the workers. Collective."""

    def __init__(self, buffers: ms.ParameterTuple, place: Place) -> None:
        super().__init__()
        self.buffers = buffers
        self.total = Total(place)

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for buffer in self.buffers:
            # One after the other: all workers must meet in the same order.
            done = ops.depend(done, ops.assign(buffer, self.total(ops.depend(buffer, done))))
        return done


def place_of(group: Group, count: int) -> Place:
    """This worker's place among `count` neighbours. Collective for these; EngineError if there are none."""
    if count == 1:
        return WHOLE
    if group.world_size % count:
        raise EngineError(
            f"the model is to be cut over {count} workers, and {group.world_size} cannot be shared out in "
            "such groups",
            hint=f"start a multiple of {count} workers",
        )
    first = group.rank - group.rank % count
    return Place(group.rank % count, count, group_of(group, range(first, first + count)))


class FromReplica(nn.Cell):
    """What one replica has, for all replicas: those of this worker's part. Collective for these.

    On the CPU, MindSpore 2.10 has a Broadcast over all workers only.
    """

    def __init__(self, replicas: Replicas, source: int) -> None:
        super().__init__()
        self.among_all = replicas.model_parallel == 1
        self.mine = replicas.rank == source
        self.nothing = Nothing()
        self.broadcast = ops.Broadcast(replicas.workers[source])
        self.all_reduce = ops.AllReduce(group=group_of(replicas.all, replicas.workers))

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """float32 of any shape."""
        if self.among_all:
            (sent,) = self.broadcast((x,))
            return sent
        # Nothing does not need x, but it must wait for what x waits for: all meet in the same order.
        return self.all_reduce(x if self.mine else ops.depend(self.nothing(x), x))


def group_of(everyone: Group, workers: range) -> str:
    """MindSpore's name of a group of these workers. Collective for these."""
    if len(workers) == everyone.world_size:
        return comm.GlobalComm.WORLD_COMM_GROUP
    with everyone.sharing():
        return _created(workers)


@cache
def _created(workers: range) -> str:
    name = f"rollforward-{workers.start}-{workers.stop}-{workers.step}"
    comm.create_group(name, list(workers))
    return name
