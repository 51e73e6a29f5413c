"""What the soaks train: a run without an end that saves, copies its reference and repeats updates often."""

from typing import Any

SETTINGS: dict[str, Any] = {
    "rl_config__epochs": 1_000_000,
    "rl_config__chunk_size": 1,
    "rl_config__num_iterations": 2,
    "rl_config__save_ckpt_interval": 4,
    "rl_config__save_max_ckpt_num": 3,
    "rl_config__weights_digest_interval": 3,
    "ref_config__sync_ref_model": True,
    "ref_config__ref_model_sync_steps": 7,
    "actor_config__lr_schedule__lr": 0.002,
    "actor_config__lr_schedule__min_lr": 0.001,
    "actor_config__lr_schedule__decay_steps": 10_000,
}
