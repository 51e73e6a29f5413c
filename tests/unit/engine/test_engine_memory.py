"""The two ways of the host to an engine's tensors, and how one is chosen."""

import json
from dataclasses import replace

import mindspore as ms
import mindspore_case
import numpy as np
import pytest
from engine_case import SETTINGS, assert_same_bits, snapshot
from golden_models import FOLDER

from rollforward.engines.mindspore.compiling import Graphs
from rollforward.engines.mindspore.denormals import flushed
from rollforward.engines.mindspore.memory import Copied, Memory, Viewed, memory_of, use_device
from rollforward.errors import DeviceUnavailable
from rollforward.grpo.group import OneProcess

BOTH = pytest.mark.parametrize("memory", [Viewed(), Copied()], ids=["viewed", "copied"])


def test_only_the_cpu_s_memory_is_seen() -> None:
    assert isinstance(memory_of("CPU"), Viewed)
    assert isinstance(memory_of("Ascend"), Copied)


def test_a_device_that_this_mindspore_does_not_have_is_refused() -> None:
    with pytest.raises(DeviceUnavailable, match="cannot compute on 'Ascend'") as caught:
        use_device("Ascend")
    assert "context.device_target: CPU" in (caught.value.hint or "")
    use_device("CPU")
    assert ms.ops.add(ms.Tensor(1), ms.Tensor(2)) == 3


@BOTH
def test_what_is_written_is_what_the_parameter_holds_whatever_becomes_of_the_array(memory: Memory) -> None:
    parameter = ms.Parameter(np.zeros((2, 3), np.float32), name="p")
    counter = np.zeros(1, np.int64)
    slots = {"role": {"p": parameter, "counter": counter}}
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    memory.write(parameter, given)
    memory.write(counter, np.array([5]))
    given[...] = -1
    found = memory.tensors(slots)["role"]
    assert found["p"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["counter"].tolist() == [5]
    assert parameter.asnumpy().tolist() == [[0, 1, 2], [3, 4, 5]]


@BOTH
def test_sums_are_cleared_put_aside_and_added(memory: Memory) -> None:
    buffers = ms.ParameterTuple([ms.Parameter(np.ones(n, np.float32), name=f"buffer{n}") for n in (2, 3)])
    sums = memory.sums(buffers, 2)
    sums.compile(Graphs(SETTINGS, OneProcess()))

    def fill(value: float) -> None:
        for buffer in buffers:
            memory.write(buffer, np.full(buffer.shape, value, np.float32))

    def found() -> list[list[float]]:
        return [buffer.asnumpy().tolist() for buffer in buffers]

    for _ in range(2):
        fill(np.nan)
        sums.clear()
        assert found() == [[0, 0], [0, 0, 0]]
        for slot, value in ((0, 1.0), (1, 2.0)):
            fill(value)
            sums.keep(slot)
        fill(4.0)
        sums.add(1)
        assert found() == [[6, 6], [6, 6, 6]]
        sums.take(0)
        assert found() == [[1, 1], [1, 1, 1]]
        sums.add(1)
        assert found() == [[3, 3], [3, 3, 3]], "a slot is what was put there, however often it is used"


@BOTH
def test_numbers_are_added_to_the_last_bit_alike(memory: Memory) -> None:
    """Denormals, zeros of both signs and what cancels, as between two workers."""
    one = np.array([1e-45, -0.0, 0.0, 1e8, 3e38, 1 / 3], np.float32)
    other = np.array([2e-45, -0.0, -0.0, -99999999.0, 1e38, 1e-9], np.float32)
    (buffer,) = buffers = ms.ParameterTuple([ms.Parameter(other, name="other")])
    sums = memory.sums(buffers, 1)
    sums.compile(Graphs(SETTINGS, OneProcess()))
    for _ in range(8):
        with flushed(), np.errstate(over="ignore"):
            memory.write(buffer, other)
            sums.keep(0)
            memory.write(buffer, one)
            sums.add(0)
            assert buffer.asnumpy().tobytes() == (one + other).tobytes()


def test_weights_of_a_folder_arrive_either_way() -> None:
    folder = FOLDER / "qwen2"
    settings = replace(
        SETTINGS,
        model_config=json.loads((folder / "config.json").read_text()),
        policy_folder=str(folder),
        reference_folder=str(folder),
    )
    viewed, copied = mindspore_case.create(settings), mindspore_case.create_copied(settings)
    assert_same_bits(snapshot(copied), snapshot(viewed))
    assert any(array.any() for array in copied.tensors()["policy_model"].values())
