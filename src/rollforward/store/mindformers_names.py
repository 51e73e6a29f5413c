"""MindFormers' parameter names and ours, in both directions.

    model.tok_embeddings.embedding_weight          model.embed_tokens.weight
    model.layers.N.attention.wq|wk|wv|wo.weight    model.layers.N.self_attn.{q,k,v,o}_proj.weight
    model.layers.N.attention.w_qkv.weight          q, k and v, one below the other
    model.layers.N.feed_forward.w1|w2|w3.weight    model.layers.N.mlp.{gate,down,up}_proj.weight
    model.layers.N.feed_forward.w_gate_hidden.weight   gate and up, one below the other
    model.layers.N.attention_norm.weight           model.layers.N.input_layernorm.weight
    model.layers.N.ffn_norm.weight                 model.layers.N.post_attention_layernorm.weight
    model.norm_out.weight                          model.norm.weight
    lm_head.weight                                 lm_head.weight

Its trainers put prefixes in front (`policy_model.`, `model.` and the like): whatever stands
before a known name is dropped. The optimizer's moments are `adam_m.` and `adam_v.` before the
parameter's name, and are mapped with it. Biases of the projections go as their weights do. What
has no counterpart is returned, not dropped in silence.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
_MOMENT = re.compile(r"(adam_[mv]\.)?(.*)", re.DOTALL)
_THEIRS = re.compile(
    r"(?:.*?\.)??(model\.(?:tok_embeddings\.embedding_weight|norm_out\.weight|layers\..*)|lm_head\.weight)"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Heads:
    """What splitting a concatenated `w_qkv` needs: rows of the query, and of the key and the value each."""

    query_rows: int
    key_rows: int


@dataclass(frozen=True)
class Mapped:
    """Tensors under our names, and the names that have no counterpart here."""

    tensors: Mapping[str, NDArray[Any]]
    unmapped: tuple[str, ...]


def to_ours(tensors: Mapping[str, NDArray[Any]], heads: Heads) -> Mapped:
    """MindFormers' tensors (of a model, or of its optimizer) under Hugging Face names.

    Concatenated projections are split, as views. ValueError when one does not have the rows that
    `heads` says, or when two names lead to the same one of ours.
    """
    found: dict[str, NDArray[Any]] = {}
    unmapped: list[str] = []
    for name, array in tensors.items():
        parts = _split(name, array, heads)
        if not parts:
            unmapped.append(name)
        for ours, part in parts.items():
            if ours in found:
                raise ValueError(f"{name!r} and another parameter both lead to {ours!r}")
            found[ours] = part
    return Mapped(found, tuple(sorted(unmapped)))


def _split(name: str, array: NDArray[Any], heads: Heads) -> dict[str, NDArray[Any]]:
    match = _MOMENT.fullmatch(name)
    moment, rest = (match[1] or "", match[2]) if match else ("", name)
    inner = _THEIRS.fullmatch(rest)
    if inner is None:
        return {}
    rest = inner[1]
    if rest in _OUTER:
        return {moment + _OUTER[rest]: array}
    layer = _LAYER.fullmatch(rest)
    if layer is None:
        return {}
    number, part, kind = layer.groups()
    if part == "attention.w_qkv":
        query, key = heads.query_rows, heads.key_rows
        pieces = _rows(name, array, [query, key, key])
        targets = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    elif part == "feed_forward.w_gate_hidden":
        pieces = _rows(name, array, [array.shape[0] // 2] * 2)
        targets = ["mlp.gate_proj", "mlp.up_proj"]
    elif part in _TO_OURS:
        pieces, targets = [array], [_TO_OURS[part]]
    else:
        return {}
    return {
        f"{moment}model.layers.{number}.{target}.{kind}": piece
        for target, piece in zip(targets, pieces, strict=True)
    }


def _rows(name: str, array: NDArray[Any], counts: list[int]) -> list[NDArray[Any]]:
    if array.ndim == 0 or array.shape[0] != sum(counts):
        raise ValueError(
            f"{name!r} has shape {list(array.shape)}, and {sum(counts)} rows are needed to split it"
        )
    return np.split(array, np.cumsum(counts)[:-1].tolist())


def to_theirs(tensors: Mapping[str, NDArray[Any]], *, prefix: str = "") -> Mapped:
    """Our tensors under MindFormers' names, projections apart; `prefix` goes before each parameter's name."""
    found: dict[str, NDArray[Any]] = {}
    unmapped: list[str] = []
    for name, array in tensors.items():
        theirs = _name_back(name, prefix)
        if theirs is None:
            unmapped.append(name)
        else:
            found[theirs] = array
    return Mapped(found, tuple(sorted(unmapped)))


def _name_back(name: str, prefix: str) -> str | None:
    match = _MOMENT.fullmatch(name)
    moment, rest = (match[1] or "", match[2]) if match else ("", name)
    if rest in _OUTER_BACK:
        return f"{moment}{prefix}{_OUTER_BACK[rest]}"
    layer = _LAYER.fullmatch(rest)
    if layer is None or layer[2] not in _TO_THEIRS:
        return None
    return f"{moment}{prefix}model.layers.{layer[1]}.{_TO_THEIRS[layer[2]]}.{layer[3]}"


def looks_like_mindformers(names: Iterable[str]) -> bool:
    """Whether names are MindFormers' rather than Hugging Face's."""
    return any(
        ".tok_embeddings." in name or ".attention.w" in name or ".feed_forward.w" in name for name in names
    )
