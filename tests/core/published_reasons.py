"""Why a published row says less about our engines than its number suggests, in words for the table of all rows.

What is called unexplained was looked into and not found. The figures in the sentences came from set-ups changed by hand
(a head apart from the embedding, whole 16-bit logits, inputs that bitsandbytes up to 0.42 keeps).
"""

from typing import Any

FUSED = "fused LoRA, norm and loss kernels"

_AXOLOTL = "axolotl does not say whether allocated or reserved"
_ONE_BY_ONE = {
    "axolotl-0002": f"{_AXOLOTL}; 19.10 was measured with the same settings (0003): unexplained",
    "axolotl-0006": f"{_AXOLOTL}; allocated is +3 % as if peft's upcast had stayed: unexplained",
    "axolotl-0007": f"{_AXOLOTL}; allocated is -5 % as if peft's upcast had stayed: unexplained",
    "litgpt-config-hub-0037": "litgpt; adapters on all maps keep less than ours: unexplained",
}


def reason(row: dict[str, Any]) -> str:
    """Return why a row is of another engine than ours, empty where it is not."""
    if row["id"] in _ONE_BY_ONE:
        return _ONE_BY_ONE[row["id"]]
    if "litgpt" in row["framework"] or "lit-gpt" in row["framework"]:
        return _litgpt(row)
    if row["quant"] == "gptq-int4":
        return "GPTQ weights and Qwen's own model code; the metric is not said"
    if "Qwen" in row["framework"]:
        return "Qwen's own model code; the metric is not said"
    if "axolotl" in row["framework"]:
        return _AXOLOTL
    if "foak" in row.get("framework_config", ""):
        return FUSED
    if "lora-fa" in row["optimizer"] or row.get("variant") not in (None, ["rslora"], ["dora"]):
        return "another adapter"
    return ""


def _litgpt(row: dict[str, Any]) -> str:
    if row["method"] == "lora":
        return "litgpt: 16-bit adapters, whole 16-bit logits, a tied head held apart (with these -6 to -1 %)"
    if row["model"] == "phi-1_5":
        return "litgpt: alike by chance, its kept inputs against the many tensors of transformers' GELU"
    made = "litgpt: the same on 16 bit, kept inputs of 4-bit maps, a 4-bit head dequantised to fp16 and then bf16"
    if row["id"] == "litgpt-config-hub-0040":
        return f"{made} (with these -20 %): unexplained"
    return f"{made} (with these -12 to 0 %)"
