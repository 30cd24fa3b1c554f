"""What the table of families does not hold: cells that are open, and trainings that are refused."""

_EXPERTS = "peft adapts the fused experts of its own accord, which are in 4 bits"
_MEASURE = "the estimate is off by {}"

REFUSED: dict[tuple[str, str], str] = {
    ("falcon", "qlora"): "whose linear layers transformers does not hand to bitsandbytes: take method lora",
}
"""Trainings that a library cannot do, at most six: family and method, and the words in which a start is refused."""

OPEN: dict[str, dict[str, str]] = {
    "nemotron": {"measure": _MEASURE.format("+2.5 %")},
    "mixtral": {"qlora": _EXPERTS},
    "qwen3_moe": {"qlora": _EXPERTS},
    "olmoe": {"qlora": _EXPERTS},
    "deepseek_v2": {"qlora": _EXPERTS, "measure": _MEASURE.format("-11 %")},
    "deepseek_v3": {"qlora": _EXPERTS, "measure": _MEASURE.format("-11 %")},
    "glm4_moe": {"qlora": _EXPERTS, "measure": _MEASURE.format("-8 %")},
    "glm4_moe_lite": {"qlora": _EXPERTS, "measure": _MEASURE.format("-11 %")},
    "ernie4_5_moe": {"qlora": _EXPERTS, "measure": _MEASURE.format("-9 %")},
    "minimax": {"qlora": _EXPERTS, "measure": _MEASURE.format("-25 %: lightning attention")},
    "minimax_m2": {"qlora": _EXPERTS, "measure": _MEASURE.format("-24 %")},
    "qwen3_next": {"qlora": _EXPERTS, "measure": _MEASURE.format("-21 %")},
    "gemma3n": {"plan": "the folder's plan is 16 % higher", "measure": _MEASURE.format("-27 %")},
    "gemma4": {"plan": "the folder's plan is 16 % higher"},
    "qwen3_vl_moe": {"measure": _MEASURE.format("+9 %")},
    "llama4": {"measure": _MEASURE.format("-36 %")},
}
"""Cells that do not hold yet: family, check, reason. Each mark is strict."""
