"""What mixes tokens by a state or a short convolution, forward and backward, as PyTorch's own code computes it.

These are the paths that run where the optional kernels (causal-conv1d, flash-linear-attention, mamba-ssm) are not
installed; with them the memory is another. They go through a row chunk by chunk, so that the length of the rows must be
known (`LayerTraits.length`): sizes per row are sizes per token divided by it.

Sources: transformers 5.24 modeling_qwen3_5.py and modeling_qwen3_next.py (`torch_chunk_gated_delta_rule`),
modeling_lfm2.py, modeling_granitemoehybrid.py (`mamba2_chunk_scan`, the same in Bamba, Falcon-H1, Mamba 2, Nemotron-H).
"""

from studio.core.mixer import Mixer
from studio.core.vram import mixer_operators as mix
from studio.core.vram import operators as op
from studio.core.vram.modules import Modules
from studio.core.vram.operators import gradient_like, result_of
from studio.core.vram.state_spaces import mamba, mamba2
from studio.core.vram.tape import Tensor

_MOST_CHUNKS = 32
"""Chunks of a row that are followed one by one. Of a longer row each that is followed stands for several, which counts
what comes and goes with a chunk several times: well below a hundredth of what a layer holds."""


def mixed(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Return the mixer's output `[batch, seq, hidden]`; its input lives until then."""
    ways = {"delta": _gated_delta, "mamba2": mamba2, "mamba": mamba, "conv": _short_convolution}
    out = ways[mixer.kind](run, mixer, x)
    run.tape.named(x)
    return out


def _unit(x: Tensor, heads: int) -> Tensor:
    """Return heads of length one (`l2norm`)."""
    squares = mix.squared(x)
    inverse = op.activate_saving_result(op.add_number(op.mean_last(squares, mix.per_token(heads))))
    return op.multiply_rows(x, inverse)


# Gated DeltaNet.


def _gated_delta(run: Modules, mixer: Mixer, x: Tensor) -> Tensor:
    """Follow Qwen3_5GatedDeltaNet.forward, Qwen3NextGatedDeltaNet.forward."""
    keys, width = mixer.groups * mixer.state, mixer.heads * mixer.head_dim
    outputs = run.linears(mixer.inputs, x)
    before, gate, writes, decays = outputs if len(outputs) == 4 else _taken_apart(mixer, *outputs)
    after = mix.convolved(run, mixer, before, activated=True)
    share = keys / (2 * keys + width)
    query, key, value = op.split_last(after, (share, share, 1 - 2 * share))
    write = op.activate_saving_result(writes)
    steps = op.activate(op.add_number(op.cast(decays, 4)))
    decay = op.times_constant(steps)
    out = _chunked_delta(run, mixer, (query, key, value, write, decay))
    normed = mix.gated_after(run, mixer, out, gate)
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
    system = mix.times(mix.product(run, k_beta, key, square), pairs)
    within = mix.times(mix.product(run, query, key, square), pairs)
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
        fresh = mix.minus(out_of, mix.product(run, op.slice_last(read, part), state, out_of.elements))
        before = mix.product(run, op.slice_last(query, part), state, out_of.elements)
        inside = op.add(before, mix.product(run, op.slice_last(within, part), fresh, out_of.elements))
        total = mix.copied_into(total, inside)
        kept = result_of((state, cumulated), row_state, 4, (gradient_like(state), None), (state,))
        update = mix.product(run, op.slice_last(key, part), fresh, row_state)
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
    after = mix.convolved(run, mixer, product, activated=False)
    gated = op.multiply(gate, after)
    out = op.clone(gated)
    (projected,) = run.linears((mixer.out,), out)
    run.tape.named(joined, after, out)
    return projected
