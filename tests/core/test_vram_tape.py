"""The symbolic autograd frees what PyTorch frees, when PyTorch frees it."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from studio.core.vram import operators as op
from studio.core.vram.polynomial import NOTHING, Polynomial, largest, ranked, uncovered
from studio.core.vram.tape import Events, Tape, Tensor, alive_after, marks, run_backward
from tests.examples import examples

ROW = Polynomial(per_token=8)


def leaf(tape: Tape) -> Tensor:
    return tape.given(ROW, 2, tape.node())


def back_from(tape: Tape, out: Tensor, gradient: Polynomial = ROW, itemsize: float = 2) -> tuple[Events, Events]:
    """Return what a backward does from a result that is gone, but for what its graph saved."""
    tape.take(out.node)
    assert out.node is not None
    return run_backward(tape, out.node, tape.given(gradient, itemsize))


def test_a_tensor_dies_after_its_last_use_or_name():
    tape = Tape(records=False)
    x = leaf(tape)
    y = op.scale(x)
    z = op.scale(y)
    assert tape.take() == (y.number, ~x.number, z.number, ~y.number, ~z.number)
    tape = Tape(records=False)
    x = leaf(tape)
    y = op.scale(x)
    z = op.scale(y)
    tape.named(x)
    assert tape.take() == (y.number, z.number, ~x.number, ~y.number, ~z.number)


def test_a_view_counts_nothing_and_keeps_its_base():
    tape = Tape(records=False)
    x = leaf(tape)
    half = op.slice_last(x, 0.5)
    y = op.scale(x)
    z = op.scale(half)
    assert tape.take() == (y.number, ~y.number, z.number, ~x.number, ~z.number)
    assert tape.alive == NOTHING


def test_an_activation_saves_its_input_until_its_backward_has_run():
    tape = Tape()
    x = leaf(tape)
    out = op.activate(x)
    tape.hold(out)
    tape.take(out.node)
    assert tape.alive == Polynomial(per_token=32)
    tape.release(out)
    back_from(tape, out)
    assert tape.alive == NOTHING


def test_without_a_graph_nothing_is_saved():
    tape = Tape(records=False)
    out = op.activate(leaf(tape))
    tape.hold(out)
    tape.take()
    assert tape.alive == out.bytes


def test_what_no_backward_reaches_goes_with_its_result():
    """A product of which only the norm is taken: what its graph saved is not kept for the backward."""
    tape = Tape()
    x = leaf(tape)
    lost = op.activate(op.scale(x))
    out = op.scale(x)
    after = op.scale(out)
    tape.named(lost)
    events = tape.take(after.node)
    assert events.index(~(lost.number - 1)) > events.index(after.number), "its input lives as long as it does"
    assert tape.alive == NOTHING


def test_a_frozen_product_saves_no_input_and_a_trained_one_does():
    tape = Tape()
    frozen = op.frozen_linear(leaf(tape), ROW)
    tape.hold(frozen)
    tape.take(frozen.node)
    assert tape.alive == frozen.bytes
    arithmetic = op.Arithmetic(compute=2, residual=2, autocast=True)
    kept: list[Tensor] = []
    trained = op.trained_linear(leaf(tape), ROW, Polynomial(per_rank=8), kept, arithmetic)
    tape.hold(trained)
    tape.take(trained.node)
    assert tape.alive == frozen.bytes.plus(trained.bytes).plus(Polynomial(per_token=16, per_rank=16))


def test_a_shared_gradient_is_added_out_of_place_and_a_lone_one_in_place():
    """x + f(x): the sum's gradient waits for x while f's backward runs; when that one comes, nobody else holds it."""
    tape = Tape()
    x = leaf(tape)
    out = op.add(x, op.scale(x))
    before, after = back_from(tape, out)
    found = marks((*before, *after), tape.sizes, out.bytes)
    assert largest(found, 1, 0, 0) == 2 * 16, "the waiting gradient and f's: no third for the sum"


def test_gradients_of_a_split_wait_side_by_side():
    tape = Tape()
    x = leaf(tape)
    tape.hold(x)
    left, right = op.split_last(x, (0.5, 0.5))
    out = op.multiply(left, right)
    tape.take(out.node)
    saved = tape.alive
    before, after = back_from(tape, out, ROW.times(0.5))
    found = marks((*before, *after), tape.sizes, saved.plus(Polynomial(per_token=8)))
    assert largest(found, 1, 0, 0) == saved.per_token + 16 + 16, "both halves' gradients and then the joined one"


def test_bytes_in_flight_before_something_saved_is_read():
    tape = Tape()
    out = op.cast(op.activate(leaf(tape)), 4)
    before, _ = back_from(tape, out, itemsize=4)
    in_flight = alive_after(before, tape.sizes, NOTHING)
    assert in_flight == Polynomial(per_token=16 - 32), "the 16-bit gradient has replaced the 32-bit one"


def test_only_polynomials_that_can_be_the_largest_stay():
    small, tokens, rank = Polynomial(per_token=1), Polynomial(per_token=3), Polynomial(per_token=1, per_rank=5)
    kept = uncovered([small, tokens, rank, tokens])
    assert set(kept) == {tokens, rank}
    assert largest(kept, 10, 0, 1) == 30
    assert largest(kept, 1, 0, 10) == 51


@given(
    st.lists(st.builds(Polynomial, *[st.integers(-9, 9)] * 5), min_size=1, max_size=12),
    st.integers(1, 99),
    st.integers(1, 9),
    st.integers(1, 64),
)
def test_polynomials_left_out_for_a_rank_are_never_the_largest(polynomials, tokens, length, rank):
    numbers = tokens, tokens * length
    kept = max(
        polynomial.per_token * numbers[0] + polynomial.per_square * numbers[1] + polynomial.fixed
        for polynomial in ranked(polynomials, rank)
    )
    assert kept == largest(polynomials, *numbers, rank)


SIZES = st.tuples(*[st.integers(0, 40)] * 5)
STEPS = st.tuples(*[st.integers(-3, 3)] * 5)


@settings(max_examples=examples(30))
@given(
    st.lists(SIZES, min_size=3, max_size=9),
    STEPS,
    st.lists(SIZES, min_size=2, max_size=5),
    STEPS,
    st.tuples(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 300)),
)
@example([(0,) * 5] * 3, (0, 0, 0, 1, -1), [(0,) * 5] * 2, (0,) * 5, (1, 0, 1))  # equal ones: no row of period 1
def test_of_many_polynomials_in_a_steady_row_only_the_ends_are_kept_and_none_that_can_be_largest_is_lost(
    first: list[tuple[int, ...]],
    rise: tuple[int, ...],
    second: list[tuple[int, ...]],
    fall: tuple[int, ...],
    numbers: tuple[int, int, int],
) -> None:
    rows = [
        Polynomial(*base).plus(Polynomial(*step).times(turn / 7))
        for bases, step in ((first, rise), (second, fall))
        for turn in range(700 // len(bases))
        for base in bases
    ]
    kept = uncovered(rows)
    assert len(kept) <= 60
    assert abs(largest(kept, *numbers) - largest(rows, *numbers)) <= 1e-9 * (1 + abs(largest(rows, *numbers)))
