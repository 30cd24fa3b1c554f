"""The structure of base and adapter without the base's weights: peft itself decides what is adapted, and how.

The base's parameters stay on the meta device, the adapter's are loaded in fp32. One layer at a time then gets real
weights, is merged by peft itself and emptied again (`units.py`), so that the sum is peft's for every kind of layer.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.base.model_class import class_in, class_of, from_config
from studio.jobs.base.swapped import swapped
from studio.probe.adapter_folder import AdapterFound
from studio.runs.layout import ADAPTER_WEIGHTS

ADAPTER = "default"
Weighted = tuple[AdapterFound, float]
"""An adapter, and what its delta is multiplied by."""
_WRAPPING = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
_ADDED = re.compile(r"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Base and adapter as structure.

    Attributes:
        clean: The base alone; every parameter is on the meta device.
        adapted: Another such base with the adapter attached; the adapter's tensors are real and fp32.
        replaced: Parameters of the base that the adapter brings whole (trained biases, embeddings), by name.
        tied: Parameters that share another one's memory: the name of each, and the other's name.
        vocabulary: Number of tokens if the adapter brings an embedding of its own, else None.
    """

    clean: PreTrainedModel
    adapted: PeftModel
    replaced: dict[str, Tensor]
    tied: dict[str, str]
    vocabulary: int | None


def build_clean(folder: Path, vocabulary: int | None = None, *, towers: bool = False) -> PreTrainedModel:
    """Return the model of a folder without its weights; buffers are real.

    Args:
        folder: Holds `config.json`.
        vocabulary: Number of tokens where it is not the config's.
        towers: Whether a multimodal model has the towers that text never reaches.

    Raises:
        BadInput: transformers cannot build this model.
    """
    try:
        picked = class_in(folder)
        if vocabulary is not None:
            picked.config.get_text_config().vocab_size = vocabulary
        # Initial values are never used, and drawing them took half of the time, even on the meta device.
        with init_empty_weights(include_buffers=False), no_init_weights():
            kind = picked.whole_kind() if towers else picked.text_kind()
            model = from_config(kind, picked.config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError) as error:
        said = plain(str(error), one_line=True, limit=300)
        raise BadInput(f"the model {plain(str(folder), one_line=True)} cannot be built: {said}") from error
    model.tie_weights()
    model.train(False)
    return model


def build_skeleton(folder: Path, adapter: AdapterFound, weight: float = 1.0, *more: Weighted) -> Skeleton:
    """Return the structure of a base folder with an adapter.

    Args:
        folder: The base.
        adapter: What was trained on it.
        weight: What its delta is multiplied by.
        more: Further adapters with their weights.

    Raises:
        BadInput: The adapter does not fit the base, or does something that no single set of weights can express.
    """
    adapters = ((adapter, weight), *more)
    for found, _ in adapters:
        refuse_what_cannot_merge(found.config)
    if more or weight != 1:
        refuse_weighted([found.config for found, _ in adapters])
    vocabulary = adapter_vocabulary(adapter)
    clean = build_clean(folder, vocabulary)
    # An adapter that was made elsewhere may adapt a vision tower, too.
    begins = tuple(f"base_model.model.{tower}." for tower in class_of(clean).towers)
    towers = any(key.startswith(begins) for found, _ in adapters for key in found.header.tensors)
    if towers:
        clean = build_clean(folder, vocabulary, towers=True)
    adapted = attach(build_clean(folder, vocabulary, towers=towers), adapters)
    replaced = {name: p.detach() for name, p in base_parameters(adapted).items() if not p.is_meta}
    if missing := clean.state_dict().keys() - base_parameters(adapted).keys() - dict(clean.named_buffers()).keys():
        raise BadInput(f"the adapter hides {sorted(missing)[0]} of the base in a way that is not understood.")
    tied = {name: of for name, of in (getattr(clean, "all_tied_weights_keys", None) or {}).items() if name != of}
    return Skeleton(clean, adapted, replaced, tied, vocabulary)


def base_parameters(adapted: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the base's parameters inside an adapted model, by the names that they have without the adapter."""
    found = {}
    for name, parameter in adapted.base_model.model.named_parameters(remove_duplicate=False):
        if not _ADDED.search(f".{name}"):
            found[clean_name(name)] = parameter
    return found


def clean_name(name: str) -> str:
    """Return the name that a module or parameter of the base, seen inside an adapted model, has without the adapter."""
    return _WRAPPING.sub("", f".{name}.")[1:-1]


def attach(base: PreTrainedModel, adapters: Sequence[Weighted]) -> PeftModel:
    """Return a base with all adapters active, each scaled by its weight; their tensors are fp32.

    Several adapters are combined as peft does it after `set_scale` on each: one delta is added after another.

    Raises:
        BadInput: An adapter does not fit the base, or its tensors are more or fewer than its config says.
    """
    names = [ADAPTER, *(f"{ADAPTER}_{place}" for place in range(1, len(adapters)))]
    model: PeftModel | None = None
    for name, (adapter, _) in zip(names, adapters, strict=True):
        model = _load(model or base, adapter, name)
    if model is None:
        raise BadInput("there is no adapter to attach.")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                if weight != 1:
                    module.set_scale(name, weight)
    if len(names) > 1:
        model.base_model.set_adapter(names, inference_mode=True)
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model.eval()


def put_on(base: PreTrainedModel, config: PeftConfig, name: str = ADAPTER) -> PeftModel:
    """Return a base on the meta device with an adapter of a config, without numbers.

    Raises:
        ValueError, TypeError, ...: peft does not find what the config names.
    """
    config.inference_mode, config.init_lora_weights = True, False
    with _stays_where_it_is():
        return PeftModel(base, config, name, low_cpu_mem_usage=True)


def _load(model: PreTrainedModel | PeftModel, adapter: AdapterFound, name: str) -> PeftModel:
    with _stays_where_it_is():
        try:
            config = PeftConfig.from_pretrained(str(adapter.folder))
            if isinstance(model, PeftModel):
                config.inference_mode, config.init_lora_weights = True, False
                model.add_adapter(name, config, low_cpu_mem_usage=True)
            else:
                model = put_on(model, config, name)
            seen = model.load_adapter(str(adapter.folder), name, torch_device="cpu", low_cpu_mem_usage=True)
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            said = plain(str(error), one_line=True, limit=400)
            raise BadInput(f"the adapter {_shown(adapter)} does not fit this base model: {said}") from error
    if left := _left_over_keys(adapter, seen.unexpected_keys):
        raise BadInput(_left_over(adapter, left, "belong to no layer of this base model"))
    if seen.missing_keys:
        raise BadInput(_left_over(adapter, sorted(seen.missing_keys), "are asked for by its config and not there"))
    return model


@contextmanager
def _stays_where_it_is() -> Iterator[None]:
    """Keep peft from moving the adapter to its base layer's device: that is meta here, and has no numbers."""
    name = "_move_adapter_to_device_of_base_layer"
    with ExitStack() as patches:
        for kind in [BaseTunerLayer, *_below(BaseTunerLayer)]:
            if name in vars(kind):
                patches.enter_context(swapped(kind, name, lambda self, adapter_name, device=None: None))
        yield


def _below(kind: type[Any]) -> Iterator[type[Any]]:
    for direct in kind.__subclasses__():
        yield direct
        yield from _below(direct)


def adapter_vocabulary(adapter: AdapterFound) -> int | None:
    """Return the number of tokens of the embedding that the adapter brings whole; None where it brings none."""
    for key, entry in adapter.header.tensors.items():
        if re.search(r"(embed_tokens|wte|embed_in)(\.base_layer|\.modules_to_save)?\.weight$", key):
            return entry.shape[0]
    return None


def _left_over_keys(adapter: AdapterFound, unexpected: list[str]) -> list[str]:
    """Return the adapter's tensors that were not loaded, except those that only repeat another one.

    Where the vocabulary was resized, peft 0.21 writes a module that is trained whole twice: as `X.weight`, which it
    reads again, and as `X.modules_to_save.weight`.
    """
    left = []
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, "pt") as file:
        for key in sorted(unexpected):
            once = key.replace(".modules_to_save.", ".")
            repeats = once != key and once in adapter.header.tensors
            if not repeats or not torch.equal(file.get_tensor(key), file.get_tensor(once)):
                left.append(key)
    return left


def _left_over(adapter: AdapterFound, names: list[str], what: str) -> str:
    first = plain(names[0], one_line=True, limit=120)
    return f"{len(names)} tensors of the adapter {_shown(adapter)} {what}, the first is {first}. Is it the right base?"


def _shown(adapter: AdapterFound) -> str:
    return plain(adapter.folder.name, one_line=True)


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
    """Refuse an `adapter_config.json` whose settings no single set of weights can express, or that are not known here.

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
    """Refuse adapters that cannot be weighted or added to others, because they are more than a low-rank sum.

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
