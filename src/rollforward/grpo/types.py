"""The values that pass between the trainer, the engine and the verifiers.

Shapes: `B` samples (one completion each), `P` the padded prompt length, `T` the padded
completion length. Arrays are NumPy, C-contiguous; ids are int32, masks bool, numbers float32.
Prompts are left-padded (so that completions start at one column), completions right-padded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem of the dataset, tokenized."""

    index: int
    """Its line in the dataset: what an epoch permutes."""
    text: str
    """What the model is shown, chat template applied."""
    token_ids: tuple[int, ...]
    answer: str
    """What verifiers compare with."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of its line in the dataset, passed to verifiers by name."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `Engine.generate` returns."""

    completion_ids: Ints
    """[B, T]; the pad token after the end."""
    lengths: Ints
    """[B]; tokens of each completion, its stop token included."""
    stopped: Bools
    """[B]; True where a stop token ended it, False where `max_tokens` did."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Prompts with their completions."""

    prompt_ids: Ints
    """[B, P]"""
    prompt_mask: Bools
    """[B, P]; True on real tokens."""
    completion_ids: Ints
    """[B, T]"""
    completion_mask: Bools
    """[B, T]; True on generated tokens, the stop token included."""


@dataclass(frozen=True, kw_only=True)
class RolloutChunk:
    """The unit of generation, and of the journal: some prompts x `num_generations` completions."""

    prompt_indices: Ints
    """[B]; `Prompt.index` of each sample; the samples of a group are consecutive."""
    tokens: TokenBatch
    stopped: Bools
    """[B]"""
    rewards: Floats
    """[B, number of verifiers], unweighted."""
    reference_logprobs: Floats
    """[B, T]; log-probability of each completion token under the reference; 0 where masked or with beta 0."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """The input of an optimizer step. Its loss: `sum(token_weights * token_loss)` over all ranks."""

    tokens: TokenBatch
    advantages: Floats
    """[B]"""
    token_weights: Floats
    """[B, T]; 0 where masked; sums to 1 over all ranks' batches."""
    reference_logprobs: Floats
    """[B, T]"""
    old_logprobs: Floats | None
    """[B, T] under the policy that generated them; None means the current policy (ratio 1)."""


@dataclass(frozen=True, kw_only=True)
class UpdateOutcome:
    """What one optimizer step reports; the numbers are over all ranks."""

    loss: float
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    kl: float
    """Weighted mean over tokens of the k3 estimate of KL(policy || reference); 0 with beta 0."""
    clip_fraction: float
    """Weighted share of tokens whose ratio was clipped."""
    logprobs: Floats
    """[B, T] of this rank's samples under the policy *before* the step; 0 where masked.

    With beta 0 an engine may leave them 0 for samples without an advantage too: these add nothing.
    """


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn."""

    max_tokens: int
    temperature: float = 1.0
    """What logits are divided by; 0: greedy, always the likeliest token."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    @property
    def learning_temperature(self) -> float:
        """What logits are divided by in learning; see `grpo.objective`."""
        return self.temperature or 1.0


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The clipped objective; see `grpo.objective` for the formulas."""

    beta: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with decoupled weight decay; `max_grad_norm` 0 turns clipping off."""

    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters: only they are trained (Hu et al., "LoRA", arXiv:2106.09685).

    A part with weight W [outputs, inputs] computes `W x + alpha / rank * B (A x)`, with A [rank, inputs] and
    B [outputs, rank]. The base, W and all that has no adapter, stays as it is.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    """Names of the parts that have an adapter, in every layer: `q_proj` and so on."""

    @property
    def scale(self) -> float:
        """What `B (A x)` is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Everything an engine is built from.

    `model_config` is the parsed `config.json` of a Hugging Face folder. `policy_folder` and
    `reference_folder` name folders to read weights from; with None the parameters are set by
    `Engine.load` (a resumed run), and nothing may be computed before that.
    """

    model_config: Mapping[str, Any]
    policy_folder: str | None
    reference_folder: str | None
    prompt_length: int
    """P: prompts are padded to this."""
    samples_per_generation: int
    """How many completions are decoded at a time; where there are more, they wait until one is finished."""
    samples_per_micro_batch: int
    """The columns of so many samples of the greatest length bound one forward and backward pass.

    A chunk's gradient is the sum over its micro-batches, in order.
    """
    sampling: SamplingSettings
    objective: ObjectiveSettings
    optimizer: OptimizerSettings
    chunks: int = 1
    """Of this worker in each step: the rows of a batch are so many chunks of one size, in order."""
    model_parallel: int = 1
    """Workers that hold the model together, neighbours by rank: see `grpo.group.Replicas`."""
    parallel_optimizer: bool = False
    """Whether each worker keeps only its part of the optimizer, as `grpo.spreading` has it."""
    recompute: bool = False
    """Whether a layer's activations are computed again in the backward pass instead of kept. Same bits."""
    lora: LoraSettings | None = None
    """Adapters that are trained instead of the model. The engine's `policy_model` is then the adapters, its
    `ref` is empty: the reference is the base, which is no part of its state."""
    base_folder: str | None = None
    """With `lora`: the folder whose weights are the base, read at every start."""
    device_target: str = "CPU"
    compile_cache_folder: str | None = None
    """Where the engine may keep compiled graphs between starts; None: nowhere."""
