"""One decoder layer of any family: norms, attention and MLP in the order and with the names of the real forward."""

from studio.core.shape import Experts, Layer
from studio.core.trainable import EXPERTS
from studio.core.vram import fused
from studio.core.vram import operators as op
from studio.core.vram.attention import attention
from studio.core.vram.form import Form
from studio.core.vram.modules import Run, centred_norm, dropout, layer_norm, linear, rms_norm
from studio.core.vram.tape import Tensor


def decoder_layer(run: Run, layer: Layer, x: Tensor) -> Tensor:
    """Return the layer's output `[batch, seq, hidden]`."""
    if layer.wiring == "parallel":
        return _parallel(run, layer, x)
    residual = x
    if layer.wiring != "post":
        x = norm(run, layer, x)
    x, weights = attention(run, layer, x)
    if layer.wiring in ("post", "sandwich"):
        x = norm(run, layer, x)
    x = op.add(residual, _scaled(run, layer, x))
    residual = x
    if layer.wiring != "post":
        x = norm(run, layer, x)
    x = feed_forward(run, layer, x)
    if layer.wiring in ("post", "sandwich"):
        x = norm(run, layer, x)
    x = op.add(residual, _scaled(run, layer, x))
    del residual, weights  # transformers keeps the attention weights under the name `_` until the layer returns
    return x


def _parallel(run: Run, layer: Layer, x: Tensor) -> Tensor:
    """Attention and MLP side by side on one normed input, or on two."""
    residual = x
    normed = norm(run, layer, x)
    attended, weights = attention(run, layer, normed)
    if layer.input_norms == 2:
        normed = norm(run, layer, residual)
    attended = _dropped(run, layer, attended)
    x = op.add(_dropped(run, layer, feed_forward(run, layer, normed)), attended)
    x = op.add(x, residual)
    del residual, weights
    return x


def _scaled(run: Run, layer: Layer, x: Tensor) -> Tensor:
    x = _dropped(run, layer, x)
    return op.scale(x) if layer.scaled_residual else x


def _dropped(run: Run, layer: Layer, x: Tensor) -> Tensor:
    return dropout(run, x) if layer.residual_dropout else x


def norm(run: Run, layer: Layer, x: Tensor) -> Tensor:
    """Return the layer's kind of norm over the hidden size."""
    if layer.norm in ("layer", "layer_wide"):
        return layer_norm(run, x, wide=layer.norm == "layer_wide")
    if layer.norm == "centred":
        return centred_norm(x)
    if run.form.fused_kernels != "none":
        return fused.rms_norm(x, 1, over_gradient=layer.wiring not in ("post", "sandwich"))
    return rms_norm(x, 1, weight_in_fp32=layer.norm == "rms_wide")


def feed_forward(run: Run, layer: Layer, x: Tensor) -> Tensor:
    """Return the MLP's output."""
    if layer.experts:
        routed = _experts(run, layer, x)
        return op.add(routed, _dense(run, layer, x)) if layer.mlp else routed
    return _dense(run, layer, x)


def _dense(run: Run, layer: Layer, x: Tensor) -> Tensor:
    if not layer.gated:
        inner = activation(run, layer, linear(run, layer.mlp[0], x))
        return linear(run, layer.mlp[1], inner)
    if len(layer.mlp) == 3:
        gate, up, down = layer.mlp
        if fused.fuses_adapters(run, layer.mlp):
            return fused.adapted_mlp(run, layer.mlp, x)
        if run.form.fused_kernels == "liger":
            return linear(run, down, fused.gated_product(linear(run, gate, x), linear(run, up, x)))
        return linear(run, down, op.multiply(activation(run, layer, linear(run, gate, x)), linear(run, up, x)))
    up_states = linear(run, layer.mlp[0], x)
    gate_states, up_states = op.split_last(up_states, (0.5, 0.5))
    if run.form.fused_kernels == "liger":
        # The kernel wants both halves in a row each.
        return linear(run, layer.mlp[1], fused.gated_product(op.clone(gate_states), op.clone(up_states)))
    up_states = op.multiply(up_states, activation(run, layer, gate_states))
    return linear(run, layer.mlp[1], up_states)


def activation(run: Run, layer: Layer, x: Tensor) -> Tensor:
    """Return the activation's output; those composed in Python save more (transformers/activations.py)."""
    if layer.activation == "gelu_new":
        half = op.scale(x)
        if run.form.arithmetic.autocast and not run.form.cpu:
            x = op.cast(x, 4)  # CUDA's autocast takes powers in fp32, and all that is added to them is fp32 then
        return op.multiply(half, op.add_number(op.activate_saving_result(op.scale(op.add(x, op.scale(op.power(x)))))))
    if layer.activation == "relu2":
        return op.power(op.activate_saving_result(x))
    return op.activate(x)


def _separate_experts(run: Run, layer: Layer, experts: Experts, x: Tensor) -> Tensor:
    """Experts one after another, each on its share of the tokens (transformers below 5, MixtralSparseMoeBlock)."""
    gate, up, down = layer.expert_maps
    share = experts.per_token / experts.count
    total = Tensor(run.tape, x.elements, x.itemsize)
    for _ in range(experts.count):
        rows = op.gather(x, share)
        inner = op.activate(linear(run, gate, rows, share))
        inner = op.multiply(inner, linear(run, up, rows, share))
        out = linear(run, down, inner, share)
        weight = op.mean_last(rows, Form(per_token=share))
        total = op.add_rows(total, op.cast(op.multiply_rows(out, weight), total.itemsize))
        del rows, inner, out, weight
    return total


def _experts(run: Run, layer: Layer, x: Tensor) -> Tensor:
    """Routed experts on grouped products: every token's input, gate, up and product once per expert that it visits."""
    experts = layer.experts
    assert experts is not None  # noqa: S101  the caller looked
    if layer.expert_maps:
        return _separate_experts(run, layer, experts, x)
    merged: list[Tensor] = []
    if EXPERTS in run.form.adapter.targets and experts.adapted_by_all:
        # peft adds the adapter's whole product to the fused weights before they are used (ParamWrapper): gate and up
        # are one tensor, down another, and both live until the layer is done.
        third = Form(fixed=experts.weights(run.shape.hidden) / 3)
        merged = [Tensor(run.tape, third.times(share), run.form.arithmetic.compute) for share in (2, 1)]
    rows = op.gather(x, experts.per_token)
    both = op.frozen_linear(rows, Form(per_token=2 * experts.inner * experts.per_token))
    _saves_merged(both, rows, merged[:1])
    gates, ups = op.split_last(both, (0.5, 0.5))
    product = op.multiply(op.activate(gates), ups)
    out = op.frozen_linear(product, Form(per_token=run.shape.hidden * experts.per_token))
    _saves_merged(out, product, merged[1:])
    shares = op.mean_last(x, Form(per_token=experts.per_token))  # what the router gives each chosen expert
    out = op.gather(op.multiply_rows(out, shares), 1 / experts.per_token)
    return out


def _saves_merged(product: Tensor, x: Tensor, weights: list[Tensor]) -> None:
    """Save input and weight of a product; the weight's gradient is as large, and is handed to the adapter."""
    if product.node is not None and weights:
        product.node.saved.extend((x, *weights))
        product.node.works = tuple(weight.bytes for weight in weights)
