"""The peft adapter: which modules get one, how it is attached to a loaded base, and how it is saved as a PEFT folder.

A recipe whose targets, layers or patterns name nothing in the model is refused.
"""

import difflib
import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from studio.core.direct_weights import not_adapted
from studio.core.errors import JobFailed
from studio.core.experts import is_of_experts
from studio.core.recipe import AdapterSection, Recompute
from studio.core.text import plain
from studio.core.value_kinds import ALL_LINEAR
from studio.jobs.base.experts.forms import experts_in
from studio.jobs.base.experts.pairs import routers, stacks_named, take_over_pairs
from studio.jobs.base.load import family_of
from studio.jobs.base.model_class import class_of, is_plain, odd_linears
from studio.jobs.base.weights.pissa import difference
from studio.jobs.train.adapted_linear import join_products
from studio.jobs.train.adapted_linear import keep_dequantised as keep_matrices
from studio.jobs.train.fused_forms import fuse_forms
from studio.jobs.train.guards import check_adapter
from studio.jobs.train.randomness import draws
from studio.jobs.train.served import check_folder
from studio.jobs.train.tiles import tile_mlps
from studio.runs.atomic import publish_folder
from studio.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

AdapterWeights = dict[str, Tensor]
"""An adapter's tensors by their names in a PEFT file."""


def attach_adapter(
    base: nn.Module, section: AdapterSection, *, recompute: Recompute, keep_dequantised: bool = False
) -> PeftModel:
    """Return the base with trainable low-rank pairs A and B; they are fp32, whatever the base's number format is.

    Embeddings, head and norms keep the base's format (peft's `prepare_model_for_kbit_training` would make them fp32).
    Initialisations that read the base's weights (PiSSA, LoftQ) come later, in `trainable_model`.

    Args:
        base: The loaded model, frozen. peft changes it in place.
        section: The recipe's `[adapter]`.
        recompute: Which decoder layers keep only their input and are computed again in the backward pass.
        keep_dequantised: Whether these keep their dequantised weights from then until they have gone backward.

    Raises:
        JobFailed: `unknown_targets` when a module, layer or pattern that the recipe names is not in the model.
    """
    layers = adapted_layers(base, section.layers)
    targets = (section.targets,) if isinstance(section.targets, str) else section.targets
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        use_dora=section.dora,
        init_lora_weights="gaussian" if section.init == "gaussian" else True,
        target_modules=target_modules(base, section.targets, by_name=layers is not None),
        target_parameters=stacks_named(base, targets, layers),
        layers_to_transform=layers,
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        modules_to_save=whole_modules(base, section.modules_to_save),
        exclude_modules=kept_out(base),
        task_type=TaskType.CAUSAL_LM,
        auto_mapping=_base_class(base),
    )
    model: PeftModel = join_products(take_over_pairs(get_peft_model(base, config, autocast_adapter_dtype=True)))
    check_patterns(model.get_base_model(), section)
    _spell_out_patterns(model)
    _widen_whole_modules(model)
    fuse_forms(model)
    if recompute != "none":
        _checkpoint_layers(model.get_base_model())
    if isinstance(recompute, int):
        _checkpoint_first(model.get_base_model(), recompute)
    for layer in _layers_again(model) if keep_dequantised else ():
        keep_matrices(layer)
    tile_mlps(model.get_base_model())
    return model


def _widen_whole_modules(model: PeftModel) -> None:
    """Turn modules that are trained whole into fp32, as the adapter is, and cast their output to the base's format.

    In 16 bits most steps of the optimizer would be rounded away. peft makes only its own layers fp32.
    """
    for wrapper in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
        for trained in wrapper.modules_to_save.values():
            dtype = next(trained.parameters()).dtype
            trained.float()
            if dtype != torch.float32:
                trained.register_forward_hook(lambda module, given, made, dtype=dtype: made.to(dtype))


def _checkpoint_layers(causal: Any) -> None:
    # Non-reentrant, because reentrant checkpoints train nothing when no input requires a gradient, and the embeddings
    # of a frozen base give none.
    enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
    # Where nothing is drawn, there is no random state to save for each layer, and to set again when it is recomputed.
    enable({"use_reentrant": False, "preserve_rng_state": draws(causal)})
    # For reentrant checkpoints transformers lets the embeddings' output require a gradient. That gradient is as large
    # as a checkpoint, the first layer has to compute it, and nobody reads it.
    causal.disable_input_require_grads()
    # transformers would switch the cache off in each checkpointed layer, with a warning (modeling_layers.py).
    causal.config.use_cache = False


def _checkpoint_first(causal: Any, count: int) -> None:
    """Let only so many layers be computed again: the first ones that the backward reaches.

    The backward reaches them last, when the layers behind them have let go of what they kept. The last layers would
    make their activations a second time while all that the others keep is still there. A model whose own code
    checkpoints all of its layers or none is left as it is.
    """
    layers = [module for module in causal.modules() if isinstance(module, GradientCheckpointingLayer)]
    trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in layers]
    embedding = any(weight.requires_grad for weight in causal.get_input_embeddings().parameters())
    first = 0 if embedding or True not in trained else trained.index(True)
    for layer in layers[first + count :]:
        layer.gradient_checkpointing = False


def checkpointed(model: nn.Module) -> tuple[int, int]:
    """Return how many decoder layers are computed again in the backward pass, and how many there are.

    Where the model's own code decides, no layer is counted.
    """
    return len(_layers_again(model)), sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


def _layers_again(model: nn.Module) -> list[nn.Module]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if layer.gradient_checkpointing]


def adapter_weights(model: PeftModel) -> AdapterWeights:
    """Return the adapter's tensors, without the embeddings.

    peft's default, `save_embedding_layers="auto"`, would ask the hub whether the base's vocabulary was resized (ours
    never is), and would add the embeddings where the head is adapted.
    """
    weights: AdapterWeights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path, initial: AdapterWeights | None = None) -> int:
    """Write the PEFT folder with the tokenizer and its chat template; it appears whole or not at all.

    Args:
        model: The trained model.
        tokenizer: Saved beside the adapter.
        folder: Where it appears.
        initial: The adapter that PiSSA subtracted from the base. The difference to it is saved, so that the result
            belongs on the ordinary base.

    Returns:
        Bytes on disk.

    Raises:
        JobFailed: The adapter holds NaN or changes nothing (see `check_adapter`), or a server would not find its
            tensors in the base; nothing is written then.
        Exception: The disk is full or not writable. peft, safetensors and tokenizers raise different classes for it
            (see `studio.runs.disk.refuses`); nothing half-made is left.
    """
    # Checked on the host: the card may have no room for the comparisons, which would cost the whole training.
    check_adapter({name: weight.detach().to("cpu") for name, weight in adapter_weights(model).items()})
    scratch = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        # False for the reasons given in adapter_weights.
        model.save_pretrained(str(scratch), safe_serialization=True, save_embedding_layers=False)
        if initial:
            _rewrite_as_difference(model, scratch, initial)
        check_folder(model, scratch)
        # safetensors makes the file readable for its owner alone, and a copy of the folder for others would stay so.
        shutil.copymode(scratch / ADAPTER_CONFIG, scratch / ADAPTER_WEIGHTS)
        tokenizer.save_pretrained(str(scratch))
        publish_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _rewrite_as_difference(model: PeftModel, folder: Path, initial: AdapterWeights) -> None:
    weights = {name: tensor.detach().cpu() for name, tensor in adapter_weights(model).items()}
    save_file(difference(weights, initial), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config.update(_doubled_config(model.active_peft_config))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _doubled_config(config: LoraConfig) -> dict[str, Any]:
    """Return the values of a PEFT config that describe `pissa.difference`: twice the rank at the same scaling."""
    # Scaling is alpha / rank, with rsLoRA alpha / sqrt(rank): twice the rank needs 2 or sqrt(2) times the alpha.
    factor = 2**0.5 if config.use_rslora else 2
    alphas = {name: alpha * factor for name, alpha in config.alpha_pattern.items()}
    ranks = {name: rank * 2 for name, rank in config.rank_pattern.items()}
    return {"r": config.r * 2, "lora_alpha": config.lora_alpha * factor, "rank_pattern": ranks, "alpha_pattern": alphas}


def target_modules(base: nn.Module, wanted: str | tuple[str, ...], *, by_name: bool) -> str | list[str]:
    """Return the value for peft's `target_modules`: `all-linear`, or the last parts of module names; not the experts.

    Args:
        base: The loaded model.
        wanted: The recipe's targets.
        by_name: Whether `all-linear` becomes a list of names without the head's. peft needs names where only some
            layers are adapted. The list is also made where an adapter on some of the linear maps would be dead, or
            where towers have maps of the same names.

    Raises:
        JobFailed: `unknown_targets` when a name is no module of the model; `dead_targets` when its weight is read past
            the module, so that an adapter would have no effect.
    """
    dead = not_adapted(family_of(base))
    every = {_short(name) for name, module in _language_modules(base).items() if is_plain(module)}
    linear = sorted(every - dead.keys())
    plain_names = [name for name in ((wanted,) if isinstance(wanted, str) else wanted) if not is_of_experts(name)]
    if len(plain_names) < 1 or plain_names == [ALL_LINEAR]:
        if not plain_names:
            return []
        # peft's own all-linear would adapt routed experts and routers of some families, too.
        mixture = next(experts_in(base), None) is not None
        by_name = by_name or mixture or len(linear) < len(every) or kept_out(base) is not None
        head = cast(Any, base).get_output_embeddings() if by_name else None
        heads = {
            name.rpartition(".")[2] for name, module in base.named_modules() if head is not None and module is head
        }
        return [name for name in linear if name not in heads] if by_name else ALL_LINEAR
    modules = _language_modules(base)
    for name in plain_names:
        found = [module for full, module in modules.items() if full == name or full.endswith(f".{name}")]
        why = dead.get(name.rpartition(".")[2])
        if any(isinstance(module, nn.Conv1d) for module in found):
            why = "a short convolution's weight is read past the adapter, which would stay untrained"
        if found and why:
            raise JobFailed(
                "dead_targets",
                f"adapter.targets names {name!r}: {why}",
                f'use "{ALL_LINEAR}" or some of: {", ".join(linear)}',
            )
        if not found:
            near = difflib.get_close_matches(name, linear, n=1)
            raise JobFailed(
                "unknown_targets",
                f"adapter.targets names {name!r}, which this model does not have"
                + (f"; perhaps {near[0]}" if near else ""),
                f'use "{ALL_LINEAR}" or some of: {", ".join(linear)}',
            )
    return plain_names


def _base_class(base: nn.Module) -> dict[str, str] | None:
    """Return the class of a multimodal base as peft notes it in the adapter's config, for the model card; else None."""
    picked = class_of(base)
    return {"base_model_class": picked.kind.__name__, "parent_library": "transformers"} if picked.decoder else None


def kept_out(base: nn.Module) -> str | None:
    """Return a regular expression for the modules that get no adapter whatever their names are; None for none.

    They are the towers beside the language model, whose layers are often named like the decoder's, linear layers that
    are more than a product, and routers. It is saved with the adapter, which then fits the whole checkpoint.
    """
    towers = [re.escape(name) + r"(\..*)?" for name in class_of(base).towers]
    odd = {re.sub(r"\d+", r"\\d+", re.escape(name)) for name in (*odd_linears(base), *routers(base))}
    return "|".join([*towers, *sorted(odd)]) or None


def _language_modules(base: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the language model by name, without linear layers that are more than a product."""
    picked, odd = class_of(base), {*odd_linears(base), *routers(base)}
    return {name: module for name, module in base.named_modules() if picked.speaks(name) and name not in odd}


def _short(name: str) -> str:
    """Return the end of a module's name that says what it is: its last part, or with the number before it."""
    before, _, last = name.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() else last


def whole_modules(base: nn.Module, names: tuple[str, ...]) -> list[str] | None:
    """Return the names of the modules that are trained whole, or None for none.

    Raises:
        JobFailed: `unknown_targets` when a name is no module of the model, or its module holds weights in 4 bits.
    """
    modules = _language_modules(base)
    chosen: list[str] = []
    for name in names:
        found = {full: module for full, module in modules.items() if full == name or full.endswith(f".{name}")}
        weights = [parameter for module in found.values() for parameter in module.parameters()]
        if weights and all(parameter.is_floating_point() for parameter in weights):
            # A tower may have a module of the same name; then only whole paths say which ones are meant.
            chosen += found if class_of(base).towers else [name]
            continue
        held = "whose weights are held in 4 bits" if weights else "which this model does not have"
        raise JobFailed(
            "unknown_targets",
            f"adapter.modules_to_save names {name!r}, {held}",
            "use the last part of a module's name, such as lm_head or embed_tokens, or method lora for any layer",
        )
    return chosen or None


def adapted_layers(base: nn.Module, wanted: tuple[int, ...]) -> list[int] | None:
    """Return the layer numbers to adapt, or None for all of them.

    Raises:
        JobFailed: `unknown_targets` when the model has fewer layers.
    """
    if not wanted:
        return None
    count = int(cast(Any, base).config.get_text_config().num_hidden_layers)
    if max(wanted) >= count:
        raise JobFailed(
            "unknown_targets",
            f"adapter.layers names layer {max(wanted)}; this model has {count}, numbered from 0",
            f"use numbers from 0 to {count - 1}, or leave adapter.layers empty for all",
        )
    return list(wanted)


def check_patterns(model: nn.Module, section: AdapterSection) -> None:
    """Refuse a pattern that names no adapted module; peft would ignore it without a word.

    Raises:
        JobFailed: `unknown_targets`.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for field, pattern in (("rank_pattern", section.rank_pattern), ("alpha_pattern", section.alpha_pattern)):
        for name, _ in pattern:
            if not any(_fits(name, module) for module in adapted):
                known = ", ".join(sorted({module.rpartition(".")[2] for module in adapted}))
                raise JobFailed(
                    "unknown_targets",
                    f"adapter.{field} names {plain(name, one_line=True)!r}, which is no adapted module of this model",
                    f"use some of: {known}; or a longer end of a module's path, such as layers.0.self_attn.q_proj",
                )


def _spell_out_patterns(model: PeftModel) -> None:
    """Give every module an entry of its own in a pattern where two names fit the same module.

    peft takes the first name that fits. It saves the names in alphabetical order, so on loading another one could be
    the first, and the adapter would have other ranks or alphas than it was trained with.
    """
    config = model.active_peft_config
    adapted = [name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field)
        fitting = {name: [pattern[key] for key in pattern if _fits(key, name)] for name in adapted}
        if any(len(numbers) > 1 for numbers in fitting.values()):
            setattr(config, field, {name: numbers[0] for name, numbers in fitting.items() if numbers})


def _fits(name: str, module: str) -> bool:
    """Return whether a pattern's name fits a module's full name, as in peft (utils/other.py get_pattern_key)."""
    return re.match(rf"(.*\.)?({name})$", module) is not None
