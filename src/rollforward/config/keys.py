"""The configuration: MindRLHF's sections and keys, typed, documented, checked.

Users bring the YAML they have. Keys that mean something here are the fields below; MindRLHF keys
that mean nothing here are listed in `config.ignored` and accepted with one line in the log; any
other key is an error that names the nearest known one. A key that is left out has its default. All
problems in a file are reported together.

Keys that are ours, since MindRLHF has no equivalent: `rl_config.max_steps`, `advantage_std`,
`loss_aggregation`, `keep_ckpt_per_n_steps`, `keep_best_ckpt_num`, `best_ckpt_metric`,
`save_ckpt_share`, `save_ckpt_prove_unchanged`, `journal_durability`, `lease_seconds`, `work_dir`,
`collective_timeout`, `actor_config.optimizer.max_grad_norm`, and the section `actor_config.lora`.

`docs/reference/config.md` is generated from this file.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from rollforward.config.schema import key, meaning_of, walk


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """The run: its data, its step, its checkpoints."""

    dataset_file: str = key(
        "",
        "JSON Lines (gzipped or not) or Parquet with `prompt` and `answer`, or "
        "`reasoning_gym:NAME?parameter=value&...`; see [data.md](data.md).",
        affects_numbers=False,
        is_path=True,
    )
    tokenizer_dir: str = key(
        "",
        "Folder of the tokenizer; the actor's Hugging Face folder when left out.",
        affects_numbers=False,
        is_path=True,
    )
    seed: int = key(0, "Key of every random number: data order and sampling.", low=0, high=2**63 - 1)
    epochs: int = key(1, "Passes over the dataset.", low=1, affects_numbers=False)
    max_steps: int = key(0, "Stop after this many steps in all; 0: all epochs.", low=0, affects_numbers=False)
    chunk_size: int = key(1, "Prompts in one rollout chunk.", low=1)
    num_rollouts: int = key(
        1,
        "Rollout chunks per step and worker, when a run starts. Its steps stay as large as that: a resume on "
        "another number of workers gives each of them what keeps their sum.",
        low=1,
        # Their number in a step does, and that is kept by itself: see `run.facts`.
        affects_numbers=False,
    )
    num_generations: int = key(8, "Completions of each prompt: the group of GRPO.", low=2)
    num_iterations: int = key(1, "Optimizer steps on the experience of one step.", low=1)
    batch_size: int = key(
        1,
        "Bounds the memory of a forward and backward pass: it has at most the columns of so many samples of "
        "the greatest length, at most a chunk. It holds more samples where they are shorter; gradients are "
        "accumulated.",
        low=1,
    )
    beta: float = key(
        0.01,
        "Weight of the KL divergence to the reference (k3 estimate); 0: the reference computes nothing.",
        low=0,
    )
    epsilon_low: float = key(0.2, "The ratio is clipped below at 1 - epsilon_low.", low=0, high=1)
    epsilon_high: float = key(0.2, "The ratio is clipped above at 1 + epsilon_high.", low=0)
    advantage_std: bool = key(
        True, "Divide advantages by the standard deviation of their group (GRPO); false: do not (Dr. GRPO)."
    )
    loss_aggregation: str = key(
        "token_mean",
        "token_mean: every token of the step weighs the same; sequence_mean: every completion does.",
        choices=("token_mean", "sequence_mean"),
    )
    seq_length: int = key(
        0,
        "Limit on max_prompt_length + max_tokens, checked when the run starts; 0: none.",
        low=0,
        affects_numbers=False,
    )
    save_ckpt_interval: int | str = key(
        5,
        "Steps between checkpoints; 0: only the final one; auto: as often as saving costs at most "
        "`save_ckpt_share` of the time, by what is measured in the run.",
        low=0,
        choices=("auto",),
        affects_numbers=False,
    )
    save_ckpt_share: float = key(
        0.02,
        "With `save_ckpt_interval: auto`: how much of the time saving may cost.",
        low=0.0001,
        high=1,
        affects_numbers=False,
    )
    save_max_ckpt_num: int = key(5, "Newest checkpoints that are kept.", low=1, affects_numbers=False)
    keep_ckpt_per_n_steps: int = key(
        0,
        "Checkpoints after a multiple of this many steps, 0 among them, are kept besides; 0: none. "
        "The journal stays from the oldest kept checkpoint on.",
        low=0,
        affects_numbers=False,
    )
    keep_best_ckpt_num: int = key(
        0,
        "So many checkpoints with the greatest best_ckpt_metric are kept besides; 0: none.",
        low=0,
        affects_numbers=False,
    )
    best_ckpt_metric: str = key(
        "reward",
        "`reward`, or `reward/NAME` for one of the verifiers: the mean over the steps since the checkpoint "
        "before.",
        affects_numbers=False,
    )
    save_ckpt_prove_unchanged: bool = key(
        False,
        "Debugging: digest every tensor when a save begins, and stop the run when other bytes are written: "
        "proof that nothing changed the weights while they were being saved.",
        affects_numbers=False,
    )
    on_divergence: str = key(
        "stop",
        "What to do when a replayed update differs from the record in the journal.",
        choices=("stop", "accept"),
        affects_numbers=False,
    )
    weights_digest_interval: int = key(
        10, "Steps between digests of the policy in the journal; 0: none.", low=0, affects_numbers=False
    )
    save_ckpt_format: str = key(
        "safetensors", "The format of new checkpoints.", choices=("safetensors",), affects_numbers=False
    )
    load_ckpt_format: str = key(
        "safetensors",
        "Accepted for MindRLHF's configurations: files of either format are recognised.",
        choices=("safetensors", "ckpt", "hf_safetensors", "ms_safetensors"),
        affects_numbers=False,
    )
    journal_durability: str = key(
        "local",
        "Of a run in object storage. local: a chunk of rollouts is used when this machine's disk has it, and "
        "shipped behind; what was not shipped yet is lost with the machine. remote: it is used when the "
        "service has it.",
        choices=("local", "remote"),
        affects_numbers=False,
    )
    lease_seconds: int = key(
        30,
        "Of a run in object storage: how long after the last sign of life of its trainer one on another "
        "machine takes over. The trainer gives one every third of that.",
        low=2,
        high=3600,
        affects_numbers=False,
    )
    work_dir: str = key(
        "",
        "Of a run in object storage: the folder for what is only of this machine. A folder of its own in "
        "`~/.cache/rollforward` when left out.",
        affects_numbers=False,
        is_path=True,
    )
    save_strategy_dir: str = key(
        "",
        "Where strategy_<rank>.ckpt goes; old ones there are removed. `<root>/strategy` when left out, or "
        "`<root>/strategy.1` and so on, if that is another run's.",
        affects_numbers=False,
        is_path=True,
    )
    enable_compile_cache: bool = key(
        True,
        "Keep compiled graphs in the run's folder, so that a restart need not compile.",
        affects_numbers=False,
    )
    collective_timeout: int = key(
        1800,
        "Seconds that a worker waits in a collective for the others before the run ends, naming who is "
        "late; 0: for ever.",
        low=0,
        affects_numbers=False,
    )
    tensorboard: bool = key(False, "Write TensorBoard event files.", affects_numbers=False)
    tensorboard_dir: str = key(
        "",
        "Where they go; `tensorboard/` in the run's folder when left out.",
        affects_numbers=False,
        is_path=True,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay."""

    type: str = key("adamw", "The optimizer.", choices=("adamw",))
    adam_beta1: float = key(0.9, "Decay of the first moment.", low=0, high=1)
    adam_beta2: float = key(0.95, "Decay of the second moment.", low=0, high=1)
    eps: float = key(1e-8, "Added to the root of the second moment.", low=0)
    weight_decay: float = key(0.0, "Decoupled weight decay.", low=0)
    max_grad_norm: float = key(1.0, "The gradient's L2 norm is clipped to this; 0: not clipped.", low=0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate: linear warm-up, then a cosine from `lr` to `min_lr`."""

    lr_decay_style: str = key("cosine", "The shape of the decay.", choices=("cosine",))
    lr: float = key(1e-6, "The rate after warm-up.", low=0)
    min_lr: float = key(0.0, "The rate at the end of the decay.", low=0)
    warmup_step: int = key(0, "Optimizer steps of linear warm-up.", low=0)
    decay_steps: int = key(0, "Optimizer steps until `min_lr`, warm-up included; 0: the whole run.", low=0)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model, policy and reference alike, is cut over workers."""

    model_parallel: int = key(
        1,
        "Workers that hold the model together: each has a part of every layer and of the vocabulary. It must "
        "divide the model's key-value heads, the width of its MLP, its vocabulary and the number of workers. "
        "`data_parallel` follows: workers / model_parallel.",
        low=1,
        # What computes: another number adds up in another order, and a replay compares within a tolerance.
        affects_numbers=False,
    )
    pipeline_stage: int = key(1, "1: layers are not shared out over workers.", low=1, affects_numbers=False)
    context_parallel: int = key(1, "1: sequences are not cut over workers.", low=1, affects_numbers=False)
    expert_parallel: int = key(1, "1: no model here has experts.", low=1, affects_numbers=False)


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """What the backward pass computes again instead of keeping it in memory."""

    recompute: bool = key(
        False,
        "Keep of each layer what goes in and out only, and compute the rest again in the backward pass: "
        "less memory, more time, the same bits.",
        affects_numbers=False,
    )
    select_recompute: bool = key(
        False, "Must be false: single operators cannot be chosen here.", affects_numbers=False
    )
    recompute_slice_activation: bool = key(
        False, "Must be false: what is kept of a layer is not cut over devices.", affects_numbers=False
    )
    mp_comm_recompute: bool = key(
        True,
        "Accepted for MindRLHF's configurations: a layer is computed again as a whole.",
        affects_numbers=False,
    )
    parallel_optimizer_comm_recompute: bool = key(
        False,
        "Accepted for MindRLHF's configurations: the optimizer sends nothing in the forward pass.",
        affects_numbers=False,
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: with a rank above 0 only they are trained and saved; the model stays as it is."""

    rank: int = key(0, "Rank of the adapters; 0: there are none, and all weights are trained.", low=0)
    alpha: float = key(16.0, "What an adapter computes is multiplied by alpha / rank.", low=0)
    target_modules: tuple[str, ...] = key(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "The parts of each layer that have an adapter.",
        choices=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """The policy and how it is trained."""

    load: str = key(
        "",
        "Hugging Face folder to start from; the same as --actor_checkpoint_path of a new run. With `lora` "
        "also where a resumed run finds the base, if that is not where it was.",
        affects_numbers=False,
        is_path=True,
    )
    save: str = key(
        "",
        "Where new checkpoints go, a folder or `s3://bucket/path`; the same as --save_checkpoint_dir.",
        affects_numbers=False,
        is_path=True,
    )
    model_config: str = key(
        "",
        "config.json of the model, for a checkpoint folder that does not carry one (MindRLHF's).",
        affects_numbers=False,
        is_path=True,
    )
    enable_parallel_optimizer: bool = key(
        False,
        "Spread the optimizer over the workers: each keeps about its share of the moments, and updates that "
        "part of the policy. The bits are the same with it and without.",
        affects_numbers=False,
    )
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    recompute_config: RecomputeConfig = field(default_factory=RecomputeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True)
class RefConfig:
    """The reference model of the KL term."""

    load: str = key(
        "",
        "Hugging Face folder; the same as --ref_checkpoint_path; the actor's when left out.",
        affects_numbers=False,
        is_path=True,
    )
    sync_ref_model: bool = key(
        False,
        "Make the reference a copy of the policy every ref_model_sync_steps; not with rl_config.beta 0.",
    )
    ref_model_sync_steps: int = key(50, "Steps between two such copies.", low=1)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a completion is worth: the weighted sum of its verifiers' rewards."""

    verifier_function: tuple[str, ...] = key(
        ("accuracy_reward",),
        "accuracy_reward, format_reward, reasoning_gym_score, or a function of yours as `module:function`.",
    )
    verifier_weight: tuple[float, ...] = key((), "One weight for each verifier; 1.0 each when left out.")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn. The loss uses the temperature, but not top_k and top_p, as in TRL."""

    max_tokens: int = key(512, "Longest completion, in tokens.", low=1)
    temperature: float = key(
        1.0,
        "Softmax temperature, of sampling and of what is learnt alike; 0: greedy, and learning takes 1.",
        low=0,
    )
    top_k: int = key(0, "Draw from the k likeliest tokens; 0 or -1: from all.", low=-1)
    top_p: float = key(
        1.0, "Draw from the likeliest tokens that together have this probability.", low=0, high=1
    )
    eos_token_id: tuple[int, ...] | None = key(
        None, "Tokens that end a completion; the model folder's when left out.", low=0
    )
    pad_token_id: int | None = key(
        None, "Fills up prompts and completions; the tokenizer's when left out.", low=0
    )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generation."""

    max_prompt_length: int = key(512, "Longest prompt, in tokens; prompts are padded to it.", low=1)
    infer_model_batch_size: int = key(
        0, "Samples that are decoded together; 0: one whole chunk (chunk_size x num_generations).", low=0
    )
    sampling_config: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """The device."""

    device_target: str = key("CPU", "What the engine computes on.", choices=("CPU", "Ascend"))
    engine: str = key(
        "mindspore",
        "What computes: the name of an installed engine (an entry point of `rollforward.engines`).",
        # Another engine has other versions, and a resume and a replay compare those.
        affects_numbers=False,
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a YAML file can say."""

    rl_config: RlConfig = field(default_factory=RlConfig)
    actor_config: ActorConfig = field(default_factory=ActorConfig)
    ref_config: RefConfig = field(default_factory=RefConfig)
    reward_config: RewardConfig = field(default_factory=RewardConfig)
    generate_config: GenerateConfig = field(default_factory=GenerateConfig)
    context: ContextConfig = field(default_factory=ContextConfig)

    @property
    def verifier_weights(self) -> tuple[float, ...]:
        """One weight for each verifier."""
        reward = self.reward_config
        return reward.verifier_weight or (1.0,) * len(reward.verifier_function)

    @property
    def samples_per_chunk(self) -> int:
        """Completions in one rollout chunk."""
        return self.rl_config.chunk_size * self.rl_config.num_generations

    @property
    def samples_per_generation(self) -> int:
        """Completions decoded together."""
        return self.generate_config.infer_model_batch_size or self.samples_per_chunk


def what_affects_numbers(config: Config) -> dict[str, Any]:
    """Dotted key -> value, of the keys that influence the weights a run ends with."""
    found: dict[str, Any] = {}
    tree = asdict(config)
    for path, declared, _kind in walk(Config):
        if meaning_of(declared).affects_numbers:
            value: Any = tree
            for part in path.split("."):
                value = value[part]
            found[path] = list(value) if isinstance(value, tuple) else value
    return found
