"""Why settings of other tools have no place in a recipe: those that the tools share, by their names."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """Why settings of these names are not carried.

    Attributes:
        why: The reason.
        names: Names with spaces between; one that ends in `*` stands for all that begin so.
        matters: Whether the training differs without them.
    """

    why: str
    names: str
    matters: bool = False

    def is_of(self, name: str) -> bool:
        """Return whether it is the reason for a setting of this name."""
        return any(name.startswith(each[:-1]) if each.endswith("*") else name == each for each in self.names.split())


REASONS = (
    Reason(
        "a run keeps its own log and pictures, and sends figures to trackers that train.track names",
        "wandb* mlflow_* use_mlflow comet_* use_comet swanlab_* use_swanlab trackio_* use_tensorboard report_to "
        "logging_* log_* run_name project plot_loss disable_tqdm include_* print_param_status profiler_steps* "
        "use_otel* otel_* gc_steps gradio_* include_tokens_per_second logging_first_step debug strict verbose "
        "use_ray ray_* mlflow",
    ),
    Reason(
        "runs and their outputs lie in a folder of their own (--runs-dir)",
        "output_dir overwrite_output_dir dataset_prepared_path tokenized_path cache_dir overwrite_cache media_dir "
        "save_safetensors save_only_model save_on_each_node save_first_step tokenizer_save_jinja_files "
        "logging_dir",
    ),
    Reason(
        "nothing is uploaded",
        "push_* hub_* save_to_hub hf_use_auth_token hf_hub_token ms_hub_token om_hub_token token",
    ),
    Reason(
        "one card trains here: with N cards a step there sees N times as many rows; train.accumulation makes up for it",
        "deepspeed fsdp* local_rank world_size dp_* tensor_parallel* context_parallel* sequence_parallel* "
        "parallelism_config accelerator_config n_gpu expert_parallel* num_processes heads_k_stride ring_attn_func",
        matters=True,
    ),
    Reason(
        "there is one process and one card",
        "ddp* dataloader_drop_last dataloader_in_order ray_run_name ray_storage_path resources_per_worker "
        "placement_strategy use_hyper_parallel use_cpu enable_jit_checkpoint full_determinism skip_memory_metrics",
    ),
    Reason(
        "all cores are used as far as they help",
        "preprocessing_* dataset_num_proc dataset_processes dataset_keep_in_memory dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers streaming buffer_size "
        "num_proc low_cpu_mem_usage device device_map max_memory gpu_memory_limit lora_on_cpu use_fast_tokenizer "
        "keep_in_memory",
    ),
    Reason(
        "kernels and forms of that tool: what they compute is the same, and this loop saves the memory in its own way",
        "unsloth_* use_scattermoe experts_implementation fused_attn_kernel moe_* use_unsloth use_unsloth_gc "
        "liger_* use_liger_kernel enable_liger_kernel cut_cross_entropy lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel lora_embedding_kernel flash_attn_* use_kernels use_v1_kernels flash_optimum "
        "pad_to_sequence_len pad_to_multiple_of padding_free batch_flattening eval_sample_packing eval_packing "
        "multipack_real_batches sample_packing_* packing_strategy use_reentrant_gc gradient_checkpointing_kwargs "
        "activation_checkpointing_kwargs torch_compile_backend torch_compile_mode tf32 upcast_* use_cache "
        "use_kv_cache flex_attn_compile_kwargs torch_empty_cache_steps average_tokens_across_devices "
        "remove_unused_columns fast_inference gpu_memory_utilization max_lora_rank float8_kv_cache "
        "embeddings_skip_upcast gemma4_hybrid_attn_impl peft_autocast_adapter_dtype runtime_config "
        "unsloth_tiled_mlp use_exact_model_name bf16_full_eval fp16_full_eval bnb_4bit_compute_dtype "
        "bnb_4bit_quant_storage llm_int8_* tiled_mlp* loss_type_impl quantization_device_map scaling_softmax "
        "qlora_sharded_model_loading",
    ),
    Reason(
        "the end and the padding of a row follow from the model's tokenizer and chat template",
        "special_tokens tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy model_type tokenizer "
        "eot_tokens eos_token pad_token processing_class processor_type base_model_config cls_model_config "
        "ignore_pad_token_for_loss tokenizer_use_mistral_common padding_side processor max_prompt_length "
        "max_prompt_len truncation_mode max_completion_length is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model task_type inference_mode base_model_name_or_path "
        "fan_in_fan_out label_names length_column_name label_pad_token_id padding_value lora_fan_in_fan_out "
        "skip_prepare_dataset dataset_kwargs data_collator add_eos_token add_bos_token",
    ),
    Reason(
        "the vocabulary is never enlarged here: new tokens stay what the tokenizer makes of them",
        "tokens add_tokens add_special_tokens new_special_tokens_config added_tokens_overrides resize_vocab "
        "resize_token_embeddings_to_32x init_special_tokens shrink_embeddings mean_resizing_embeddings "
        "fix_untrained_tokens trainable_token_indices peft_trainable_token_indices",
        matters=True,
    ),
    Reason(
        "answers of held-out rows are shown with eval.samples; what a benchmark says, `lora-studio audit` does",
        "eval_table_size eval_max_new_tokens do_bench_eval bench_* do_causal_lm_eval eval_causal_lm_metrics "
        "predict_with_generate compute_accuracy per_device_eval_batch_size eval_batch_size "
        "eval_accumulation_steps eval_on_start eval_delay eval_on_each_dataset do_train do_eval do_predict "
        "generate_during_eval compute_metrics prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "batch_eval_metrics generation_* generate_samples num_generation_samples lm_eval_*",
    ),
    Reason(
        "every run ends with its last step; runs keep their newest checkpoints, and the curve shows where it was best",
        "early_stopping_* load_best_model_at_end metric_for_best_model greater_is_better loss_watchdog_* callbacks",
        matters=True,
    ),
    Reason(
        "a run is resumed by name: lora-studio runs resume RUN",
        "resume_from_checkpoint auto_resume_from_checkpoints ignore_data_skip restore_callback_states_from_checkpoint",
    ),
    Reason(
        "the adapter starts anew: training on from an adapter of another tool is not offered",
        "lora_model_dir adapter_name_or_path adapter_folder peft_config_path",
        matters=True,
    ),
    Reason(
        "rows are shuffled by train.seed",
        "shuffle_dataset shuffle_merged_datasets data_seed disable_shuffling",
    ),
    Reason(
        "no noise is added to embeddings, labels are not smoothed, and no router loss is added",
        "neftune_noise_alpha noisy_embedding_alpha label_smoothing_factor moe_aux_loss_coef router_aux_loss_coef",
        matters=True,
    ),
    Reason(
        "one learning rate for the adapter, with adapter.lora_plus_ratio and adapter.whole_rate_ratio beside it",
        "embedding_lr embedding_lr_scale lr_groups embedding_learning_rate loraplus_lr_embedding optim_target_modules",
        matters=True,
    ),
    Reason(
        "the schedules are cosine, linear and constant, each after a warm-up, and fall to zero",
        "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor",
        matters=True,
    ),
    Reason(
        "AdamW with the usual betas is the optimizer here",
        "optim_args torchdistx_path adam_beta3 adam_epsilon2",
        matters=True,
    ),
    Reason(
        "the base's config is taken as it is",
        "overrides_of_model_* model_config rope_scaling model_kwargs shift_attn s2_attention use_pose pose_* "
        "mixture_of_depths use_llama_pro freeze_vision_tower freeze_multi_modal_projector freeze_language_model "
        "model_init_kwargs unfrozen_parameters num_labels",
        matters=True,
    ),
    Reason(
        "text alone is trained",
        "image_* video_* crop_to_patches use_audio_in_video audio_* finetune_vision_layers image_size max_pixels",
        matters=True,
    ),
    Reason(
        "the reference of dpo is the model with its adapter switched off",
        "ref_model* precompute_ref_log_probs reference_free force_use_ref_model sync_ref_model model_adapter_name "
        "ref_adapter_name model_ref disable_dropout",
    ),
    Reason(
        "no such term is in the loss here",
        "pref_ftx pref_bco_weight rpo_alpha ld_alpha dpo_use_weighting simpo_gamma cpo_alpha use_dft_loss kto_* "
        "f_divergence_type f_alpha_divergence_coef loss_weights dpo_norm_loss trl",
        matters=True,
    ),
    Reason(
        "model.stream and train.offload_checkpoints say what waits in main memory: layers of the base, or checkpoints",
        "use_kt kt_* chunk_size cpu_infer offload_folder offload_*",
        matters=True,
    ),
    Reason(
        "the base is trained on from its weights, and its modules are named by adapter.targets",
        "train_from_scratch finetune_language_layers finetune_attention_modules finetune_mlp_modules "
        "llama4_linearized_experts base_model_revision model_code_revision",
        matters=True,
    ),
    Reason(
        "no such form of adapter is offered",
        "peft_layer_replication layer_replication layers_pattern peft_layers_pattern target_parameters "
        "lora_target_parameters exclude_modules lora_bias megatron_config eva_config corda_config qalora_* "
        "use_qalora alora_* relora* lisa_* pissa_iter pissa_convert ensure_weight_tying peft_ensure_weight_tying",
        matters=True,
    ),
    Reason(
        "the rows of a step are counted by train.micro_batch and train.accumulation",
        "auto_find_batch_size",
    ),
    Reason(
        "merge and export are verbs of their own: lora-studio merge, lora-studio export",
        "export_* merge_* infer_*",
    ),
)
