"""One decoder layer of any family: norms, attention and MLP in the order and with the names of the real forward.

Sources of the attention: transformers/integrations/sdpa_attention.py and modeling_llama.py (`eager_attention_forward`),
transformers 5.24.
"""

from studio.core.shape import Experts, Layer
from studio.core.trainable import EXPERTS
from studio.core.vram import fused
from studio.core.vram import operators as op
from studio.core.vram.modules import Run, centred_norm, dropout, layer_norm, linear, rms_norm
from studio.core.vram.polynomial import Polynomial
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
        weight = op.mean_last(rows, Polynomial(per_token=share))
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
        third = Polynomial(fixed=experts.weights(run.shape.hidden) / 3)
        merged = [Tensor(run.tape, third.times(share), run.form.arithmetic.compute) for share in (2, 1)]
    rows = op.gather(x, experts.per_token)
    both = op.frozen_linear(rows, Polynomial(per_token=2 * experts.inner * experts.per_token))
    _saves_merged(both, rows, merged[:1])
    gates, ups = op.split_last(both, (0.5, 0.5))
    product = op.multiply(op.activate(gates), ups)
    out = op.frozen_linear(product, Polynomial(per_token=run.shape.hidden * experts.per_token))
    _saves_merged(out, product, merged[1:])
    shares = op.mean_last(x, Polynomial(per_token=experts.per_token))  # what the router gives each chosen expert
    out = op.gather(op.multiply_rows(out, shares), 1 / experts.per_token)
    return out


def _saves_merged(product: Tensor, x: Tensor, weights: list[Tensor]) -> None:
    """Save input and weight of a product; the weight's gradient is as large, and is handed to the adapter."""
    if product.node is not None and weights:
        product.node.saved.extend((x, *weights))
        product.node.works = tuple(weight.bytes for weight in weights)


def attention(run: Run, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the block's output `[batch, seq, hidden]` and, for eager attention, its weights."""
    query, key, value = _projections(run, layer, x)
    if layer.query_key_norm:
        per_head, wide = layer.query_key_norm == "head", layer.norm == "rms_wide"
        groups = (run.shape.heads, run.shape.kv_heads) if per_head else (1, 1)
        if run.form.fused_kernels == "none":
            query, key = (rms_norm(t, n, weight_in_fp32=wide) for t, n in zip((query, key), groups, strict=True))
        else:
            query, key = (
                fused.rms_norm(t, n, over_gradient=not wide) for t, n in zip((query, key), groups, strict=True)
            )
    # Both unrotated tensors live until both are rotated: they are apply_rotary_pos_emb's own arguments.
    itemsize = query.itemsize
    if layer.rotary_wide:
        query, key = op.cast(query, 4), op.cast(key, 4)
    turned = _rotate(run, query, layer)
    query, key = turned, _rotate(run, key, layer)
    del turned
    query, key = op.cast(query, itemsize), op.cast(key, itemsize)
    out, weights = _attend(run, layer, query, key, value)
    if layer.rotary_joined and run.form.kernel in ("flash", "cpu"):
        # These kernels lay their output out as the queries are; head by head, it must be copied token by token.
        out = op.clone(out)
    if fused.fuses_adapters(run, (layer.out,)):
        (out,) = fused.adapted_linears(run, (layer.out,), out)
        return out, weights
    out = linear(run, layer.out, out)
    return out, weights


def _projections(run: Run, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if len(layer.qkv) == 3 and fused.fuses_adapters(run, layer.qkv):
        query, key, value = fused.adapted_linears(run, layer.qkv, x)
        return query, key, value
    if len(layer.qkv) == 3:
        query, key, value = (linear(run, projection, x) for projection in layer.qkv)
        return query, key, value
    joined = linear(run, layer.qkv[0], x)
    queries, keys = run.shape.heads * run.shape.head_dim, run.shape.kv_heads * run.shape.head_dim
    width = queries + 2 * keys
    if layer.qkv_split:
        query, key, value = op.split_last(joined, tuple(part / width for part in (queries, keys, keys)))
        return query, key, value
    query, key, value = (op.slice_last(joined, part / width) for part in (queries, keys, keys))
    return query, key, value


def _rotate(run: Run, x: Tensor, layer: Layer) -> Tensor:
    if layer.rotary == 0:
        return x
    if run.form.fused_kernels != "none" and layer.rotary == 1 and not layer.rotary_wide:
        return fused.rotate(x)
    if not layer.rotary_joined:
        return _rotate_whole(x)
    turned, kept = op.slice_last(x, layer.rotary), op.slice_last(x, 1 - layer.rotary)
    turned = _rotate_whole(turned)
    return op.join((turned, kept))


def _rotate_whole(x: Tensor) -> Tensor:
    """Return `x * cos + rotate_half(x) * sin`."""
    straight = op.times_constant(x)
    half = op.slice_last(x, 0.5)
    turned = op.times_constant(op.join((op.scale(op.slice_last(x, 0.5)), half)))
    del half
    return op.add(straight, turned)


def _attend(run: Run, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the attention output and, for eager attention, its weights `[batch, heads, seq, seq]`."""
    if run.form.kernel == "eager" and run.shape.own_attention:
        return _broadcast(run, query, key, value)
    if run.form.kernel == "eager":
        return _eager(run, layer, query, key, value)
    if run.form.arithmetic.autocast:
        query, key, value = (op.cast(t, run.form.arithmetic.compute) for t in (query, key, value))
    if run.form.plain_attention:
        return _plain(run, query, key, value), None
    kernel = run.form.kernel
    masked = kernel == "efficient_masked"
    if masked or kernel == "efficient" or run.form.repeats_heads:
        key, value = _widened(run, key), _widened(run, value)
    flash, on_card = kernel == "flash", kernel != "cpu"
    out = op.fused_attention(query, key, value, run.shape.heads, flash=flash, workspaces=on_card, masked=masked)
    return out, None


def _eager(run: Run, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Follow eager_attention_forward."""
    arithmetic = run.form.arithmetic
    key, value = _widened(run, key), _widened(run, value)
    if arithmetic.autocast:
        query, key = (op.cast(t, arithmetic.compute) for t in (query, key))
    itemsize = query.itemsize
    # Heads of several rows lie apart; keys and values that were repeated lie together.
    batched = run.form.batched
    strided = batched and run.shape.kv_heads in (1, run.shape.heads)
    weights = op.scale(
        op.matmul(query, key, Polynomial(per_square=run.shape.heads), copies_x=batched, copies_y=strided)
    )
    if run.shape.attention_softcap:
        weights = op.scale(op.activate_saving_result(op.scale(weights)))
    weights = op.add_number(weights)  # the causal mask
    if not run.form.half:
        weights = op.cast(weights, 4)
    weights = op.cast(op.softmax_in_fp32(weights, fused_backward=run.form.cpu), itemsize)
    if layer.attention_dropout:
        weights = dropout(run, weights)
    if arithmetic.autocast:
        value = op.cast(value, arithmetic.compute)
    out = op.matmul(weights, value, query.elements, copies_x=False, copies_y=strided)
    out = op.clone(op.laid_anew(out) if batched else out)  # .transpose(1, 2).contiguous()
    return out, weights


def _plain(run: Run, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Follow aten/src/ATen/native/transformers/attention.cpp _scaled_dot_product_attention_math, torch 2.5 and newer.

    All in fp32; its softmax makes its result twice, to empty rows that see nothing. It also hands back the weights in
    the format that came in, and nobody takes them.
    """
    itemsize, square = query.itemsize, Polynomial(per_square=run.shape.heads)
    query, key, value = (op.cast(t, 4) for t in (query, key, value))
    query, key = op.scale(query), op.scale(key)
    scores = _product(run, query, key, square)
    weights = op.softmax_in_fp32(scores, fused_backward=run.form.cpu)
    run.tape.passing(square.times(4))
    del scores
    out = op.cast(_product(run, weights, value, query.elements), itemsize)
    run.tape.passing(square.times(itemsize))
    return op.clone(out)


def _broadcast(run: Run, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Follow FalconAttention.forward without sdpa: scores are scaled in place, and softmax keeps the input's format.

    The input comes from a layer norm, which CUDA's autocast gives back in fp32.
    """
    square, autocast = Polynomial(per_square=run.shape.heads), run.form.arithmetic.autocast
    if autocast:
        query, key, value = (op.cast(t, run.form.arithmetic.compute) for t in (query, key, value))
    itemsize = query.itemsize
    wide = 4 if autocast and not run.form.cpu else itemsize
    scores = op.add_number(_product(run, query, key, square))
    if not run.form.half:
        scores = op.cast(scores, wide)
    weights = op.softmax(scores, wide, fused_backward=run.form.cpu)
    del scores
    out = _product(run, op.cast(weights, itemsize), value, query.elements)
    return op.clone(out), weights


def _product(run: Run, x: Tensor, y: Tensor, outputs: Polynomial) -> Tensor:
    """Return a batched product; where all heads share y, `matmul` copies it for each, but not for a single row."""
    shared = run.shape.kv_heads < run.shape.heads
    y = op.expanded(y, run.shape.heads / run.shape.kv_heads) if shared else y
    return op.matmul(x, y, outputs, copies_x=False, copies_y=shared and run.form.batched)


def _widened(run: Run, x: Tensor) -> Tensor:
    """Return keys or values repeated for every query head (repeat_kv): a copy, unless none share them, or all."""
    groups = run.shape.heads / run.shape.kv_heads
    if groups == 1:
        return x
    return op.expanded(x, groups) if run.shape.kv_heads == 1 else op.gather(x, groups)
