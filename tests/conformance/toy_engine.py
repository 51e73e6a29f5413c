"""A whole engine in NumPy: small enough to check by eye, fast enough to be killed five hundred times.

The policy knows the last token only. With embeddings E [V, H], head W [V, H] and bias b [V]:

    logits(next | last) = W E[last] + b

It passes the same conformance suite as the real engine and obeys the same contract: no
randomness of its own, no memory besides `tensors()`, the same bits out for the same bits in.
The gradients of chunks are added in the order of `grpo.addition`, between workers in JSON.
Gradients are written out by hand, from `grpo.objective`. `create_copied` makes one that is read by
copies, as on a device whose memory the host does not see, and counts them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.boxes import Box, whole, within
from rollforward.errors import EngineError, ModelError, NonFinite
from rollforward.grpo.addition import Add, Exchange, Gradient, Keep, Spread, Take, programs, rounds
from rollforward.grpo.group import OneProcess
from rollforward.grpo.objective import token_terms
from rollforward.grpo.ports import Group
from rollforward.grpo.spreading import spread
from rollforward.grpo.types import (
    EngineSettings,
    Floats,
    Generation,
    Ints,
    SamplingSettings,
    TokenBatch,
    TrainingBatch,
    UpdateOutcome,
)
from rollforward.tensors import Layout, Tensors, TensorSpec, layout_of

HIDDEN = 6
NAMES = ("embedding.weight", "head.weight", "head.bias")


def toy_model_config(vocab_size: int = 16) -> dict[str, Any]:
    """What `EngineSettings.model_config` is for this engine."""
    return {"model_type": "toy", "vocab_size": vocab_size}


@dataclass
class ToyEngine:
    """`grpo.ports.Engine`; made by `create`."""

    settings: EngineSettings
    group: Group
    roles: dict[str, dict[str, NDArray[Any]]]
    views: bool = True
    revisions: Counter[str] = field(default_factory=Counter)

    @property
    def spreads(self) -> bool:
        """Whether each worker keeps a part of the optimizer."""
        return self.settings.parallel_optimizer and self.group.world_size > 1

    @property
    def kept(self) -> dict[str, Box]:
        """Tensor -> what this worker updates, and keeps the moments of."""
        return kept_by(self.roles["policy_model"], self.settings, self.group)

    def generate(self, prompt_ids: Ints, prompt_mask: np.ndarray, uniforms: Floats) -> Generation:
        sampling = self.settings.sampling
        table = _logits(self.roles["policy_model"])
        ids = np.full((len(prompt_ids), sampling.max_tokens), sampling.pad_token_id, dtype=np.int32)
        lengths = np.zeros(len(ids), dtype=np.int32)
        stopped = np.zeros(len(ids), dtype=bool)
        for row in range(len(ids)):
            last = prompt_ids[row][prompt_mask[row]][-1]
            for column in range(sampling.max_tokens):
                last = _sample(table[last], sampling, uniforms[row, column])
                ids[row, column] = last
                lengths[row] = column + 1
                if last in sampling.stop_token_ids:
                    stopped[row] = True
                    break
        return Generation(completion_ids=ids, lengths=lengths, stopped=stopped)

    def reference_logprobs(self, tokens: TokenBatch) -> Floats:
        return _completion_logprobs(self._learnt_logits("ref"), tokens)

    def update(self, batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
        self.revisions.update(("policy_model", "optimizer"))
        policy, optimizer = self.roles["policy_model"], self.roles["optimizer"]
        logits = self._learnt_logits("policy_model")
        logprobs = _completion_logprobs(logits, batch.tokens)
        old = logprobs if batch.old_logprobs is None else batch.old_logprobs
        terms = token_terms(
            logprobs, old, batch.reference_logprobs, batch.advantages, self.settings.objective
        )
        weights = batch.token_weights.astype(np.float64)
        of_logprobs = weights * terms.gradient
        chunks = np.split(np.arange(len(weights)), self.settings.chunks)

        def gradient_of(rows: NDArray[np.intp]) -> list[NDArray[np.float64]]:
            tokens = TokenBatch(**{name: array[rows] for name, array in vars(batch.tokens).items()})
            of_logits = _logits_gradient(logits, tokens, of_logprobs[rows]) / self._temperature
            return _gradients(policy, of_logits)

        sums = [
            [float((weights * values)[rows].sum()) for values in (terms.loss, terms.kl, terms.clipped)]
            for rows in chunks
        ]
        bad = np.flatnonzero(~np.isfinite(terms.loss).all(axis=1)).tolist()
        everyone = self.group.all_gather([sums, bad])
        by_chunk = [each for told in everyone for each in told[0]]
        loss, kl, clip_fraction = (math.fsum(each[i] for each in by_chunk) for i in range(3))
        totals = self._added_up([gradient_of(rows) for rows in chunks])
        norm = float(np.sqrt(sum(float((total**2).sum()) for total in totals)))
        if not np.isfinite([loss, norm]).all():
            raise NonFinite(
                f"loss {loss} and gradient norm {norm}; samples by worker: {[e[1] for e in everyone]}",
                samples=bad,
                facts={"loss": loss, "grad_norm": norm},
                arrays={"computed.loss": terms.loss, "computed.logprobs": logprobs},
            )
        self._step(dict(zip(NAMES, totals, strict=True)), norm, learning_rate, policy, optimizer)
        return UpdateOutcome(loss=loss, grad_norm=norm, kl=kl, clip_fraction=clip_fraction, logprobs=logprobs)

    def _added_up(self, own: list[list[NDArray[np.float64]]]) -> list[NDArray[np.float64]]:
        """The gradients of all chunks of all workers, in the order of `grpo.addition`. Collective.

        `own` are those of this worker's chunks. Each round of exchanges is one gathering of all.
        """
        workers, rank = self.group.world_size, self.group.rank
        first = rank * len(own)
        everyone = programs(len(own) * workers, workers)
        total: list[NDArray[np.float64]] = []
        slots: dict[int, list[NDArray[np.float64]]] = {}
        turn = 0

        def meet(until: int) -> list[Any]:
            """Take part in the rounds up to this one."""
            nonlocal turn
            told: list[Any] = []
            while turn <= until:
                told, turn = self.group.all_gather([array.tolist() for array in total]), turn + 1
            return told

        for step in everyone[rank].instructions:
            match step:
                case Gradient(chunk):
                    total = own[chunk - first]
                case Keep(slot):
                    slots[slot] = total
                case Take(slot):
                    total = slots[slot]
                case Add(slot):
                    total = [one + other for one, other in zip(total, slots[slot], strict=True)]
                case Exchange(peer, number):
                    told = meet(number)[peer]
                    total = [one + np.array(other) for one, other in zip(total, told, strict=True)]
                case Spread(source):
                    total = [np.array(array) for array in meet(rounds(everyone))[source]]
        meet(rounds(everyone) - 1)
        return total

    @property
    def _temperature(self) -> float:
        return self.settings.sampling.learning_temperature

    def _learnt_logits(self, role: str) -> NDArray[np.float64]:
        return _logits(self.roles[role]) / self._temperature

    def _step(
        self,
        gradients: Mapping[str, NDArray[Any]],
        norm: float,
        learning_rate: float,
        policy: Mapping[str, NDArray[Any]],
        optimizer: Mapping[str, NDArray[Any]],
    ) -> None:
        settings = self.settings.optimizer
        scale = settings.max_grad_norm / norm if 0 < settings.max_grad_norm < norm else 1.0
        optimizer["global_step"] += 1
        step = int(optimizer["global_step"][0])
        kept = self.kept
        for name in filter(kept.__contains__, gradients):
            first, second = optimizer[f"adam_m.{name}"], optimizer[f"adam_v.{name}"]
            part = within(kept[name], whole(policy[name].shape))
            clipped = (gradients[name][part] * scale).astype(np.float32)
            first += (1 - settings.adam_beta1) * (clipped - first)
            second += (1 - settings.adam_beta2) * (clipped**2 - second)
            if policy[name].ndim >= 2:
                policy[name][part] *= 1 - learning_rate * settings.weight_decay
            corrected = np.sqrt(second / (1 - settings.adam_beta2**step)) + settings.eps
            policy[name][part] -= learning_rate * (first / (1 - settings.adam_beta1**step)) / corrected
        if self.spreads:
            self._from_owners(policy)

    def _from_owners(self, policy: Mapping[str, NDArray[Any]]) -> None:
        """The values that each worker has updated, to all. Collective."""
        own = [
            [name, box, policy[name][within(box, whole(policy[name].shape))].tolist()]
            for name, box in self.kept.items()
        ]
        for name, box, values in (each for told in self.group.all_gather(own) for each in told):
            policy[name][within(Box(*map(tuple, box)), whole(policy[name].shape))] = values

    def sync_reference(self) -> None:
        self.revisions.update(("ref",))
        for name, array in self.roles["policy_model"].items():
            self.roles["ref"][name][:] = array

    def layout(self) -> Layout:
        found = {role: dict(named) for role, named in layout_of(self.roles).items()}
        for name, box in self.kept.items() if self.spreads else ():
            shape = self.roles["policy_model"][name].shape
            for moment in (f"adam_m.{name}", f"adam_v.{name}"):
                found["optimizer"][moment] = TensorSpec.piece(moment, np.float32, shape, box)
        return found

    def tensors(self) -> Tensors:
        return self.roles

    def revision(self, role: str) -> int:
        return self.revisions[role]

    def load(self, role: str, name: str, array: NDArray[Any]) -> None:
        try:
            target = self.roles[role][name]
        except KeyError:
            raise EngineError(f"there is no tensor {name!r} in {role!r}") from None
        if target.shape != array.shape or target.dtype != array.dtype:
            raise EngineError(
                f"{role} {name} is {target.dtype}{target.shape}, not {array.dtype}{array.shape}"
            )
        self.revisions.update((role,))
        target[:] = array


@dataclass
class CopiedToyEngine(ToyEngine):
    """As on a device whose memory the host does not see: what is written into `tensors()` is lost."""

    views: bool = False
    copied: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(role, name) -> how often it was copied."""

    def tensors(self) -> Tensors:
        return {role: _Copies(role, named, self.copied) for role, named in self.roles.items()}


class _Copies(Mapping[str, NDArray[Any]]):
    def __init__(
        self, role: str, named: Mapping[str, NDArray[Any]], copied: Counter[tuple[str, str]]
    ) -> None:
        self._role = role
        self._named = named
        self._copied = copied

    def __getitem__(self, name: str) -> NDArray[Any]:
        self._copied[self._role, name] += 1
        return self._named[name].copy()

    def copy_into(self, name: str, target: NDArray[Any]) -> None:
        self._copied[self._role, name] += 1
        np.copyto(target, self._named[name], casting="no")

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


def create(settings: EngineSettings, group: Group | None = None) -> ToyEngine:
    """An engine whose weights are a function of the vocabulary's size; folders are not looked at."""
    if settings.model_config.get("model_type") != "toy":
        raise ModelError(f"the toy engine has no model {settings.model_config.get('model_type')!r}")
    vocabulary = settings.model_config["vocab_size"]
    source = np.random.Generator(np.random.Philox(key=vocabulary))
    policy = {
        "embedding.weight": source.standard_normal((vocabulary, HIDDEN), dtype=np.float32),
        "head.weight": source.standard_normal((vocabulary, HIDDEN), dtype=np.float32),
        "head.bias": np.zeros(vocabulary, dtype=np.float32),
    }
    optimizer: dict[str, NDArray[Any]] = {"global_step": np.zeros(1, dtype=np.int64)}
    group = group or OneProcess()
    for name, box in kept_by(policy, settings, group).items():
        optimizer[f"adam_m.{name}"] = np.zeros(box.shape, np.float32)
        optimizer[f"adam_v.{name}"] = np.zeros(box.shape, np.float32)
    reference = {name: array.copy() for name, array in policy.items()}
    roles = {"policy_model": policy, "optimizer": optimizer, "ref": reference}
    return ToyEngine(settings=settings, group=group, roles=roles)


def kept_by(policy: Mapping[str, NDArray[Any]], settings: EngineSettings, group: Group) -> dict[str, Box]:
    """What a worker keeps of the optimizer, by the name of the tensor."""
    shapes = {name: array.shape for name, array in policy.items()}
    if not settings.parallel_optimizer:
        return {name: whole(shape) for name, shape in shapes.items()}
    return spread(shapes, group.world_size)[group.rank]


def create_copied(settings: EngineSettings, group: Group | None = None) -> CopiedToyEngine:
    """The same engine, read by copies."""
    made = create(settings, group)
    return CopiedToyEngine(settings=settings, group=made.group, roles=made.roles)


def _logits(weights: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """[V, V]: row = last token, column = next token."""
    embedding, head, bias = (weights[name].astype(np.float64) for name in NAMES)
    return embedding @ head.T + bias


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _sample(logits: NDArray[np.float64], sampling: SamplingSettings, uniform: float) -> np.int32:
    """One token, by inverting the cumulative distribution of what top-k and top-p leave."""
    if sampling.temperature == 0:
        return np.int32(logits.argmax())
    logprobs = _log_softmax(logits / sampling.temperature)
    order = np.argsort(-logprobs, kind="stable")
    kept = len(order) if sampling.top_k == 0 else min(sampling.top_k, len(order))
    probabilities = np.exp(logprobs[order])
    if sampling.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        kept = min(kept, int((before / probabilities.sum() < sampling.top_p).sum()))
    allowed = np.zeros(len(order), dtype=bool)
    allowed[order[:kept]] = True
    cumulative = np.cumsum(np.where(allowed, np.exp(logprobs), 0))
    return np.int32(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def _transitions(tokens: TokenBatch) -> tuple[Ints, Ints]:
    """(last, next) of each completion token, [B, T] each."""
    ends = [row[mask][-1] for row, mask in zip(tokens.prompt_ids, tokens.prompt_mask, strict=True)]
    last = np.concatenate([np.array(ends, dtype=np.int32)[:, None], tokens.completion_ids[:, :-1]], axis=1)
    return last, tokens.completion_ids


def _completion_logprobs(logits: NDArray[np.float64], tokens: TokenBatch) -> Floats:
    last, following = _transitions(tokens)
    logprobs = _log_softmax(logits)[last, following]
    return np.where(tokens.completion_mask, logprobs, 0).astype(np.float32)


def _logits_gradient(
    logits: NDArray[np.float64], tokens: TokenBatch, logprob_gradient: NDArray[np.float64]
) -> NDArray[np.float64]:
    """d loss / d logits [V, V], from d loss / d log-probability of each completion token, [B, T]."""
    last, following = _transitions(tokens)
    of_token = np.where(tokens.completion_mask, logprob_gradient, 0)
    # d logprob / d logits = onehot - softmax, added up for each pair (last, next).
    of_logits = np.zeros_like(logits)
    np.add.at(of_logits, (last, following), of_token)
    return of_logits - np.exp(_log_softmax(logits)) * of_logits.sum(axis=1, keepdims=True)


def _gradients(
    policy: Mapping[str, NDArray[Any]], of_logits: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """The gradients of NAMES."""
    embedding, head = (policy[name].astype(np.float64) for name in NAMES[:2])
    return [of_logits @ head, of_logits.T @ embedding, of_logits.sum(axis=0)]
