"""Loads a base model, frozen, in the form that the method asks for.

LoRA has 16- or 32-bit weights. QLoRA has linear layers in 4 bits (bitsandbytes) and everything else in the compute
format. Nothing is cast up to fp32 afterwards; peft's `prepare_model_for_kbit_training` would do that, and take 3.4 GiB
more on an 8B model.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import Mxfp4Config

from studio.core.direct_weights import kept_16bit, read_past
from studio.core.errors import BadInput
from studio.core.layer_precision import (
    INT8,
    NO_INT8_EXPERTS,
    SIXTEEN_BIT,
    Table,
    contradicted,
    precision_at,
    unmatched,
)
from studio.core.quantised_base import BITSANDBYTES, MXFP4, QuantisedBase
from studio.core.recipe import Attention, Method, ModelSection, QuantType
from studio.core.text import plain
from studio.jobs.base.attention import attention_for, only_for_text
from studio.jobs.base.embedded import ensure_embedded
from studio.jobs.base.experts.forms import experts_in
from studio.jobs.base.model_class import ModelClass, class_in, class_of, empty_model, odd_linears
from studio.jobs.base.tokenizer import why_unloadable
from studio.probe.hub_transfer import download
from studio.probe.models import BaseFound, refuse_untrainable
from studio.runs.failure import of_the_machine

Progress = Callable[[str, float], None]

_FOUR_BIT_BYTES = 0.5625
"""Bytes of a weight in 4 bits, with one scale in fp32 for 64 of them; double quantisation takes less."""


@dataclass(frozen=True, slots=True)
class FourBit:
    """How QLoRA's base is quantised.

    Attributes:
        quant_type: The 4-bit code, nf4 or fp4.
        double_quant: Whether the scales are quantised too.
        precision: Which linear layers are held in other bits (`model.precision`).
    """

    quant_type: QuantType = "nf4"
    double_quant: bool = True
    precision: Table = ()


def four_bit_of(section: ModelSection) -> FourBit:
    """Return the 4-bit form that a recipe asks for."""
    return FourBit(section.quant_type, section.double_quant, section.precision)


def base_folder(base: BaseFound, progress: Progress | None = None) -> Path:
    """Return a local folder with the base model, converting or downloading it first where needed.

    Raises:
        BadInput: The model cannot be had, or the download is damaged.
        StudioError: The embedded model cannot be converted.
    """
    if base.kind == "embedded":
        return ensure_embedded(progress)
    if base.path is not None:
        return base.path
    if progress is None:
        return download(base.word, base.revision, base.size_bytes)
    tell, whole = progress, max(base.size_bytes, 1)
    name = f"downloading {plain(base.word, one_line=True)} ({whole / 1e9:.1f} GB)"
    tell(name, 0.0)
    return download(base.word, base.revision, base.size_bytes, lambda there: tell(name, min(1.0, there / whole)))


def load_base(
    base: BaseFound,
    *,
    method: Method,
    dtype: torch.dtype,
    quant: FourBit,
    attention: Attention,
    device: torch.device,
    trust_remote_code: bool = False,
    streamed: int = 0,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Return the base model on the device, every parameter frozen.

    A base that bitsandbytes has quantised already is loaded as it lies, in 4 or 8 bits, where the method is QLoRA.

    Args:
        base: What `find_base` found.
        method: `qlora` quantises the linear layers to 4 bits, `lora` does not.
        dtype: Format of the weights that stay unquantised, and of QLoRA's arithmetic.
        quant: The 4-bit form, for QLoRA.
        attention: The wanted attention implementation. A model that has only `eager` gets that; see its config.
        device: Where it goes, shard by shard, without a second copy in main memory.
        trust_remote_code: Whether to run Python code that the model folder brings.
        streamed: How many decoder layers will be streamed: on a card, their matrices are left in main memory.
        progress: Told what is being done, and the fraction done.

    Raises:
        BadInput: The model cannot be loaded as asked; the message says why and what to do.
        JobFailed: Main memory has no room for the streamed layers.
        Exception: The memory is full or the card has failed, as torch raised it.
    """
    # bitsandbytes, as below.
    from studio.jobs.base.experts.loading import read_in_parts  # noqa: PLC0415
    from studio.jobs.base.streaming.base import loading_behind, place_rest, waiting_bytes, waiting_in  # noqa: PLC0415
    from studio.jobs.base.streaming.host import check_room, room  # noqa: PLC0415

    own = base.quantization == BITSANDBYTES
    if not (own and method == "qlora"):
        refuse_untrainable(base, method)
    folder = base_folder(base, progress)
    if progress:
        progress("loading the base model", 0.0)
    model: PreTrainedModel
    try:
        picked = class_in(folder, trust_remote_code=trust_remote_code)
        # Any, because its type says nothing of the pair that it returns with output_loading_info.
        from_pretrained: Any = picked.text_kind().from_pretrained
        chosen = attention_for(picked, attention, device=device, dtype=dtype)
        options = _quantisation(base, picked, method, quant, dtype)
        waiting = None
        if streamed and device.type == "cuda":
            waiting = waiting_in(empty := empty_model(picked), streamed)
            packed = _FOUR_BIT_BYTES if method == "qlora" else dtype.itemsize
            check_room(waiting_bytes(empty, waiting, packed, dtype.itemsize), room())
        # Quantised on the card, one weight after another. In 16 bit a card would be given weights far ahead of their
        # turn to go back to main memory.
        behind = waiting is not None and method == "qlora"
        with read_in_parts(), loading_behind(waiting) if waiting and behind else nullcontext():
            model, seen = from_pretrained(
                folder,
                config=picked.config,
                dtype=dtype,
                device_map={"": "cpu" if waiting and not behind else device},
                attn_implementation=only_for_text(picked.config, chosen),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        if of_the_machine(error):
            raise
        raise BadInput(f"The base model {_shown(folder)} cannot be loaded: {why_unloadable(error)}") from error
    if missing := sorted(seen["missing_keys"]):
        lacking = f"{len(missing)} weights, such as {plain(missing[0], one_line=True)}"
        raise BadInput(
            f"The base model {_shown(folder)} lacks {lacking}: they would be random. Its files do not belong to its "
            "config.json, or are not complete."
        )
    if method == "qlora":
        _ready_four_bit(model, own)
    model.requires_grad_(False)
    if waiting:
        place_rest(model, waiting, device)
    return model


def _quantisation(
    base: BaseFound, picked: ModelClass, method: Method, quant: FourBit, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what transformers is told of how the weights are to be held; nothing where they stay as they lie."""
    own, mxfp4 = base.quantization == BITSANDBYTES, base.quantization == MXFP4
    if method == "lora":
        return {"quantization_config": Mxfp4Config(dequantize=True)} if mxfp4 else {}
    if mxfp4:
        _take_form_away(picked.config)
    if own and not quant.precision:
        return {}
    structure = empty_model(picked)
    check_names(structure, quant.precision, base.quantised if own else None)
    return {} if own else {"quantization_config": four_bit_config(quant, dtype, structure)}


def four_bit_parameters(model: torch.nn.Module) -> int:
    """Return how many numbers of the model's weights are held in 4 bits."""
    from bitsandbytes.nn import Params4bit  # noqa: PLC0415  only QLoRA needs it

    return sum(p.quant_state.shape.numel() for p in model.parameters() if isinstance(p, Params4bit) and p.quant_state)


def four_bit_config(quant: FourBit, dtype: torch.dtype, model: PreTrainedModel) -> BitsAndBytesConfig:
    """Return what transformers needs to quantise linear layers and fused experts to 4 bits, and some layers to 8.

    Args:
        quant: The 4-bit form, and what is held in other bits.
        dtype: Of the arithmetic.
        model: Its structure.
    """
    # bitsandbytes is 47 MB, which a merge in 16 bit goes without.
    from studio.jobs.base.experts.loading import StacksConfig  # noqa: PLC0415

    return StacksConfig(
        eight=in_eight_bits(model, quant.precision),
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left_alone(model, quant.precision),
    )


def left_alone(model: PreTrainedModel, precision: Table = ()) -> list[str]:
    """Return the modules that are not quantised: transformers' own choice, weights that are read as numbers, and more.

    Given such a list, transformers does not add its own choice, such as the head. Towers for images and sound are left
    alone, and linear layers that are more than a product.

    Args:
        model: Its structure.
        precision: What the recipe holds in other bits than 4.
    """
    read, towers = sorted(kept_16bit(family_of(model))), class_of(model).towers
    always = [*get_keys_to_not_convert(model), *read, *towers, *odd_linears(model)]
    wide = [name for name in weights_in(model) if precision_at(precision, name) == SIXTEEN_BIT] if precision else []
    return [*always, *wide]


def in_eight_bits(model: PreTrainedModel, precision: Table) -> list[str]:
    """Return the linear layers that are held in 8 bits.

    Args:
        model: Its structure.
        precision: What the recipe holds in other bits than 4.
    """
    if all(word != INT8 for _, word in precision):
        return []
    alone = left_alone(model, precision)
    found = (name for name in weights_in(model) if precision_at(precision, name) == INT8)
    return [name for name in found if should_convert_module(name, alone)]


def weights_in(model: nn.Module) -> list[str]:
    """Return the paths of a model's linear layers, and of its stacks of experts."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [*linears, *(f"{name}.{stack}" for name, _, form in experts_in(model) for stack in form.stacks)]


def check_names(model: PreTrainedModel, precision: Table, laid: QuantisedBase | None = None) -> None:
    """Refuse a precision that means nothing in a model, or that its weights cannot have.

    Args:
        model: Its structure.
        precision: What the recipe holds in other bits than 4.
        laid: How a prequantised base lies in its files, which is how it is held.

    Raises:
        BadInput: It is one of these; the message says which name, and what to write.
    """
    if not precision:
        return
    if laid is not None and (why := contradicted(precision, laid.skipped, weights_in(model))):
        raise BadInput(why)
    alone = left_alone(model)
    rounded = [name for name in weights_in(model) if should_convert_module(name, alone)]
    modules = [name for name, _ in model.named_modules()]
    for name, word in precision:
        if unmatched(((name, word),), [*modules, *rounded] if word == SIXTEEN_BIT else rounded):
            raise BadInput(
                f"model.precision names {plain(name, one_line=True, limit=80)!r}, and this model has no "
                f"{'module' if word == SIXTEEN_BIT else 'linear layer that is rounded'} of that name: use parts of its "
                f"modules' paths, such as {rounded[0] if rounded else 'layers.0'}"
            )
    stacks = (f"{name}.{stack}" for name, _, form in experts_in(model) for stack in form.stacks)
    if held := next((name for name in stacks if precision_at(precision, name) == INT8), None):
        raise BadInput(f"model.precision holds {held} in int8. {NO_INT8_EXPERTS}")


def family_of(model: torch.nn.Module) -> str:
    """Return transformers' `model_type` of the language model inside a model."""
    config: Any = model.config
    return str(config.get_text_config().model_type)


def _take_form_away(config: Any) -> None:
    """Let a config no longer say how its weights are quantised: transformers would keep that form."""
    for place in (config, config.get_text_config()):
        if hasattr(place, "quantization_config"):
            del place.quantization_config


def _ready_four_bit(model: torch.nn.Module, own: bool) -> None:
    """Prepare a quantised model for training; refuse one that was to be quantised here and was not."""
    if not own:
        _require_rounded(model)
    _keep_packing(model)
    _keep_modules_called(model)


def _require_rounded(model: torch.nn.Module) -> None:
    """Refuse a model of which nothing is in 4 or 8 bits: QLoRA would be plain LoRA there, and nobody would be told.

    Raises:
        BadInput: No layer was quantised.
    """
    if not four_bit_parameters(model) and not any(hasattr(p, "SCB") for p in model.parameters()):
        why = "No layer of this model could be quantised to 4 bits: bitsandbytes converts torch.nn.Linear only"
        raise BadInput(f"{why}. Use method lora.")


def _keep_packing(model: torch.nn.Module) -> None:
    """Keep 4-bit weights on a CPU in the one layout that training and merging understand.

    bitsandbytes 0.50 repacks them for AVX512-BF16 at the first forward pass in evaluation mode. From then on its matrix
    product has no gradient (`matmul_4bit` calls `gemv_4bit`): after a held-out evaluation nothing would be trained.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _keep_modules_called(model: torch.nn.Module) -> None:
    """Keep layers from handing quantised weights to a fused kernel that would read them as plain numbers.

    They do so in training mode only (`self.training` in the forward of transformers' Mamba layers), so such a layer
    itself stays in evaluation mode, in which it calls its modules. It has no dropout of its own.

    Raises:
        BadInput: A weight that the layer reads in evaluation mode, too, is quantised in the model's files.
    """
    family = family_of(model)
    names, numbers = read_past(family), kept_16bit(family)
    for module in model.modules():
        # Both kinds of quantised weights; those in 4 bits may be stored as floating-point numbers.
        held = {
            name
            for name, child in module.named_children()
            if name in (names.keys() | numbers)
            and (hasattr(child.weight, "quant_state") or not child.weight.is_floating_point())
        }
        if broken := sorted(held & numbers):
            raise BadInput(
                f"This base's {' and '.join(broken)} are quantised, and a {family} model multiplies with their weights "
                "as if they were plain numbers. Use the original 16-bit model."
            )
        if held:
            module.training = False
            module.train = partial(_train_children, module)  # type: ignore[method-assign]


def _train_children(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    for child in module.children():
        child.train(mode)
    return module


def _shown(folder: Path) -> str:
    return plain(str(folder), one_line=True)
