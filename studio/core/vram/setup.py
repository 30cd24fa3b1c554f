"""What besides the model decides how many bytes a step needs: the recipe's choices, as our loop takes them."""

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from studio.core.gpu_catalogue import Gpu, sixteen_bit
from studio.core.layer_precision import Table, in_sixteen_bit
from studio.core.preferences import takes_pairs
from studio.core.quantised_base import QuantisedBase
from studio.core.recipe import (
    FIELDS,
    Attention,
    Loss,
    Method,
    Objective,
    OnOom,
    Optimizer,
    OrAuto,
    Recipe,
    Recompute,
    Stream,
)
from studio.core.trainable import AdaptedPart
from studio.core.value_kinds import ALL_LINEAR

Engine = Literal["studio", "hf"]
PRODUCT_BY_KERNEL = 1536
"""Most rows that bitsandbytes may multiply with a 4-bit weight by one kernel, without dequantising it first
(backends/cuda/ops.py _gemm_4bit_custom_max_m). To keep a dequantised weight saves nothing there."""
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Attributes:
        engine: Whose loop it is.
        method: LoRA on 16- or 32-bit weights, or QLoRA on 4-bit ones.
        rank: Adapter rank.
        targets: Adapted linear maps.
        rank_pattern: Other ranks by module name (peft's `rank_pattern`).
        layers: Numbers of the adapted layers, empty for all.
        dropout: Adapter dropout probability.
        dora: Whether the adapter learns magnitudes.
        objective: What is learnt: answers, or from pairs of them, of which each holds two sequences.
        micro_batch: Rows at once; a pair of answers is one.
        seq_len: Tokens per sequence; every one is taken to be full.
        accumulation: Micro-batches per optimizer step; above 1 gradients are alive while the next one runs.
        optimizer: Which AdamW.
        recompute: Which layers are computed again in the backward: all, none, or so many from the first that has an
            adapter. `auto` counts as all until `studio.core.placement.auto` has made it a number.
        keep_dequantised: Whether a 4-bit layer that is computed again keeps what is dequantised for its backward;
            `auto` counts as no until it has been decided.
        attention: Fused kernels or S x S matrices.
        loss: Whole logits, or a head taken in chunks (by this program's loop or by liger's kernel).
        compile: Whether layers are compiled; they then take long rows whole, not in tiles.
        offload_checkpoints: Whether the layers' inputs wait for the backward in host memory.
        modules_to_save: Modules trained whole, beside the adapter (peft's `modules_to_save`).
        precision: Which linear maps of a quantised base are held in other bits than the others.
        quant_type: How quantised weights are held; int8 (LLM.int8) in other loops than ours.
        device: `cpu` counts the tensors of a run on a CPU: no workspaces, no context, no segments.
        dtype: Format of frozen weights and of matrix products: bf16, fp16 or fp32.
        double_quant: Whether the 4-bit scales are quantised again.
        gpus: Data-parallel replicas; each holds everything.
        stream: How many layers' weights wait in main memory. `auto` counts as none until it has been made a number.
        on_oom: `shrink` copies what is trained during each optimizer's step on a CPU, which may fail half-way there.
    """

    engine: ClassVar[Engine] = "studio"

    method: Method = "qlora"
    rank: int = 16
    targets: str | tuple[str, ...] = ALL_LINEAR
    rank_pattern: tuple[tuple[str, int], ...] = ()
    layers: tuple[int, ...] = ()
    dropout: float = 0.0
    dora: bool = False
    objective: Objective = "sft"
    micro_batch: int = 1
    seq_len: int = 1024
    accumulation: int = 1
    optimizer: Optimizer = "adamw_torch"
    recompute: Recompute = "all"
    keep_dequantised: OrAuto = False
    attention: Attention = "sdpa"
    loss: Loss = "chunked"
    compile: bool = False
    offload_checkpoints: bool = False
    modules_to_save: tuple[str, ...] = ()
    precision: Table = ()
    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    double_quant: bool = True
    gpus: int = 1
    stream: Stream = "off"
    on_oom: OnOom = "stop"

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        of: Any = type(self)
        return hash(_getters(of).values(self))

    @cached_property
    def kind(self) -> Self:
        """This set-up without the numbers that sliders move; it keeps only whether a micro-batch has several rows.

        All set-ups of a kind share one object: what does not depend on the numbers is cached by it.
        """
        of: Any = type(self)
        kind: Self = _kind(of, _getters(of).choices(self), self.micro_batch > 1)
        return kind

    @cached_property
    def adapted(self) -> AdaptedPart:
        """What is trained."""
        return AdaptedPart(
            self.targets,
            self.rank,
            self.rank_pattern,
            self.layers,
            self.dora,
            self.modules_to_save,
            as_peft=self.engine == "hf",
        )

    @property
    def paired(self) -> bool:
        """Whether a row is a pair of answers."""
        return takes_pairs(self.objective)

    @property
    def sequences(self) -> int:
        """Sequences of a micro-batch: its rows, or both of every pair."""
        return self.micro_batch * (1 + self.paired)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequences * self.seq_len

    @property
    def squares(self) -> int:
        """Entries of one head's attention matrices in a micro-batch."""
        return self.sequences * self.seq_len * self.seq_len

    @cached_property
    def quantised(self) -> bool:
        """Whether linear maps hold 4- or 8-bit weights."""
        return self.method == "qlora"

    @property
    def streamed(self) -> int:
        """How many layers are streamed, at most."""
        return self.stream if isinstance(self.stream, int) else 0

    @cached_property
    def compute_itemsize(self) -> int:
        """Bytes per element of matrix products."""
        return ITEMSIZES[self.dtype]

    @cached_property
    def recomputes(self) -> bool:
        """Whether any layer is computed again in the backward, from the input that it kept (a checkpoint)."""
        return self.recompute != "none"

    def recomputed_of(self, layers: int) -> int:
        """Return how many of so many layers are computed again."""
        if isinstance(self.recompute, int):
            return min(self.recompute, layers)
        return layers if self.recomputes else 0

    @property
    def keeps_dequantised(self) -> bool:
        """Whether layers that are computed again keep their dequantised weights in a micro-batch of this size."""
        again = self.quantised and self.recomputes and not (self.compile or self.dora)
        return self.keep_dequantised is True and again and self.tokens > PRODUCT_BY_KERNEL

    @property
    def autocast(self) -> bool:
        """Whether the forward runs under autocast."""
        return self.dtype != "fp32"

    @property
    def residual_itemsize(self) -> int:
        """Bytes per element of everything not quantised."""
        return self.compute_itemsize

    @property
    def embedding_itemsize(self) -> int:
        """Bytes per weight of embedding and head."""
        return self.compute_itemsize

    @property
    def separate_experts(self) -> bool:
        """Whether the experts of a mixture are linear maps of their own, which bitsandbytes quantises."""
        return False

    @property
    def packs_experts(self) -> bool:
        """Whether fused experts are held in 4 bits, too."""
        return self.quantised and self.engine == "studio"


_NUMBERS = ("rank", "micro_batch", "seq_len", "accumulation", "rank_pattern")
_Either = TypeVar("_Either", bound=Setup)


class _Getters(NamedTuple):
    """What reads the fields of a class of set-ups."""

    values: "attrgetter[tuple[Any, ...]]"
    choices: "attrgetter[tuple[Any, ...]]"
    choice_names: tuple[str, ...]


@lru_cache(maxsize=8)
def _getters(of: Any) -> _Getters:
    names = tuple(field.name for field in fields(of))
    choices = tuple(name for name in names if name not in _NUMBERS)
    return _Getters(attrgetter(*names), attrgetter(*choices), choices)


@lru_cache(maxsize=512)
def _kind(of: Any, choices: tuple[Any, ...], batched: bool) -> Any:
    return of(**dict(zip(_getters(of).choice_names, choices, strict=True)), micro_batch=1 + batched)


def as_it_lies(setup: _Either, base: QuantisedBase | None) -> _Either:
    """Return the set-up with the form that a 4-bit base already has; the same set-up for any other base, or for LoRA.

    transformers lets a model's own quantization_config win (quantizers/auto.py merge_quantization_configs). Our engine
    refuses weights that are quantised otherwise: for them the plan is for the 16-bit original.
    """
    if base is None or not base.in_four_bits or not setup.quantised:
        return setup
    laid: _Either = _as_it_lies(setup, base)
    return laid


@lru_cache(maxsize=256)
def _as_it_lies(setup: Any, base: QuantisedBase) -> Any:
    kept = in_sixteen_bit(base.skipped)
    return replace(setup, quant_type=base.quant_type, double_quant=base.double_quant, precision=kept)


_OWN = {field.name for field in fields(Setup)} - {"dtype", "device"}
_TAKEN = {name: path for path in FIELDS if (name := path.rpartition(".")[2]) in _OWN}
"""The fields that a set-up takes from the recipe unchanged, as name and path. `setup_of` works out `dtype` and
`device`, which the recipe may leave open."""
_taken = attrgetter(*_TAKEN.values())


def setup_of(recipe: Recipe, gpu: Gpu | None = None) -> Setup:
    """Return the set-up of this program's own engine for a recipe.

    Args:
        recipe: What is wanted.
        gpu: The card, for a dtype of `auto`; None where it is not known, or there is none.
    """
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = sixteen_bit(gpu.compute_capability if gpu else None)
    taken: dict[str, Any] = dict(zip(_TAKEN, _taken(recipe), strict=True))
    return Setup(**taken, dtype=dtype, device="cpu" if recipe.device.device == "cpu" else "cuda")
