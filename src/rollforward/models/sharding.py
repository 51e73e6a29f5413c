"""How a model is cut over the workers that hold it together (tensor parallelism), as pure functions of names.

    attention     by heads: rows of q_proj, k_proj, v_proj and their biases; columns of o_proj
    MLP           rows of gate_proj, up_proj and their biases; columns of down_proj
    vocabulary    rows of the embedding and of the head
    adapters      like the matrix that they stand beside: rows of B where that is cut by rows, columns of A
                  where it is by columns; the other factor is whole on every worker
    the rest      norms, and the biases of o_proj and down_proj: whole on every worker

(Shoeybi et al., "Megatron-LM", arXiv:1909.08053.) Worker `index` of `count` has the `index`-th of `count`
equal parts; as a decoder of its own that is one with fewer heads, a narrower MLP and a smaller vocabulary.

Left out: parts of unequal size, and key-value heads that several workers have copies of.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rollforward.boxes import Box, Shape, whole
from rollforward.errors import ModelError
from rollforward.models.config import ModelConfig

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_COLUMNS = ("o_proj", "down_proj")
_WHOLE_BESIDE = {"lora_A": _ROWS, "lora_B": _COLUMNS}
"""A factor of an adapter -> the parts beside which all workers have all of it."""


@dataclass(frozen=True)
class Shard:
    """Which part of a model a worker has."""

    index: int = 0
    count: int = 1
    """Workers that hold the model together; 1: it is not cut."""

    def whole_shape(self, name: str, part: Shape) -> Shape:
        """The shape of a parameter of whose part this is the shape."""
        axis = axis_of(name)
        return tuple(size * self.count if each == axis else size for each, size in enumerate(part))

    def box(self, name: str, shape: Shape) -> Box:
        """The part of a parameter, `shape` being that of the whole; `name` may have a prefix (`adam_m.`)."""
        axis = axis_of(name)
        if axis is None or self.count == 1:
            return whole(shape)
        size = shape[axis] // self.count
        offset = tuple(self.index * size if each == axis else 0 for each in range(len(shape)))
        return Box(offset, tuple(size if each == axis else n for each, n in enumerate(shape)))


def axis_of(name: str) -> int | None:
    """The axis along which a parameter is cut; None: every worker has all of it."""
    *_, above, part, kind = ("", "", *name.split("."))
    if part in _WHOLE_BESIDE:
        if above in _WHOLE_BESIDE[part]:
            return None
        part = above
    if part in _ROWS:
        return 0
    return 1 if part in _COLUMNS and kind == "weight" else None


def learns_in_parts(name: str) -> bool:
    """Whether a parameter is whole on every worker, but its gradient is the sum of what each worker finds.

    That is so for the norms of queries and keys (Qwen3), which all heads share, and for the factor of an
    adapter that is not cut, since the other one is. All else that is whole has its whole gradient everywhere.
    """
    return axis_of(name) is None and any(part in name for part in (".q_norm.", ".k_norm.", ".lora_"))


def counts(config: ModelConfig) -> list[int]:
    """The numbers of workers that such a model can be cut over."""
    return [
        count
        for count in range(1, config.kv_heads + 1)
        if not any(size % count for size in _sizes(config).values())
    ]


def check(config: ModelConfig, count: int) -> None:
    """ModelError, with the numbers that work, when the model cannot be cut over so many workers."""
    misfits = [f"{name} ({size})" for name, size in _sizes(config).items() if size % count]
    if misfits:
        able = ", ".join(map(str, counts(config)))
        raise ModelError(
            f"the model cannot be cut over {count} workers: {count} does not divide {', '.join(misfits)} of "
            "its config.json",
            hint=f"actor_config.parallel_config.model_parallel can be {able} for this model",
        )


def part_of(config: ModelConfig, count: int) -> ModelConfig:
    """The decoder that each of `count` workers has."""
    check(config, count)
    return replace(
        config,
        vocab_size=config.vocab_size // count,
        heads=config.heads // count,
        kv_heads=config.kv_heads // count,
        intermediate=config.intermediate // count,
    )


def _sizes(config: ModelConfig) -> Mapping[str, int]:
    return {
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.intermediate,
        "vocab_size": config.vocab_size,
    }
