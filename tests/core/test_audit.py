"""What figures mean in words: what is advised, what is called noise, what is called no effect."""

import random

import pytest

from studio.core.audit import (
    Figures,
    Plan,
    RowFigures,
    advise_base,
    advise_race,
    advise_run,
    beat_its_base,
    best_plan,
    figures_of,
    forgetting_of,
)
from studio.core.audit_tables import difference, interval, size
from studio.core.audit_text import markdown_of
from studio.core.evidence import (
    DECIDES_NATS,
    LEAST_NATS,
    LEAST_ROWS,
    LEAST_TOKENS,
    difference_in_words,
    gain_in_words,
    seen_sign,
)
from studio.core.intervals import Interval, ratio_interval
from tests.fakes.audit_job import base_report

ROWS, TOKENS = 60, 12


def rows_of(shift: float = 0.0, scatter: float = 0.0, kl: float = 0.0, seed: int = 0) -> RowFigures:
    """Rows whose losses are all moved by `shift`, and each by a random number of size `scatter` (summing to zero)."""
    draw = random.Random(seed)  # noqa: S311
    base = random.Random(99)  # noqa: S311
    half = [draw.gauss(0.0, scatter) for _ in range(ROWS // 2)]
    own = half + [-value for value in half]
    loss = [[base.uniform(1, 3) + shift + own[row] for _ in range(TOKENS)] for row in range(ROWS)]
    return RowFigures(loss, [[kl] * TOKENS] * ROWS, [[1.0] * TOKENS] * ROWS)


def found(**moved: float) -> Figures:
    return figures_of(rows_of(**moved), rows_of())  # type: ignore[arg-type]


def test_figures_rest_on_rows_and_tokens() -> None:
    figures = found(shift=0.5, kl=0.25)
    assert (figures.rows, figures.tokens) == (ROWS, ROWS * TOKENS)
    assert figures.more.value == pytest.approx(0.5)
    assert figures.kl.value == figures.kl_tail.value == 0.25
    assert figures.loss.value == pytest.approx(figures_of(rows_of(), rows_of()).loss.value + 0.5)


def test_a_paired_difference_is_far_surer_than_two_losses() -> None:
    figures = found(shift=0.05, scatter=0.02)
    assert figures.loss.high - figures.loss.low > 3 * (figures.more.high - figures.more.low)  # type: ignore[operator]
    assert seen_sign(figures.more) == 1


def test_other_rows_than_the_references_are_refused() -> None:
    short = RowFigures([[1.0]], [[0.0]], [[1.0]])
    with pytest.raises(ValueError, match="same rows"):
        figures_of(short, rows_of())


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (Interval(0.5, 0.4, 0.6), "higher by 0.5000 (0.4000 to 0.6000)"),
        (Interval(-0.5, -0.6, -0.4), "lower by 0.5000 (0.4000 to 0.6000)"),
        (Interval(0.1, -0.1, 0.3), "no difference seen (-0.1000 to +0.3000"),
        (Interval(LEAST_NATS / 2, LEAST_NATS / 4, LEAST_NATS), "no difference seen"),
        (Interval(0.1), "of one row only"),
    ],
)
def test_a_difference_in_words(more: Interval, wanted: str) -> None:
    assert wanted in difference_in_words(more)


def test_noise_between_rows_is_called_no_difference() -> None:
    advice = advise_base({"nf4": found(scatter=0.1)}, "nf4", [])
    assert advice.sentence == "No cost of nf4 can be seen in the loss on your data; choose by memory and speed."
    assert "no difference seen" in advice.reason


def test_noise_alone_is_called_no_difference_nineteen_times_in_twenty() -> None:
    draw, called, trials = random.Random(11), 0, 300  # noqa: S311
    for trial in range(trials):
        rows = [draw.gauss(0.0, 0.3) for _ in range(40)]
        called += seen_sign(ratio_interval([12 * row for row in rows], [12] * 40, seed=trial, resamples=400)) != 0
    assert called / trials <= 0.09, "5 % are called a difference by chance; 0.09 is three standard deviations above"


def test_a_cost_that_is_real_is_told() -> None:
    advice = advise_base({"nf4": found(shift=0.3, kl=0.4)}, "nf4", [])
    assert "costs this model something" in advice.sentence
    assert "720 tokens of 60 rows" in advice.certainty


def test_the_plan_that_wins_most_per_byte_is_told_and_noise_is_not() -> None:
    figures = found()
    sure = Plan(("model.layers.1",), 2**30, figures, Interval(0.2, 0.1, 0.3))
    more = Plan(("model.layers.1", "model.layers.2"), 2**31, figures, Interval(0.3, 0.2, 0.4))
    noise = Plan(("model.layers.3",), 1, figures, Interval(0.2, -0.1, 0.5))
    assert best_plan([noise, more, sure]) is sure
    assert best_plan([noise]) is None
    advice = advise_base({"nf4": figures}, "nf4", [noise, more, sure])
    assert "Keeping model.layers.1 in 16 bit wins 0.2000 of the KL for 1.00 GiB" in advice.sentence


def test_a_race_is_won_or_drawn() -> None:
    peaks = {"lora": 300, "qlora": 100, "qlora+mixed": 200}
    clear = advise_race({"lora": found(), "qlora": found(shift=0.1)}, peaks)
    assert clear.best == "lora" and "lora learns these data better" in clear.sentence
    assert "qlora higher by 0.1000" in clear.reason
    better = advise_race({"lora": found(), "qlora": found(shift=-0.1)}, peaks)
    assert better.best == "qlora"
    drawn = advise_race({"lora": found(), "qlora": found(scatter=0.4)}, peaks)
    assert drawn.best == "qlora" and drawn.sentence.startswith("No difference in loss can be seen; qlora")
    three = {"lora": found(), "qlora": found(shift=0.2), "qlora+mixed": found(scatter=0.4, seed=3)}
    advice = advise_race(three, peaks)
    assert advice.best == "qlora+mixed", "the leanest of those that are as good, not the leanest of all"
    assert "between lora and qlora+mixed" in advice.sentence
    unknown = advise_race({"lora": found(), "qlora": found(scatter=0.4)}, {"lora": None, "qlora": None})
    assert unknown.best == "lora" and "memory is not known" in unknown.sentence


def measured(**forms: Figures) -> dict[str, Figures]:
    return {"trained": found(), "alone": found(shift=1.0, kl=1.0), **forms}


def test_the_lowest_loss_wins_whatever_its_distance() -> None:
    seen = measured(far=found(shift=-0.2, kl=0.9), near=found(kl=0.001))
    advice = advise_run(seen, trained="trained", without="alone", choices=["near", "trained", "far"])
    assert advice.best == "far"


def test_among_those_that_cannot_be_told_apart_the_handiest_wins() -> None:
    seen = measured(small=found(shift=0.01, scatter=0.1), large=found(scatter=0.1, seed=4))
    advice = advise_run(seen, trained="trained", without="alone", choices=["small", "large", "trained"])
    assert advice.best == "small"
    assert advice.reason.endswith("What cannot be told from it: large, trained.")


def test_no_effect_and_harm_are_said() -> None:
    nothing = {"trained": found(), "alone": found(kl=1e-9)}
    assert "no effect" in advise_run(nothing, trained="trained", without="alone", choices=["trained"]).sentence
    harm = {"trained": found(), "alone": found(shift=-0.5, kl=0.5)}
    advice = advise_run(harm, trained="trained", without="alone", choices=["trained"])
    assert advice.sentence.startswith("Do not use this adapter")
    unsure = {"trained": found(), "alone": found(scatter=0.5, kl=0.5)}
    advice = advise_run(unsure, trained="trained", without="alone", choices=["trained"])
    assert "not certain" in advice.certainty
    judged = [beat_its_base(one["alone"]) for one in (measured(), harm, unsure)]
    assert judged == [True, False, False] and beat_its_base(measured()["alone"], answers=1) is None


def test_cells() -> None:
    assert interval({"value": 1.0, "low": None, "high": None}) == "1.0000"
    assert difference({"value": 0.1, "low": -0.1, "high": 0.3}) == "+0.1000 (-0.1000 to +0.3000, noise)"
    assert (size(None), size(2**20), size(3 * 2**30)) == ("?", "1.0 MiB", "3.00 GiB")


def test_names_from_outside_do_not_break_the_page() -> None:
    name = "a|b\x1b[2J<script>\n# head"
    report = base_report(name)
    report["variants"][1]["name"] = name
    page = markdown_of(report)
    assert "\x1b" not in page and "\n# head" not in page.removeprefix("# Audit")
    assert "a\\|b" in page


@pytest.mark.parametrize(
    ("shift", "scatter", "said"),
    [
        (-0.3, 0.0, "The model forgot something: its loss on the neutral text is higher by 0.3000"),
        (0.3, 0.0, "No forgetting: the neutral text became likelier"),
        (0.0, 0.3, "No forgetting can be seen"),
    ],
)
def test_forgetting_is_the_loss_after_training_above_that_before(shift: float, scatter: float, said: str) -> None:
    before = found(shift=shift, scatter=scatter)  # the base, compared with the trained model
    forgetting = forgetting_of(before, found())
    assert said in forgetting.verdict
    assert f"{ROWS * TOKENS} tokens of {ROWS} passages" in forgetting.verdict
    assert forgetting.more.value == pytest.approx(-before.more.value)
    assert (forgetting.more.low, forgetting.more.high) == (-before.more.high, -before.more.low)  # type: ignore[operator]
    assert Interval(1.0).negated == Interval(-1.0)


def some(rows: int, tokens: int, shift: float, scatter: float = 0.0) -> Figures:
    """Figures of a few rows, all moved by `shift`."""
    draw = random.Random(5)  # noqa: S311
    reference = [[draw.uniform(1, 3) for _ in range(tokens)] for _ in range(rows)]
    own = [[loss + shift + scatter * (-1) ** place for loss in row] for place, row in enumerate(reference)]
    kl, same = [[0.1] * tokens] * rows, [[1.0] * tokens] * rows
    return figures_of(RowFigures(own, kl, same), RowFigures(reference, kl, same))


@pytest.mark.parametrize(
    ("rows", "tokens", "why"),
    [
        (10, 2, "10 rows are too few"),
        (LEAST_ROWS - 1, 50, f"{LEAST_ROWS - 1} rows are too few for an interval to be trusted, wanted {LEAST_ROWS}"),
        (1, 500, "1 row is too few"),
        (20, 1, f"20 tokens are too few for an interval to be trusted, wanted {LEAST_TOKENS} or more"),
    ],
)
@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.3])
def test_too_little_passes_no_verdict(rows: int, tokens: int, why: str, shift: float) -> None:
    """Also where every row agrees: so few could have agreed by chance, and their interval would not tell."""
    few, zero = some(rows, tokens, shift), some(rows, tokens, 0.0)
    plan = Plan(("model.layers.1",), 2**30, few, Interval(0.2, 0.1, 0.3))
    run = {"trained": zero, "alone": some(rows, tokens, shift)}
    said = [
        advise_base({"nf4": few}, "nf4", [plan]).sentence,
        advise_race({"lora": zero, "qlora": few}, {"lora": 2, "qlora": 1}).sentence,
        advise_run(run, trained="trained", without="alone", choices=["trained"]).sentence,
        forgetting_of(few, zero).verdict,
    ]
    for sentence in said:
        assert sentence.startswith("Too little to say") and why in sentence
    for advice in (
        advise_race({"lora": zero, "qlora": few}, {}),
        advise_run(run, trained="trained", without="alone", choices=["trained"]),
    ):
        assert advice.best == "", "nothing is advised"
    assert "does not harm" not in said[0] and "Keeping" not in said[0]


def test_enough_passes_one() -> None:
    enough = some(LEAST_ROWS, 8, -0.3, 0.05)
    assert "nf4 does not harm" in advise_base({"nf4": enough}, "nf4", []).sentence
    one_answer = advise_base({"nf4": enough}, "nf4", [], answers=1).sentence
    assert f"all {LEAST_ROWS} rows have one and the same answer" in one_answer


def test_a_difference_that_could_hide_is_said() -> None:
    wide = some(20, 10, 0.0, 0.3)
    hidden = max(abs(wide.more.low or 0), abs(wide.more.high or 0))
    assert hidden > DECIDES_NATS
    advice = advise_base({"nf4": wide}, "nf4", [])
    assert f"too little to rule one out: up to {hidden:.2f} nats a token" in advice.sentence
    assert "choose by memory" not in advice.sentence and "too wide to rule one out" in advice.reason
    race = advise_race({"lora": some(20, 10, 0.0), "qlora": wide}, {"lora": 2, "qlora": 1})
    assert race.best == "qlora" and f"up to {hidden:.2f} nats a token" in race.sentence
    assert f"up to {hidden:.2f} nats a token" in forgetting_of(wide, some(20, 10, 0.0)).verdict
    narrow = some(20, 10, 0.0, 0.01)
    assert "could hide" not in advise_base({"nf4": narrow}, "nf4", []).sentence


@pytest.mark.parametrize(
    ("more", "rows", "tokens", "improved", "words"),
    [
        (Interval(-1.0, -1.2, -0.8), 50, 600, True, "the held-out loss improved: lower by 1.0000"),
        (Interval(0.2, 0.1, 0.3), 50, 600, False, "the held-out loss got worse: higher by 0.2000"),
        (Interval(-0.01, -0.03, 0.01), 50, 600, False, "did not improve beyond noise: no difference seen"),
        (Interval(-0.0001, -0.0002, -0.00005), 50, 600, False, "did not improve beyond noise"),
        (
            Interval(-1.0, -1.2, -0.8),
            5,
            600,
            None,
            "too little to tell whether the held-out loss improved (-1.0000): 5 rows",
        ),
        (Interval(-1.0, -1.2, -0.8), 50, 60, None, "60 tokens are too few"),
    ],
)
def test_what_training_did_to_the_held_out_loss(
    more: Interval, rows: int, tokens: int, improved: bool | None, words: str
) -> None:
    found, said = gain_in_words(more, rows, tokens)
    assert found is improved and words in said


def test_our_interval_holds_the_truth_about_as_often_as_it_says_from_the_least_rows_on() -> None:
    """The count behind LEAST_ROWS, smaller: mean losses of one or two tokens a row, exponentially spread."""
    draw, held = random.Random(3), {3: 0, LEAST_ROWS: 0}  # noqa: S311
    trials = 200
    for rows in held:
        for trial in range(trials):
            tokens = [draw.choice((1, 2)) for _ in range(rows)]
            sums = [count * (draw.expovariate(1.0) - 1.0) for count in tokens]
            one = ratio_interval(sums, tokens, seed=trial, resamples=300)
            held[rows] += (one.low or 0.0) <= 0.0 <= (one.high or 0.0)
    assert held[3] / trials < 0.8 < 0.84 < held[LEAST_ROWS] / trials
