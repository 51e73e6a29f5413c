"""What `rollforward.trl` was written for, checked at the start: another signature is an error that names it.

The trainer overrides private methods of TRL and transformers. Their parameters are compared with those of the
versions that were tested (TRL 1.16, transformers 5.24), so that a release which changed one cannot train a
run that would not resume.
"""

import inspect
from typing import Any

import transformers
import trl

from rollforward.errors import InputError

OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "log": ("logs", "start_time"),
    "_generate_and_score_completions": ("inputs",),
    "_get_train_sampler": ("dataset",),
    "_run_epoch": (
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_evaluate": ("trial", "ignore_keys_for_eval", "skip_scheduler"),
    "_maybe_log_save_evaluate": (
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_load_callback_state": (),
    "_load_best_model": (),
}
"""Method -> its parameters besides `self`, in their order."""

ATTRIBUTES = (
    "_step",
    "_buffered_inputs",
    "_metrics",
    "_logs",
    "_last_world_entropy",
    "_entropy_window_stats",
)
"""State of TRL's trainer that is saved and restored."""

LOGS = frozenset({"images", "prompt", "completion", "rewards", "advantages", "extra"})

_INSTALL = "pip install 'rollforward[trl]' installs versions that were tested"


def check_versions() -> None:
    """InputError for a TRL or transformers whose methods are not the ones that are overridden."""
    for name, expected in OVERRIDDEN.items():
        method = getattr(trl.GRPOTrainer, name, None)
        if method is None:
            raise InputError(
                f"{_installed()}: GRPOTrainer has no method {name}, which is needed here",
                hint=_INSTALL,
            )
        found = tuple(parameter for parameter in inspect.signature(method).parameters if parameter != "self")
        if found != expected:
            raise InputError(
                f"{_installed()}: GRPOTrainer.{name} takes {', '.join(found) or 'nothing'}; this trainer was "
                f"written for {', '.join(expected) or 'nothing'}",
                hint=_INSTALL,
            )


def check_trainer(trainer: Any) -> list[str]:
    """InputError for what cannot be resumed exactly; returns warnings for what is exact only in part."""
    missing = [name for name in ATTRIBUTES if not hasattr(trainer, name)]
    if missing or trainer._logs.keys() != LOGS:
        raise InputError(
            f"{_installed()}: GRPOTrainer keeps its state elsewhere: {', '.join(missing) or '_logs'}",
            hint=_INSTALL,
        )
    args = trainer.args
    for refused, why in (
        (trainer.is_deepspeed_enabled, "DeepSpeed holds the tensors in parts, over processes"),
        (trainer.is_fsdp_enabled, "FSDP holds the tensors in parts, over processes"),
        (args.auto_find_batch_size, "auto_find_batch_size starts training over after an error"),
        (args.ignore_data_skip, "with ignore_data_skip a resume trains on other data"),
    ):
        if refused:
            raise InputError(
                f"rollforward.trl cannot resume this exactly: {why}",
                hint="turn it off, or train with trl.GRPOTrainer, without the guarantee",
            )
    warnings = []
    if trainer.use_vllm:
        warnings.append(
            "vLLM: finished rollouts are journaled and repeated, but new ones depend on vLLM's own state: a "
            "resumed run continues exactly up to the last finished rollouts, and differs from there"
        )
    if trainer.environment_factories is not None or trainer.tools:
        warnings.append(
            "tools and environments: what they keep between rollouts is not saved; exact if each rollout "
            "depends on its prompt and on the random state only"
        )
    if args.save_only_model:
        warnings.append("save_only_model is ignored: a run cannot resume without its optimizer")
    if args.push_to_hub:
        warnings.append("push_to_hub: checkpoints are not pushed while training; the final model is")
    return warnings


def _installed() -> str:
    return f"TRL {trl.__version__} with transformers {transformers.__version__}"
