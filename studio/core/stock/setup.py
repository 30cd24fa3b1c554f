"""What is chosen in a stock loop (transformers' model and loss, peft, bitsandbytes), and the versions that differ."""

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import ClassVar

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import Gpu
from studio.core.quantised_base import BITSANDBYTES, QuantisedBase
from studio.core.shape import ModelShape, with_separate_experts
from studio.core.stock.modules import FusedKernels
from studio.core.text import plain
from studio.core.vram.setup import Engine, Setup, as_it_lies

UPCAST_BELOW, SHIFT_COPIED_BELOW, FUSED_EXPERTS_FROM, REENTRANT_BELOW = (4, 46), (4, 49), (5, 0), (5, 0)
"""Versions of transformers. Below the first the model itself casts its logits to fp32. Below the second the loss copies
them to drop the last token. From the third on the experts of a layer are one tensor, before that separate modules.
Below the last checkpoints are of torch's older kind (`use_reentrant=True`) unless a script asks otherwise (read in the
sources of 4.43.3, 4.45.2, 4.48.1, 4.49.0, 4.50.3 and 5.24: loss/loss_utils.py, modeling_mistral.py, modeling_mixtral.py
and modeling_utils.py gradient_checkpointing_enable; transformers pull request 43203)."""

ALWAYS_FUSED = frozenset({"gpt_oss", "granitemoe", "llama4_text"})
"""Families whose experts were one tensor from their first version on (GraniteMoeParallelExperts, GptOssExperts,
Llama4TextExperts)."""

_ROTARY_TABLES_BELOW = (4, 48)
"""Below this version every layer of Mixtral held cosines and sines of all its positions (modeling_mixtral.py of 4.45.2;
4.48.1 has none): 512 MiB of the 8x7B model, seen in published runs to 16 KiB."""

REPEATS_BELOW = {"sdpa": (4, 54), "flash_attention_2": (4, 48)}
_REPEATING = frozenset({"mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "starcoder2"})
"""Below these versions keys and values were repeated for every query head before a kernel that needs no such thing:
sdpa's always (transformers pull request 39412), the flash-attn package's in these families (modeling_mistral.py of
4.45.2, MistralFlashAttention2)."""

TRUTHS_FROM = (4, 53)
"""From this version on sdpa's masks are boolean; before, they were numbers (masking_utils.py, which 4.52.4 lacks)."""

THREADED_FROM = (5, 0)
"""From this version on weights are read in threads, ahead of their quantisation (core_model_loading.py). From 5.5 on
weights are quantised one after another there. But seven published rows that name 5.17 reserved what threads leave
behind, so these versions count as threaded too. If the archive names the wrong version, that is a few per cent too much
for models with a large embedding."""

UPCASTS_LOGITS, COPIES_LOGITS, NEWEST = "4.45", "4.48", "5.24"
"""An unstated version counts as the newest; where its loss matters, the others are tried as well."""


@dataclass(frozen=True)
class StockSetup(Setup):
    """How a model is trained in a stock loop.

    Attributes:
        kbit_prepare: Whether peft's `prepare_model_for_kbit_training` upcasts everything not quantised to fp32.
        head_cast_back: Whether embedding and head go back to 16 bit after that upcast (TRL's SFTTrainer in bf16).
        autocast: Whether the forward runs under autocast.
        outputs_kept: Whether the loop holds the model's outputs, logits among them, during the backward.
        transformers: Version of transformers whose loss runs, such as `4.48.1`; empty where it is not known.
        fused_kernels: Fused kernels in place of the model's own operators.
    """

    engine: ClassVar[Engine] = "hf"

    kbit_prepare: bool = False
    head_cast_back: bool = False
    autocast: bool = True
    outputs_kept: bool = False
    transformers: str = ""
    fused_kernels: FusedKernels = "none"

    __hash__ = Setup.__hash__

    @cached_property
    def residual_itemsize(self) -> int:
        """Bytes per element of everything not quantised."""
        return 4 if self.quantised and self.kbit_prepare else self.compute_itemsize

    @cached_property
    def embedding_itemsize(self) -> int:
        """Bytes per weight of embedding and head."""
        return self.compute_itemsize if self.head_cast_back else self.residual_itemsize

    @property
    def separate_experts(self) -> bool:
        """Whether the experts of a mixture are linear maps of their own, as before transformers 5."""
        return self.transformers.startswith("4.")

    @property
    def version(self) -> tuple[int, int]:
        """Version of transformers; an unstated one counts as the newest."""
        return version_of(self.transformers or NEWEST)


def stock_setup(
    setup: Setup,
    *,
    kbit_prepare: bool | None = None,
    head_cast_back: bool = False,
    autocast: bool | None = None,
    outputs_kept: bool | None = None,
    transformers: str = "",
    fused_kernels: FusedKernels = "none",
    gpu: Gpu | None = None,
) -> StockSetup:
    """Return the same training in the stock loop.

    Unstated settings are those of the loops whose measurements were published. In fp16 on a card without bf16 that is a
    plain loop without autocast, which holds the model's outputs through the backward (25 rows of a T4). Otherwise it is
    the Trainer, with autocast on 4-bit weights and without it on 16-bit ones (9 rows of an A100, 8 of an L40S). The
    estimate's range covers the other loops.

    Args:
        setup: What is trained, and how.
        kbit_prepare: peft's upcast; QLoRA scripts call it by habit.
        head_cast_back: Whether embedding and head go back to 16 bit after it, as TRL's SFTTrainer does in bf16.
        autocast: The Trainer's `bf16=True` or `fp16=True`.
        outputs_kept: Whether the loop holds the logits while it runs the backward.
        transformers: Version of transformers; for an unstated one the loss counts as the mean of two kinds.
        fused_kernels: Kernels that stand in for the model's own operators.
        gpu: The card, where known.

    Raises:
        BadInput: `transformers` is no version, or the objective or a part of the layers recomputed is not priced.
    """
    if setup.paired:
        raise BadInput(f"--engine hf prices supervised training alone; found train.objective {setup.objective}")
    if isinstance(setup.recompute, int):
        raise BadInput(f"--engine hf checkpoints all layers or none; found train.recompute {setup.recompute}")
    quantised = setup.method == "qlora"
    plain_loop = setup.dtype == "fp16" and (gpu is None or not gpu.bf16)
    wanted_autocast = quantised and not plain_loop if autocast is None else autocast
    if transformers:
        version_of(transformers)
    same = {field.name: getattr(setup, field.name) for field in fields(Setup)}
    return StockSetup(
        # The Trainer knows none of them.
        **same | {"recompute": "all" if setup.recomputes else "none", "stream": "off", "keep_dequantised": False},
        kbit_prepare=quantised if kbit_prepare is None else kbit_prepare and quantised,
        head_cast_back=head_cast_back and quantised and setup.compute_itemsize == 2,
        autocast=wanted_autocast and setup.dtype != "fp32",
        outputs_kept=plain_loop if outputs_kept is None else outputs_kept,
        transformers=transformers,
        fused_kernels=fused_kernels,
    )


@lru_cache(maxsize=256)
def copying_logits(setup: StockSetup) -> StockSetup:
    """Return the same kind of loop in a version of transformers with another loss than the newest.

    Most hold more then, for they copy the logits. foak copies them in every version, and holds less where the model
    itself makes them fp32.
    """
    return replace(setup, transformers=UPCASTS_LOGITS if setup.fused_kernels == "foak" else COPIES_LOGITS).kind


def built(shape: ModelShape, setup: StockSetup) -> ModelShape:
    """Return the shape as the set-up's version of transformers builds it."""
    if not setup.transformers or version_of(setup.transformers) >= FUSED_EXPERTS_FROM:
        return shape
    if shape.family == "mixtral" and version_of(setup.transformers) < _ROTARY_TABLES_BELOW:
        shape = _with_rotary_tables(shape)
    return shape if shape.family in ALWAYS_FUSED else with_separate_experts(shape)


@lru_cache(maxsize=16)
def _with_rotary_tables(shape: ModelShape) -> ModelShape:
    return replace(shape, buffers=2 * shape.layers * shape.positions * shape.head_dim)


def as_it_lies_here(setup: StockSetup, base: QuantisedBase | None) -> StockSetup:
    """Return the set-up with the form that a base quantised by bitsandbytes already has, in 4 or in 8 bits."""
    if base is not None and base.method == BITSANDBYTES and base.bits == 8 and setup.quantised:
        return _in_eight_bits(setup)
    return as_it_lies(setup, base)


@lru_cache(maxsize=256)
def _in_eight_bits(setup: StockSetup) -> StockSetup:
    return replace(setup, quant_type="int8")


def loads_in_threads(setup: Setup) -> bool:
    """Whether a loop reads weights in threads: ours does, and the stock loop in newer versions of transformers."""
    return not isinstance(setup, StockSetup) or setup.version >= THREADED_FROM


def repeats_heads(shape: ModelShape, setup: StockSetup) -> bool:
    """Whether a version of transformers repeats keys and values for every query head; an unstated one does not."""
    below = REPEATS_BELOW.get(setup.attention)
    if not setup.transformers or below is None or setup.version >= below:
        return False
    return setup.attention == "sdpa" or shape.family in _REPEATING


@lru_cache(maxsize=64)
def version_of(text: str) -> tuple[int, int]:
    """Return major and minor of a version.

    Raises:
        BadInput: It is no version.
    """
    found = re.match(r"(\d{1,4})\.(\d{1,4})(\.|$)", text, re.ASCII)
    if found is None:
        shown = plain(text, one_line=True, limit=40)
        raise BadInput(f"the version of transformers is {shown!r}; wanted one such as 4.48.1 or 5.24")
    return int(found[1]), int(found[2])
