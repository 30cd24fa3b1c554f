"""The peft adapter: attached to a loaded base, and saved as the standard PEFT folder that anyone can load."""

import difflib
import shutil
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from torch import nn

from studio.core.errors import JobFailed
from studio.core.recipe import ALL_LINEAR, AdapterSection
from studio.jobs.train.guards import check_adapter
from studio.runs.atomic import publish_folder


def attach_adapter(base: nn.Module, section: AdapterSection, *, grad_checkpointing: bool) -> PeftModel:
    """Return the base with trainable low-rank pairs; adapter weights are fp32 whatever the base is held in.

    Nothing else is touched: embeddings, head and norms keep the base's format (peft's `prepare_model_for_kbit_training`
    would make them fp32).

    Raises:
        JobFailed: `unknown_targets` when a named target module does not exist in the model.
    """
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        use_dora=section.dora,
        target_modules=_targets(base, section.targets),
        task_type=TaskType.CAUSAL_LM,
    )
    model: PeftModel = get_peft_model(base, config, autocast_adapter_dtype=True)
    if grad_checkpointing:
        # Non-reentrant: reentrant checkpoints train nothing when no input requires a gradient.
        causal: Any = model.get_base_model()
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        causal.config.use_cache = False
    return model


def _targets(base: nn.Module, wanted: str | tuple[str, ...]) -> str | list[str]:
    if wanted == ALL_LINEAR:
        return ALL_LINEAR
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found = {name for name, _ in base.named_modules()}
    linear = sorted({n.rpartition(".")[2] for n, module in base.named_modules() if isinstance(module, nn.Linear)})
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in found):
            near = difflib.get_close_matches(name, linear, n=1)
            raise JobFailed(
                "unknown_targets",
                f"adapter.targets names {name!r}, which this model does not have"
                + (f"; perhaps {near[0]}" if near else ""),
                f'use "{ALL_LINEAR}" or some of: {", ".join(linear)}',
            )
    return names


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path) -> int:
    """Write the PEFT folder with the tokenizer and its chat template; it appears whole or not at all.

    Returns:
        Bytes on disk.

    Raises:
        JobFailed: The adapter is broken or dead (see `check_adapter`); nothing is written then.
        OSError: The disk is full or not writable.
    """
    check_adapter(get_peft_model_state_dict(model))
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        # peft's "auto" would ask the hub whether the base's vocabulary was resized; ours never is.
        model.save_pretrained(str(aside), safe_serialization=True, save_embedding_layers=False)
        tokenizer.save_pretrained(str(aside))
        publish_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
