"""Which modules of a loaded model a recipe's targets, layers and patterns mean; what names nothing is refused."""

import difflib
import re
from typing import Any, cast

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from studio.core.adapter_text import layers_of, modules_of, pattern_of
from studio.core.errors import JobFailed
from studio.core.recipe import ALL_LINEAR, AdapterSection
from studio.core.text import plain


def target_modules(base: nn.Module, wanted: str | tuple[str, ...], *, by_name: bool) -> str | list[str]:
    """Return what peft calls `target_modules`.

    Args:
        base: The loaded model.
        wanted: The recipe's targets.
        by_name: Spell `all-linear` out, as peft wants it where layers are chosen.

    Raises:
        JobFailed: `unknown_targets` when a name is no module of the model.
    """
    linear = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if _is_linear(module)})
    if wanted == ALL_LINEAR:
        head = cast(Any, base).get_output_embeddings() if by_name else None
        heads = {
            name.rpartition(".")[2] for name, module in base.named_modules() if head is not None and module is head
        }
        return [name for name in linear if name not in heads] if by_name else ALL_LINEAR
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found = {name for name, _ in base.named_modules()}
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


def whole_modules(base: nn.Module, text: str) -> list[str] | None:
    """Return the names of the modules that are trained whole, or None for none.

    Raises:
        JobFailed: `unknown_targets` when a name is no module of the model, or one whose weights are in 4 bits.
    """
    names = modules_of(text)
    modules = dict(base.named_modules())
    for name in names:
        found = [module for full, module in modules.items() if full == name or full.endswith(f".{name}")]
        weights = [parameter for module in found for parameter in module.parameters()]
        if weights and all(parameter.is_floating_point() for parameter in weights):
            continue
        held = "whose weights are held in 4 bits" if weights else "which this model does not have"
        raise JobFailed(
            "unknown_targets",
            f"adapter.modules_to_save names {name!r}, {held}",
            "use the last part of a module's name, such as lm_head or embed_tokens, or method lora for any layer",
        )
    return list(names) or None


def adapted_layers(base: nn.Module, text: str) -> list[int] | None:
    """Return the layer numbers to adapt, or None for all of them.

    Raises:
        JobFailed: `unknown_targets` when the model has fewer layers.
    """
    wanted = layers_of(text)
    if not wanted:
        return None
    count = int(cast(Any, base).config.get_text_config().num_hidden_layers)
    if wanted[-1] >= count:
        raise JobFailed(
            "unknown_targets",
            f"adapter.layers names layer {wanted[-1]}; this model has {count}, numbered from 0",
            f"use numbers from 0 to {count - 1}, or leave adapter.layers empty for all",
        )
    return list(wanted)


def check_patterns(model: nn.Module, section: AdapterSection) -> None:
    """Refuse a pattern that names no adapted module: peft would pass over it in silence.

    Raises:
        JobFailed: `unknown_targets`.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for field, text in (("rank_pattern", section.rank_pattern), ("alpha_pattern", section.alpha_pattern)):
        for name in pattern_of(text):
            if not any(re.match(rf"(.*\.)?({name})$", module) for module in adapted):
                known = ", ".join(sorted({module.rpartition(".")[2] for module in adapted}))
                raise JobFailed(
                    "unknown_targets",
                    f"adapter.{field} names {plain(name, one_line=True)!r}, which is no adapted module of this model",
                    f"use some of: {known}; or a longer end of a module's path, such as layers.0.self_attn.q_proj",
                )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))
