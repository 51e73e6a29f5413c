"""One worker of `test_model_parallel.py`: `... model_parallel_worker.py OUT MODEL_PARALLEL SPREAD CASE...`.

Whatever the model is cut over, the same two chunks are worked on. A case is a golden model, or `wide`, with
four key-value heads, biases, and norms of queries and keys. `-recompute` behind it: it only learns, and
computes activations again. `-lora`: it has adapters beside weights drawn at random, and computes activations
again. What each worker found goes to `CASE_WORKERS_MODEL-PARALLEL_SPREAD_RANK.npz`.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

from engine_case import SETTINGS, prompts, rows_of, training_batch, uniforms
from mindspore_case import MODEL

from rollforward import boxes
from rollforward.boxes import whole, within
from rollforward.engines.mindspore.decoding import Cache
from rollforward.engines.mindspore.denormals import flushed
from rollforward.engines.mindspore.engine import MindSporeEngine, create
from rollforward.engines.mindspore.model import Decoder, attention_mask
from rollforward.engines.mindspore.package import MindSpore
from rollforward.engines.mindspore.parallel import connect, serve_scheduler
from rollforward.engines.mindspore.shards import Gathered
from rollforward.grpo.addition import share
from rollforward.grpo.group import Replicas
from rollforward.grpo.ports import Group
from rollforward.grpo.types import EngineSettings, LoraSettings
from rollforward.models.config import ModelConfig
from rollforward.models.lora import MODULES
from rollforward.models.shapes import parameter_shapes
from rollforward.models.weights import load_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
WIDE = MODEL | {
    "model_type": "qwen3",
    "attention_bias": True,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
CHUNKS, ROWS = 2, 6
LORA = LoraSettings(rank=2, alpha=3.0, target_modules=MODULES)


class Logits(nn.Cell):
    """All logits of a batch, without a cache: int32 [B, L] -> float32 [B, L, vocabulary]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.head_weight = decoder.head_weight
        self.head = ops.MatMul(transpose_b=True)
        self.is_part = decoder.place.count > 1
        if self.is_part:
            self.gathered = Gathered(decoder.place)

    def construct(self, ids, positions, groups, samples):
        hidden = self.decoder.hidden(ids, positions, attention_mask(groups, samples))
        logits = self.head(self.head_weight, hidden.reshape(-1, hidden.shape[-1]))
        if self.is_part:
            logits = self.gathered(logits).reshape(self.decoder.vocabulary, -1)
        return logits.transpose(1, 0)


def whole_tensors(case: str, settings: EngineSettings) -> dict[str, dict[str, np.ndarray]]:
    """The state that all start from: the golden weights, another reference, a fresh optimizer."""
    parsed = ModelConfig.parse(settings.model_config)
    found: dict[str, dict[str, np.ndarray]] = {}
    layout = MindSpore().tensor_layout(settings.model_config, settings.lora)
    for seed, (role, named) in enumerate(sorted(layout.items())):
        source = np.random.default_rng(seed)
        found[role] = {
            name: np.zeros(spec.shape, spec.dtype)
            if role == "optimizer"
            else source.normal(0, 0.4, spec.shape).astype(spec.dtype)
            for name, spec in sorted(named.items())
        }
    if case != "wide" and settings.lora is None:
        load_weights(GOLDEN / case, parsed, found["policy_model"])
        for name, array in found["policy_model"].items():
            np.copyto(found["ref"][name], array + 0.02 * found["ref"][name])
    return found


def start(engine: MindSporeEngine, state: dict[str, dict[str, np.ndarray]]) -> None:
    for role, named in engine.layout().items():
        for name, spec in named.items():
            array = state[role][name]
            engine.load(role, name, array[within(spec.box, whole(array.shape))])


def forward(engine: MindSporeEngine) -> dict[str, np.ndarray]:
    """Logits of a batch, and what is drawn for prompts."""
    ids = np.random.default_rng(7).integers(2, 16, (3, 8)).astype(np.int32)
    zeros = np.zeros_like(ids)
    given = ids, np.broadcast_to(np.arange(8, dtype=np.int32), ids.shape).copy(), zeros, zeros
    with flushed():
        logits = Logits(engine.policy)(*map(ms.Tensor, given)).asnumpy()
    drawn = engine.generate(*prompts(ROWS), uniforms(ROWS))
    return {"logits": logits, "samples": drawn.completion_ids, "lengths": drawn.lengths}


def held(engine: MindSporeEngine) -> dict[str, int]:
    """Bytes that this worker has of what `models.memory` computes exactly, by its names."""
    named = {role: [array.nbytes for array in each.values()] for role, each in engine.tensors().items()}
    cache = Cache(engine.policy, engine._generator._pages.rows)
    return {
        "weights": sum(named["policy_model"]) + sum(each.nbytes for each in engine._base.values()),
        "reference": sum(named["ref"]),
        "moments": sum(named["optimizer"]) - engine.tensors()["optimizer"]["global_step"].nbytes,
        "new_gradients": sum(each.nbytes for each in engine._learner._squared_norms.buffers),
        "cache": sum(each.nbytes for each in (*cache.keys, *cache.values)),
    }


def write_base(folder: Path, config: dict[str, Any]) -> str:
    """A model folder with weights drawn at random, for adapters to stand beside."""
    source = np.random.default_rng(11)
    shapes = parameter_shapes(ModelConfig.parse(config))
    folder.mkdir()
    weights = {name: source.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def study(
    case: str, group: Group, model_parallel: int, folder: Path, *, spread: bool
) -> dict[str, np.ndarray]:
    case, _, way = case.partition("-")
    config = WIDE if case == "wide" else json.loads((GOLDEN / case / "config.json").read_text())
    replicas = Replicas(group, model_parallel)
    own = share(CHUNKS, replicas.world_size, replicas.rank)
    settings = replace(
        SETTINGS,
        model_config=config,
        policy_folder=None if case == "wide" or way == "lora" else str(GOLDEN / case),
        base_folder=write_base(folder, config) if way == "lora" else None,
        lora=LORA if way == "lora" else None,
        model_parallel=model_parallel,
        chunks=len(own),
        parallel_optimizer=spread,
        recompute=way in ("recompute", "lora"),
    )
    engine = create(settings, group)
    state = whole_tensors(case, settings)
    if settings.policy_folder is not None:
        # The folder was read, each worker its part.
        for name, spec in engine.layout()["policy_model"].items():
            array = state["policy_model"][name]
            part = array[within(spec.box, whole(array.shape))]
            assert np.array_equal(engine.tensors()["policy_model"][name], part), name
    start(engine, state)
    need = MindSpore().memory_needed(settings, group.world_size)
    found: dict[str, Any] = {}
    for name, size in held(engine).items():
        found[f"bytes {name}"] = np.array([size, getattr(need, name)])
    if way != "recompute":
        found |= forward(engine)
    rows = slice(ROWS * own[0], ROWS * (own[-1] + 1))
    batch = training_batch(engine, ROWS * CHUNKS)
    found["reference"] = batch.reference_logprobs
    for step in range(2):
        outcome = engine.update(rows_of(batch, rows), 1e-2)
        found[f"numbers {step}"] = np.array(
            [outcome.loss, outcome.grad_norm, outcome.kl, outcome.clip_fraction]
        )
        found[f"logprobs {step}"] = np.concatenate(
            [np.array(each, np.float32) for each in replicas.all_gather(outcome.logprobs.tolist())]
        )
        for role, named in engine.layout().items():
            for name, spec in named.items():
                found[f"{step} {role} {name}"] = engine.tensors()[role][name].copy()
                found[f"box {role} {name}"] = np.array([spec.offset, spec.shape])
    return found


def main(out: Path, model_parallel: int, spread: bool, cases: list[str]) -> None:
    group = connect()
    if model_parallel > 1:
        team = group.team(model_parallel)
        told = team.all_gather({"rank": group.rank, "text": "é" * 100 * group.rank})
        first = group.rank - group.rank % model_parallel
        members = range(first, first + model_parallel)
        assert told == [{"rank": rank, "text": "é" * 100 * rank} for rank in members]
    for case in cases:
        name = f"{case}_{group.world_size}_{model_parallel}_{int(spread)}_{group.rank}"
        found = study(case, group, model_parallel, out / name, spread=spread)
        np.savez(out / f"{name}.npz", **found)


if __name__ == "__main__":
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        serve_scheduler()
    # Blocks of a few rows, so that tensors of this size are cut where the optimizer is spread.
    boxes.BLOCK_BYTES = 1024
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:])
