"""Picks the class that a base is built as, and says where the language model lies in it.

A checkpoint's `config.json` names its class in `architectures`. That class alone has the module names which servers
know, so an adapter must be trained on it: with the text class of the same family every key of the adapter would have
another name. A multimodal class holds the language model as a submodule (the decoder), beside towers for images or
sound and the projectors behind them. What is trained here is the language model.

Nothing is looked up by a family's name: the class is built on the meta device and asked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.base.swapped import swapped

if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    # transformers 5.24's Llama4ForConditionalGeneration reads this of its decoder's output, whose class lacks it: every
    # forward pass of it would fail.
    MoeCausalLMOutputWithPast.image_outputs = None


@dataclass(frozen=True, slots=True)
class ModelClass:
    """The class of a base, and what lies where in it.

    A module's name in an adapter file is `base_model.model.` and its name in `kind`.

    Attributes:
        kind: The class, as transformers or the model's own code has it.
        config: The config that it is built from.
        decoder: Name of the submodule that is the language model without its head; empty where the whole model is.
        head: Name of the module that turns hidden states into logits; empty where there is none.
        attending: The class of the decoder, which says what attention it can compute; None where that is `kind`.
        towers: Names of the submodules beside decoder and head, such as a vision tower and its projector.
        unused: Those of the towers that text never reaches.
    """

    kind: type[PreTrainedModel]
    config: PretrainedConfig
    decoder: str = ""
    head: str = ""
    attending: type[Any] | None = None
    towers: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def speaks(self, name: str) -> bool:
        """Return whether a module or parameter belongs to the language model: to the decoder or to the head."""
        return not self.decoder or _inside(name, self.decoder) or bool(self.head and _inside(name, self.head))

    def text_kind(self) -> type[PreTrainedModel]:
        """Return the class without the towers that text never reaches; all other modules keep their names.

        Loading it ignores the weights of those towers, so that they take no memory.
        """
        return _built_from(self.kind, self.unused) if self.decoder else self.kind

    def whole_kind(self) -> type[PreTrainedModel]:
        """Return the class with all its towers; those whose library is not installed are empty."""
        return _built_from(self.kind, ()) if self.decoder else self.kind


def model_class(config: PretrainedConfig, *, trust_remote_code: bool = False) -> ModelClass:
    """Return the class that a config's checkpoint is built as.

    That is the class which the config names in `architectures`, where it is one that continues text; else
    transformers' causal class for the config. A model that brings code of its own gets the class that it names for
    `AutoModelForCausalLM`.

    Args:
        config: Of the checkpoint.
        trust_remote_code: Whether code that the model's folder brings may be run.

    Raises:
        BadInput: There is no class that continues text.
        ValueError, ImportError, ...: The class cannot be built from this config, as transformers raises it.
    """
    kind = _remote_class(config) if trust_remote_code else None
    if kind is None:
        kind, config = _named_class(config) or _causal_class(config)
    if config.get_text_config() is config:
        return ModelClass(kind, config)
    return _look(kind, config)


def class_in(folder: Path, *, trust_remote_code: bool = False) -> ModelClass:
    """Return the class of the checkpoint in a folder; arguments and errors as for `model_class`.

    Raises:
        OSError, ValueError, KeyError: The folder's config cannot be read.
    """
    return model_class(
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )


def from_config(kind: type[PreTrainedModel], config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Return a model without a checkpoint, as transformers builds it.

    Args:
        kind: Its class.
        config: Its config.
        **options: What `from_pretrained` takes, too: dtype, attn_implementation.
    """
    build: Any = kind._from_config
    model: PreTrainedModel = build(config, **options)
    return model


def class_of(model: nn.Module) -> ModelClass:
    """Return the class of a model that is there, and what lies where in it; `unused` stays empty.

    Raises:
        BadInput: It is multimodal and does not say where its language model is.
    """
    whole: Any = model
    kind, config = getattr(type(whole), "studio_original", type(whole)), whole.config
    if config.get_text_config() is config:
        return ModelClass(kind, config)
    names = {id(module): name for name, module in whole.named_modules()}
    try:
        decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    except NotImplementedError:
        decoder = head = None
    place, end = names.get(id(decoder), ""), names.get(id(head), "")
    if not place:
        raise BadInput(
            f"A {kind.__name__} does not say which part of it is its language model, which alone is trained here. "
            "Use a checkpoint of the language model alone."
        )
    return ModelClass(kind, config, place, end, type(decoder), tuple(_beside(whole, place, end)))


def backbone_of(causal: nn.Module) -> nn.Module | None:
    """Return the module that makes the hidden states; None, or the model itself, where there is none inside.

    Of a multimodal model it is the decoder alone: a text needs nothing that the wrapper does around it.
    """
    picked = class_of(causal)
    model = causal.get_submodule(picked.decoder)
    if picked.decoder and not picked.head.startswith(f"{picked.decoder}."):
        return model
    backbone: nn.Module | None = getattr(model, "base_model", None)
    if backbone is not model:
        return backbone
    # Llama 4's class names another attribute than its backbone's: the backbone is what holds the embedding.
    embedding = cast(Any, model).get_input_embeddings()
    place = next((name for name, module in model.named_modules() if module is embedding), "")
    return model.get_submodule(place.rpartition(".")[0])


def decoder_layers(causal: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    """Return the decoder layers of a language model in their order, with their names; none where it is no stack."""
    picked, config = class_of(causal), cast(Any, causal).config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    for path, module in causal.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and picked.speaks(path):
            return tuple((f"{path}.{place}", layer) for place, layer in enumerate(module))
    return ()


def empty_model(picked: ModelClass) -> PreTrainedModel:
    """Return a model of a class, without the towers that text never reaches; everything is on the meta device."""
    with torch.device("meta"), no_init_weights():
        return from_config(picked.text_kind(), deepcopy(picked.config), dtype=torch.float32)


def odd_linears(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that are more than a product: such a module is never adapted or quantised.

    Llama 4's and PhiMoE's routers are subclasses of `nn.Linear` that return a pair.
    """
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not is_plain(module)]


def is_plain(module: nn.Module) -> bool:
    """Return whether a module is a linear map and nothing else, in 16 bits or in bitsandbytes' form of it.

    A subclass may return something else than the product; it is tried without numbers.
    """
    kind = type(module)
    if kind in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    if any(each.__module__.startswith("bitsandbytes.") for each in kind.__mro__):
        return True
    parameters = {name: parameter.to("meta") for name, parameter in module.named_parameters()}
    given = torch.empty(1, module.in_features, dtype=module.weight.dtype, device="meta")
    try:
        made = functional_call(module, parameters, given)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return False
    return isinstance(made, Tensor) and made.shape == (1, module.out_features)


def _remote_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class in the Python code that the checkpoint brings; None where it brings none."""
    reference = (getattr(config, "auto_map", None) or {}).get(AutoModelForCausalLM.__name__)
    if reference is None:
        return None
    folder, _, name = reference.rpartition("--")
    complete: Any = add_generation_mixin_to_remote_model
    kind: type[PreTrainedModel] = complete(get_class_from_dynamic_module(name, folder or str(config.name_or_path)))
    return kind


def _named_class(config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig] | None:
    """Return the class that `architectures` names, with the config that it takes; None where it is not usable."""
    kind = getattr(transformers, str((config.architectures or [""])[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.can_generate()):
        return None
    return _taking(kind, config)


def _causal_class(config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return transformers' class for a config whose `architectures` names none that can be used.

    Raises:
        BadInput: It has no class that continues text.
    """
    # A multimodal config's own class before the class of the text model inside it.
    maps = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    for known in maps if config.get_text_config() is config else reversed(maps):
        found = known.get(type(config), None)
        for kind in found if isinstance(found, tuple) else (found,):
            if kind is not None and (taken := _taking(kind, config)):
                return taken
    shown = plain(str(config.name_or_path or ""), one_line=True) or config.model_type
    raise BadInput(
        f"The model {shown} is not a causal language model (a decoder that continues text), which is what is trained "
        "here."
    )


def _taking(
    kind: type[PreTrainedModel], config: PretrainedConfig
) -> tuple[type[PreTrainedModel], PretrainedConfig] | None:
    """Return a class with the one of a config and its text config that it takes; None for an encoder-decoder too."""
    wanted = kind.config_class
    text = config.get_text_config()
    for own in (config, text):
        if wanted is not None and isinstance(own, wanted) and not own.is_encoder_decoder:
            if own is not config and hasattr(config, "quantization_config"):
                own.quantization_config = config.quantization_config
            return kind, own
    return None


def _look(kind: type[PreTrainedModel], config: PretrainedConfig) -> ModelClass:
    """Build a multimodal class without weights and see where its parts are."""
    with _built_without_images(), torch.device("meta"), no_init_weights():
        model: Any = kind(deepcopy(config))
    found = replace(class_of(model), config=config)
    return replace(found, unused=_unused(model, found)) if found.decoder else found


def _beside(model: nn.Module, decoder: str, head: str) -> Iterator[str]:
    """Yield the names of the modules that hold neither decoder nor head, without those inside such a module."""
    parents = ["", *(decoder[:place] for place, letter in enumerate(decoder) if letter == ".")]
    for parent in parents:
        for name, _ in model.get_submodule(parent).named_children():
            full = f"{parent}.{name}" if parent else name
            if not any(_inside(part, full) for part in (decoder, head) if part):
                yield full


def _unused(model: nn.Module, found: ModelClass) -> tuple[str, ...]:
    """Return the towers that a text does not pass through on its way to the decoder.

    Gemma 3n sends text through the embeddings of its towers, too; only a forward pass shows that.
    """
    called: set[str] = set()

    def reached(*_: Any) -> None:
        raise _ReachedError

    model.get_submodule(found.decoder).register_forward_pre_hook(reached)
    for name in found.towers:
        for inner in model.get_submodule(name).modules():
            inner.register_forward_pre_hook(_remember(called, name))
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    # Gemma 4 makes its masks before its decoder, from positions, which have no values here; it takes made ones, too.
    for more in ({}, {"attention_mask": dict.fromkeys(("full_attention", "sliding_attention"))}):
        try:
            model.eval()(input_ids=ids, **more)
        except _ReachedError:
            return tuple(name for name in found.towers if name not in called)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            continue  # not known, so everything stays
    return ()


class _ReachedError(Exception):
    """Ends a forward pass where the decoder begins."""


def _remember(called: set[str], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        called.add(name)

    return hook


@contextmanager
def _built_without_images() -> Iterator[None]:
    """Build a tower whose library is not installed as an empty module: text needs neither timm nor pillow."""
    build = vars(AutoModel)["from_config"].__func__

    def from_config(kind: Any, *given: Any, **named: Any) -> nn.Module:
        try:
            made: nn.Module = build(kind, *given, **named)
        except ImportError:
            return nn.Module()
        return made

    # The wrapper's constructor builds its towers through this; nothing of its own can be told to leave one out.
    with swapped(AutoModel, "from_config", classmethod(from_config)):
        yield


def _built_from(kind: type[PreTrainedModel], unused: tuple[str, ...]) -> type[PreTrainedModel]:
    """Return a subclass whose instances have an empty module in place of each of the named ones."""

    def build(self: Any, *given: Any, **named: Any) -> None:
        with _built_without_images():
            kind.__init__(self, *given, **named)
        for name in unused:
            self.set_submodule(name, nn.Module())

    ignored = [*(getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ())]
    ignored += [rf"^{name.replace('.', chr(92) + '.')}\." for name in unused]
    members = {
        "__init__": build,
        "__module__": kind.__module__,
        "studio_original": kind,
        "_keys_to_ignore_on_load_unexpected": ignored,
    }
    # The original's name, by which transformers finds the renaming of a checkpoint's weights.
    return type(kind.__name__, (kind,), members)


def _inside(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")
