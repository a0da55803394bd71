"""What transformers and TRL call our fields, for the message about an unknown key."""

# Names that transformers and TRL have for fields of ours. Those that look alike are left out: `field_of` finds them.
OTHER_NAMES = dict(
    model_name_or_path="model", sft_model_path="model", model_revision="model=id@revision",
    dataset_name="data", dataset_test_split="eval_split", max_prompt_length="max_query_tokens",
    max_new_tokens="response_length", max_completion_length="response_length", ref_model="reference",
    learning_rate="lr", warmup_ratio="warmup_steps = ratio x updates", bf16="dtype=bfloat16",
    per_device_train_batch_size="micro_batch_size, rows per process and pass (batch_size counts all)",
    gradient_accumulation_steps="batch_size, which counts all micro-batches and processes",
    num_train_epochs="episodes = epochs x rows", max_steps="episodes = steps x batch_size",
    num_generations="group_size", num_iterations="n_epochs", epsilon="cliprange", beta="kl_coef",
    missing_eos_penalty="missing_eos_score, which replaces the score", completion_only_loss="loss_on=response",
    eval_steps="eval_every", save_steps="save_every", save_total_limit="keep_checkpoints",
    report_to="log_to", resume_from_checkpoint="out_dir, from which the same command goes on",
)  # fmt: skip
