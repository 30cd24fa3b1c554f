"""The peft adapter: attached to a loaded base, and saved as the standard PEFT folder that anyone can load."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn

from studio.core.adapter_text import pattern_of
from studio.core.recipe import AdapterSection
from studio.jobs.base.weights.pissa import difference
from studio.jobs.train.guards import check_adapter
from studio.jobs.train.start import Pair, adapter_weights, doubled_config
from studio.jobs.train.targets import adapted_layers, check_patterns, target_modules, whole_modules
from studio.runs.atomic import publish_folder

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def attach_adapter(base: nn.Module, section: AdapterSection, *, grad_checkpointing: bool) -> PeftModel:
    """Return the base with trainable low-rank pairs; adapter weights are fp32 whatever the base is held in.

    Nothing else is touched: embeddings, head and norms keep the base's format (peft's `prepare_model_for_kbit_training`
    would make them fp32). Starts that need the base's weights are `studio.jobs.train.start`'s business.

    Raises:
        JobFailed: `unknown_targets` when a named target module or layer does not exist in the model.
    """
    layers = adapted_layers(base, section.layers)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        use_dora=section.dora,
        init_lora_weights="gaussian" if section.init == "gaussian" else True,
        target_modules=target_modules(base, section.targets, by_name=layers is not None),
        layers_to_transform=layers,
        rank_pattern={name: int(rank) for name, rank in pattern_of(section.rank_pattern).items()},
        alpha_pattern=pattern_of(section.alpha_pattern),
        modules_to_save=whole_modules(base, section.modules_to_save),
        task_type=TaskType.CAUSAL_LM,
    )
    model: PeftModel = get_peft_model(base, config, autocast_adapter_dtype=True)
    check_patterns(model.get_base_model(), section)
    _widen_whole_modules(model)
    if grad_checkpointing:
        _checkpoint_layers(model.get_base_model())
    return model


def _widen_whole_modules(model: PeftModel) -> None:
    """Hold modules that are trained whole in fp32, as the adapter is; what they return keeps the base's format.

    In 16 bits most steps of the optimizer would be rounded away. peft casts only its own layers.
    """
    for wrapper in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
        for trained in wrapper.modules_to_save.values():
            dtype = next(trained.parameters()).dtype
            trained.float()
            if dtype != torch.float32:
                trained.register_forward_hook(lambda module, given, made, dtype=dtype: made.to(dtype))


def _checkpoint_layers(causal: Any) -> None:
    # Non-reentrant: reentrant checkpoints train nothing when no input requires a gradient.
    enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers lets the embeddings' output require a gradient, for the reentrant ones' sake: that gradient is as
    # large as a checkpoint, the first layer works for it, and nobody reads it.
    causal.disable_input_require_grads()
    causal.config.use_cache = False


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path, start: Pair | None = None) -> int:
    """Write the PEFT folder with the tokenizer and its chat template; it appears whole or not at all.

    Args:
        model: The trained model.
        tokenizer: Saved beside the adapter.
        folder: Where it appears.
        start: What PiSSA took out of the base; what is saved is then the difference to it, for the ordinary base.

    Returns:
        Bytes on disk.

    Raises:
        JobFailed: The adapter is broken or dead (see `check_adapter`); nothing is written then.
        Exception: The disk is full or not writable, in whichever class peft, safetensors or tokenizers say it (see
            `studio.runs.disk.refuses`); nothing half-made is left.
    """
    # On the host: the card may have no room for the comparisons, and a whole training would be lost over them.
    check_adapter({name: weight.detach().to("cpu") for name, weight in adapter_weights(model).items()})
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        # Not "auto": see adapter_weights.
        model.save_pretrained(str(aside), safe_serialization=True, save_embedding_layers=False)
        if start:
            _rewrite_as_difference(model, aside, start)
        # safetensors writes for the owner alone, which a copy of the folder for others would keep.
        shutil.copymode(aside / _CONFIG, aside / _WEIGHTS)
        tokenizer.save_pretrained(str(aside))
        publish_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _rewrite_as_difference(model: PeftModel, folder: Path, start: Pair) -> None:
    weights = {name: tensor.detach().cpu() for name, tensor in adapter_weights(model).items()}
    save_file(difference(weights, start), folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    config.update(doubled_config(model.active_peft_config))
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
