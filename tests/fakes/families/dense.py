"""Dense decoders."""

from tests.fakes.families.checkpoint import HEAD_16, TOKENS, Checkpoint, text

DENSE: dict[str, Checkpoint] = {
    "llama": text("llama", "LlamaForCausalLM"),
    "mistral": text("mistral", "MistralForCausalLM", sliding_window=None, **HEAD_16),
    "qwen2": text("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": text("qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True, **HEAD_16),
    "smollm3": text("smollm3", "SmolLM3ForCausalLM", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]),
    "phi": text("phi", "PhiForCausalLM", num_key_value_heads=4),
    "phi3": text("phi3", "Phi3ForCausalLM", sliding_window=2047),
    "gemma": text("gemma", "GemmaForCausalLM", num_key_value_heads=1, **HEAD_16),
    "gemma2": text("gemma2", "Gemma2ForCausalLM", query_pre_attn_scalar=16, **HEAD_16),
    "gemma3_text": text(
        "gemma3_text",
        "Gemma3ForCausalLM",
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
        **HEAD_16,
    ),
    "olmo": text("olmo", "OlmoForCausalLM", num_key_value_heads=4),
    "olmo2": text("olmo2", "Olmo2ForCausalLM"),
    "olmo3": text("olmo3", "Olmo3ForCausalLM", layer_types=["sliding_attention", "full_attention"]),
    "granite": text(
        "granite",
        "GraniteForCausalLM",
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
    ),
    "stablelm": text("stablelm", "StableLmForCausalLM", use_qkv_bias=True, partial_rotary_factor=0.25),
    "gpt_neox": text("gpt_neox", "GPTNeoXForCausalLM", rotary_pct=0.25),
    "falcon": Checkpoint(
        "falcon",
        "FalconForCausalLM",
        {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": False},
    ),
    "starcoder2": text("starcoder2", "Starcoder2ForCausalLM", sliding_window=512),
    "cohere": text("cohere", "CohereForCausalLM", use_qk_norm=True),
    "cohere2": text(
        "cohere2", "Cohere2ForCausalLM", sliding_window=512, layer_types=["sliding_attention", "full_attention"]
    ),
    "glm": text("glm", "GlmForCausalLM", **HEAD_16),
    "glm4": text("glm4", "Glm4ForCausalLM", **HEAD_16),
    "exaone4": text(
        "exaone4", "Exaone4ForCausalLM", sliding_window=512, layer_types=["sliding_attention", "full_attention"]
    ),
    "nemotron": text("nemotron", "NemotronForCausalLM"),
    "seed_oss": text("seed_oss", "SeedOssForCausalLM", attention_bias=True, **HEAD_16),
    "apertus": text("apertus", "ApertusForCausalLM"),
    "ernie4_5": text("ernie4_5", "Ernie4_5ForCausalLM", **HEAD_16),
    "helium": text("helium", "HeliumForCausalLM", **HEAD_16),
    "hunyuan_v1_dense": text("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", **HEAD_16),
    "arcee": text("arcee", "ArceeForCausalLM"),
    "ministral3": text("ministral3", "Ministral3ForCausalLM", **HEAD_16),
}
