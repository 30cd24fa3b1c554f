"""Attention of any kind, forward and backward: projections, norms and positions of heads, and the kernels.

Sources: transformers/integrations/sdpa_attention.py, modeling_llama.py (`eager_attention_forward`) and
modeling_deepseek_v3.py (`DeepseekV3Attention`), transformers 5.24.
"""

from studio.core.shape import Layer
from studio.core.tiles import head_groups
from studio.core.vram import operators as op
from studio.core.vram.elementwise import unscaled_norm
from studio.core.vram.modules import Modules
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Tensor


def attention(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the block's output `[batch, seq, hidden]` and, for eager attention, its weights."""
    if layer.latent:
        return _latent_attention(run, layer, x)
    if layer.value_norm:
        return _of_normed_values(run, layer, x)
    if layer.rotary_form == "complex":
        return _with_positions_or_tempered(run, layer, x)
    tape = run.tape
    query, key, value = _projections(run, layer, x)
    gate = None
    if layer.output_gate:
        query, gate = op.split_last(query, (0.5, 0.5))
        gate = op.clone(gate)  # `gate.reshape` of one half of each head (modeling_qwen3_next.py) must copy it
    if layer.query_key_norm:
        groups = (layer.heads.queries, layer.heads.keys) if layer.query_key_norm == "head" else (1, 1)
        normed = [run.head_norm(layer, t, n) for t, n in zip((query, key), groups, strict=True)]
        tape.named(query, key)
        query, key = normed
    # Both unrotated tensors live until both are rotated: apply_rotary_pos_emb holds them as its arguments.
    itemsize = query.itemsize
    if layer.rotary_wide:
        query, key = _both_cast(query, key, 4)
    turned = run.rotate(layer, query), run.rotate(layer, key)
    tape.named(query, key)
    query, key = _both_cast(*turned, itemsize)
    attended, weights = _attend(run, layer, query, key, value)
    if (layer.rotary_joined or layer.rotary_form == "parts") and run.traits.kernel in ("flash", "cpu"):
        # These kernels give their output the layout of the queries. Queries that were joined lie head by head, so that
        # the output is copied to lie token by token.
        attended = op.clone(attended)
    if gate is not None:
        ungated, attended = attended, op.multiply(attended, op.activate_saving_result(gate))
        tape.named(ungated)
    assert layer.out is not None  # noqa: S101  a layer without attention has no heads
    (out,) = run.linears((layer.out,), attended)
    tape.named(x, query, key, value, gate, attended)
    return out, weights


def _with_positions_or_tempered(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Follow Llama4TextAttention.forward."""
    query, key, value = run.linears(layer.qkv, x)
    if layer.rotary:
        query, key = _turned_as_complex(query, key)
    if layer.query_key_norm:
        raw, query = query, unscaled_norm(query, layer.heads.queries)
        run.tape.named(raw)
        raw, key = key, unscaled_norm(key, layer.heads.keys)
        run.tape.named(raw)
    if layer.tempered:
        # The numbers are in fp32, and so is the gradient before the engine casts it to the queries' format.
        raw, tempered = query, op.times_constant(query, 4, works=(query.elements.times(4),))
        query = op.cast(tempered, raw.itemsize)
        run.tape.named(raw)
    attended, weights = _attend(run, layer, query, key, value)
    assert layer.out is not None  # noqa: S101  every layer of these has attention
    (out,) = run.linears((layer.out,), attended)
    run.tape.named(x, query, key, value, attended)
    return out, weights


def _turned_as_complex(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Follow apply_rotary_emb of modeling_llama4.py: neighbours are turned as one complex number in fp32."""
    wide = op.cast(query, 4), op.cast(key, 4)
    turned = op.times_constant(wide[0]), op.times_constant(wide[1])
    narrow = op.cast(turned[0], query.itemsize), op.cast(turned[1], key.itemsize)
    query.tape.named(query, key, *wide, *turned)
    return narrow


def _of_normed_values(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Follow Gemma4TextAttention.forward."""
    query, key, value = _normed_heads(run, layer, x)
    attended, weights = _attend(run, layer, query, key, value)
    assert layer.out is not None  # noqa: S101  every layer of these has attention
    (out,) = run.linears((layer.out,), attended)
    run.tape.named(x, query, key, value, attended)
    return out, weights


def _normed_heads(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as attention takes them: queries are ready before keys are made."""
    heads = layer.heads
    query = _placed(run, layer, run.linear(layer.qkv[0], x), heads.queries)
    if layer.keys_from == "before":
        size = Polynomial(per_token=heads.keys * heads.width)
        return query, run.of_others(size, query.itemsize), run.of_others(size, query.itemsize)
    raw = run.linear(layer.qkv[1], x)
    value = raw if layer.keys_from == "values" else run.linear(layer.qkv[2], x)
    key = _placed(run, layer, raw, heads.keys)
    return query, key, unscaled_norm(value, heads.keys)


def _placed(run: Modules, layer: Layer, x: Tensor, heads: int) -> Tensor:
    normed = run.head_norm(layer, x, heads)
    run.tape.named(x)
    turned = run.rotate(layer, normed)
    run.tape.named(normed)
    return turned


def _latent_attention(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Follow DeepseekV3Attention.forward: queries, and keys with values, are made from narrow vectors."""
    tape, heads, latent = run.tape, layer.heads, layer.latent
    assert latent is not None  # noqa: S101  the caller looked
    assert layer.out is not None  # noqa: S101  a layer without attention has no heads
    *narrow, into, back = layer.qkv
    query = run.linear(narrow[0], x)
    if len(narrow) > 1:
        normed = run.rms_norm(layer, query)
        query = run.linear(narrow[1], normed)
        tape.named(normed)
    rotary = latent.rotary / heads.width
    unturned, positions = op.split_last(query, (1 - rotary, rotary))
    both = run.linear(into, x)
    share = latent.rotary / (latent.keys + latent.rotary)
    compressed, key_positions = op.split_last(both, (1 - share, share))
    compressed = run.rms_norm(layer, compressed)
    turned, key_turned = run.rotate(layer, positions), run.rotate(layer, key_positions)
    joined = op.join((unturned, turned))
    expanded = run.linear(back, compressed)
    width = heads.width - latent.rotary
    share = width / (width + heads.value_width)
    unturned_keys, value = op.split_last(expanded, (share, 1 - share))
    key = op.filled((unturned_keys, op.expanded(key_turned, heads.queries)))
    attended, weights = _attend(run, layer, joined, key, value)
    if run.traits.kernel in ("flash", "cpu"):
        attended = op.clone(attended)  # joined queries lie head by head, see `attention`
    (out,) = run.linears((layer.out,), attended)
    tape.named(x, query, both, compressed, turned, key_turned, joined, key, value, attended)
    return out, weights


def _both_cast(x: Tensor, y: Tensor, itemsize: float) -> tuple[Tensor, Tensor]:
    """Return two tensors in another format; both old ones live until both new ones are there."""
    cast = op.cast(x, itemsize), op.cast(y, itemsize)
    x.tape.named(x, y)
    return cast


def _projections(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values: views of one product where the family joins their projections."""
    if len(layer.qkv) == 3:
        query, key, value = run.linears(layer.qkv, x)
        return query, key, value
    joined = run.linear(layer.qkv[0], x)
    heads = layer.heads
    queries, keys, values = heads.queries * heads.width, heads.keys * heads.width, heads.keys * heads.value_width
    shares = [part / (queries + keys + values) for part in (queries, keys, values)]
    if layer.qkv_split:
        query, key, value = op.split_last(joined, tuple(shares))
    else:
        query, key, value = (op.slice_last(joined, share) for share in shares)
    return query, key, value


def _attend(run: Modules, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the attention output and, for eager attention, its weights `[batch, heads, seq, seq]`."""
    kernel = run.traits.kernel
    if kernel == "eager":
        eager = _broadcast if run.shape.own_attention else _with_sinks if run.traits.sinks else _eager
        return eager(run, layer, query, key, value)
    if run.traits.arithmetic.autocast:
        query, key, value = (op.cast(t, run.traits.arithmetic.compute) for t in (query, key, value))
    if run.traits.plain_attention:
        out = _plain(run, layer, query, key, value)
        run.tape.named(query, key, value)
        return out, None
    masked = kernel == "efficient_masked"
    if masked or kernel == "efficient" or run.traits.repeats_heads:
        key, value = _both_widened(layer, key, value)
    out = op.fused_attention(
        *(query, key, value, layer.heads.queries),
        flash=kernel == "flash",
        workspaces=kernel != "cpu",
        masked=masked,
        value_share=layer.heads.value_width / layer.heads.width,
        sinks=run.traits.sinks,
        groups=head_groups(layer.heads.keys) if run.traits.groups_heads and kernel in ("flash", "cpu") else 1,
    )
    return out, None


def _eager(run: Modules, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Follow eager_attention_forward."""
    arithmetic, tape = run.traits.arithmetic, run.tape
    key, value = _both_widened(layer, key, value)
    if arithmetic.autocast:
        query, key = _both_cast(query, key, arithmetic.compute)
    itemsize = query.itemsize
    # With several rows the heads are strided, and `matmul` copies a strided operand. Keys and values that repeat_kv
    # copied are contiguous: only those that it did not copy, because no head or every head shares them, are strided.
    batched = run.traits.batched
    strided = batched and layer.heads.keys in (1, layer.heads.queries)
    square = Polynomial(per_square=layer.heads.queries)
    weights = op.scale(op.matmul(query, key, square, copies_x=batched, copies_y=strided))
    if run.shape.attention_softcap:
        raw, weights = weights, op.scale(op.activate_saving_result(op.scale(weights)))
        tape.named(raw)
    weights = op.add_number(weights)  # the causal mask
    if not run.traits.half:
        weights = op.cast(weights, 4)
    raw, weights = weights, op.cast(op.softmax_in_fp32(weights, fused_backward=run.traits.cpu), itemsize)
    tape.named(raw)
    if layer.attention_dropout:
        weights = run.dropout(weights)
    if arithmetic.autocast:
        value = op.cast(value, arithmetic.compute)
    out = op.matmul(weights, value, query.elements, copies_x=False, copies_y=strided)
    out = op.clone(op.laid_anew(out) if batched else out)  # .transpose(1, 2).contiguous()
    tape.named(query, key, value, weights)
    return out, weights


def _with_sinks(run: Modules, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Follow eager_attention_forward of modeling_gpt_oss.py: a column for the sink is joined, and cut off afterwards.

    The softmax keeps the scores' format. The greatest score of a row is subtracted, and the gradient goes through it.
    """
    arithmetic, tape = run.traits.arithmetic, run.tape
    key, value = _both_widened(layer, key, value)
    if arithmetic.autocast:
        query, key = _both_cast(query, key, arithmetic.compute)
    heads = layer.heads.queries
    scores = op.add_number(
        op.scale(op.matmul(query, key, Polynomial(per_square=heads), copies_x=False, copies_y=False))
    )
    joined = op.join((scores,))
    shifted = op.subtract_rows(joined, op.mean_last(joined, Polynomial(per_token=heads)))
    weights = op.slice_last(op.softmax(shifted, fused_backward=run.traits.cpu), 1)
    tape.named(scores)
    if arithmetic.autocast:
        value = op.cast(value, arithmetic.compute)
    out = op.matmul(weights, value, query.elements, copies_x=False, copies_y=False)
    out = op.clone(op.laid_anew(out) if run.traits.batched else out)  # .transpose(1, 2).contiguous()
    tape.named(query, key, value, shifted, weights)
    return out, weights


def _plain(run: Modules, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Follow aten/src/ATen/native/transformers/attention.cpp _scaled_dot_product_attention_math, torch 2.5 and newer.

    All of it runs in fp32. The softmax makes its result a second time to set rows that see nothing to zero. The kernel
    also returns the weights in the input's format, which nobody uses.
    """
    tape, itemsize, square = run.tape, query.itemsize, Polynomial(per_square=layer.heads.queries)
    wide_query, wide_key, value = (op.cast(t, 4) for t in (query, key, value))
    query, key = op.scale(wide_query), op.scale(wide_key)
    tape.named(wide_query, wide_key)
    scores = _product(run, layer, query, key, square)
    weights = op.softmax_in_fp32(scores, fused_backward=run.traits.cpu)
    tape.passing(square.times(4))
    tape.named(scores)
    out = op.cast(_product(run, layer, weights, value, query.elements), itemsize)
    tape.passing(square.times(itemsize))
    out = op.clone(out)  # .transpose(1, 2).contiguous() in sdpa_attention.py
    tape.named(query, key, value, weights)
    return out


def _broadcast(run: Modules, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Follow FalconAttention.forward without sdpa: scores are scaled in place, and softmax keeps the input's format.

    The input comes from a layer norm, which CUDA's autocast gives back in fp32.
    """
    square, autocast = Polynomial(per_square=layer.heads.queries), run.traits.arithmetic.autocast
    if autocast:
        query, key, value = (op.cast(t, run.traits.arithmetic.compute) for t in (query, key, value))
    itemsize = query.itemsize
    wide = 4 if autocast and not run.traits.cpu else itemsize
    scores = op.add_number(_product(run, layer, query, key, square))
    if not run.traits.half:
        scores = op.cast(scores, wide)
    weights = op.softmax(scores, wide, fused_backward=run.traits.cpu)
    out = op.clone(_product(run, layer, op.cast(weights, itemsize), value, query.elements))  # .permute(..).reshape(..)
    run.tape.named(query, key, value, weights)
    return out, weights


def _product(run: Modules, layer: Layer, x: Tensor, y: Tensor, outputs: Polynomial) -> Tensor:
    """Return a batched product. Where heads share y, `matmul` copies it for each of them, except for a single row."""
    shared = layer.heads.keys < layer.heads.queries
    y = op.expanded(y, layer.heads.queries / layer.heads.keys) if shared else y
    return op.matmul(x, y, outputs, copies_x=False, copies_y=shared and run.traits.batched)


def _both_widened(layer: Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values repeated for every query head (repeat_kv); both old ones live until both are there."""
    widened = _widened(layer, key), _widened(layer, value)
    key.tape.named(key, value)
    return widened


def _widened(layer: Layer, x: Tensor) -> Tensor:
    """Return keys or values for every query head: x itself where none share it, a view where all do, else a copy."""
    groups = layer.heads.queries / layer.heads.keys
    if groups == 1:
        return x
    return op.expanded(x, groups) if layer.heads.keys == 1 else op.gather(x, groups)
