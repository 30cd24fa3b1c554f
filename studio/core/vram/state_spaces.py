"""Selective state spaces, Mamba 2 and 1, as PyTorch's own code computes them (`studio.core.vram.mixers`)."""

from studio.core.mixer import Mixer
from studio.core.vram import mixer_operators as mix
from studio.core.vram import operators as op
from studio.core.vram.modules import Modules
from studio.core.vram.operators import gradient_like, result_of
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Tensor

_MOST_POSITIONS = 128
"""Positions of a row that are followed one by one; of a longer row each stands for several."""


def mamba2(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Follow forward of GraniteMoeHybridMambaLayer, NemotronHMamba2Mixer, FalconH1Mixer and the like."""
    tape, width = run.tape, mixer.heads * mixer.head_dim
    scaled = op.scale(x) if mixer.scales else x
    projected = run.linear(mixer.inputs[0], scaled)
    if mixer.scales:
        projected = op.times_constant(projected)
    whole = mixer.inputs[0].outputs
    shares = width / whole, mixer.channels / whole, mixer.heads / whole
    gate, before, steps = op.split_last(projected, shares)
    after = mix.convolved(run, mixer, before, activated=True)
    keys = mixer.groups * mixer.state / mixer.channels
    values, into, out_of = op.split_last(after, (1 - 2 * keys, keys, keys))
    steps = op.activate(op.activate(op.cast(op.add_number(steps), 4)))  # softplus, clamp
    scanned = _chunked_scan(run, mixer, (values, steps, into, out_of))
    if mixer.gate_norm == "before":
        normed = _gated_before(run, mixer, scanned, gate)
    elif mixer.gate_norm:
        normed = mix.gated_after(run, mixer, scanned, gate)
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
    # A single chunk of a single row lies as the products want it.
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
    both = op.clone(op.add(inside, outside))
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
    out = mix.product(run, x_laid, y_laid, outputs)
    run.tape.named(x_laid, y_laid)
    return out


# Mamba.


def mamba(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Follow MambaMixer.forward; Jamba's has three small norms beside, which are left out."""
    tape, state, width = run.tape, mixer.state, mixer.channels
    masked = op.times_constant(x)
    into_scan, from_input, from_steps = mixer.inputs
    joined = run.linear(into_scan, masked)
    values, gate = op.split_last(joined, (0.5, 0.5))
    after = op.times_constant(mix.convolved(run, mixer, values, activated=True))
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
        outputs.append(mix.product(run, narrow, op.slice_last(out_of, part), mix.per_token(width * part)))
    skipped = op.times_constant(values, 4)
    out = op.add(op.join(tuple(outputs)), skipped)
    tape.named(steps, decay, writes, fed, state, *outputs)
    return out
