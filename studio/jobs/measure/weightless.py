"""Builds a base model from its config, without its weights, in the form that loading would give it.

It must be called where every new tensor is fake, or for a model that is small enough for real tensors.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes.functional import QuantState, quantize_4bit
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.attention import attention_of, only_for_text
from studio.jobs.base.eight_bit import codes_and_scales, eight_bit_layer
from studio.jobs.base.experts.forms import experts_in, packable
from studio.jobs.base.experts.product import take_over
from studio.jobs.base.experts.stacks import four_bit_stack
from studio.jobs.base.load import FourBit, check_names, four_bit_config, four_bit_of, in_eight_bits, left_alone
from studio.jobs.base.model_class import from_config, model_class
from studio.jobs.base.streaming.base import waiting_in
from studio.jobs.base.streaming.four_bit import tensors_of
from studio.jobs.measure.fake import is_fake
from studio.jobs.measure.storages import HOST, Storages
from studio.jobs.train.trainable_model import streamed_of

_UNBUILDABLE = (
    *(ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError),
    *(ZeroDivisionError, OverflowError, AssertionError, IndexError),
)
"""Exceptions that transformers and torch raise for a config whose sizes do not fit together."""


def config_of(values: dict[str, Any]) -> PretrainedConfig:
    """Return transformers' config for the values of a config.json.

    Raises:
        BadInput: transformers does not know this architecture, or the values do not fit together.
    """
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        shown = plain(kind, one_line=True, limit=60)
        raise BadInput(
            f"transformers {transformers.__version__} does not know the architecture {shown}: nothing can be traced. "
            "Update it (pip install -U transformers), or use `lora-studio plan`."
        )
    try:
        rest = {name: value for name, value in values.items() if name not in ("model_type", "quantization_config")}
        config: PretrainedConfig = AutoConfig.for_model(kind, **rest)
    except (*_UNBUILDABLE, StrictDataclassError) as error:
        said = plain(f"{type(error).__name__}: {error}", one_line=True, limit=300)
        raise BadInput(
            f"transformers cannot make a {plain(kind, one_line=True, limit=60)} model of this config: {said}"
        ) from error
    return config


def weightless_base(
    config: PretrainedConfig, recipe: Recipe, dtype: torch.dtype, device_type: str, storages: Storages
) -> PreTrainedModel:
    """Return the frozen base model of a recipe; its tensors are logged as `base`.

    Args:
        config: The model's config.
        recipe: Says method, attention and 4-bit form.
        dtype: dtype of what is not quantised.
        device_type: Where it would run.
        storages: Logs what is allocated.

    Raises:
        BadInput: The model cannot be built, or none of its layers can be quantised.
    """
    try:
        with unset_fake_temporarily():
            picked = model_class(config)
        # flash_attention_2 is traced as sdpa: flash-attn's kernel and torch's own flash kernel hold the same tensors.
        attention = "eager" if recipe.train.attention == "eager" else attention_of(picked, torch.device(device_type))
        chosen = only_for_text(picked.config, attention)
        # Fake numbers have no values, and a truncated normal would draw them until all lie inside: for ever.
        with no_init_weights() if is_fake(torch.empty(0)) else nullcontext():
            model = from_config(picked.text_kind(), picked.config, dtype=dtype, attn_implementation=chosen)
        model.tie_weights()
    except _UNBUILDABLE as error:
        said = plain(f"{type(error).__name__}: {error}", one_line=True, limit=300)
        raise BadInput(f"this model cannot be built from its config: {said}") from error
    if recipe.method == "qlora":
        _quantise(model, recipe, dtype, storages)
    model.requires_grad_(False)
    with storages:
        if streamed_of(recipe):
            waiting = waiting_in(model, streamed_of(recipe))
            trained = tuple(f".{name}.weight" for name in recipe.adapter.modules_to_save)
            named = ((name, weight) for name, weight in model.named_parameters() if not f".{name}".endswith(trained))
            storages.claim(_with_states(weight for name, weight in named if waiting(name, weight)), HOST)
        storages.claim(frozen_tensors(model), "base")
    return model


def frozen_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield everything that a base model holds: parameters, buffers, and the scales and tables of 4-bit weights."""
    yield from _with_states(model.parameters())
    yield from model.buffers()


def _with_states(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    for parameter in parameters:
        yield parameter
        state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        if isinstance(state, QuantState):
            yield from tensors_of(state)
        if isinstance(scales, Tensor):
            yield scales


def _quantise(model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype, storages: Storages) -> None:
    """Replace linear layers as transformers does when it loads for bitsandbytes.

    Raises:
        BadInput: There is no layer that bitsandbytes converts.
    """
    before = dict(model.named_modules())
    quant = four_bit_of(recipe.model)
    check_names(model, quant.precision)
    kept = [*left_alone(model, quant.precision), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    eight = in_eight_bits(model, quant.precision)
    config = four_bit_config(quant, dtype, model)
    with unset_fake_temporarily():
        # transformers makes bitsandbytes' layers on the meta device, with a parameter class that cannot wrap a fake
        # tensor.
        replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
        for name in eight:
            model.set_submodule(name, eight_bit_layer(model.get_submodule(name), dtype))
    replaced = [(name, module) for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not replaced and not eight:
        raise BadInput(
            "No layer of this model could be quantised to 4 bits: bitsandbytes converts torch.nn.Linear only. "
            "Use method lora."
        )
    for name, layer in replaced:
        _fill(layer, cast(nn.Linear, before.pop(name)), quant, storages)
    for name in eight:
        _fill_eight(model.get_submodule(name), cast(nn.Linear, before.pop(name)), storages)
    stacks = dict(packable(model, kept))
    if stacks:
        # While the last stack is read, everything else is there.
        with storages:
            storages.claim([p for name, p in model.named_parameters() if name not in stacks], "base")
    for name, shape in stacks.items():
        _fill_stack(model, name, shape, quant, storages)
    for _, module, form in list(experts_in(model)):
        if any(hasattr(getattr(module, stack), "quant_state") for stack in form.stacks):
            take_over(module, form)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model.is_loaded_in_8bit = bool(eight)  # type: ignore[assignment]


def _fill(layer: Any, linear: nn.Linear, quant: FourBit, storages: Storages) -> None:
    """Give a 4-bit layer the weights of the layer that it replaces."""
    weight = linear.weight.data.T if layer.source_cls is Conv1D else linear.weight.data
    with storages, storages.newborn("workspace"):
        packed, state = quantize_4bit(weight, compress_statistics=quant.double_quant, quant_type=quant.quant_type)
        # On a card the 16-bit weight is there, too, until its 4-bit form is complete.
        storages.passing(weight.nbytes)
        storages.claim([packed, *tensors_of(state)], "base")
    layer.weight = _packed_parameter(packed, state, quant)
    layer.bias = linear.bias
    layer.quant_state = state
    layer.support_avx512bf16_for_cpu = False


def _fill_eight(layer: Any, linear: nn.Linear, storages: Storages) -> None:
    """Give a layer in 8 bits the weights of the layer that it replaces."""
    weight = linear.weight.data.T if layer.source_cls is Conv1D else linear.weight.data
    with storages, storages.newborn("workspace"):
        codes, scales = codes_and_scales(weight)
        storages.passing(weight.nbytes)  # as for 4 bits
        storages.claim([codes, scales], "base")
    layer.weight = nn.Parameter(codes, requires_grad=False)  # `Int8Params` cannot wrap a fake tensor
    layer.weight.SCB = scales
    layer.bias = linear.bias


def _fill_stack(model: nn.Module, name: str, shape: torch.Size, quant: FourBit, storages: Storages) -> None:
    """Give a module of experts a stack in 4 bits: quantised whole, as sizes are the same for experts one by one."""
    path, _, stack = name.rpartition(".")
    module = model.get_submodule(path)
    weights = getattr(module, stack).data
    with storages, storages.newborn("workspace"):
        packed, state = quantize_4bit(weights, compress_statistics=quant.double_quant, quant_type=quant.quant_type)
        storages.passing(3 * weights.nbytes // shape[0])  # one expert: as it lies in the files, and as it is joined
        storages.claim([packed, *tensors_of(state)], "base")
    if not is_fake(packed):
        module._parameters[stack] = four_bit_stack(packed, state)
        return
    parameter = _packed_parameter(packed, state, quant)
    parameter.ds_shape = shape  # type: ignore[attr-defined]  # as FourBitStack has it
    module._parameters[stack] = parameter


def _packed_parameter(packed: Tensor, state: QuantState, quant: FourBit) -> nn.Parameter:
    """Return a 4-bit weight as bitsandbytes and peft read it.

    A fake one becomes a plain parameter with the same attributes, because `Params4bit` cannot wrap a fake tensor.
    """
    kind, double = quant.quant_type, quant.double_quant
    if not is_fake(packed):
        made = bnb.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            compress_statistics=double,
            quant_type=kind,
            bnb_quantized=True,
        )
        return cast(nn.Parameter, made)
    parameter = nn.Parameter(packed, requires_grad=False)
    for name, value in {
        "quant_state": state,
        "blocksize": state.blocksize,
        "compress_statistics": double,
        "quant_type": kind,
        "quant_storage": torch.uint8,
        "bnb_quantized": True,
    }.items():
        setattr(parameter, name, value)
    return parameter
