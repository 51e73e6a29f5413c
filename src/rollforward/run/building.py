"""Turns a plan into the settings of engine, trainer and store; configuration keys stop here."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rollforward.config.keys import Config
from rollforward.grpo.schedule import LearningRate
from rollforward.grpo.trainer import TrainerSettings
from rollforward.grpo.types import EngineSettings, ObjectiveSettings, OptimizerSettings, SamplingSettings
from rollforward.replay.cadence import Cadence
from rollforward.run.adapters import lora_of
from rollforward.run.plan import Plan, decay_steps, end_tokens, pad_token
from rollforward.store import Retention


def engine_settings(plan: Plan) -> EngineSettings:
    """What the engine is built from."""
    config = plan.config
    settings = settings_without_data(config, plan.model_config, chunks=plan.chunks_per_worker)
    policy, reference = plan.source.weights() if plan.lora is None else (None, None)
    return replace(
        settings,
        policy_folder=None if policy is None else str(policy),
        reference_folder=None if reference is None else str(reference),
        base_folder=None if plan.base is None else str(plan.base),
        # One replica keeps all of it either way: what it compiles is the same.
        parallel_optimizer=settings.parallel_optimizer and plan.replicas > 1,
        sampling=replace(
            settings.sampling,
            stop_token_ids=end_tokens(config, plan.tokenizer),
            pad_token_id=pad_token(config, plan.tokenizer),
        ),
        compile_cache_folder=str(plan.outputs.run / "compile_cache")
        if config.rl_config.enable_compile_cache
        else None,
    )


def settings_without_data(config: Config, model_config: Mapping[str, Any], *, chunks: int) -> EngineSettings:
    """Everything that shapes and memory depend on; without folders, and tokens of the tokenizer."""
    sampling, optimizer = config.generate_config.sampling_config, config.actor_config.optimizer
    return EngineSettings(
        model_config=model_config,
        policy_folder=None,
        reference_folder=None,
        prompt_length=config.generate_config.max_prompt_length,
        samples_per_generation=config.samples_per_generation,
        # A chunk's gradient is computed by itself: more rows than it has would only be filled up.
        samples_per_micro_batch=min(config.rl_config.batch_size, config.samples_per_chunk),
        chunks=chunks,
        model_parallel=config.actor_config.parallel_config.model_parallel,
        parallel_optimizer=config.actor_config.enable_parallel_optimizer,
        recompute=config.actor_config.recompute_config.recompute,
        lora=lora_of(config),
        sampling=SamplingSettings(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=max(sampling.top_k, 0),
            top_p=sampling.top_p,
        ),
        objective=ObjectiveSettings(
            beta=config.rl_config.beta,
            epsilon_low=config.rl_config.epsilon_low,
            epsilon_high=config.rl_config.epsilon_high,
        ),
        optimizer=OptimizerSettings(
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
        ),
        device_target=config.context.device_target,
    )


def trainer_settings(plan: Plan) -> TrainerSettings:
    """What the trainer needs to know."""
    rl, ref = plan.config.rl_config, plan.config.ref_config
    every = 0 if plan.rebuild else rl.save_ckpt_interval
    return TrainerSettings(
        seed=rl.seed,
        num_generations=rl.num_generations,
        num_iterations=rl.num_iterations,
        prompt_length=plan.config.generate_config.max_prompt_length,
        max_tokens=plan.config.generate_config.sampling_config.max_tokens,
        pad_token_id=pad_token(plan.config, plan.tokenizer),
        standardise_advantages=rl.advantage_std,
        loss_aggregation="token_mean" if rl.loss_aggregation == "token_mean" else "sequence_mean",
        verifier_names=plan.config.reward_config.verifier_function,
        verifier_weights=plan.config.verifier_weights,
        # Nothing is compared with the reference then: it stays what it is.
        ref_model_sync_steps=ref.ref_model_sync_steps if ref.sync_ref_model and rl.beta > 0 else 0,
        uses_reference=rl.beta > 0,
        model_parallel=plan.model_parallel,
        # 0 means only the final checkpoint: an interval longer than the run.
        save_ckpt_interval="auto" if every == "auto" else int(every) or plan.total_steps + 1,
    )


def retention(plan: Plan) -> Retention:
    """Which checkpoints are kept."""
    rl = plan.config.rl_config
    return Retention(
        newest=rl.save_max_ckpt_num,
        every=rl.keep_ckpt_per_n_steps,
        best=rl.keep_best_ckpt_num,
        metric=rl.best_ckpt_metric,
    )


def cadence(plan: Plan) -> Cadence:
    """When a checkpoint is due."""
    rl = plan.config.rl_config
    return Cadence(share=rl.save_ckpt_share, kept=rl.keep_ckpt_per_n_steps)


def learning_rate(plan: Plan) -> LearningRate:
    """The schedule, in optimizer steps."""
    schedule = plan.config.actor_config.lr_schedule
    return LearningRate(
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        warmup_steps=schedule.warmup_step,
        decay_steps=decay_steps(plan.config, plan.total_steps),
    )
