"""The attention block of a decoder layer: projections, norms, rotary positions, and the three ways to attend.

Sources: transformers/integrations/sdpa_attention.py and modeling_llama.py (`eager_attention_forward`), transformers
5.24.
"""

from studio.core.shape import Layer
from studio.core.vram import fused
from studio.core.vram import operators as op
from studio.core.vram.form import Form
from studio.core.vram.modules import Run, dropout, linear, rms_norm
from studio.core.vram.tape import Tensor


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
    weights = op.scale(op.matmul(query, key, Form(per_square=run.shape.heads), copies_x=batched, copies_y=strided))
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
    itemsize, square = query.itemsize, Form(per_square=run.shape.heads)
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
    square, autocast = Form(per_square=run.shape.heads), run.form.arithmetic.autocast
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


def _product(run: Run, x: Tensor, y: Tensor, outputs: Form) -> Tensor:
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
