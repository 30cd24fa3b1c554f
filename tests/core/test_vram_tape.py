"""The symbolic autograd frees what PyTorch frees, when PyTorch frees it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from studio.core.vram import operators as op
from studio.core.vram.polynomial import NOTHING, Polynomial, largest, ranked, uncovered
from studio.core.vram.tape import Node, Tape, Tensor, run_backward

ROW = Polynomial(per_token=8)


def leaf(tape: Tape) -> Tensor:
    return Tensor(tape, ROW, 2, Node(tape.next_sequence(), (), ()))


def peak(tape: Tape, tokens: int = 1) -> float:
    return largest(tape.marks, tokens, 0, 0)


def test_a_tensor_dies_with_its_last_name():
    tape = Tape()
    x = leaf(tape)
    y = x
    del x
    assert tape.live == Polynomial(per_token=16)
    del y
    assert tape.live == NOTHING


def test_a_view_counts_nothing_and_keeps_its_base():
    tape = Tape()
    x = leaf(tape)
    half = op.slice_last(x, 0.5)
    del x
    assert tape.live == Polynomial(per_token=16)
    del half
    assert tape.live == NOTHING


def test_an_activation_saves_its_input_until_its_backward_has_run():
    tape = Tape()
    x = leaf(tape)
    out = op.activate(x)
    del x
    assert tape.live == Polynomial(per_token=32)
    node, out.node = out.node, None
    gradient = [Tensor(tape, ROW, 2)]
    del out
    run_backward(tape, node, gradient)
    del node
    assert tape.live == NOTHING


def test_without_a_graph_nothing_is_saved():
    tape = Tape(records=False)
    out = op.activate(leaf(tape))
    assert tape.live == out.bytes


def test_a_frozen_product_saves_no_input_and_a_trained_one_does():
    tape = Tape()
    frozen = op.frozen_linear(leaf(tape), ROW)
    assert tape.live == frozen.bytes
    arithmetic = op.Arithmetic(compute=2, residual=2, autocast=True)
    kept: list[Tensor] = []
    trained = op.trained_linear(leaf(tape), ROW, Polynomial(per_rank=8), kept, arithmetic)
    assert tape.live == frozen.bytes.plus(trained.bytes).plus(Polynomial(per_token=16, per_rank=16))


def test_a_shared_gradient_is_added_out_of_place_and_a_lone_one_in_place():
    """x + f(x): the sum's gradient waits for x while f's backward runs; when that one comes, nobody else holds it."""
    tape = Tape()
    x = leaf(tape)
    out = op.add(x, op.scale(x))
    node, out.node = out.node, None
    del out, x
    tape.marks.clear()
    gradient = [Tensor(tape, ROW, 2)]
    run_backward(tape, node, gradient)
    assert peak(tape) == 2 * 16, "the waiting gradient and f's: no third for the sum"


def test_gradients_of_a_split_wait_side_by_side():
    tape = Tape()
    x = leaf(tape)
    left, right = op.split_last(x, (0.5, 0.5))
    out = op.multiply(left, right)
    del left, right
    node, out.node = out.node, None
    del out
    tape.marks.clear()
    live = tape.live
    run_backward(tape, node, [Tensor(tape, ROW.times(0.5), 2)])
    assert peak(tape) == live.per_token + 16 + 16, "both halves' gradients and then the joined one"


def test_bytes_in_flight_before_something_saved_is_read():
    tape = Tape()
    x = leaf(tape)
    out = op.cast(op.activate(x), 4)
    node, out.node = out.node, None
    del out
    in_flight = run_backward(tape, node, [Tensor(tape, ROW, 4)])
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


@settings(max_examples=30, deadline=None)
@given(
    st.lists(SIZES, min_size=3, max_size=9),
    STEPS,
    st.lists(SIZES, min_size=2, max_size=5),
    STEPS,
    st.tuples(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 300)),
)
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
