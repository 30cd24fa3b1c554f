"""What an adapter may ask for that a merge cannot give, refused by name before anything is read."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from studio.core.errors import BadInput
from studio.core.text import plain

_UNDERSTOOD = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "use_dora", "lora_bias", "target_parameters", "ensure_weight_tying", "runtime_config",
    # Only read where init_lora_weights names them, which is refused below where it changes the base.
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
}  # fmt: skip
_WHY = {
    "layer_replication": "its layers share weights of the base that would have to differ after the merge",
    "alora_invocation_tokens": "it acts only after its invocation tokens, which no weight can express",
    "arrow_config": "it routes between adapters for every token, which no weight can express",
}
_MORE_THAN_A_SUM = {
    "use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "trainable_token_indices": None,
}  # fmt: skip
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that subtract their start from the base (peft `LoraConfig.init_lora_weights`)."""


def refuse_what_cannot_merge(table: dict[str, Any]) -> None:
    """Refuse an `adapter_config.json` that asks for more than one set of weights can hold, or that we do not know.

    Raises:
        BadInput: Names the setting, says why, and what to do.
    """
    defaults = LoraConfig()
    known = {item.name for item in fields(LoraConfig)}
    for name, value in table.items():
        if name in _UNDERSTOOD or not value or (name in known and value == getattr(defaults, name)):
            continue
        shown = plain(name, one_line=True, limit=60)
        why = _WHY.get(name, "merging with it is not known to give the model that was trained")
        raise BadInput(f"the adapter uses {shown}: {why}. Serve it unmerged, with peft.")
    start = table.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise BadInput(
            f"the adapter was started with init_lora_weights={plain(start, one_line=True, limit=40)!r}, which changed "
            "the base that it belongs to. Save it again with path_initial_model_for_weight_conversion (peft), which "
            "makes a plain LoRA adapter of it, and merge that."
        )


def refuse_weighted(tables: Sequence[dict[str, Any]]) -> None:
    """Refuse adapters that cannot be weighted or added to others: what is more than a low-rank sum has no half.

    Raises:
        BadInput: Names the setting.
    """
    for table in tables:
        for name, plain_value in _MORE_THAN_A_SUM.items():
            if table.get(name) not in (plain_value, None, [], {}):
                raise BadInput(
                    f"an adapter uses {name}, which is more than a delta that is added: it cannot be weighted or "
                    "merged with others. Merge it alone, with weight 1."
                )
        if len(tables) > 1 and table.get("target_parameters"):
            raise BadInput("an adapter uses target_parameters: peft merges such an adapter only alone.")
