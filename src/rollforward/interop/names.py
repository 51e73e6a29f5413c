"""MindFormers' parameter names and ours, in both directions.

    model.tok_embeddings.embedding_weight          model.embed_tokens.weight
    model.layers.N.attention.wq|wk|wv|wo.weight    model.layers.N.self_attn.{q,k,v,o}_proj.weight
    model.layers.N.attention.w_qkv.weight          q, k and v, group by group (below)
    model.layers.N.feed_forward.w1|w2|w3.weight    model.layers.N.mlp.{gate,down,up}_proj.weight
    model.layers.N.feed_forward.w_gate_hidden.weight   gate and up, row by row (below)
    model.layers.N.attention_norm.weight           model.layers.N.input_layernorm.weight
    model.layers.N.ffn_norm.weight                 model.layers.N.post_attention_layernorm.weight
    model.norm_out.weight                          model.norm.weight
    lm_head.weight                                 lm_head.weight
    adam_m. | moment1. | exp_avg.                  adam_m.      before the name of a parameter
    adam_v. | moment2. | exp_avg_sq.               adam_v.

Trainers put prefixes in front (`grpo_model_train.policy_model.model.` and the like). Whatever comes
before a known name is dropped, whether the name is MindFormers' or Hugging Face's. Biases of the
projections map as their weights do. Names without a counterpart are returned, not silently dropped.

MindFormers' model may compute with concatenated projections. With `qkv_concat` the rows of `w_qkv`
are, for each key-value head, those of its query heads, then its key's, then its value's; the rows of
`w_gate_hidden` are gate 0, up 0, gate 1, up 1, ... That is the layout of MindFormers 1.5 and later.
Up to 1.4.0-beta1 they were whole blocks. Nothing in a file tells the two layouts apart, so older
files must be split with the version of MindFormers that wrote them.

The moments are those of MindFormers' AdamW and MindSpore's AdamWeightDecay (`adam_`), MindSpore's
Adam (`moment`) and MindFormers' FusedAdamW (`exp_avg`). FusedAdamW's `global_step` starts at -1, so
it is one less than the number of updates made, which is what ours counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]

_TO_OURS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TO_THEIRS = {ours: theirs for theirs, ours in _TO_OURS.items()}
_OUTER = {
    "model.tok_embeddings.embedding_weight": "model.embed_tokens.weight",
    "model.norm_out.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_OUTER_BACK = {ours: theirs for theirs, ours in _OUTER.items()}
_MOMENTS = {
    "adam_m.": "adam_m.",
    "adam_v.": "adam_v.",
    "moment1.": "adam_m.",
    "moment2.": "adam_v.",
    "exp_avg.": "adam_m.",
    "exp_avg_sq.": "adam_v.",
}
_BOOKKEEPING = frozenset(
    # What trainers append, what MindSpore's optimizers hold, and what loss scaling adds.
    {"epoch_num", "step_num", "global_step", "global_batch_size"}
    | {"learning_rate", "weight_decay", "beta1_power", "beta2_power"}
    | {"loss_scale", "last_loss_scale", "scale_sense"}
    | {"current_iterator_step", "last_overflow_iterator_step"}
    # Parameters of MindRLHF's model that hold a monitored number, and a counter of MindFormers'.
    | {"kl_loss", "actor_loss", "clipfrac", "old_log_ratio", "seq_chunk"}
)
_OTHER_STATES = frozenset(
    {"accu_grads", "accum", "exp_inf", "lamb_m", "lamb_v", "linear", "max_exp_avg_sq", "mean_grad"}
    | {"mean_square", "moment", "moments", "stat", "vhat"}
)
"""Prefixes of MindSpore's optimizers and gradient accumulation for states that AdamW does not have."""
_STEP, _BEHIND = "global_step", "exp_avg."
_MOMENT = re.compile(rf"({'|'.join(map(re.escape, _MOMENTS))})?(.*)", re.DOTALL)
_KNOWN = re.compile(
    rf"(?:.*?\.)??({'|'.join(map(re.escape, [*_OUTER, *_OUTER_BACK]))}|model\.layers\.\d+\..*)", re.DOTALL
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_QKV = ("attention.wq", "attention.wk", "attention.wv")
_QKV_WHOLE = "attention.w_qkv"
_GATE = ("feed_forward.w1", "feed_forward.w3")
_GATE_WHOLE = "feed_forward.w_gate_hidden"


@dataclass(frozen=True)
class Heads:
    """What is needed to split a concatenated `w_qkv`."""

    query_rows: int
    """Rows of all query heads."""
    key_rows: int
    """Rows of all key heads; the values have the same number."""
    groups: int
    """Number of key-value heads."""


@dataclass(frozen=True)
class Mapped:
    """Renamed tensors, and the names that have no counterpart."""

    tensors: Arrays
    unmapped: tuple[str, ...]
    origins: Mapping[str, str]
    """Name in `tensors` -> its original name."""


def to_ours(tensors: Arrays, heads: Heads) -> Mapped:
    """A trainer's tensors, of a model or of its optimizer, under our names.

    Concatenated projections are split. A tensor that already has one of our names, with or without a
    prefix, keeps it. ValueError when a projection does not have the rows that `heads` gives, or when
    two names map to the same one of ours.
    """
    found: dict[str, NDArray[Any]] = {}
    origins: dict[str, str] = {}
    unmapped: list[str] = []
    behind = any(name.startswith(_BEHIND) for name in tensors)
    for name, array in tensors.items():
        parts = _counterparts(name, array, heads)
        if name == _STEP:
            parts = {name: array + 1 if behind else array}
        if not parts:
            unmapped.append(name)
        for ours, part in parts.items():
            if ours in found:
                raise ValueError(f"{name!r} and {origins[ours]!r} both lead to {ours!r}")
            found[ours], origins[ours] = part, name
    return Mapped(found, tuple(sorted(unmapped)), origins)


def to_theirs(tensors: Arrays, *, prefix: str = "") -> Mapped:
    """Our tensors under MindFormers' names, projections separate; `prefix` precedes each parameter's name."""
    origins: dict[str, str] = {}
    unmapped: list[str] = []
    for name in tensors:
        theirs = name if name == _STEP else _name_back(name, prefix)
        if theirs is None:
            unmapped.append(name)
        else:
            origins[theirs] = name
    return Mapped(
        {theirs: tensors[name] for theirs, name in origins.items()}, tuple(sorted(unmapped)), origins
    )


def concatenated(theirs: Arrays, heads: Heads) -> dict[str, NDArray[Any]]:
    """MindFormers' tensors with the projections concatenated, as with its `qkv_concat`.

    `theirs` has them separate, all of a kind or none. ValueError when their rows do not match `heads`.
    """
    found = dict(theirs)
    for name in theirs:
        for parts, whole in ((_QKV, _QKV_WHOLE), (_GATE, _GATE_WHOLE)):
            if f".{parts[0]}." in name:
                names = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
                arrays = [found.pop(part) for part in names]
                groups = heads.groups if parts is _QKV else len(arrays[0])
                found[name.replace(f".{parts[0]}.", f".{whole}.")] = _joined(name, arrays, groups)
    return found


def plain_name(name: str) -> str:
    """A parameter's name without the trainer's prefix; unchanged when the name is not known."""
    place = _place(name)
    return name if place is None else "".join(place)


def is_concatenated(name: str) -> bool:
    """Whether a parameter is several projections in one."""
    return f".{_QKV_WHOLE}." in name or f".{_GATE_WHOLE}." in name


def is_moment(name: str) -> bool:
    """Whether a tensor is a moment of a known optimizer."""
    return name.startswith(tuple(_MOMENTS))


def is_bookkeeping(name: str) -> bool:
    """Whether a trainer saves this besides what is learnt: counters, rates, monitored values."""
    return name.rpartition(".")[2] in _BOOKKEEPING


def _place(name: str) -> tuple[str, str] | None:
    """Our moment prefix, or "", and the parameter's name without any other prefix."""
    match = _MOMENT.fullmatch(name)
    assert match is not None  # everything in it is optional
    inner = _KNOWN.fullmatch(match[2])
    if inner is None or match[2].partition(".")[0] in _OTHER_STATES:
        return None
    moment = _MOMENTS[match[1]] if match[1] else ""
    return moment, inner[1]


def _counterparts(name: str, array: NDArray[Any], heads: Heads) -> dict[str, NDArray[Any]]:
    """Our tensors that one of theirs holds, by name; empty when its name is not known."""
    place = _place(name)
    if place is None:
        return {}
    moment, rest = place
    if rest in _OUTER or rest in _OUTER_BACK:
        return {moment + _OUTER.get(rest, rest): array}
    layer = _LAYER.fullmatch(rest)
    if layer is None:
        return {}
    number, part, kind = layer.groups()
    if part == _QKV_WHOLE:
        query, key = heads.query_rows, heads.key_rows
        pieces = _apart(name, array, [query, key, key], heads.groups)
        targets = [_TO_OURS[target] for target in _QKV]
    elif part == _GATE_WHOLE:
        rows = array.shape[0] // 2 if array.ndim else 0
        pieces = _apart(name, array, [rows, rows], rows)
        targets = [_TO_OURS[target] for target in _GATE]
    elif part in _TO_OURS or part in _TO_THEIRS:
        pieces, targets = [array], [_TO_OURS.get(part, part)]
    else:
        return {}
    return {
        f"{moment}model.layers.{number}.{target}.{kind}": piece
        for target, piece in zip(targets, pieces, strict=True)
    }


def _apart(name: str, array: NDArray[Any], rows: list[int], groups: int) -> list[NDArray[Any]]:
    """The parts of a concatenated projection: each group of rows holds a share of every part."""
    whole = sum(rows)
    if array.ndim == 0 or array.shape[0] != whole or groups < 1 or any(count % groups for count in rows):
        raise ValueError(
            f"{name!r} has shape {list(array.shape)}, and {whole} rows in {groups} groups are needed "
            "to take it apart"
        )
    grouped = array.reshape(groups, whole // groups, *array.shape[1:])
    ends = np.cumsum([count // groups for count in rows]).tolist()
    return [
        grouped[:, end - count // groups : end].reshape(count, *array.shape[1:])
        for count, end in zip(rows, ends, strict=True)
    ]


def _joined(name: str, parts: list[NDArray[Any]], groups: int) -> NDArray[Any]:
    """The inverse of `_apart`."""
    if groups < 1 or any(part.shape[0] % groups for part in parts):
        raise ValueError(f"{name!r} and its like cannot be put together in {groups} groups")
    grouped = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
    whole: NDArray[Any] = np.concatenate(grouped, axis=1)
    return whole.reshape(sum(map(len, parts)), *parts[0].shape[1:])


def _name_back(name: str, prefix: str) -> str | None:
    place = _place(name)
    if place is None or place[0] + place[1] != name:
        return None
    moment, rest = place
    if rest in _OUTER_BACK:
        return f"{moment}{prefix}{_OUTER_BACK[rest]}"
    layer = _LAYER.fullmatch(rest)
    if layer is None or layer[2] not in _TO_THEIRS:
        return None
    return f"{moment}{prefix}model.layers.{layer[1]}.{_TO_THEIRS[layer[2]]}.{layer[3]}"
