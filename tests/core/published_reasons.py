"""Why a published row says less about our engines than its number suggests, in words for the table of all rows.

What is called unexplained was looked into and not found. The figures in the sentences came from set-ups changed by hand
(a head apart from the embedding, whole 16-bit logits, kept inputs).
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
    if "resource-tables" in row["id"]:
        return "litgpt: bitsandbytes 0.41 keeps the input of every 4-bit map (with these -7 to -6 %)"
    return "litgpt: on 4 bits it takes 16 to 29 % more than kept inputs and whole logits make: unexplained"
