"""Files that MindSpore saves of cells nested as MindRLHF nests them: the names are MindSpore's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.nn.learning_rate_schedule import LearningRateSchedule
from numpy.typing import NDArray
from small_model import QWEN2

from rollforward.interop.exporting import export_mindrlhf
from rollforward.interop.files import read_arrays
from rollforward.interop.mapping import MappedTensors, fit
from rollforward.interop.names import to_theirs
from rollforward.models.config import ModelConfig
from rollforward.models.shapes import tensor_layout
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore

LAYOUT = tensor_layout(ModelConfig.parse(QWEN2))
MONITORS = ("actor_loss", "clipfrac", "kl_loss", "old_log_ratio")
Arrays = Mapping[str, NDArray[Any]]


def values() -> dict[str, NDArray[Any]]:
    source = np.random.default_rng(5)
    return {n: source.normal(size=a.shape).astype(np.float32) for n, a in LAYOUT["policy_model"].items()}


def grown(arrays: Arrays) -> nn.Cell:
    """Cells within cells, as the dots of the names say; numbers are places in a list."""
    children: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        first, _, rest = name.partition(".")
        children.setdefault(first, {})[rest] = array
    if all(name.isdigit() for name in children):
        return nn.CellList([grown(children[str(i)]) for i in range(len(children))])
    cell = nn.Cell()
    for name, inner in children.items():
        setattr(cell, name, ms.Parameter(ms.Tensor(inner[""]), name=name) if "" in inner else grown(inner))
    return cell


def policy(arrays: Arrays) -> nn.Cell:
    """The model of MindRLHF's workers: MindFormers' model, two parts of it once more, and monitors."""
    found = nn.Cell()
    found.model = grown(to_theirs(arrays).tensors)
    found.backbone = found.model.model
    found.lm_head = found.model.lm_head
    for name in MONITORS:
        setattr(found, name, ms.Parameter(ms.Tensor(0, ms.float32), name=name, requires_grad=False))
    return found


def trained(inner: nn.Cell) -> nn.Cell:
    """As the policy lies in what MindRLHF trains."""
    whole, loss = nn.Cell(), nn.Cell()
    loss.policy_model = inner
    whole.grpo_model_train = loss
    return whole


class Constant(LearningRateSchedule):
    def construct(self, global_step: ms.Tensor) -> ms.Tensor:
        return global_step * 0.0


def fitted(role: str, arrays: Arrays) -> MappedTensors:
    found = fit(role, arrays, LAYOUT, groups=2)
    assert found.problems == ()
    return found


def same(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_the_policy_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"policy_model_rank_0-0_4.{form}"
    whole = trained(policy(values()))
    inner = whole.grpo_model_train.policy_model
    counters = {"epoch_num": 0, "step_num": 4}
    ms.save_checkpoint(inner, str(path), append_dict=counters, integrated_save=False, format=form)
    arrays = dict(read_arrays(path))
    assert "grpo_model_train.policy_model.model.model.layers.0.attention.wq.weight" in arrays
    assert "grpo_model_train.policy_model.kl_loss" in arrays
    found = fitted("policy_model", arrays)
    same(found.tensors, values())
    assert found.left_out == tuple(sorted((*MONITORS, *counters)))


def test_the_reference_file(tmp_path: Path) -> None:
    path = tmp_path / "ref_rank_0-0_4.safetensors"
    reference = policy(values())
    for name, parameter in reference.parameters_and_names():
        parameter.name = name  # as MindRLHF does: MindSpore names what is there twice after the second place
    ms.save_checkpoint(reference, str(path), integrated_save=False, format="safetensors")
    found = fitted("ref", dict(read_arrays(path)))
    same(found.tensors, values())
    assert found.left_out == MONITORS


@pytest.mark.parametrize(
    ("kind", "extra"),
    [(nn.AdamWeightDecay, ()), (nn.Adam, ("beta1_power", "beta2_power"))],
    ids=["adam_m and adam_v", "moment1 and moment2"],
)
@pytest.mark.parametrize("scheduled", [True, False], ids=["scheduled", "constant"])
def test_the_optimizer_file(
    tmp_path: Path, kind: type[nn.Optimizer], extra: tuple[str, ...], scheduled: bool
) -> None:
    path = tmp_path / "optimizer_rank_0-0_4.ckpt"
    parameters = trained(policy(values())).trainable_params()
    groups = [
        {"params": [p for p in parameters if "norm" not in p.name], "weight_decay": 0.1},
        {"params": [p for p in parameters if "norm" in p.name], "weight_decay": 0.0},
        {"order_params": parameters},
    ]
    optimizer = kind(groups, learning_rate=Constant() if scheduled else 0.001)
    source = np.random.default_rng(6)
    expected = {"global_step": np.array([4], np.int64)}
    optimizer.global_step.set_data(ms.Tensor([4], ms.int32))
    for moment, held in zip("mv", states(optimizer), strict=True):
        for parameter, state in zip(parameters, held, strict=True):
            # A second moment is a mean of squares.
            array = abs(source.normal(size=state.shape).astype(np.float32))
            state.set_data(ms.Tensor(array))
            expected[f"adam_{moment}.{name_of(parameter)}"] = array
    ms.save_checkpoint(optimizer, str(path), integrated_save=False)
    found = fitted("optimizer", dict(read_arrays(path)))
    same(found.tensors, expected)
    rate = () if scheduled else ("learning_rate",)
    assert found.left_out == (*extra, *rate)


def test_mindspore_loads_what_is_exported_for_mindrlhf(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    source = np.random.default_rng(7)
    moments = {
        name: source.normal(size=array.shape).astype(array.dtype)
        for name, array in LAYOUT["optimizer"].items()
    }
    tensors = {"policy_model": values(), "optimizer": moments, "ref": values()}
    saved = store.save(Position(0, 4), tensors, global_step=4, run_id="r", incarnation=1, state={})
    out = tmp_path / "out"
    export_mindrlhf(store.storage, saved.manifest, LocalStorage(out))

    def load(role: str, folder: str, cell: nn.Cell) -> list[str]:
        path = out / folder / "rank_0" / f"{role}_rank_0-0_4.safetensors"
        left, unknown = ms.load_param_into_net(cell, ms.load_checkpoint(str(path), format="safetensors"))
        assert set(unknown) <= {"epoch_num", "step_num"}
        return sorted(left)

    empty = {name: np.zeros_like(array) for name, array in values().items()}
    whole = trained(policy(empty))
    inner = whole.grpo_model_train.policy_model
    prefix = "grpo_model_train.policy_model."
    assert load("policy_model", "train", inner) == [prefix + name for name in MONITORS]
    norm = inner.model.model.norm_out.weight
    np.testing.assert_array_equal(norm.asnumpy(), values()["model.norm.weight"])

    optimizer = nn.AdamWeightDecay(whole.trainable_params(), learning_rate=Constant())
    assert load("optimizer", "optimizer", optimizer) == []
    np.testing.assert_array_equal(norm.asnumpy(), values()["model.norm.weight"])
    first = {state.name: state.asnumpy() for state in optimizer.moments1}
    np.testing.assert_array_equal(
        first[f"adam_m.{norm.name}"], tensors["optimizer"]["adam_m.model.norm.weight"]
    )

    reference = policy(empty)
    for name, parameter in reference.parameters_and_names():
        parameter.name = name
    assert load("ref", "ref", reference) == list(MONITORS)


def test_one_file_of_mindformers_trainer(tmp_path: Path) -> None:
    path = tmp_path / "qwen_rank_0-1_20.ckpt"
    model = grown(to_theirs(values()).tensors)
    optimizer = nn.AdamWeightDecay(model.trainable_params(), learning_rate=Constant())
    whole = nn.TrainOneStepWithLossScaleCell(model, optimizer, nn.DynamicLossScaleUpdateCell(65536, 2, 1000))
    counters = {"epoch_num": 1, "step_num": 20, "loss_scale": 1, "global_batch_size": 4}
    whole.optimizer.global_step.set_data(ms.Tensor([20], ms.int32))
    ms.save_checkpoint(whole, str(path), append_dict={**counters, "global_step": optimizer.global_step})
    arrays = dict(read_arrays(path))
    assert "model.layers.0.attention.wq.weight" in arrays
    same(fitted("policy_model", arrays).tensors, values())
    found = fitted("optimizer", arrays)
    assert found.tensors["global_step"] == [20]
    assert len(found.tensors) == len(LAYOUT["optimizer"])


def name_of(parameter: ms.Parameter) -> str:
    """Told by its values."""
    return next(name for name, array in values().items() if np.array_equal(parameter.asnumpy(), array))


def states(optimizer: nn.Optimizer) -> tuple[Any, Any]:
    if isinstance(optimizer, nn.Adam):
        return optimizer.moment1, optimizer.moment2
    return optimizer.moments1, optimizer.moments2
