"""However many workers share a step, its gradients add up to the same bits."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rollforward.grpo.addition import (
    Add,
    Exchange,
    Gradient,
    Keep,
    Program,
    Spread,
    Take,
    children,
    divisors,
    programs,
    rounds,
    share,
)

Array = NDArray[np.float32]

MOST = 48
"""Chunks of a step, here."""


def tree(node: range, gradients: list[Array]) -> Array:
    """The sum as the module's docstring has it."""
    if len(node) == 1:
        return gradients[node[0]]
    left, right = children(node)
    return tree(left, gradients) + tree(right, gradients)


class Workers:
    """Carries out all programs, one thread each; whoever waits for a worker that never comes fails."""

    def __init__(self, gradients: list[Array], programs: list[Program]) -> None:
        self.computed: list[list[int]] = [[] for _ in programs]
        self._gradients = gradients
        self._programs = programs
        self._meetings: dict[object, list[tuple[int, Array]]] = {}
        self._changed = threading.Condition()

    def run(self) -> list[Array]:
        sums: list[Array | None] = [None] * len(self._programs)

        def work(worker: int) -> None:
            sums[worker] = self._work(worker)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(len(sums))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(found is not None for found in sums), "a worker waited in vain"
        return [found for found in sums if found is not None]

    def _work(self, worker: int) -> Array:
        total: Array = np.full_like(self._gradients[0], np.nan)
        slots = [total] * self._programs[worker].slots
        for step in self._programs[worker].instructions:
            match step:
                case Gradient(chunk):
                    self.computed[worker].append(chunk)
                    total = self._gradients[chunk]
                case Keep(slot):
                    slots[slot] = total
                case Take(slot):
                    total = slots[slot]
                case Add(slot):
                    total = total + slots[slot]
                case Exchange(peer, turn):
                    told = self._meet((turn, *sorted((worker, peer))), worker, total, 2)
                    total = total + told[peer]
                case Spread(source):
                    total = self._meet("spread", worker, total, len(self._programs))[source]
        return total

    def _meet(self, where: object, worker: int, value: Array, count: int) -> dict[int, Array]:
        with self._changed:
            met = self._meetings.setdefault(where, [])
            met.append((worker, value))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: len(met) == count, 300), f"worker {worker} waits at {where}"
            return dict(met)


def cancelling(chunks: int, seed: int) -> list[Array]:
    """Gradients of very different sizes that almost cancel, denormals and zeros of both signs among them."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-60, 60, (chunks, 40)))
    made = (rng.standard_normal((chunks, 40)) * sizes).astype(np.float32)
    made[chunks // 2 :, :20] = -made[: chunks - chunks // 2, :20] * np.float32(1 + 2.0**-22)
    made[:, 20:25] = rng.integers(0, 1 << 23, (chunks, 5)).astype(np.uint32).view(np.float32)
    made[:, 25:28] = rng.choice(np.array([0.0, -0.0], np.float32), (chunks, 3))
    return list(made)


@given(st.integers(1, MOST), st.integers(0, 1 << 30), st.data())
def test_every_number_of_workers_that_divides_the_step_gives_the_same_bits(
    chunks: int, seed: int, data: st.DataObject
) -> None:
    gradients = cancelling(chunks, seed)
    expected = tree(range(chunks), gradients).tobytes()
    for workers in {1, chunks, data.draw(st.sampled_from(divisors(chunks)))}:
        sums = Workers(gradients, programs(chunks, workers)).run()
        assert all(found.tobytes() == expected for found in sums), (chunks, workers)


def test_the_arrays_tell_orders_apart() -> None:
    """Otherwise the test above would prove nothing."""
    gradients = cancelling(8, seed=1)
    one_by_one = gradients[0]
    for gradient in gradients[1:]:
        one_by_one = one_by_one + gradient
    expected = tree(range(8), gradients)
    assert (one_by_one != expected)[:20].any()


@pytest.mark.parametrize("chunks", range(1, MOST + 1))
def test_each_chunk_is_computed_once_by_the_worker_that_has_it(chunks: int) -> None:
    for workers in divisors(chunks):
        running = Workers(cancelling(chunks, 0), programs(chunks, workers))
        running.run()
        assert running.computed == [list(share(chunks, workers, worker)) for worker in range(workers)]


@pytest.mark.parametrize("chunks", range(1, MOST + 1))
def test_little_is_put_aside_and_nobody_waits_before_its_own_chunks_are_done(chunks: int) -> None:
    for workers in divisors(chunks):
        each = chunks // workers
        for program in programs(chunks, workers):
            assert program.slots <= max(2 * each.bit_length() - 2, 0) + (workers > 1)
            kinds = [type(step) for step in program.instructions]
            meetings = [at for at, kind in enumerate(kinds) if kind in (Exchange, Spread)]
            computing = [at for at, kind in enumerate(kinds) if kind is Gradient]
            assert not meetings or min(meetings) > max(computing)


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16])
def test_powers_of_two_need_no_spreading_and_as_many_rounds_as_they_halve(workers: int) -> None:
    made = programs(16, workers)
    assert rounds(made) == workers.bit_length() - 1
    assert not any(isinstance(step, Spread) for program in made for step in program.instructions)


def test_a_number_of_workers_that_does_not_divide_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match="6 chunks cannot be shared evenly by 4 workers"):
        programs(6, 4)
    assert divisors(6) == [1, 2, 3, 6]
    assert divisors(1) == [1]
