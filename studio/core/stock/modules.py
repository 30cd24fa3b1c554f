"""Modules and losses of stock loops, as sizes: 8-bit products, experts one by one, fused kernels, transformers' loss.

`liger` are liger-kernel's kernels (ops/rms_norm.py, rope.py, swiglu.py), which the Trainer's `use_liger_kernel` puts
in; `foak` are fms-acceleration's "fused ops and kernels", taken from early Unsloth (fms_acceleration_foak:
fused_ops/unsloth_lora/bnb/fast_lora.py, kernels/unsloth/rms_layernorm.py and rope_embedding.py). foak fuses adapters on
4-bit weights alone (framework_plugin_fast_kernels.py: "fused_lora only required for quant-peft"). They differ in what
they keep for the backward, and in what they write their gradients over.

Other sources: transformers/loss/loss_utils.py ForCausalLMLoss, bitsandbytes/autograd/_functions.py (0.50).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from studio.core.errors import BadInput
from studio.core.layer_parts import Linear
from studio.core.shape import Layer, ModelShape
from studio.core.trainable import AS_PEFT
from studio.core.vram import operators as op
from studio.core.vram.head import cross_entropy, logits_of
from studio.core.vram.modules import LayerTraits, Modules
from studio.core.vram.polynomial import NOTHING, Polynomial, total
from studio.core.vram.tape import Node, Tape, Tensor

FusedKernels = Literal["none", "liger", "foak"]

KERNEL_FAMILIES: Mapping[str, frozenset[str]] = {
    "foak": frozenset({"gpt_bigcode", "granite", "granitemoe", "llama", "mistral", "mixtral"}),
    "liger": frozenset(
        {"gemma", "gemma2", "gemma3_text", "glm4", "granite", "hunyuan_v1_dense", "llama", "ministral", "mistral"}
        | {"mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
    ),
}
"""Model types that each has kernels for (fms_acceleration_foak/models, liger_kernel/transformers/monkey_patch.py)."""

_OWN_LOSS = frozenset({"bloom", "falcon", "gpt_bigcode", "gpt_neox", "stablelm"})
"""Families whose own code shifted the logits and called a loss (read in modeling_*.py of 4.45.2 and 4.48.1)."""


def check_kernels(shape: ModelShape, kernels: FusedKernels, *, fused_loss: bool) -> None:
    """Raise where there are no such kernels for a model.

    Args:
        shape: The model.
        kernels: Which kernels.
        fused_loss: Whether the loss is to be fused with the head.

    Raises:
        BadInput: There are none.
    """
    if kernels != "none" and shape.family not in KERNEL_FAMILIES[kernels]:
        known = ", ".join(sorted(KERNEL_FAMILIES[kernels]))
        raise BadInput(
            f"{kernels} has no kernels for {shape.family}; leave --fused-kernels out. It has some for {known}"
        )
    if kernels == "liger" and shape.family == "granite" and fused_loss:
        raise BadInput("liger has no fused loss for granite, which scales its logits; add --loss full")


@dataclass(frozen=True)
class StockTraits(LayerTraits):
    """How a layer of a stock loop is computed.

    Attributes:
        fused_kernels: Which fused kernels stand in for the model's own operators.
    """

    fused_kernels: FusedKernels = "none"

    def modules(self, tape: Tape, shape: ModelShape, *, checkpointed: bool = False) -> "StockModules":
        """Return the modules of one symbolic pass."""
        return StockModules(tape, shape, self, checkpointed)

    def fuses_adapters(self, maps: tuple[Linear, ...]) -> bool:
        """Whether one function holds the adapters of these maps: foak's, on 4-bit weights, where all are targets."""
        return (
            self.fused_kernels == "foak"
            and self.quantised in ("nf4", "fp4")
            and not self.adapter.dora
            and all(linear.name in self.adapter.targets for linear in maps)
        )


@dataclass
class StockModules(Modules):
    """The modules of a layer as stock loops have them."""

    traits: StockTraits

    def linears(self, layers: tuple[Linear, ...], x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of linear layers of one input, by one function where their adapters are fused."""
        if self.traits.fuses_adapters(layers):
            return adapted_linears(self, layers, x)
        return super().linears(layers, x)

    def base_linear(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Return the product with a frozen weight."""
        if self.traits.quantised == "int8":
            return self._int8_linear(layer, x, visits)
        return super().base_linear(layer, x, visits)

    def _int8_linear(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Return bitsandbytes' 8-bit product (autograd/_functions.py MatMul8bitLt, backends/cuda/ops.py).

        It quantises an fp16 copy of its input, sums in int32, and makes an fp16 result of that before its own. The
        16-bit products of outliers are left out, because nobody knows which inputs count as outliers. Its backward
        dequantises the whole weight. It keeps its input as an attribute of its context: a checkpoint of torch's newer
        kind, which drops what is saved with `save_for_backward`, never sees it, so that the input of every layer stays
        (seen on a CPU, tests/jobs/test_int8_keeps.py).
        """
        outputs, narrow = Polynomial(per_token=layer.outputs * visits), self.traits.half and x.itemsize == 2
        copied, escapes = 0 if narrow else 2, self.checkpointed and not self.traits.recomputes_whole
        # Beside its copy: 8-bit rows, magnitudes, where they are outliers.
        self.tape.passing(x.elements.times(copied + 4))
        self.tape.passing(x.elements, outputs.times(4 if narrow else 6))
        if escapes and not self.tape.records:
            self.keep_beside(x)
        weight = Polynomial(fixed=layer.inputs * layer.outputs * x.itemsize)
        return op.frozen_linear(x, outputs, works=(weight,), works_forward=False, keeps_input=not escapes)

    def adapted_base(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Return what a quantised layer's adapter adds to: peft does not clone the result of 8-bit weights."""
        if self.traits.quantised == "int8":
            return self.base_linear(layer, x, visits)
        return super().adapted_base(layer, x, visits)

    def rms_norm(self, layer: Layer, x: Tensor) -> Tensor:
        """Return an RMS norm over the hidden size."""
        if self.traits.fused_kernels == "none":
            return super().rms_norm(layer, x)
        return rms_norm(x, 1, over_gradient=layer.wiring not in ("post", "sandwich"))

    def head_norm(self, layer: Layer, x: Tensor, groups: float) -> Tensor:
        """Return an RMS norm of queries or keys."""
        if self.traits.fused_kernels == "none":
            return super().head_norm(layer, x, groups)
        return rms_norm(x, groups, over_gradient=layer.norm != "rms_wide")

    def rotate(self, layer: Layer, x: Tensor) -> Tensor:
        """Return queries or keys turned by their positions."""
        if self.traits.fused_kernels != "none" and layer.rotary == 1 and not layer.rotary_wide:
            return rotate(x)
        return super().rotate(layer, x)

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """Return a dense MLP's output."""
        if not layer.gated:
            return super().mlp(layer, x)
        if len(layer.mlp) == 3 and self.traits.fuses_adapters(layer.mlp):
            return adapted_mlp(self, layer.mlp, x)
        if self.traits.fused_kernels != "liger":
            return super().mlp(layer, x)
        if len(layer.mlp) == 3:
            gate, up, down = layer.mlp
            return self.linear(down, gated_product(self.linear(gate, x), self.linear(up, x)))
        gate_states, up_states = op.split_last(self.linear(layer.mlp[0], x), (0.5, 0.5))
        # The kernel needs each half contiguous.
        out = self.linear(layer.mlp[1], gated_product(op.clone(gate_states), op.clone(up_states)))
        self.tape.named(gate_states)
        return out

    @property
    def groups_experts(self) -> bool:
        """Whether routed experts are multiplied in groups: transformers does not do so."""
        return False

    def whole_experts(self, layer: Layer, x: Tensor) -> Tensor:
        """Return what the experts make of the tokens that come to them."""
        if not layer.expert_maps or layer.experts is None:
            experts = layer.experts
            adapted = experts is not None and experts.adapted_by_all and AS_PEFT in self.traits.adapter.targets
            return self._merged_experts(layer, x) if adapted else super().whole_experts(layer, x)
        # One after another, each on its share of the tokens (transformers below 5, MixtralSparseMoeBlock).
        gate, up, down = layer.expert_maps
        share = layer.experts.per_token / layer.experts.count
        summed = Tensor(self.tape, x.elements, x.itemsize)
        for _ in range(layer.experts.count):
            rows = op.gather(x, share)
            activated = op.activate(self.linear(gate, rows, share))
            inner = op.multiply(activated, self.linear(up, rows, share))
            out = self.linear(down, inner, share)
            weight = op.mean_last(rows, Polynomial(per_token=share))
            summed = op.add_rows(summed, op.cast(op.multiply_rows(out, weight), summed.itemsize))
            self.tape.named(rows, inner, out, weight)
        return summed

    def _merged_experts(self, layer: Layer, x: Tensor) -> Tensor:
        """Follow peft's ParamWrapper, which adds the adapter's whole product to the fused weights before they are used.

        Gate and up are one tensor, down another, and both live until the layer is done.
        """
        experts, tape = layer.experts, self.tape
        assert experts is not None  # noqa: S101  the caller looked
        third = Polynomial(fixed=experts.weights(self.shape.hidden) / 3)
        merged = [Tensor(tape, third.times(share), self.traits.arithmetic.compute) for share in (2, 1)]
        rows = op.cast(op.gather(x, experts.per_token), self.traits.arithmetic.compute)
        both = op.frozen_linear(rows, Polynomial(per_token=2 * experts.inner * experts.per_token))
        self._saves_merged(both, rows, merged[0])
        gates, ups = op.split_last(both, (0.5, 0.5))
        product = op.multiply(op.activate(gates), ups)
        down = op.frozen_linear(product, Polynomial(per_token=self.shape.hidden * experts.per_token))
        self._saves_merged(down, product, merged[1])
        shares = op.mean_last(x, Polynomial(per_token=experts.per_token))
        out = op.cast(op.gather(op.multiply_rows(down, shares), 1 / experts.per_token), x.itemsize)
        tape.named(*merged, rows, both, product, down, shares)
        return out

    def _saves_merged(self, product: Tensor, x: Tensor, weight: Tensor) -> None:
        """Save input and weight of a product; the weight's gradient is as large, and is handed to the adapter."""
        if product.node is not None:
            self.tape.saves(product.node, x, weight)
            product.node.works = (weight.bytes,)


def rms_norm(x: Tensor, groups: float, *, over_gradient: bool) -> Tensor:
    """Return an RMS norm in one kernel: it saves its input and one fp32 number per row.

    Args:
        x: What is normed.
        groups: Norms per token.
        over_gradient: Whether its gradient is written over the one that comes in; a norm after a block, whose incoming
            gradient the residual still needs, gets a new one.
    """
    inverse = Tensor(x.tape, Polynomial(per_token=groups), 4)
    gradient = None if over_gradient else op.gradient_like(x)
    return op.result_of((x,), x.elements, x.itemsize, (gradient,), (x, inverse))


def rotate(x: Tensor) -> Tensor:
    """Return rotary positions applied in place; so is their gradient."""
    return op.result_of((x,), x.elements, x.itemsize, (None,), base=x)


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return `act(gate) * up`: both are saved, and their gradients are written over them."""
    return op.result_of((gate, up), gate.elements, gate.itemsize, (0, 1), (gate, up))


def _product(run: Modules, linear: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x @ W + dropout(x) @ A @ B`, added in place, and what the adapter saw of x.

    The weight is dequantised whole for its product; each map drops x anew, and its copy is kept.
    """
    tape, compute = run.tape, run.traits.arithmetic.compute
    dequantised = Tensor(tape, Polynomial(fixed=compute * linear.inputs * linear.outputs), 1)
    result = Tensor(tape, Polynomial(per_token=linear.outputs), x.itemsize)
    tape.named(dequantised)
    seen = Tensor(tape, x.elements, x.itemsize) if run.traits.adapter.dropout else x
    tape.passing(result.bytes)
    tape.named(result)
    return result, seen


def _trained_node(
    run: Modules,
    maps: tuple[Linear, ...],
    gradient: tuple[Polynomial, float] | int,
    saved: tuple[Tensor, ...],
    works: tuple[Polynomial, ...],
) -> Node | None:
    """Return a node that makes the gradients of the adapters and, where it wants one, of the input: `saved[0]`."""
    if not run.tape.records:
        return None
    node = run.tape.node((saved[0].node,), (gradient,), saved, works)
    node.trained = (total(Polynomial(per_rank=linear.inputs + linear.outputs) for linear in maps),), run.gradients
    return node


def adapted_linears(run: Modules, maps: tuple[Linear, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs of one function over the adapted maps of one input (LoRA_QKV, LoRA_W).

    It saves its input and what each adapter saw of it. The gradient is summed over the maps beside a mask of what was
    dropped and two products; LoRA_QKV writes it over its own input, LoRA_W makes a new one.
    """
    pairs = [_product(run, linear, x) for linear in maps]
    outs = tuple(out for out, _ in pairs)
    seen = tuple(dropped for _, dropped in pairs if dropped is not x)
    shared = len(maps) > 1
    gradient = 0 if shared else op.gradient_like(x)
    node = _trained_node(run, maps, gradient, (x, *seen), (x.elements, x.bytes, x.bytes))
    for out in outs:
        out.node = node
    if node is not None:
        node.apart = shared
    run.tape.named(x, *outs, *seen)
    return outs


def adapted_mlp(run: Modules, maps: tuple[Linear, ...], x: Tensor) -> Tensor:
    """Return `down(act(gate(x)) * up(x))` as one function with all three adapters (LoRA_MLP).

    It saves gate, up, the input, and what the three adapters saw. Its backward makes the inner gradient, twice while
    the adapter's part is added, and writes all else over what was saved.
    """
    (gate, seen_gate), (up, seen_up) = (_product(run, linear, x) for linear in maps[:2])
    inner = Tensor(run.tape, gate.elements, gate.itemsize)
    out, seen_inner = _product(run, maps[2], inner)
    run.tape.named(inner)
    seen = tuple(dropped for dropped in (seen_gate, seen_up) if dropped is not x)
    works = (gate.elements, gate.bytes, gate.bytes)
    out.node = _trained_node(run, maps, 0, (x, gate, up, seen_inner, *seen), works)
    run.tape.named(x, gate, up, seen_inner, *seen)
    return out


@dataclass(frozen=True, slots=True)
class TransformersLoss:
    """transformers' own loss, of whole logits.

    Attributes:
        outputs_kept: Whether the loop holds the model's outputs, and so the logits, while it runs the backward.
        upcast_outputs: Whether those logits are fp32 already (transformers up to 4.45: `logits = logits.float()`).
        shift_copied: Whether the fp32 logits are copied to drop the last token of several rows (transformers up to
            4.48: `logits[..., :-1, :].contiguous()`; later the labels are shifted instead).
        overwrites: Whether one kernel makes the loss of the fp32 logits and writes their gradient over them.
        by_model: Whether models that bring a loss of their own still use it (transformers up to 4.48): it leaves the
            logits in the head's format.
        shifted: Share of the logits that is left when the last token of each row is dropped.
    """

    outputs_kept: bool = False
    upcast_outputs: bool = False
    shift_copied: bool = False
    overwrites: bool = False
    by_model: bool = False
    shifted: float = 1.0
    in_chunks: ClassVar[bool] = False

    def forward(self, run: Modules, hidden: Tensor) -> Tensor:
        """Return the loss."""
        logits = logits_of(run, hidden)
        if self.by_model and run.shape.family in _OWN_LOSS:
            value = self._of_model(run, logits)
        else:
            if self.upcast_outputs:
                logits = op.cast(logits, 4)
            value = self._in_fp32(logits)
        if run.traits.arithmetic.autocast and not self.outputs_kept:
            # accelerate gives the outputs of an autocast forward back in fp32 (ConvertOutputsToFp32).
            op.cast(logits, 4)
        run.tape.named(logits)
        if self.outputs_kept:
            run.keep(logits)
        return value

    def _in_fp32(self, logits: Tensor) -> Tensor:
        """Return the loss of logits that are made fp32 first, as transformers' own loss function does."""
        wide = op.cast(logits, 4)
        shifted = self._shifted(wide)
        value = _overwritten(shifted) if self.overwrites else cross_entropy(shifted)
        wide.tape.named(wide, shifted)
        return value

    def _of_model(self, run: Modules, logits: Tensor) -> Tensor:
        """Return the loss of models that bring their own: the copy is of the head's format, and autocast widens it."""
        shifted = self._shifted(logits)
        if self.overwrites:
            return _overwritten(shifted)
        value = cross_entropy(op.cast(shifted, 4) if run.traits.arithmetic.autocast else shifted)
        run.tape.named(shifted)
        return value

    def _shifted(self, logits: Tensor) -> Tensor:
        return op.clone(op.slice_last(logits, self.shifted)) if self.shift_copied else logits

    def chunk_bytes(self, shape: ModelShape, traits: LayerTraits, tokens: int) -> int:
        """Return 0: there are no chunks."""
        return 0


def _overwritten(logits: Tensor) -> Tensor:
    """Return a loss whose gradient is written over the logits that it saved."""
    return op.result_of((logits,), NOTHING, 4, (0,), (logits,))
