"""The modules of a decoder layer, written with symbolic tensors in the order of the real code.

Sources: transformers/models/*/modeling_*.py and activations.py, peft/tuners/lora/layer.py, bnb.py and dora.py
(transformers 5.24, peft 0.21, bitsandbytes 0.50).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from studio.core.layer_parts import Linear
from studio.core.shape import EXPERTS_DOWN, EXPERTS_UP, Layer, ModelShape
from studio.core.trainable import HEAD
from studio.core.vram import fused
from studio.core.vram import operators as op
from studio.core.vram.elementwise import activated, centred_norm, rms_norm, rotated, sparse
from studio.core.vram.operators import Arithmetic
from studio.core.vram.polynomial import NOTHING, Polynomial
from studio.core.vram.tape import Tape, Tensor

Kernel = Literal["flash", "efficient", "efficient_masked", "eager", "cpu"]
"""Which attention runs. `efficient_masked`: the memory-efficient kernel takes only masks of numbers, so that each layer
makes one of the boolean mask."""


@dataclass(frozen=True, slots=True)
class AdapterTraits:
    """What stands beside the linear layers.

    Attributes:
        targets: Names of the adapted linear layers.
        dropout: Whether dropout is applied to its inputs.
        dora: Whether it learns magnitudes.
        casts_inputs: Whether peft casts each adapted layer's input to the adapter's fp32 (its default).
        whole: Names of the linear layers that are trained whole.
        whole_itemsize: Bytes per element of their weights.
    """

    targets: frozenset[str] = frozenset()
    dropout: bool = False
    dora: bool = False
    casts_inputs: bool = True
    whole: frozenset[str] = frozenset()
    whole_itemsize: int = 4


@dataclass(frozen=True)
class LayerTraits:
    """How a layer is computed.

    Attributes:
        arithmetic: Number formats.
        adapter: What stands beside the linear layers.
        quantised: How its linear layers hold their weights, such as nf4; empty where they are not quantised.
        kernel: Which attention runs.
        batched: Whether the micro-batch has several rows.
        half: Whether 16 bit means fp16: softmax then reads it and writes fp32 in one kernel, where in bf16 it makes an
            fp32 copy first (aten/src/ATen/native/SoftMax.cpp: only for Half).
        cpu: Whether it runs on a CPU: dropout is not fused, and autocast leaves layer norms alone.
        repeats_heads: Whether keys and values are repeated for every query head though the kernel can do without.
        plain_attention: Whether torch has only its plain kernel for this attention, with S x S matrices in fp32.
        sinks: Whether each head has a sink.
        packed_experts: Whether fused experts are in 4 bits.
        recomputes_whole: Whether a checkpointed layer is computed again to its end, and its output and gradient are
            held until its backward ends. If not, computing again stops as soon as everything is saved again.
        length: Tokens per row; 0 where a layer's sizes do not depend on it.
        fused_mixers: Whether kernels mix tokens by state and keep nothing but what they are given and what they give.
        tile: Tokens that a dense MLP takes at once in checkpointed layers and in evaluations; 0 for all.
        groups_heads: Whether attention takes its heads in groups.
        joins_products: Whether one function makes an adapted layer's frozen product and its pair's, as in our loop.
        keeps_dequantised: Whether a checkpointed layer that is computed again keeps its dequantised weights until then.
        fused_norms: Whether one function makes an RMS norm.
        fused_rotary: Whether one function turns whole heads.
        plain: Names of the linear layers that are not quantised though others are.
    """

    arithmetic: Arithmetic
    adapter: AdapterTraits
    quantised: str
    kernel: Kernel
    batched: bool
    half: bool = False
    cpu: bool = False
    repeats_heads: bool = False
    plain_attention: bool = False
    sinks: bool = False
    packed_experts: bool = False
    recomputes_whole: bool = False
    length: int = 0
    fused_mixers: bool = False
    tile: int = 0
    groups_heads: bool = False
    joins_products: bool = False
    keeps_dequantised: bool = False
    fused_norms: bool = False
    fused_rotary: bool = False
    plain: frozenset[str] = frozenset()

    def dequantises(self, layer: Linear) -> bool:
        """Whether a layer's weight is brought to 16 bit for each of its products."""
        return bool(self.quantised) and layer.name not in self.plain

    def modules(self, tape: Tape, shape: ModelShape, *, checkpointed: bool = False) -> "Modules":
        """Return the modules of one symbolic pass."""
        return Modules(tape, shape, self, checkpointed)


@dataclass
class Modules:
    """The modules of a layer in one symbolic pass; loops with modules of their own override them.

    Attributes:
        tape: Where it is recorded.
        shape: The model.
        traits: How it computes.
        checkpointed: Whether a checkpoint drops what the pass saves.
        gradients: Gradients of what is trained, made so far.
        beside: What is kept beside the graph until the pass has gone backward.
        lasting: What the loop itself keeps beyond that.
    """

    tape: Tape
    shape: ModelShape
    traits: LayerTraits
    checkpointed: bool = False
    gradients: list[Tensor] = field(default_factory=list)
    beside: list[Tensor] = field(default_factory=list)
    lasting: list[Tensor] = field(default_factory=list)

    def keep_beside(self, x: Tensor) -> None:
        """Keep a tensor beside the graph until the pass has gone backward."""
        self.tape.hold(x)
        self.beside.append(x)

    def keep(self, x: Tensor) -> None:
        """Keep a tensor for good."""
        self.tape.hold(x)
        self.lasting.append(x)

    def end(self) -> None:
        """Let go of what was kept beside the graph."""
        for x in self.beside:
            self.tape.release(x)
        self.beside.clear()

    def of_others(self, elements: Polynomial, itemsize: float) -> Tensor:
        """Return a tensor that another layer, or the model, holds: its bytes are not this layer's, its gradient is."""
        node = self.tape.node() if self.tape.records else None
        if node is not None:
            node.keeps = []
        return Tensor(self.tape, elements, itemsize, node, base=Tensor(self.tape, NOTHING, 1))

    # Linear layers.

    def linears(self, layers: tuple[Linear, ...], x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of linear layers of one input."""
        return tuple([self.linear(layer, x) for layer in layers])

    def linear(self, layer: Linear, x: Tensor, visits: float = 1) -> Tensor:
        """Return a linear layer's output `[.., out]`, with its adapter where it is a target.

        Args:
            layer: The linear layer.
            x: Its input.
            visits: Rows per token: the share of tokens that an expert sees.
        """
        if layer.name in self.traits.adapter.whole:
            out = self._whole(layer, x, visits)
        elif layer.name not in self.traits.adapter.targets:
            out = self.base_linear(layer, x, visits)
        elif self.traits.joins_products and not self.traits.adapter.dora:
            dropped = self.dropout(x) if self.traits.adapter.dropout else None
            out = fused.adapted_linear(
                layer,
                x,
                dropped,
                visits,
                self.gradients,
                compute=self.traits.arithmetic.compute,
                quantised=self.traits.dequantises(layer),
                keeps=self.traits.keeps_dequantised and self.checkpointed,
            )
        elif self.traits.dequantises(layer):
            out = self._adapted_quantised(layer, x, visits)
        else:
            out = self._adapted(layer, x, visits)
        self.tape.named(x)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Return the head's product; the head is never quantised, but may be adapted or trained whole."""
        layer, arithmetic = Linear(HEAD, self.shape.hidden, self.shape.vocabulary), self.traits.arithmetic
        if HEAD in self.traits.adapter.targets | self.traits.adapter.whole:
            return replace(self, traits=replace(self.traits, quantised="")).linear(layer, hidden)
        compute = arithmetic.compute if arithmetic.autocast else None
        return op.frozen_linear(hidden, Polynomial(per_token=layer.outputs), compute)

    def _whole(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Follow peft.utils.ModulesToSaveWrapper: autocast casts the weight to 16 bit, and its gradient back."""
        arithmetic, elements = self.traits.arithmetic, Polynomial(fixed=layer.inputs * layer.outputs)
        weight = op.whole_weight(self.tape, elements, self.traits.adapter.whole_itemsize, self.gradients)
        weight = op.cast(weight, arithmetic.compute if arithmetic.autocast else weight.itemsize)
        out = op.cast(op.whole_linear(x, Polynomial(per_token=layer.outputs * visits), weight), x.itemsize)
        self.tape.named(weight)
        return out

    def base_linear(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Return the product with a frozen weight."""
        arithmetic = self.traits.arithmetic
        outputs = Polynomial(per_token=layer.outputs * visits)
        if not self.traits.dequantises(layer):
            return op.frozen_linear(x, outputs, arithmetic.compute if arithmetic.autocast else None)
        # Linear4bit.forward: input to the compute type, result back to the input's; the weight is dequantised whole.
        weight = Polynomial(fixed=layer.inputs * layer.outputs * arithmetic.compute)
        narrow = op.cast(x, arithmetic.compute)
        out = op.cast(op.frozen_linear(narrow, outputs, works=(weight,)), x.itemsize)
        self.tape.named(narrow)
        return out

    def _adapted(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Follow peft.tuners.lora.layer.Linear.forward."""
        result = self.base_linear(layer, x, visits)
        itemsize = result.itemsize
        if self.traits.adapter.casts_inputs:
            x = op.cast(x, 4)
        if self.traits.adapter.dora:
            out = op.cast(self._dora(layer, x, result, visits), itemsize)
        else:
            result = op.add(result, op.scale(self.low_rank(layer, x, visits)))
            out = op.cast(result, itemsize)
        self.tape.named(x, result)
        return out

    def adapted_base(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Return what a quantised layer's adapter adds to: peft clones the result of 4-bit weights."""
        # peft does so in case the backward fails on a view (its comment in peft.tuners.lora.bnb.Linear4bit.forward).
        return op.clone(self.base_linear(layer, x, visits))

    def _adapted_quantised(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Follow the forwards in peft.tuners.lora.bnb, which cast the input only where autocast is off."""
        result = self.adapted_base(layer, x, visits)
        converts = not self.traits.arithmetic.autocast
        if converts and self.traits.adapter.casts_inputs:
            x = op.cast(x, 4)
        if self.traits.adapter.dora:
            out = op.cast(self._dora(layer, x, result, visits), result.itemsize)
        else:
            update = op.scale(self.low_rank(layer, x, visits))
            if converts:
                update = op.cast(update, result.itemsize)
            out = op.add(result, update)
        self.tape.named(x, result)
        return out

    def low_rank(self, layer: Linear, x: Tensor, visits: float) -> Tensor:
        """Return `lora_B(lora_A(dropout(x)))`."""
        x = self._adapter_input(x)
        out = self._pair(layer, x, Polynomial(per_token_rank=visits), Polynomial(per_token=layer.outputs * visits))
        self.tape.named(x)
        return out

    def _adapter_input(self, x: Tensor) -> Tensor:
        return self.dropout(x) if self.traits.adapter.dropout else x

    def _pair(self, layer: Linear, x: Tensor, narrow: Polynomial, outputs: Polynomial) -> Tensor:
        """Return `lora_B(lora_A(x))`: `narrow` elements on its way, `outputs` at its end."""
        into, back = Polynomial(per_rank=layer.inputs), Polynomial(per_rank=layer.outputs)
        inner = op.trained_linear(x, narrow, into, self.gradients, self.traits.arithmetic)
        return op.trained_linear(inner, outputs, back, self.gradients, self.traits.arithmetic)

    def _dora(self, layer: Linear, x: Tensor, result: Tensor, visits: float) -> Tensor:
        """Follow peft.tuners.lora.dora.DoraLinearLayer.forward.

        Every forward computes the norm of the adapted weight again. For that it makes the adapter's product (an fp32
        identity matrix goes through the pair), the base weight, the scaled product and their sum; the product and the
        dequantised weight live until the forward ends. With dropout the base's product is computed a second time, from
        the dropped input, and the weight is saved for its backward. No gradient flows through the norm (DoRA paper,
        section 4.3). For the magnitude's gradient the base result and the update are saved.
        """
        tape, matrix = self.tape, Polynomial(fixed=layer.inputs * layer.outputs)
        quantised = self.traits.dequantises(layer)
        given, x = x, self._adapter_input(x)
        identity = Tensor(tape, Polynomial(fixed=layer.inputs * layer.inputs), 4)
        product = self._pair(layer, identity, Polynomial(per_rank=layer.inputs), matrix)
        tape.named(identity)
        product = op.cast(product, x.itemsize)
        held = self.traits.arithmetic.compute if quantised else self.traits.arithmetic.weights
        weight = Tensor(tape, matrix, x.itemsize) if quantised or held != x.itemsize else None
        if weight is not None and held != x.itemsize and quantised:
            tape.passing(matrix.times(held))
        tape.passing(matrix.times(x.itemsize), matrix.times(x.itemsize))
        update = self._pair(layer, x, Polynomial(per_token_rank=visits), Polynomial(per_token=layer.outputs * visits))
        base = result
        if self.traits.adapter.dropout:
            base = op.frozen_linear(x, result.elements)
            if weight is not None and base.node is not None:
                tape.saves(base.node, weight)
        change = op.add(op.times_vector(base), op.scale(op.times_vector(update)))
        tape.named(product, weight, update, base, x, given)
        return op.add(result, change)

    # Dropout and norms.

    def dropout(self, x: Tensor) -> Tensor:
        """Return `dropout(x)`: one fused kernel on a card, plain noise on a CPU."""
        return op.dropout(x, mask_itemsize=x.itemsize if self.traits.cpu else 1)

    def norm(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the layer's kind of norm over the hidden size."""
        if layer.norm in ("layer", "layer_wide"):
            out = self._layer_norm(x, wide=layer.norm == "layer_wide")
        elif layer.norm == "layer_plain":
            out = op.activate(x)
        elif layer.norm == "centred":
            out = centred_norm(x)
        else:
            out = self.rms_norm(layer, x)
        self.tape.named(x)
        return out

    def rms_norm(self, layer: Layer, x: Tensor) -> Tensor:
        """Return an RMS norm over the hidden size."""
        return self.head_norm(layer, x, 1)

    def head_norm(self, layer: Layer, x: Tensor, groups: float) -> Tensor:
        """Return an RMS norm of queries or keys, with `groups` norms per token."""
        if layer.norm == "rms" and self.traits.fused_norms:
            by_kernel = not self.traits.cpu and x.itemsize == self.traits.arithmetic.compute
            return fused.rms_norm(x, groups, by_kernel=by_kernel)
        return rms_norm(x, groups, weight_in_fp32=layer.norm == "rms_wide")

    def _layer_norm(self, x: Tensor, *, wide: bool) -> Tensor:
        """Return a layer norm: its input is saved. Under autocast CUDA computes and returns it in fp32."""
        if wide:  # the module itself casts to fp32 and back
            return op.cast(op.activate(op.cast(x, 4)), x.itemsize)
        if self.traits.arithmetic.autocast and not self.traits.cpu:
            x = op.cast(x, 4)
        return op.activate(x)

    # Positions.

    def rotate(self, layer: Layer, x: Tensor) -> Tensor:
        """Return queries or keys turned by their positions."""
        halves = layer.rotary == 1 and layer.rotary_form == "halves" and not layer.rotary_joined
        if halves and self.traits.fused_rotary and not layer.rotary_wide:
            return op.times_constant(x)
        return rotated(layer, x)

    # The feed-forward block, whose experts `studio.core.vram.experts` follows.

    @property
    def groups_experts(self) -> bool:
        """Whether routed experts are multiplied in our groups."""
        targets = self.traits.adapter.targets
        return self.traits.packed_experts or EXPERTS_UP in targets or EXPERTS_DOWN in targets

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """Return a dense MLP's output."""
        if not layer.gated:
            return self.linear(layer.mlp[1], self.activation(layer, self.linear(layer.mlp[0], x)))
        if len(layer.mlp) == 3:
            gate, up, down = layer.mlp
            gates = self.linear(gate, x)
            gated = self.activation(layer, sparse(gates) if layer.sparse_gate else gates)
            self.tape.named(gates if layer.sparse_gate else None)
            return self.linear(down, op.multiply(gated, self.linear(up, x)))
        gate_states, up_states = op.split_last(self.linear(layer.mlp[0], x), (0.5, 0.5))
        up_states = op.multiply(up_states, self.activation(layer, gate_states))
        out = self.linear(layer.mlp[1], up_states)
        self.tape.named(gate_states)
        return out

    def activation(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the activation's output."""
        widens = self.traits.arithmetic.autocast and not self.traits.cpu
        out = activated(layer.activation, x, widens=widens)
        self.tape.named(x)
        return out

    def whole_experts(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the output of products with whole stacks: each token's rows for every expert that it visits.

        Experts without a gate (Nemotron-H) have but their activation between the two products.
        """
        experts = layer.experts
        assert experts is not None  # noqa: S101  the caller looked
        rows = op.cast(op.gather(x, experts.per_token), self.traits.arithmetic.compute)
        up, back = experts.stacks(self.shape.hidden)
        both = op.frozen_linear(rows, Polynomial(per_token=up.outputs * experts.per_token))
        if experts.gated:
            gates, ups = op.split_last(both, (0.5, 0.5))
            product = op.multiply(op.activate(gates), ups)
        else:
            product = self.activation(layer, both)
        down = op.frozen_linear(product, Polynomial(per_token=back.outputs * experts.per_token))
        shares = op.mean_last(x, Polynomial(per_token=experts.per_token))  # what the router gives each chosen expert
        out = op.cast(op.gather(op.multiply_rows(down, shares), 1 / experts.per_token), x.itemsize)
        self.tape.named(rows, both, product, down, shares)
        return out
