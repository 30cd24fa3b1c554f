"""What mixes tokens by a state or a short convolution, forward and backward, as PyTorch's own code computes it.

These paths run where the optional kernels (causal-conv1d, flash-linear-attention, mamba-ssm) are not installed; with
the kernels a step needs other amounts. They go through a row chunk by chunk, so the length of the rows must be known
(`LayerTraits.length`): what there is once a row is written as a size per token, divided by that length.

Sources: transformers 5.24 modeling_qwen3_5.py and modeling_qwen3_next.py (`torch_chunk_gated_delta_rule`),
modeling_lfm2.py, modeling_granitemoehybrid.py (`mamba2_chunk_scan`, the same in Bamba, Falcon-H1, Mamba 2, Nemotron-H).
"""

from studio.core.layer_parts import Mixer
from studio.core.vram import mixer_operators as mix
from studio.core.vram import operators as op
from studio.core.vram.modules import Modules
from studio.core.vram.operators import gradient_like, result_of
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Tensor

_MOST_CHUNKS = 32
"""At most so many chunks of a row are followed one by one. In a longer row each of them stands for several chunks, so
what comes and goes with a chunk is counted several times. That is well below a hundredth of what a layer holds."""

_MOST_POSITIONS = 128
"""At most so many positions are followed one by one in Mamba's scan; in a longer row each stands for several."""


def mixed(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Return the mixer's output `[batch, seq, hidden]`; its input lives until then."""
    ways = {"delta": _gated_delta, "mamba2": _mamba2, "mamba": _mamba, "conv": _short_convolution}
    out = ways[mixer.kind](run, mixer, x)
    run.tape.named(x)
    return out


def _unit(x: Tensor, heads: int) -> Tensor:
    """Return heads of length one (`l2norm`)."""
    squares = mix.squared(x)
    inverse = op.activate_saving_result(op.add_number(op.mean_last(squares, mix.per_token(heads))))
    return op.multiply_rows(x, inverse)


def _product(run: Modules, x: Tensor, y: Tensor, outputs: Polynomial) -> Tensor:
    """Return a batched product; autocast takes both operands in 16 bit, whatever they were computed in."""
    if run.traits.arithmetic.autocast:
        y, x = op.cast(y, run.traits.arithmetic.compute), op.cast(x, run.traits.arithmetic.compute)
    saved = tuple(t for t, other in ((x, y), (y, x)) if other.node is not None)
    return result_of((y, x), outputs, x.itemsize, (gradient_like(y), gradient_like(x)), saved)


def _convolved(run: Modules, mixer: Mixer, x: Tensor, *, activated: bool) -> Tensor:
    """Return a causal convolution of each channel (`causal_conv1d_fn`): it makes `kernel - 1` positions too many."""
    if run.traits.fused_mixers:
        return result_of((x,), x.elements, x.itemsize, (gradient_like(x),), (x,))
    longer = 1 + (mixer.kernel - 1) / run.traits.length
    whole = result_of((x,), x.elements.times(longer), x.itemsize, (gradient_like(x),), (x,))
    cut = op.slice_last(whole, 1 / longer)
    out = op.activate(cut) if activated else cut
    x.tape.named(x)
    return out


def _gated_after(run: Modules, mixer: Mixer, x: Tensor, gate: Tensor) -> Tensor:
    """Follow Qwen3NextRMSNormGated: normed head by head, then multiplied with the gate in fp32."""
    wide = op.cast(x, 4)
    inverse = op.activate_saving_result(op.mean_last(op.power(wide), mix.per_token(mixer.heads)))
    normed = op.times_constant(op.cast(op.multiply_rows(wide, inverse), x.itemsize))
    gated = mix.times(normed, op.activate(op.cast(gate, 4)))
    out = op.cast(gated, x.itemsize)
    run.tape.named(x, inverse, gate)
    return out


# Gated DeltaNet.


def _gated_delta(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Follow Qwen3_5GatedDeltaNet.forward, Qwen3NextGatedDeltaNet.forward."""
    keys, width = mixer.groups * mixer.state, mixer.heads * mixer.head_dim
    outputs = run.linears(mixer.inputs, x)
    before, gate, writes, decays = outputs if len(outputs) == 4 else _taken_apart(mixer, *outputs)
    after = _convolved(run, mixer, before, activated=True)
    share = keys / (2 * keys + width)
    query, key, value = op.split_last(after, (share, share, 1 - 2 * share))
    write = op.activate_saving_result(writes)
    steps = op.activate(op.add_number(op.cast(decays, 4)))
    decay = op.times_constant(steps)
    out = _chunked_delta(run, mixer, (query, key, value, write, decay))
    normed = _gated_after(run, mixer, out, gate)
    projected = run.linear(mixer.out, normed)
    # The projection's output has no name of its own where it is the convolution's input (Qwen3.5).
    run.tape.named(*(outputs[1:] if len(outputs) == 4 else outputs), after, gate, writes, decays, decay)
    return projected


def _taken_apart(mixer: Mixer, joined: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """Follow fix_query_key_value_ordering: what is joined head by head is copied to lie kind by kind."""
    keys, width = mixer.groups * mixer.state, mixer.heads * mixer.head_dim
    shares = [part / (2 * keys + 2 * width) for part in (keys, keys, width, width)]
    query, key, value, gate = op.split_last(joined, tuple(shares))
    writes, decays = op.split_last(ends, (0.5, 0.5))
    shared = mixer.heads != mixer.groups
    if shared:
        value, gate, writes, decays = (op.clone(t) for t in (value, gate, writes, decays))
    parts = op.clone(query), op.clone(key), value if shared else op.clone(value)
    before = op.join(parts)
    joined.tape.named(*parts)
    return before, gate, writes, decays


def _chunked_delta(run: Modules, mixer: Mixer, given: tuple[Tensor, ...]) -> Tensor:
    """Follow torch_chunk_gated_delta_rule."""
    tape, length, chunk = run.tape, run.traits.length, mixer.chunk
    query, key, value, write, decay = given
    if run.traits.fused_mixers:
        return mix.fused(given, value.elements, value.itemsize)
    itemsize = query.itemsize
    if mixer.heads != mixer.groups:
        query, key = (op.gather(t, mixer.heads / mixer.groups) for t in (query, key))
        tape.named(query)
    narrow = (query, key)
    query, key, value, write = (op.cast(t, 4) for t in (query, key, value, write))
    tape.named(*narrow, query, key, value)
    query = _unit(query, mixer.heads)
    key = _unit(key, mixer.heads)
    query = op.scale(query)
    ratio = -(-length // chunk) * chunk / length
    short = query, key, value
    query, key, value = (mix.padded(t, ratio) for t in short)
    tape.named(*short)
    write, decay = mix.padded(write, ratio), mix.padded(decay, ratio)
    v_beta, k_beta = op.multiply_rows(value, write), op.multiply_rows(key, write)
    cumulated = result_of((decay,), decay.elements, 4, (gradient_like(decay),))
    pairs = mix.exponential(mix.masked(mix.pairwise(cumulated, chunk), chunk))
    square = pairs.elements
    system = mix.times(_product(run, k_beta, key, square), pairs)
    within = mix.times(_product(run, query, key, square), pairs)
    decayed = op.multiply_rows(k_beta, mix.exponential(cumulated))
    new, read = mix.solved(system, v_beta), mix.solved(system, decayed)
    chunks = -(-length // chunk)
    several = max(1.0, chunks / _MOST_CHUNKS)
    row_state = mix.per_token(several * mixer.heads * mixer.state * mixer.head_dim / length)
    state = Tensor(tape, row_state, 4)
    total = Tensor(tape, new.elements, 4)
    query = op.multiply_rows(query, mix.exponential(cumulated))
    key = op.multiply_rows(key, mix.exponential(mix.minus(cumulated, cumulated)))
    tape.named(state, total)
    part = several / chunks
    for _ in range(min(chunks, _MOST_CHUNKS)):
        out_of = op.slice_last(new, part)
        fresh = mix.minus(out_of, _product(run, op.slice_last(read, part), state, out_of.elements))
        before = _product(run, op.slice_last(query, part), state, out_of.elements)
        inside = op.add(before, _product(run, op.slice_last(within, part), fresh, out_of.elements))
        total = mix.copied_into(total, inside)
        kept = result_of((state, cumulated), row_state, 4, (gradient_like(state), None), (state,))
        update = _product(run, op.slice_last(key, part), fresh, row_state)
        old, state = state, op.add(kept, update)
        tape.named(old, before, fresh)
    tape.named(state)
    out = (
        op.cast(op.clone(total), itemsize)
        if ratio == 1
        else op.cast(op.slice_last(op.clone(total), 1 / ratio), itemsize)
    )
    tape.named(query, key, value, write, decay, v_beta, k_beta, cumulated, pairs, system, within, decayed, new, read)
    return out


# Short convolutions.


def _short_convolution(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Follow Lfm2ShortConv.forward."""
    (joined,) = run.linears(mixer.inputs, x)
    left, gate, right = op.split_last(joined, (1 / 3, 1 / 3, 1 / 3))
    product = op.multiply(left, right)
    after = _convolved(run, mixer, product, activated=False)
    gated = op.multiply(gate, after)
    out = op.clone(gated)  # .transpose(-1, -2).contiguous()
    (projected,) = run.linears((mixer.out,), out)
    run.tape.named(joined, after, out)
    return projected


# Mamba 2.


def _mamba2(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Follow forward of GraniteMoeHybridMambaLayer, NemotronHMamba2Mixer, FalconH1Mixer and the like."""
    tape, width = run.tape, mixer.heads * mixer.head_dim
    scaled = op.scale(x) if mixer.scales else x
    projected = run.linear(mixer.inputs[0], scaled)
    if mixer.scales:
        projected = op.times_constant(projected)
    whole = mixer.inputs[0].outputs
    shares = width / whole, mixer.channels / whole, mixer.heads / whole
    gate, before, steps = op.split_last(projected, shares)
    after = _convolved(run, mixer, before, activated=True)
    keys = mixer.groups * mixer.state / mixer.channels
    values, into, out_of = op.split_last(after, (1 - 2 * keys, keys, keys))
    steps = op.activate(op.activate(op.cast(op.add_number(steps), 4)))  # softplus, clamp
    scanned = _chunked_scan(run, mixer, (values, steps, into, out_of))
    if mixer.gate_norm == "before":
        normed = _gated_before(run, mixer, scanned, gate)
    elif mixer.gate_norm:
        normed = _gated_after(run, mixer, scanned, gate)
    else:
        normed = mix.times(scanned, op.activate(gate))
    narrow = op.cast(normed, x.itemsize)
    out = run.linear(mixer.out, narrow)
    tape.named(scaled, projected, after, steps, normed, narrow)
    return out


def _gated_before(run: Modules, mixer: Mixer, x: Tensor, gate: Tensor) -> Tensor:
    """Follow GraniteMoeHybridRMSNormGated: multiplied with the gate in fp32, then normed group by group."""
    gated = mix.times(op.cast(x, 4), op.activate(op.cast(gate, 4)))
    inverse = op.activate_saving_result(op.mean_last(op.power(gated), mix.per_token(mixer.groups)))
    out = op.times_constant(op.cast(op.multiply_rows(gated, inverse), x.itemsize))
    run.tape.named(inverse)
    return out


def _chunked_scan(run: Modules, mixer: Mixer, given: tuple[Tensor, ...]) -> Tensor:
    """Follow mamba2_chunk_scan: `[batch, seq, heads, head_dim]` in fp32."""
    if run.traits.fused_mixers:
        return mix.fused(given, given[0].elements, given[0].itemsize)
    tape, length, chunk = run.tape, run.traits.length, mixer.chunk
    chunks = -(-length // chunk)
    ratio = chunks * chunk / length
    # A single chunk of a single row already lies in memory as the products want it, so nothing is copied.
    copies = chunks > 1 or run.traits.batched
    values, steps, into, out_of = given
    values = op.cast(values, 4)
    into, out_of = (op.gather(op.cast(t, 4), mixer.heads / mixer.groups) for t in (into, out_of))
    skipped = op.times_constant(mix.padded(values, ratio))
    short = op.multiply_rows(values, steps), op.times_constant(steps), into, out_of
    values, decay, into, out_of = (op.laid_anew(mix.padded(t, ratio)) for t in short)
    tape.named(*short)
    summed = _cumulated(decay)
    pairs = mix.exponential(_segments(run, decay, chunk))
    square = pairs.elements
    scores = _contracted(run, out_of, into, square, copies=(copies, copies))
    weights = mix.times(scores, pairs)
    wide = values.elements
    inside = op.laid_anew(_contracted(run, weights, values, wide, copies=(False, copies)))
    decayed = op.multiply_rows(into, mix.exponential(mix.minus(summed, summed)))
    per_chunk = mixer.heads * mixer.head_dim * mixer.state / length
    made = _contracted(run, decayed, values, mix.per_token(chunks * per_chunk), copies=(copies, copies))
    first = Tensor(tape, mix.per_token(per_chunk), made.itemsize)
    states = op.join((first, op.laid_anew(made)))
    tape.named(first)
    states = op.clone(states) if run.traits.batched else states
    passed = result_of((states,), states.elements, states.itemsize, (gradient_like(states),), (states,))
    fading = mix.exponential(summed)
    state = op.slice_last(passed, chunks / (chunks + 1))
    outside = op.laid_anew(_contracted(run, out_of, state, wide, copies=(copies, copies)))
    outside = _times_rows(outside, fading)
    both = op.clone(op.add(inside, outside))  # (Y_diag + Y_off).contiguous()
    out = op.add(both, skipped)
    tape.named(values, decay, into, out_of, skipped, summed, pairs, scores, weights, inside, decayed, passed, outside)
    return out if ratio == 1 else op.slice_last(out, 1 / ratio)


def _segments(run: Modules, x: Tensor, chunk: int) -> Tensor:
    """Return sums over all stretches within a chunk (`segment_sum`)."""
    mask = Tensor(x.tape, Polynomial(fixed=chunk * chunk), 1)
    first = result_of((x,), x.elements.times(chunk), x.itemsize, (gradient_like(x),), (mask,))
    out = mix.masked(_cumulated(first), chunk)
    run.tape.named(first)
    return out


def _cumulated(x: Tensor) -> Tensor:
    """Return `cumsum`: its backward turns the gradient around, sums it up and turns it around again."""
    return result_of((x,), x.elements, x.itemsize, (gradient_like(x),), works=(x.bytes, x.bytes))


def _times_rows(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x * factor` in fp32 with one factor per row, for an x in 16 bit."""
    wide = x.elements.times(4)
    works = (wide,) if x.itemsize == 4 else (wide, wide)
    return result_of((x, factor), x.elements, 4, (gradient_like(x), gradient_like(factor)), (x, factor), works=works)


def _contracted(run: Modules, x: Tensor, y: Tensor, outputs: Polynomial, *, copies: tuple[bool, bool]) -> Tensor:
    """Return `einsum` of two operands, which copies those that do not lie batch by batch before it multiplies them."""
    x_laid, y_laid = (op.clone(t) if copied else t for t, copied in zip((x, y), copies, strict=True))
    out = _product(run, x_laid, y_laid, outputs)
    run.tape.named(x_laid, y_laid)
    return out


# Mamba.


def _mamba(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Follow MambaMixer.forward; Jamba's has three small norms beside, which are left out."""
    tape, state, width = run.tape, mixer.state, mixer.channels
    masked = op.times_constant(x)
    into_scan, from_input, from_steps = mixer.inputs
    joined = run.linear(into_scan, masked)
    values, gate = op.split_last(joined, (0.5, 0.5))
    after = op.times_constant(_convolved(run, mixer, values, activated=True))
    narrow = run.linear(from_input, after)
    rank = from_steps.inputs / from_input.outputs
    times, into, out_of = op.split_last(narrow, (rank, state / from_input.outputs, state / from_input.outputs))
    steps = op.frozen_linear(times, mix.per_token(width), run.traits.arithmetic.compute)
    scanned = _selective_scan(run, mixer, (after, steps, into, out_of))
    gated = mix.times(scanned, op.activate(gate))
    out = op.cast(gated, x.itemsize)
    projected = run.linear(mixer.out, out)
    tape.named(joined, after, steps, narrow, gated)
    return projected


def _selective_scan(run: Modules, mixer: Mixer, given: tuple[Tensor, ...]) -> Tensor:
    """Follow mamba_selective_scan without mambapy: position by position, each with a state of its own."""
    values, steps, into, out_of = given
    if run.traits.fused_mixers:
        return mix.fused(given, values.elements, values.itemsize)
    tape, length, width = run.tape, run.traits.length, mixer.channels
    every = mix.per_token(width * mixer.state)
    whole = every.times(4)
    steps = op.activate(op.cast(op.add_number(steps), 4))
    spread = result_of((steps,), every, 4, (gradient_like(steps),), works=(whole,))
    decay = op.activate_saving_result(spread)
    into = op.cast(into, 4)
    sizes = gradient_like(steps), gradient_like(into)
    writes = result_of((steps, into), every, 4, sizes, (steps, into), works=(whole, whole))
    fed = op.multiply_rows(writes, op.cast(values, 4))
    positions = min(length, _MOST_POSITIONS)
    part = 1 / positions
    state = Tensor(tape, every.times(part), values.itemsize)
    outputs = []
    for _ in range(positions):
        old, faded = state, mix.times(state, op.slice_last(decay, part))
        state = op.add(faded, op.slice_last(fed, part))
        tape.named(old)
        narrow = op.cast(state, values.itemsize)
        outputs.append(_product(run, narrow, op.slice_last(out_of, part), mix.per_token(width * part)))
    skipped = op.times_constant(values, 4)
    out = op.add(op.join(tuple(outputs)), skipped)
    tape.named(steps, decay, writes, fed, state, *outputs)
    return out
