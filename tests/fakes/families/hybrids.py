"""Hybrids: recurrent layers, convolutions."""

from tests.fakes.families.checkpoint import MAMBA, TOKENS, Checkpoint, text

HYBRIDS: dict[str, Checkpoint] = {
    "lfm2": text(
        "lfm2",
        "Lfm2ForCausalLM",
        intermediate_size=192,
        block_multiple_of=64,
        layer_types=["conv", "full_attention"],
        hub={"intermediate_size": None, "block_ff_dim": 192, "layer_types": None, "full_attn_idxs": [1]},
    ),
    "granite4_hybrid": text(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
        **MAMBA,
    ),
    "nemotron_h": text(
        "nemotron_h",
        "NemotronHForCausalLM",
        num_hidden_layers=None,
        layers_block_type=["mamba", "mlp", "attention", "moe"],
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=2,
        chunk_size=64,
        n_routed_experts=4,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        hub={"layers_block_type": None, "hybrid_override_pattern": "M-*E", "num_hidden_layers": 4},
    ),
    "falcon_h1": text("falcon_h1", "FalconH1ForCausalLM", **{**MAMBA, "mamba_d_ssm": 128, "mamba_expand": 2}),
    "bamba": text("bamba", "BambaForCausalLM", attn_layer_indices=[1], **MAMBA),
    "mamba2": Checkpoint(
        "mamba2",
        "Mamba2ForCausalLM",
        {
            **TOKENS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 64,
        },
    ),
}
