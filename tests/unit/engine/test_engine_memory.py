"""The two ways of the host to an engine's tensors, and how one is chosen."""

import json
from dataclasses import replace

import mindspore as ms
import mindspore_case
import numpy as np
import pytest
from engine_case import SETTINGS, assert_same_bits, snapshot
from golden_models import FOLDER

from rollforward.engines.mindspore.memory import Copied, Memory, Viewed, memory_of, use_device
from rollforward.errors import DeviceUnavailable

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
def test_buffers_become_zero_again_and_again(memory: Memory) -> None:
    buffers = ms.ParameterTuple([ms.Parameter(np.ones(n, np.float32), name=f"buffer{n}") for n in (2, 3)])
    clear = memory.zeroing(buffers)
    for _ in range(2):
        for buffer in buffers:
            memory.write(buffer, np.full(buffer.shape, np.nan, np.float32))
        clear()
        assert [buffer.asnumpy().tolist() for buffer in buffers] == [[0, 0], [0, 0, 0]]


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
