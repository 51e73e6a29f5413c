"""Turns a plan into the settings of engine, trainer and store; configuration keys stop here."""

from rollforward.grpo.schedule import LearningRate
from rollforward.grpo.trainer import TrainerSettings
from rollforward.grpo.types import EngineSettings, ObjectiveSettings, OptimizerSettings, SamplingSettings
from rollforward.run.plan import Plan, decay_steps, end_tokens, pad_token
from rollforward.store import Retention


def engine_settings(plan: Plan) -> EngineSettings:
    """What the engine is built from."""
    config = plan.config
    sampling, optimizer = config.generate_config.sampling_config, config.actor_config.optimizer
    policy, reference = plan.source.weights()
    return EngineSettings(
        model_config=plan.model_config,
        policy_folder=None if policy is None else str(policy),
        reference_folder=None if reference is None else str(reference),
        prompt_length=config.generate_config.max_prompt_length,
        samples_per_generation=config.samples_per_generation,
        samples_per_micro_batch=config.rl_config.batch_size,
        sampling=SamplingSettings(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=max(sampling.top_k, 0),
            top_p=sampling.top_p,
            stop_token_ids=end_tokens(config, plan.tokenizer),
            pad_token_id=pad_token(plan.config, plan.tokenizer),
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
        compile_cache_folder=str(plan.outputs.run / "compile_cache")
        if config.rl_config.enable_compile_cache
        else None,
    )


def trainer_settings(plan: Plan) -> TrainerSettings:
    """What the trainer needs to know."""
    rl, ref = plan.config.rl_config, plan.config.ref_config
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
        ref_model_sync_steps=ref.ref_model_sync_steps if ref.sync_ref_model else 0,
        # 0 means only the final checkpoint: an interval longer than the run.
        save_ckpt_interval=(not plan.rebuild and rl.save_ckpt_interval) or plan.total_steps + 1,
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


def learning_rate(plan: Plan) -> LearningRate:
    """The schedule, in optimizer steps."""
    schedule = plan.config.actor_config.lr_schedule
    return LearningRate(
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        warmup_steps=schedule.warmup_step,
        decay_steps=decay_steps(plan.config, plan.total_steps),
    )
