"""The modules of a decoder layer, written with symbolic tensors in the order of the real code, so names live as long.

Sources: transformers/models/*/modeling_*.py, peft/tuners/lora/layer.py, bnb.py and dora.py,
bitsandbytes/autograd/_functions.py (transformers 5.24, peft 0.21, bitsandbytes 0.50).
"""

from dataclasses import dataclass, field
from typing import Literal

from studio.core.shape import Linear, ModelShape
from studio.core.vram import operators as op
from studio.core.vram.operators import Arithmetic
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Tape, Tensor

Kernel = Literal["flash", "efficient", "efficient_masked", "eager", "cpu"]
"""Which attention runs. The memory-efficient kernel wants numbers for a mask; each layer makes them of truths."""
FusedKernels = Literal["none", "liger", "foak"]


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """What stands beside the linear layers.

    Attributes:
        targets: Names of the adapted linear layers.
        dropout: Whether its inputs are dropped.
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


@dataclass(frozen=True, slots=True)
class LayerForm:
    """How a layer is computed.

    Attributes:
        arithmetic: Number formats.
        adapter: What stands beside the linear layers.
        quantised: How its linear layers hold their weights: nf4, fp4 or int8; empty where they are not quantised.
        kernel: Which attention runs.
        batched: Whether the micro-batch has several rows.
        half: Whether 16 bit means fp16: softmax then reads it and writes fp32 in one kernel, where in bf16 it makes an
            fp32 copy first (aten/src/ATen/native/SoftMax.cpp: only for Half).
        cpu: Whether it runs on a CPU: dropout is not fused, and autocast leaves layer norms alone.
        fused_kernels: Which fused kernels stand in for the model's own operators (studio.core.vram.fused).
        reentrant: Whether checkpoints are torch's older kind, a backward inside the backward.
        repeats_heads: Whether keys and values are repeated for every query head though the kernel can do without.
        plain_attention: Whether torch is left no kernel but its plain one, with S x S matrices in fp32.
    """

    arithmetic: Arithmetic
    adapter: AdapterForm
    quantised: str
    kernel: Kernel
    batched: bool
    half: bool = False
    cpu: bool = False
    fused_kernels: FusedKernels = "none"
    reentrant: bool = False
    repeats_heads: bool = False
    plain_attention: bool = False


@dataclass(slots=True)
class Run:
    """One symbolic pass: where bytes are counted, of what model, how it computes, and adapter gradients made so far.

    `held` collects what operators keep where no checkpoint drops it; None where all that is saved counts in its graph.
    """

    tape: Tape
    shape: ModelShape
    form: LayerForm
    gradients: list[Tensor] = field(default_factory=list)
    held: list[Tensor] | None = None


def held_apart(form: LayerForm) -> list[Tensor] | None:
    """Return where to collect what a layer's checkpoint does not drop; None where it drops all."""
    return [] if form.quantised == "int8" and not form.reentrant else None


def linear(run: Run, layer: Linear, x: Tensor, visits: float = 1) -> Tensor:
    """Return a linear layer's output `[.., out]`, with its adapter where it is a target.

    Args:
        run: The pass.
        layer: The linear layer.
        x: Its input.
        visits: Rows per token: the share of tokens that an expert sees.
    """
    if layer.name in run.form.adapter.whole:
        return _whole(run, layer, x, visits)
    if layer.name not in run.form.adapter.targets:
        return _base_linear(run, layer, x, visits)
    return _adapted_quantised(run, layer, x, visits) if run.form.quantised else _adapted(run, layer, x, visits)


def _whole(run: Run, layer: Linear, x: Tensor, visits: float) -> Tensor:
    """peft.utils.ModulesToSaveWrapper around a linear layer; autocast casts the weight, and its gradient back."""
    arithmetic, elements = run.form.arithmetic, Polynomial(fixed=layer.inputs * layer.outputs)
    weight = op.whole_weight(run.tape, elements, run.form.adapter.whole_itemsize, run.gradients)
    weight = op.cast(weight, arithmetic.compute if arithmetic.autocast else weight.itemsize)
    return op.cast(op.whole_linear(x, Polynomial(per_token=layer.outputs * visits), weight), x.itemsize)


def _base_linear(run: Run, layer: Linear, x: Tensor, visits: float) -> Tensor:
    arithmetic = run.form.arithmetic
    outputs = Polynomial(per_token=layer.outputs * visits)
    if not run.form.quantised:
        return op.frozen_linear(x, outputs, arithmetic.compute if arithmetic.autocast else None)
    if run.form.quantised == "int8":
        return _int8_linear(run, layer, x, visits)
    # Linear4bit.forward: input to the compute type, result back to the input's; the weight is dequantised whole.
    weight = Polynomial(fixed=layer.inputs * layer.outputs * arithmetic.compute)
    narrow = op.cast(x, arithmetic.compute)
    return op.cast(op.frozen_linear(narrow, outputs, works=(weight,)), x.itemsize)


def _int8_linear(run: Run, layer: Linear, x: Tensor, visits: float) -> Tensor:
    """Return bitsandbytes' 8-bit product (autograd/_functions.py MatMul8bitLt, backends/cuda/ops.py).

    It quantises an fp16 copy of its input, sums in int32 and makes an fp16 result of that before its own; which inputs
    count as outliers is not known, so that their 16-bit products are left out. Its backward dequantises the whole
    weight. It keeps its input on its own context: a checkpoint of torch's newer kind, which drops what is saved by the
    rules, never sees it, and the input of every layer stays (seen on a CPU, tests/jobs/test_int8_keeps.py).
    """
    outputs, narrow = Polynomial(per_token=layer.outputs * visits), run.form.half and x.itemsize == 2
    copied, kept = 0 if narrow else 2, run.held is not None
    run.tape.passing(x.elements.times(copied + 4))  # beside its copy: 8-bit rows, magnitudes, where they are outliers
    run.tape.passing(x.elements, outputs.times(4 if narrow else 6))
    if run.held is not None and not run.tape.records:
        run.held.append(x)
    weight = Polynomial(fixed=layer.inputs * layer.outputs * x.itemsize)
    return op.frozen_linear(x, outputs, works=(weight,), works_forward=False, keeps_input=not kept)


def _adapted(run: Run, layer: Linear, x: Tensor, visits: float) -> Tensor:
    """peft.tuners.lora.layer.Linear.forward."""
    result = _base_linear(run, layer, x, visits)
    itemsize = result.itemsize
    if run.form.adapter.casts_inputs:
        x = op.cast(x, 4)
    if run.form.adapter.dora:
        return op.cast(_dora(run, layer, x, result, visits), itemsize)
    result = op.add(result, op.scale(low_rank(run, layer, x, visits)))
    return op.cast(result, itemsize)


def _adapted_quantised(run: Run, layer: Linear, x: Tensor, visits: float) -> Tensor:
    """peft.tuners.lora.bnb: clones the 4-bit result, casts the input only without autocast."""
    result = _base_linear(run, layer, x, visits)
    if run.form.quantised != "int8":
        result = op.clone(result)
    converts = not run.form.arithmetic.autocast
    if converts and run.form.adapter.casts_inputs:
        x = op.cast(x, 4)
    if run.form.adapter.dora:
        return op.cast(_dora(run, layer, x, result, visits), result.itemsize)
    update = op.scale(low_rank(run, layer, x, visits))
    if converts:
        update = op.cast(update, result.itemsize)
    return op.add(result, update)


def low_rank(run: Run, layer: Linear, x: Tensor, visits: float) -> Tensor:
    """Return `lora_B(lora_A(dropout(x)))`."""
    x = _dropped(run, x)
    return _pair(run, layer, x, Polynomial(per_token_rank=visits), Polynomial(per_token=layer.outputs * visits))


def _dropped(run: Run, x: Tensor) -> Tensor:
    return dropout(run, x) if run.form.adapter.dropout else x


def dropout(run: Run, x: Tensor) -> Tensor:
    """Return `dropout(x)`: one fused kernel on a card, plain noise on a CPU."""
    return op.dropout(x, mask_itemsize=x.itemsize if run.form.cpu else 1)


def _pair(run: Run, layer: Linear, x: Tensor, narrow: Polynomial, outputs: Polynomial) -> Tensor:
    """Return `lora_B(lora_A(x))`: `narrow` elements on its way, `outputs` at its end."""
    into, back = Polynomial(per_rank=layer.inputs), Polynomial(per_rank=layer.outputs)
    inner = op.trained_linear(x, narrow, into, run.gradients, run.form.arithmetic)
    del x
    return op.trained_linear(inner, outputs, back, run.gradients, run.form.arithmetic)


def _dora(run: Run, layer: Linear, x: Tensor, result: Tensor, visits: float) -> Tensor:
    """peft.tuners.lora.dora.DoraLinearLayer.forward.

    The norm of the adapted weight is made anew in every forward: the adapter's product, for which an fp32 identity
    matrix goes through the pair, the base weight, the scaled product and their sum. Product and dequantised weight stay
    to the end. Dropout makes the base's product anew from the dropped input, and the weight is saved for it. The
    magnitude's gradient keeps the base result and the update.
    """
    tape, matrix = run.tape, Polynomial(fixed=layer.inputs * layer.outputs)
    given, x = x, _dropped(run, x)
    identity = Tensor(tape, Polynomial(fixed=layer.inputs * layer.inputs), 4)
    product = _pair(run, layer, identity, Polynomial(per_rank=layer.inputs), matrix)
    del identity
    product = op.cast(product, x.itemsize)
    held = run.form.arithmetic.compute if run.form.quantised else run.form.arithmetic.weights
    weight = Tensor(tape, matrix, x.itemsize) if run.form.quantised or held != x.itemsize else None
    if weight is not None and held != x.itemsize and run.form.quantised:
        tape.passing(matrix.times(held))
    tape.passing(matrix.times(x.itemsize), matrix.times(x.itemsize))
    update = _pair(run, layer, x, Polynomial(per_token_rank=visits), Polynomial(per_token=layer.outputs * visits))
    base = result
    if run.form.adapter.dropout:
        base = op.frozen_linear(x, result.elements)
        if weight is not None and base.node is not None:
            base.node.saved.append(weight)
    change = op.add(op.times_vector(base), op.scale(op.times_vector(update)))
    del product, weight, update, base, x, given
    return op.add(result, change)


def rms_norm(x: Tensor, groups: float, *, weight_in_fp32: bool = False) -> Tensor:
    """Return an RMS norm computed in fp32.

    Args:
        x: What is normed.
        groups: Norms per token: 1 over the hidden size, the number of heads over head_dim.
        weight_in_fp32: Whether the weight is applied before the result is cast back (Gemma, OLMo 2).
    """
    itemsize = x.itemsize
    x = op.cast(x, 4)
    inverse = op.activate_saving_result(op.mean_last(op.power(x), Polynomial(per_token=groups)))
    x = op.multiply_rows(x, inverse)
    del inverse
    if weight_in_fp32:
        return op.cast(op.times_constant(x), itemsize)
    return op.times_constant(op.cast(x, itemsize))


def centred_norm(x: Tensor) -> Tensor:
    """Return a layer norm composed of plain operators in fp32; both differences from the mean are saved."""
    itemsize = x.itemsize
    x = op.cast(x, 4)
    mean = op.mean_last(x, Polynomial(per_token=1))
    inverse = op.activate_saving_result(op.mean_last(op.power(op.subtract_rows(x, mean)), Polynomial(per_token=1)))
    x = op.multiply_rows(op.subtract_rows(x, mean), inverse)
    del mean, inverse
    return op.cast(op.times_constant(x), itemsize)


def layer_norm(run: Run, x: Tensor, *, wide: bool = False) -> Tensor:
    """Return a layer norm: its input is saved. Under autocast CUDA computes and returns it in fp32.

    Args:
        run: The pass.
        x: What is normed.
        wide: Whether the module itself casts to fp32 and back.
    """
    if wide:
        return op.cast(op.activate(op.cast(x, 4)), x.itemsize)
    if run.form.arithmetic.autocast and not run.form.cpu:
        x = op.cast(x, 4)
    return op.activate(x)
