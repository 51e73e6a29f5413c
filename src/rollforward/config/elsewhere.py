"""The names that TRL, transformers and launchers have for this program's options and keys.

People who come from there type the names they know. Those mean nothing here, so the error message gives the
right one: an option, or a dotted key, which is given with `--set` on a command line.
"""

_KEYS = """
    save_steps                      rl_config.save_ckpt_interval
    save_total_limit                rl_config.save_max_ckpt_num
    num_train_epochs                rl_config.epochs
    max_steps                       rl_config.max_steps
    seed                            rl_config.seed
    data_seed                       rl_config.seed
    beta                            rl_config.beta
    epsilon                         rl_config.epsilon_low
    epsilon_high                    rl_config.epsilon_high
    num_generations                 rl_config.num_generations
    num_iterations                  rl_config.num_iterations
    scale_rewards                   rl_config.advantage_std
    loss_type                       rl_config.loss_aggregation
    per_device_train_batch_size     rl_config.batch_size
    generation_batch_size           rl_config.chunk_size
    learning_rate                   actor_config.lr_schedule.lr
    warmup_steps                    actor_config.lr_schedule.warmup_step
    lr_scheduler_type               actor_config.lr_schedule.lr_decay_style
    weight_decay                    actor_config.optimizer.weight_decay
    adam_beta1                      actor_config.optimizer.adam_beta1
    adam_beta2                      actor_config.optimizer.adam_beta2
    adam_epsilon                    actor_config.optimizer.eps
    max_grad_norm                   actor_config.optimizer.max_grad_norm
    sync_ref_model                  ref_config.sync_ref_model
    ref_model_sync_steps            ref_config.ref_model_sync_steps
    max_prompt_length               generate_config.max_prompt_length
    max_completion_length           generate_config.sampling_config.max_tokens
    lora_r                          actor_config.lora.rank
    lora_alpha                      actor_config.lora.alpha
    lora_target_modules             actor_config.lora.target_modules
    temperature                     generate_config.sampling_config.temperature
    top_k                           generate_config.sampling_config.top_k
    top_p                           generate_config.sampling_config.top_p
"""
_OPTIONS = """
    resume_from_checkpoint          --resume_training
    resume                          --resume_training
    output_dir                      --save_checkpoint_dir               actor_config.save
    model_name_or_path              --actor_checkpoint_path             actor_config.load
    ref_model                       --ref_checkpoint_path               ref_config.load
    dataset_name                    --dataset_file                      rl_config.dataset_file
    dataset_path                    --dataset_file                      rl_config.dataset_file
    reward_funcs                    --verifier_function                 reward_config.verifier_function
    reward_weights                  --verifier_weight                   reward_config.verifier_weight
    tokenizer_name                  --tokenizer_dir                     rl_config.tokenizer_dir
    logging_dir                     --tensorboard                       rl_config.tensorboard_dir
    report_to                       --tensorboard                       rl_config.tensorboard
    num_processes                   --workers
    nproc_per_node                  --workers
    worker_num                      --workers
"""


def _rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if line.strip()]


KEYS = {row[0]: row[-1] for row in _rows(_KEYS + _OPTIONS) if "." in row[-1]}
"""Their name -> the dotted key here."""

OPTIONS = {name: f"--set {key}=..." for name, key in _rows(_KEYS)} | {
    name: option for name, option, *_ in _rows(_OPTIONS)
}
"""Their name -> what to write on the command line here."""
