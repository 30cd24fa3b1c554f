"""Quantises stacks of experts while a model is loaded, so that no more than one of them is ever there in 16 bit.

transformers reads tensor after tensor, and lets its quantizer have each before the next is read. Mixtures whose files
hold each expert by itself it merges first, and needs two to three stacks in 16 bit for that. Here its own operations
are run on one expert after another, and each result is quantised before the next expert is read, whether the files hold
experts one by one or a whole stack.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, core_model_loading
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    log_conversion_errors,
)
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from studio.jobs.base.eight_bit import EightBitLinear, eight_bit_layer, in_eight_bits
from studio.jobs.base.experts.forms import experts_in, packable
from studio.jobs.base.experts.product import take_over
from studio.jobs.base.experts.stacks import Packing, four_bit_stack
from studio.jobs.base.swapped import swapped

_NAME = "lora_studio_4bit"
"""The name under which transformers knows this way to quantise."""


@register_quantization_config(_NAME)
class StacksConfig(BitsAndBytesConfig):
    """bitsandbytes' 4-bit form, for linear layers and stacks of experts alike; some linear layers are in 8 bits."""

    def __init__(self, eight: Collection[str] = (), **options: Any) -> None:
        """Take the options of `BitsAndBytesConfig`, and the names of the layers that are in 8 bits."""
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.eight = list(eight)
        self.quant_method = _NAME  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which parameters are packed, and how.

    Attributes:
        shapes: Shapes of the stacks, by the names of their parameters.
        quant_type: The 4-bit code.
        double_quant: Whether the scales are quantised too.
    """

    shapes: dict[str, torch.Size]
    quant_type: str
    double_quant: bool

    def __deepcopy__(self, memo: Any) -> Self:
        """Return itself: transformers copies a converter for every tensor of the files."""
        return self

    def packing(self, name: str) -> Packing:
        return Packing(self.shapes[name], quant_type=self.quant_type, double_quant=self.double_quant)


@register_quantizer(_NAME)
class StacksQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer for bitsandbytes, which takes stacks of experts as well."""

    plan: _Plan
    quantization_config: StacksConfig

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **more: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **more)
        config = self.quantization_config
        for name in config.eight:
            layer = eight_bit_layer(model.get_submodule(name), config.bnb_4bit_compute_dtype)
            model.set_submodule(name, layer)
        shapes = dict(packable(model, self.modules_to_not_convert))
        self.plan = _Plan(shapes, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> Any:
        for _, module, form in experts_in(model):
            if any(getattr(getattr(module, name), "quant_state", None) is not None for name in form.stacks):
                take_over(module, form)
        model.is_loaded_in_8bit = bool(self.quantization_config.eight)  # peft asks for it
        return super()._process_model_after_weight_loading(model, **more)

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
        """Whether a parameter is quantised: a linear layer's, as transformers says, one in 8 bits, or a stack."""
        path, _, name = param_name.rpartition(".")
        eight = name == "weight" and isinstance(model.get_submodule(path), EightBitLinear)
        return eight or param_name in self.plan.shapes or super().param_needs_quantization(model, param_name, **more)

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantises one parameter that is there whole."""
        return _Quantise(self)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Let every converter that may make a stack do so expert by expert; stacks read as they are get one, too."""
        known = super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-untyped-call]
        made = [_by_expert(entry, self.plan) if isinstance(entry, WeightConverter) else entry for entry in known]
        taken = {pattern for entry in known for pattern in entry.source_patterns}
        ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in self.plan.shapes)
        for end in ends:
            if end not in taken:
                made.append(_ExpertByExpert([end], [end], [_AsItIs()], self.plan))
            # Of a base in MXFP4 (gpt-oss) each stack lies as two tensors.
            made.append(_ExpertByExpert([f"{end}{part}" for part in _MXFP4_PARTS], [end], [_FromMxfp4()], self.plan))
        return made


class _Quantise(ConversionOps):
    """Quantises what transformers has read and merged: a linear layer's weight, or a stack in 16 bit."""

    def __init__(self, quantizer: StacksQuantizer) -> None:
        self._plan = quantizer.plan
        self._of_linear = Bnb4bitQuantize(quantizer)  # type: ignore[no-untyped-call]

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **more: Any) -> dict[str, Any]:
        """Return the parameters in 4 bits, by name."""
        made: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            stack = value[0] if isinstance(value, list) else value
            layer = more["model"].get_submodule(name.rpartition(".")[0])
            if isinstance(layer, EightBitLinear):
                made[name] = in_eight_bits(stack.T.contiguous() if layer.source_cls is Conv1D else stack)
                continue
            if name not in self._plan.shapes:
                made |= self._of_linear.convert({name: value}, **more)
                continue
            packing = self._plan.packing(name)
            for expert in stack.split(1):
                packing.add(expert)
            made[name] = four_bit_stack(*packing.packed())
        return made


class _AsItIs(ConversionOps):
    """Leaves an expert as it lies in the files."""

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **more: Any) -> dict[str, Any]:
        """Return what is given."""
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        """Itself."""
        return self


_MXFP4_PARTS = ("_blocks", "_scales")


class _FromMxfp4(ConversionOps):
    """Dequantises an expert from MXFP4, as transformers does a whole stack."""

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **more: Any) -> dict[str, Any]:
        """Return the expert in the format of the arithmetic."""
        blocks, scales = (input_dict[f"{more['target_patterns'][0]}{part}"][0] for part in _MXFP4_PARTS)
        made = convert_moe_packed_tensors(blocks, scales, dtype=more["config"].dtype)
        return {more["target_patterns"][0]: made}

    @property
    def reverse_op(self) -> ConversionOps:
        """Nothing that could be undone."""
        return _AsItIs()


_PER_EXPERT = (MergeModulelist, Concatenate, Transpose, Interleave)
"""Operations of transformers that treat every expert alike."""


def _by_expert(converter: WeightConverter, plan: _Plan) -> WeightConverter:
    alike = all(type(operation) in _PER_EXPERT for operation in converter.operations)
    if not alike or len(converter._original_target_patterns) != 1:
        return converter
    made = _ExpertByExpert(
        list(converter._original_source_patterns),
        list(converter._original_target_patterns),
        converter.operations,
        plan,
    )
    made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return made


class _ExpertByExpert(WeightConverter):
    """One of transformers' converters, run on one expert after another where it makes a stack that is packed."""

    __slots__ = ("plan",)

    def __init__(self, source: list[str], target: list[str], operations: list[ConversionOps], plan: _Plan) -> None:
        super().__init__(source, target, operations)
        self.plan = plan

    def copy(self, source_patterns: Any, target_patterns: Any, **more: Any) -> WeightConverter:
        """Return one of transformers' own converters: copies are for saving."""
        return WeightConverter(source_patterns, target_patterns, **more)

    def convert(self, layer_name: str, model: Any = None, *others: Any, **more: Any) -> Any:
        """Return the parameters that the collected tensors become, by name."""
        if layer_name not in self.plan.shapes:
            return super().convert(layer_name, model, *others, **more)
        with log_conversion_errors(layer_name, more.get("loading_info"), (1, layer_name), self.operations):
            return {layer_name: self._packed(layer_name, more.get("config"))}

    def _packed(self, name: str, config: Any) -> Tensor:
        shape, packing = self.plan.shapes[name], self.plan.packing(name)
        waiting = {pattern: self.collected_tensors.pop(pattern) for pattern in list(self.collected_tensors)}
        parts = {pattern: _one_by_one(given, shape[0]) for pattern, given in waiting.items()}
        del waiting
        for _ in range(shape[0]):
            made: dict[str, Any] = {pattern: [next(experts)] for pattern, experts in parts.items()}
            for operation in self.operations:
                made = operation.convert(
                    made,
                    source_patterns=self.source_patterns,
                    target_patterns=self.target_patterns,
                    full_layer_name=name,
                    model=_OneExpert(torch.Size((1, *shape[1:]))),
                    config=config,
                )
            (expert,) = made.values()
            packing.add(expert[0] if isinstance(expert, list) else expert)
            del made, expert
        return four_bit_stack(*packing.packed())


def _one_by_one(given: list[Any], count: int) -> Iterator[Tensor]:
    """Yield the experts: tensors that are read only now, or the slices `[1, ..]` of one that holds all of them.

    Raises:
        ValueError: There are more or fewer than the model has.
    """
    if len(given) == 1 and count != 1:
        whole: _Waiting = given.pop()
        if whole.shape[0] != count:
            raise ValueError(f"the files hold {whole.shape[0]} experts where the model has {count}")
        for place in range(count):
            yield whole.part(place)
        return
    if len(given) != count:
        raise ValueError(f"the files hold {len(given)} experts where the model has {count}")
    while given:
        yield given.pop(0)()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A tensor of the files that is read when it is asked for, or a part of it; as transformers' own, which hides it.

    Attributes:
        source: The tensor in the files.
        device: Where it goes.
        dtype: The format that it gets; None leaves it.
    """

    source: Any
    device: Any
    dtype: torch.dtype | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        held = self.source
        return tuple(held.get_shape() if hasattr(held, "get_shape") else held.shape)

    def __call__(self) -> Tensor:
        """Return the whole tensor."""
        return self._moved(self.source[...])

    def part(self, place: int) -> Tensor:
        """Return one expert of a stack, `[1, .., ..]`."""
        return self._moved(self.source[place : place + 1])

    def _moved(self, tensor: Tensor) -> Tensor:
        # Codes and scales of a quantised base are no numbers to be cast.
        return tensor.to(device=self.device, dtype=self.dtype if tensor.is_floating_point() else None)


@contextmanager
def read_in_parts() -> Iterator[None]:
    """Let what is loaded and quantised inside the context be read when it is needed, stacks one expert at a time."""
    usual = core_model_loading.spawn_materialize

    def waiting(thread_pool: Any, tensor: Any, device: Any = None, dtype: Any = None, **more: Any) -> Any:
        if thread_pool is not None or more.get("sharding_op") is not None:
            return usual(thread_pool, tensor, device, dtype, **more)
        return _Waiting(tensor, device, dtype)

    # Swapped because transformers gives its quantizer the tensors themselves, whole and on their device.
    with swapped(core_model_loading, "spawn_materialize", waiting):
        yield


@dataclass(frozen=True, slots=True)
class _OneExpert:
    """What an operation may ask of the model while it makes one expert.

    Attributes:
        shape: Of the result.
    """

    shape: torch.Size

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter without memory."""
        return torch.empty(self.shape, device="meta")
