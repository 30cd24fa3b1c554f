"""Mixtures of experts."""

from tests.fakes.families.checkpoint import DEEPSEEK, DELTA_NET, EXPERTS, HEAD_16, MLA, Checkpoint, next_tokens, text

NOT_IN_MXFP4 = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]

EXPERT_MODELS: dict[str, Checkpoint] = {
    "mixtral": text("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": text(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
        **EXPERTS,
    ),
    "qwen3_moe": text(
        "qwen3_moe", "Qwen3MoeForCausalLM", moe_intermediate_size=64, norm_topk_prob=True, **HEAD_16, **EXPERTS
    ),
    "olmoe": text("olmoe", "OlmoeForCausalLM", **EXPERTS),
    "granitemoe": text("granitemoe", "GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "phimoe": text("phimoe", "PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": text(
        "gpt_oss",
        "GptOssForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"],
        **HEAD_16,
    ),
    "gpt_oss_mxfp4": text(
        "gpt_oss",
        "GptOssForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"],
        mxfp4=True,
        hub={"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": NOT_IN_MXFP4}},
        **HEAD_16,
    ),
    "deepseek_v2": text("deepseek_v2", "DeepseekV2ForCausalLM", **{**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": text(
        "deepseek_v3", "DeepseekV3ForCausalLM", unread=next_tokens("model.layers.", "2", "1"), **DEEPSEEK
    ),
    "glm4_moe": text(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        use_qk_norm=True,
        unread=next_tokens("model.layers.", "2", "1"),
        **HEAD_16,
    ),
    "glm4_moe_lite": text(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        unread=next_tokens("model.layers.", "2", "1"),
        **MLA,
    ),
    "ernie4_5_moe": text(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=64,
        moe_num_shared_experts=1,
    ),
    "minimax": text(
        "minimax",
        "MiniMaxForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=128,
        layer_types=["linear_attention", "full_attention"],
        **HEAD_16,
    ),
    "minimax_m2": text("minimax_m2", "MiniMaxM2ForCausalLM", num_local_experts=4, num_experts_per_tok=2, **HEAD_16),
    "lfm2_moe": text(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        num_hidden_layers=3,
        num_dense_layers=1,
        moe_intermediate_size=64,
        layer_types=["conv", "conv", "full_attention"],
        **EXPERTS,
    ),
    "qwen3_next": text(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        unread={"mtp.layers.0.": "model.layers.1.", "mtp.norm.weight": "model.norm.weight"},
        **DELTA_NET,
        **EXPERTS,
    ),
}
