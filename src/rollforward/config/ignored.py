"""Keys of MindRLHF's configuration that mean nothing here: accepted, and reported as ignored.

Most of them lay out a model over an Ascend cluster, choose a compilation mode, or belong to other
algorithms (PPO's value function, its adaptive KL coefficient) or to vLLM. A section named here is
ignored with everything below it.
"""

_BY_SECTION: dict[str, str] = {
    "rl_config": """
        model_name deterministic align_type sink_size use_parallel parallel_mode save_data_file packing
        pack_num save_prompt_completions_data save_prompt_completions_interval save_prompt_completions_dir
        reshard_mem_opt_level reshard_mode enable_reshard_optimizer tensorboard_queue_size performance_stats
        micro_batch_interleaved init_kl_coef kl_coef target horizon gamma lam cliprange cliprange_value
        vf_coef pretrain_coef scale_reward ref_mean ref_std gen_experience_kwargs enable_full_monitor
        use_eod_attn_mask_compression enable_compile_cache_dir profile_config num_samples calculate_logprobs
        custom_model_name reset_position_ids dataset_type max_epochs tokenizer_type enable_oldpolicy
        calculate_entropy packing_sample_length compile_cache_path save_checkpoint_dir save_checkpoint_steps
        """,
    "actor_config": """
        enable_alltoall offset use_eod_attn_mask_compression
        save_ckpt_format load_ckpt_format use_parallel loss_scale_value
        """,
    "actor_config.parallel_config": """
        data_parallel micro_batch_num gradient_aggregation_group vocab_emb_dp use_seq_parallel
        optimizer_shard recompute
        """,
    "actor_config.optimizer": "opt_offload",
    "actor_config.lr_schedule": "lr_warmup_init total_steps",
    "ref_config": """
        model_config ref_model_batch_size offset use_eod_attn_mask_compression parallel_config
        recompute_config sync_ref_model_mixup_alpha ref_model_mixup_alpha
        """,
    "generate_config": """
        model_config load parallel_config use_vllm hf_config_path block_size max_model_len
        max_num_batched_tokens max_num_seqs num_scheduler_steps gpu_memory_utilization offset
        trust_remote_code recompute_config use_eod_attn_mask_compression
        """,
    "generate_config.sampling_config": """
        min_tokens repetition_penalty bos_token_id detokenize min_p presence_penalty frequency_penalty seed
        logprobs
        """,
    "context": """
        mode max_call_depth max_device_memory save_graphs save_graphs_path device_id jit_config
        memory_optimize_level ascend_config mempool_block_size enable_compile_cache
        """,
}

IGNORED = frozenset(
    f"{section}.{name}" for section, names in _BY_SECTION.items() for name in names.split()
) | {"monitor_config", "profiler_config", "critic_config", "reward_config.parallel_config"}


def is_ignored(path: str) -> bool:
    """Whether a dotted key, or a section above it, is accepted and ignored."""
    while path:
        if path in IGNORED:
            return True
        path = path.rpartition(".")[0]
    return False
