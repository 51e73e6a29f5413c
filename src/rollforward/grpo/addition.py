"""The order in which the gradients of a step's chunks are added: a function of their number alone.

Floating-point addition is not associative, so the order decides the bits. Here it is a binary tree over the
chunk numbers 0 .. C-1, fixed by C. A node of several chunks is the sum of its two children; the left child
has the largest power of two of chunks that leaves one for the right:

    C = 6       ((0 + 1) + (2 + 3)) + (4 + 5)

N workers hold C/N neighbouring chunks each. Where one worker holds both children, it adds them by itself.
Elsewhere two workers exchange theirs and add: a + b has the same bits on both. An all-reduce over more
workers would add in an order of its own, so there is none. `programs` says what each worker does, as the
instructions of a small machine: one *sum*, which additions go to, and a few *slots*, where sums are put
aside. In the end every worker has the whole sum.

    C = 6, N = 3        workers 0, 1, 2     two gradients each, the first kept and added to the second
                        workers 0 and 1     exchange: both have ((0 + 1) + (2 + 3))
                        workers 0 and 2     exchange: both have the sum
                        worker 0            spreads it, for worker 1

A pair adds on both sides, so where C and N are powers of two, the last exchanges leave the sum everywhere.

Left out: sending each worker only the part of the sum that it needs. That takes a reduce-scatter that keeps
this order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Gradient:
    """The sum becomes the gradient of a chunk."""

    chunk: int


@dataclass(frozen=True)
class Keep:
    """A slot becomes a copy of the sum."""

    slot: int


@dataclass(frozen=True)
class Take:
    """The sum becomes a copy of a slot."""

    slot: int


@dataclass(frozen=True)
class Add:
    """A slot is added to the sum."""

    slot: int


@dataclass(frozen=True)
class Exchange:
    """The other worker's sum is added to the sum, and this one to the other's; both then have the same."""

    peer: int
    round: int
    """Exchanges of one round, from 0 on, do not depend on each other; every worker is in one at most."""


@dataclass(frozen=True)
class Spread:
    """The sum becomes that of one worker. All workers meet here."""

    source: int


Instruction: TypeAlias = Gradient | Keep | Take | Add | Exchange | Spread


@dataclass(frozen=True)
class Program:
    """What one worker does, in order."""

    instructions: tuple[Instruction, ...]
    slots: int
    """How many it needs."""


def divisors(chunks: int) -> list[int]:
    """The numbers of workers that can share a step of so many chunks."""
    return [workers for workers in range(1, chunks + 1) if chunks % workers == 0]


def share(chunks: int, workers: int, worker: int) -> range:
    """The chunks of one worker. `workers` divides `chunks`."""
    each = chunks // workers
    return range(worker * each, (worker + 1) * each)


def rounds(programs: Sequence[Program]) -> int:
    """How many rounds of exchanges there are."""
    found = [
        step.round for program in programs for step in program.instructions if isinstance(step, Exchange)
    ]
    return max(found, default=-1) + 1


def programs(chunks: int, workers: int) -> list[Program]:
    """The program of each worker. ValueError unless `workers` divides `chunks`."""
    if chunks < 1 or workers < 1 or chunks % workers:
        raise ValueError(f"{chunks} chunks cannot be shared evenly by {workers} workers")
    plans = [_Plan() for _ in range(workers)]
    holders = _visit(range(chunks), chunks // workers, plans)
    end = () if len(holders) == workers else (Spread(holders[0]),)
    return [plan.program(end) for plan in plans]


Node: TypeAlias = range
"""Neighbouring chunks, and the sum of their gradients."""


def children(node: Node) -> tuple[Node, Node]:
    """The two nodes that a node of several chunks is the sum of."""
    left = 1 << (len(node) - 1).bit_length() - 1
    return node[:left], node[left:]


@dataclass(frozen=True)
class _Crossing:
    """An addition of which at least one operand comes from several workers."""

    here: tuple[Node, ...]
    """The operands that this worker has: both, or the one that it exchanges."""
    result: Node
    peer: int = -1
    round: int = -1


@dataclass
class _Plan:
    """One worker's part of the tree."""

    alone: list[Node] = field(default_factory=list)
    """What it adds without the others, in order of chunks."""
    crossings: list[_Crossing] = field(default_factory=list)
    round: int = -1
    """Of its newest exchange."""

    def program(self, end: tuple[Instruction, ...]) -> Program:
        """All of its own additions first: others may wait for them."""
        writer = _Writer()
        for node in self.alone:
            writer.put_aside()
            writer.evaluate(node)
        for number, crossing in enumerate(self.crossings):
            later = any(writer.current in other.here for other in self.crossings[number + 1 :])
            writer.cross(crossing, later=later)
        return Program((*writer.written, *end), writer.most)


class _Writer:
    """Writes a program, and keeps track of where each node's sum is."""

    def __init__(self) -> None:
        self.written: list[Instruction] = []
        self.current: Node = range(0)
        """What the sum is."""
        self.most = 0
        self._slots: dict[Node, int] = {}

    def evaluate(self, node: Node) -> None:
        """The sum becomes a node of one worker's chunks."""
        if len(node) == 1:
            self.written.append(Gradient(node[0]))
        else:
            left, right = children(node)
            self.evaluate(left)
            self.put_aside()
            self.evaluate(right)
            self._add(left)
        self.current = node

    def cross(self, crossing: _Crossing, *, later: bool) -> None:
        """`later`: what the sum is now will be needed after this."""
        if self.current not in crossing.here:
            if later:
                self.put_aside()
            self.written.append(Take(self._slots.pop(crossing.here[0])))
            self.current = crossing.here[0]
        for node in crossing.here:
            if node != self.current:
                self._add(node)
        if crossing.peer >= 0:
            self.written.append(Exchange(crossing.peer, crossing.round))
        self.current = crossing.result

    def put_aside(self) -> None:
        """Keep the sum, if there is one."""
        if self.current:
            slot = next(slot for slot in range(len(self._slots) + 1) if slot not in self._slots.values())
            self._slots[self.current] = slot
            self.most = max(self.most, slot + 1)
            self.written.append(Keep(slot))

    def _add(self, node: Node) -> None:
        self.written.append(Add(self._slots.pop(node)))


def _visit(node: Node, each: int, plans: Sequence[_Plan]) -> list[int]:
    """Plan the node's sum; returns the workers that have it then, in order. `each`: chunks of a worker."""
    first, last = node[0] // each, node[-1] // each
    if first == last:
        plans[first].alone.append(node)
        return [first]
    left, right = children(node)
    with_left, with_right = _visit(left, each, plans), _visit(right, each, plans)
    both = sorted(set(with_left) & set(with_right))
    if both:
        for worker in both:
            plans[worker].crossings.append(_Crossing((left, right), node))
        return both
    pairs = list(zip(with_left, with_right, strict=False))
    for one, other in pairs:
        plans[one].round = plans[other].round = turn = max(plans[one].round, plans[other].round) + 1
        plans[one].crossings.append(_Crossing((left,), node, other, turn))
        plans[other].crossings.append(_Crossing((right,), node, one, turn))
    return sorted(worker for pair in pairs for worker in pair)
