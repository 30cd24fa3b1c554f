"""What an audit's figures mean: losses and divergences with intervals, and the words that follow from them.

The input is figures per token; every result says on how many rows and tokens it rests.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from studio.core.evidence import could_hide, difference_in_words, seen_sign, too_little
from studio.core.intervals import Interval, quantile_interval, ratio_interval

NOTHING_NATS = 1e-6
"""KL per token up to which two models count as the same: fp32 rounding of our own arithmetic gives up to 1e-7."""
_TAIL = 0.99


@dataclass(frozen=True, slots=True)
class RowFigures:
    """A variant on some rows, a number per token of each row.

    Attributes:
        loss: Negative log-likelihood of the token that follows, nats.
        kl: KL divergence from the reference, nats.
        same: 1 where the most likely token is the reference's, else 0.
    """

    loss: Sequence[Sequence[float]]
    kl: Sequence[Sequence[float]]
    same: Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Figures:
    """A variant on some rows; every interval is a 95 % one by bootstrap over rows.

    Attributes:
        rows: How many rows they rest on.
        tokens: How many tokens.
        loss: Mean negative log-likelihood per token, nats.
        perplexity: Its exponential.
        more: Loss above the reference's, paired row by row.
        kl: Mean KL divergence from the reference, nats per token.
        kl_tail: Its 99th percentile over tokens.
        same_top: Share of tokens whose most likely one is the reference's.
    """

    rows: int
    tokens: int
    loss: Interval
    perplexity: float
    more: Interval
    kl: Interval
    kl_tail: Interval
    same_top: Interval


def figures_of(found: RowFigures, reference: RowFigures) -> Figures:
    """Return the figures of a variant beside those of the reference on the same rows.

    Raises:
        ValueError: There is no token, or the rows are not the same.
    """
    counts = [len(row) for row in found.loss]
    if counts != [len(row) for row in reference.loss]:
        raise ValueError("found rows of other lengths than the reference's; wanted the same rows")
    sums, meant = ([math.fsum(row) for row in one.loss] for one in (found, reference))
    loss = ratio_interval(sums, counts)
    return Figures(
        rows=len(counts),
        tokens=sum(counts),
        loss=loss,
        perplexity=math.exp(min(loss.value, 700.0)),  # beyond 709 the exponential overflows a float
        more=ratio_interval([one - other for one, other in zip(sums, meant, strict=True)], counts),
        kl=ratio_interval([math.fsum(row) for row in found.kl], counts),
        kl_tail=quantile_interval(found.kl, _TAIL),
        same_top=ratio_interval([math.fsum(row) for row in found.same], counts),
    )


@dataclass(frozen=True, slots=True)
class Forgetting:
    """What training did to a text that has nothing to do with its data.

    Attributes:
        before: The base that the adapter was trained on, on that text.
        after: The trained model on it.
        more: Loss after training above that before, paired passage by passage, nats per token.
        verdict: What that says.
    """

    before: Figures
    after: Figures
    more: Interval
    verdict: str


def forgetting_of(before: Figures, after: Figures) -> Forgetting:
    """Return what training did to a neutral text.

    Args:
        before: The base without the adapter, with the trained model as its reference.
        after: The trained model on the same passages.
    """
    more = before.more.negated
    rests = f"{after.tokens:,} tokens of {after.rows} passages"
    said = difference_in_words(more)
    hides = could_hide(more)
    if why := too_little(after.rows, after.tokens):
        verdict = f"Too little to say whether the model forgot anything: of the neutral text {why} ({more.value:+.4f})."
    elif seen_sign(more) > 0:
        verdict = f"The model forgot something: its loss on the neutral text is {said}, {rests}."
    elif seen_sign(more) < 0:
        verdict = f"No forgetting: the neutral text became likelier, its loss is {said}, {rests}."
    else:
        verdict = f"No forgetting can be seen in the loss on the neutral text: {said}, {rests}."
        verdict += f" That is too little to rule it out: {hides}." if hides else ""
    return Forgetting(before, after, more, verdict)


@dataclass(frozen=True, slots=True)
class Advice:
    """What follows from the figures.

    Attributes:
        best: Name of the variant that is advised; empty where there is nothing to choose.
        sentence: What to do.
        reason: Why.
        certainty: How sure that is, and on what it rests.
    """

    best: str
    sentence: str
    reason: str
    certainty: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Blocks that stay in 16 bit.

    Attributes:
        kept: Their names.
        extra_bytes: More memory than with none kept.
        figures: On the user's rows.
        won: KL that keeping them saves, nats per token; negative where it costs.
    """

    kept: tuple[str, ...]
    extra_bytes: int
    figures: Figures
    won: Interval


def advise_base(
    rounded: Mapping[str, Figures], asked: str, plans: Sequence[Plan], answers: int | None = None
) -> Advice:
    """Return what the rounding of a base means for the choice of a method.

    Args:
        rounded: Figures on the user's rows by form.
        asked: The form that a recipe would use.
        plans: Measured mixed plans of that form.
        answers: How many different answers the rows have; None where that is not known.
    """
    seen = rounded[asked]
    rests = f"{seen.tokens:,} tokens of {seen.rows} rows; other data may differ"
    moved = f"KL {seen.kl.value:.4f} nats a token, {1 - seen.same_top.value:.1%} of the most likely tokens change"
    plan = best_plan(plans)
    keep = ""
    if plan:
        names = ", ".join(plan.kept)
        keep = f" Keeping {names} in 16 bit wins {plan.won.value:.4f} of the KL for {plan.extra_bytes / 2**30:.2f} GiB."
    loss, hides = difference_in_words(seen.more), could_hide(seen.more)
    if why := too_little(seen.rows, seen.tokens, answers):
        sentence, keep = f"Too little to say what {asked} costs on your data: {why}.", ""
    elif seen_sign(seen.more) > 0:
        sentence = (
            f"{asked} costs this model something on your data before training; race both methods to see the rest."
        )
    elif seen_sign(seen.more) < 0:
        sentence = f"{asked} does not harm this model's loss on your data; choose by memory and speed."
    elif hides:
        sentence = f"No cost of {asked} can be seen in the loss on your data, too little to rule one out: {hides}."
    else:
        sentence = f"No cost of {asked} can be seen in the loss on your data; choose by memory and speed."
    return Advice(asked, sentence + keep, f"Loss against 16 bit: {loss}. {moved}.", rests)


def advise_race(
    lanes: Mapping[str, Figures], peaks_bytes: Mapping[str, int | None], answers: int | None = None
) -> Advice:
    """Return which method to train with, after both were trained for some steps.

    Args:
        lanes: Figures on the held-out rows by lane, compared with the first.
        peaks_bytes: Predicted peak of each lane, where it is known.
        answers: How many different answers the rows have; None where that is not known.
    """
    first, *others = lanes
    best = min(lanes, key=lambda name: lanes[name].loss.value)
    alike = [name for name in lanes if name == best or not _lanes_differ(lanes, name, best, first)]
    certainty = f"{lanes[first].tokens:,} tokens of {lanes[first].rows} held-out rows, one seed; another seed moves all"
    told = "; ".join(f"{name} {difference_in_words(lanes[name].more)}" for name in others)
    reason = f"Held-out loss against {first}: {told}."
    if too_few := too_little(lanes[first].rows, lanes[first].tokens, answers):
        return Advice("", f"Too little to say which learns these data better: {too_few}.", reason, certainty)
    if alike == [best]:
        return Advice(best, f"{best} learns these data better; use it if it fits.", reason, certainty)
    known = {name: size for name in alike if (size := peaks_bytes.get(name))}
    lean = min(known, key=known.__getitem__, default=alike[0])
    why = f"{lean} needs the least memory" if known else "their memory is not known"
    among = "" if len(alike) == len(lanes) else f" between {' and '.join(alike)}"
    hides = next(filter(None, (could_hide(lanes[name].more) for name in alike)), "")
    rest = f" That is too little to rule one out: {hides}." if hides else ""
    return Advice(lean, f"No difference in loss can be seen{among}; {why}.{rest}", reason, certainty)


def _lanes_differ(lanes: Mapping[str, Figures], one: str, best: str, first: str) -> bool:
    """Return whether two lanes can be told apart; all are paired with the first, not with each other."""
    if first in (one, best):
        return bool(seen_sign(lanes[best if one == first else one].more))
    return apart(lanes[one].more, lanes[best].more)


def best_plan(plans: Sequence[Plan]) -> Plan | None:
    """Return the plan that wins most KL per byte among those whose win is more than noise; None where none does."""
    real = [plan for plan in plans if plan.won.sign > 0 and plan.extra_bytes > 0]
    return max(real, key=lambda plan: plan.won.value / plan.extra_bytes, default=None)


def advise_run(
    measured: Mapping[str, Figures],
    *,
    trained: str,
    without: str,
    choices: Sequence[str],
    answers: int | None = None,
) -> Advice:
    """Return which form of a trained model to use.

    The form with the lowest task loss wins; among forms that cannot be told apart from it the first of `choices` wins.
    Closeness to the trained model is reported but does not decide: on one adapter the 16-bit merge was further away
    and better.

    Args:
        measured: Figures on the held-out rows, compared with the trained model.
        trained: The adapter on the base that it was trained on.
        without: That base alone.
        choices: Forms that can be used, the handiest first.
        answers: How many different answers the rows have; None where that is not known.
    """
    alone = measured[without]
    rests = f"{alone.tokens:,} tokens of {alone.rows} held-out rows"
    if alone.kl.value <= NOTHING_NATS:
        return Advice(
            "",
            "The adapter has no effect: with and without it the model is the same.",
            f"KL {alone.kl.value:.1e} nats a token between the two.",
            rests,
        )
    if why := too_little(alone.rows, alone.tokens, answers):
        return Advice(
            "",
            f"Too little to say whether the adapter helps and which form to use: {why}.",
            f"Loss of the base against the trained model: {alone.more.value:+.4f}.",
            rests,
        )
    if seen_sign(alone.more) < 0:
        return Advice(
            "",
            "Do not use this adapter: the base alone has the lower loss on the held-out rows.",
            f"Loss of the base against the trained model: {difference_in_words(alone.more)}.",
            rests,
        )
    known = [name for name in choices if name in measured]
    lowest = min(known, key=lambda name: measured[name].loss.value)
    # Each form is paired with the trained model, not with another form. Overlapping intervals count as alike, so that
    # forms are rather called alike than different.
    alike = [name for name in known if not apart(measured[name].more, measured[lowest].more)]
    best = alike[0]
    others = [name for name in alike if name != best]
    certainty = f"{rests}; 95 % intervals"
    if not seen_sign(alone.more):
        certainty += "; whether the adapter helps at all on these rows is not certain"
    same = f" What cannot be told from it: {', '.join(others)}." if others else ""
    reason = f"Loss against the trained model ({trained}): {difference_in_words(measured[best].more)}.{same}"
    return Advice(best, f"Use {best}.", reason, certainty)


def beat_its_base(alone: Figures, answers: int | None = None) -> bool | None:
    """Return whether a trained model beat its base on the held-out rows; None where there is too little to tell.

    Args:
        alone: Figures of the base alone, compared with the trained model.
        answers: How many different answers the rows have; None where that is not known.
    """
    return None if too_little(alone.rows, alone.tokens, answers) else seen_sign(alone.more) > 0


def apart(one: Interval, other: Interval) -> bool:
    """Return whether two intervals do not touch."""
    ends = (one.low, one.high, other.low, other.high)
    if any(end is None for end in ends):
        return False
    return bool(one.high < other.low or other.high < one.low)  # type: ignore[operator]
