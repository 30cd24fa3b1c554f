"""A recipe for a goal, a model, data and a card: every choice with its reason and its source.

The rules are rules of thumb from papers and measurements, and are named as such. A trial on the user's own data tells
more than any of them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from studio.core.advice import QLORA, REGRET, advised_rate
from studio.core.base_form import refusal
from studio.core.columns import Pairs
from studio.core.errors import BadInput
from studio.core.evidence import LEAST_ROWS
from studio.core.goals import GOALS, Goal
from studio.core.gpu_catalogue import GIB, Gpu
from studio.core.placement.sixteen_bit import StreamedWay, streamed_way
from studio.core.preferences import ADVISED_RATES
from studio.core.recipe import Method, Recipe, number_of
from studio.core.schedule import total_steps_of
from studio.core.shape import ModelShape
from studio.core.text import plain
from studio.core.trainable import check_adapted
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.precision_check import check_precision
from studio.core.vram.report import Verdict, VramEstimate
from studio.core.vram.setup import setup_of

ROWS_PER_STEP = 16
"""Rows of a step. Above 32, LoRA loses more by large batches than full fine-tuning does (Schulman et al. 2025)."""

RASCHKA = "Raschka 2023, Practical Tips for LoRA: one 7B model"
LITGPT = "LitGPT's fine-tuning tables: 12 models on one A10G"
BIDERMAN = "Biderman et al. 2024, LoRA Learns Less and Forgets Less"
MUENNIGHOFF = "Muennighoff et al. 2023, Scaling Data-Constrained Language Models"
UNSLOTH = "Unsloth 2024, unsloth.ai/blog/contpretraining"
HABIT = "a habit of the field: try half and twice of it"
ESTIMATE = "this program's memory estimate"
YOUR_DATA = "your data"

_SMALL_PARAMETERS = 1e9
_LONGEST_ADVISED = 2048
_TOKENS_PER_PARAMETER = 2
"""Trained tokens that one adapter parameter can hold: it holds 2 bits, and a token has 1 at most (Schulman et al.)."""
_WORTHWHILE_SHARE = 0.9
_MUCH_TEXT_TOKENS = 5_000_000
_WHOLE_RATE = 0.2
"""Unsloth advises a rate 2 to 10 times smaller for embeddings and head: the middle of it."""
_TEMPLATE_TOKENS = 32
"""Tokens that a chat template adds to a row at most: the roles of a few turns, and a system line."""
_MICRO_BATCHES = (16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a recommendation needs to know of a data file. Tokens are those of the texts, without a chat template's.

    Attributes:
        path: The file, or `embedded`.
        rows: Usable rows.
        tokens: Tokens of all rows.
        longest_tokens: Tokens of the longest row.
        counted: Whether the model's own tokenizer counted them; else they are estimated from the characters.
        pairs: Whether each row is a pair of answers of which one is preferred; tokens are then those of both sides, and
            the longest row is the longest side.
        text: Whether the rows are plain texts, of which those that are longer than a row become blocks.
        columns: What the file calls our columns.
    """

    path: str
    rows: int
    tokens: int
    longest_tokens: int
    counted: bool = True
    pairs: bool = False
    text: bool = False
    columns: Pairs = ()


@dataclass(frozen=True, slots=True)
class ReasonedChoice:
    """One choice: the fields that it sets, what is shown for it, the reason, and the source of the reason."""

    settings: tuple[tuple[str, Any], ...]
    label: str
    shown: str
    why: str
    source: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A whole recipe with its reasons.

    Attributes:
        recipe: The recipe.
        choices: Its choices with their reasons, in the order in which they are shown.
        instead: What might serve without any training; empty where nothing would.
        estimate: What the recipe needs; on a CPU there is no budget to compare it with.
        verdict: Whether it fits the card; None on a CPU.
        budget_bytes: What the card has for it; None on a CPU.
        streamed: Where 4 bits were chosen only because 16 do not fit: how they could all the same. None elsewhere.
    """

    recipe: Recipe
    choices: tuple[ReasonedChoice, ...]
    instead: str
    estimate: VramEstimate
    verdict: Verdict | None
    budget_bytes: int | None
    streamed: StreamedWay | None = None


@dataclass(frozen=True, slots=True)
class _Ground:
    shape: ModelShape
    gpu: Gpu | None
    budget_bytes: int | None

    def estimate(self, recipe: Recipe) -> VramEstimate:
        setup = setup_of(recipe, self.gpu)
        check_adapted(self.shape, setup.adapted)
        check_precision(self.shape, setup)
        return estimate_vram(self.shape, setup, self.gpu)

    def fits(self, recipe: Recipe) -> bool:
        return self.budget_bytes is not None and self.estimate(recipe).device.high <= self.budget_bytes


@dataclass(slots=True)
class _Draft:
    recipe: Recipe
    choices: list[ReasonedChoice] = field(default_factory=list)

    def choose(self, settings: dict[str, Any], label: str, shown: str, why: str, source: str) -> None:
        for path, value in settings.items():
            self.recipe = self.recipe.with_(path, value)
        self.choices.append(ReasonedChoice(tuple(settings.items()), label, shown, why, source))


def recommend(
    goal: Goal,
    base: str,
    shape: ModelShape,
    data: DataFacts,
    *,
    gpu: Gpu | None = None,
    budget_bytes: int | None = None,
    ram_bytes: int | None = None,
) -> Recommendation:
    """Return a recipe for a goal and the reasons for it.

    Args:
        goal: What the user wants.
        base: The model, as a recipe names it.
        shape: What it is made of.
        data: The rows to learn from.
        gpu: The card; None trains on the CPU.
        budget_bytes: What is free on the card; None takes all of it.
        ram_bytes: Main memory of the computer; None where it is not known.

    Raises:
        BadInput: The model cannot be adapted like this, or is quantised in a way that cannot be trained on.
    """
    if why := refusal(shape.quantised, "qlora"):
        raise BadInput(f"the model {plain(base, one_line=True, limit=200)} is {why}")
    # Without a card there is no budget, so that nothing "fits" or "does not fit" on a CPU.
    budget = None if gpu is None else gpu.total_bytes if budget_bytes is None else budget_bytes
    ground = _Ground(shape, gpu, budget)
    named = Recipe(name=goal, method="lora").with_("model.base", base).with_("data.path", data.path)
    draft = _Draft(named.with_("data.columns", data.columns))
    _length(draft, data)
    if data.text:  # from here on a row is a block
        data = replace(data, rows=max(data.rows, math.ceil(data.tokens / draft.recipe.train.seq_len)))
    if data.pairs:
        _preferences(draft)
    else:
        _epochs(draft, data)
        _learning_rate(draft, shape, data)
    _rank(draft, goal, ground, data)
    if data.text:
        _whole_modules(draft, ground)
    _method(draft, ground)
    _batch(draft, ground)
    _held_out(draft, data)
    draft.choices.sort(key=lambda choice: _ORDER.index(choice.label))
    estimate = ground.estimate(draft.recipe)
    verdict = None if budget is None else estimate.verdict(budget)
    way = streamed_way(draft.recipe, shape, gpu, budget, ram_bytes)
    return Recommendation(draft.recipe, tuple(draft.choices), GOALS[goal].instead, estimate, verdict, budget, way)


_ORDER = (
    *("Objective", "Method", "Rank", "Alpha", "Learning rate", "Targets", "Embeddings"),
    *("Length", "Rows a step", "Epochs", "Held out"),
)


def _length(draft: _Draft, data: DataFacts) -> None:
    stops = number_of("train.seq_len").stops
    needed = data.longest_tokens + (1 if data.text else _TEMPLATE_TOKENS)  # a text gets an end token
    fitting = next((int(stop) for stop in stops if stop >= needed), int(stops[-1]))
    length = min(fitting, _LONGEST_ADVISED)
    about = "" if data.counted else "about "
    longest = (
        f"the longest row has {about}{data.longest_tokens} tokens of text, and {_TEMPLATE_TOKENS} more are for what a "
        "chat template adds"
    )
    if data.text:
        longest = f"the longest text has {about}{data.longest_tokens} tokens"
        longest += ", and becomes blocks of this length: nothing is cut" if needed > length else ""
    elif needed > length:
        longest += "; what is longer is cut there"
    draft.choose({"train.seq_len": length}, "Length", f"{length} tokens", longest, YOUR_DATA)


def _preferences(draft: _Draft) -> None:
    """Choose DPO, its rate and one pass: the rows say which of two answers is preferred."""
    rate, source = ADVISED_RATES["dpo"]
    why = "each row has a preferred answer and another one: DPO makes the first likelier, held to the base by beta"
    draft.choose({"train.objective": "dpo"}, "Objective", "dpo", why, "Rafailov et al. 2023, DPO")
    why = "far below that of supervised training: higher rates make both answers unlikely"
    draft.choose({"train.learning_rate": rate}, "Learning rate", f"{rate:.0e}".replace("e-0", "e-"), why, source)
    why = "one pass: see margin and accuracy on held-out pairs before you take another"
    draft.choose({"train.epochs": 1.0}, "Epochs", "1", why, source)


def _epochs(draft: _Draft, data: DataFacts) -> None:
    if data.text:
        epochs = 1.0 if data.tokens >= _MUCH_TEXT_TOKENS else 3.0
        why = f"{data.tokens / 1e6:.1f} M tokens; text read up to four times is worth nearly as much as new text"
        draft.choose({"train.epochs": epochs}, "Epochs", f"{epochs:g}", why, MUENNIGHOFF)
        return
    epochs = 3.0 if data.rows < 2000 else 2.0 if data.rows < 10_000 else 1.0
    why = f"{data.rows} rows; more passes memorise them: stop where the held-out loss turns up"
    draft.choose({"train.epochs": epochs}, "Epochs", f"{epochs:g}", why, RASCHKA)


def _rank(draft: _Draft, goal: Goal, ground: _Ground, data: DataFacts) -> None:
    stops = [int(stop) for stop in number_of("adapter.rank").stops]
    least = max(stop for stop in stops if stop <= max(stops[0], min(GOALS[goal].rank, _most_rank(ground.shape))))
    ranks = [stop for stop in stops if stop >= least]
    wanted = data.tokens * draft.recipe.train.epochs / _TOKENS_PER_PARAMETER
    rank, why, source = ranks[0], GOALS[goal].rank_reason, HABIT
    trained = ground.estimate(draft.recipe.with_("adapter.rank", rank)).trainable_parameters
    for higher in ranks[1:]:
        if trained >= wanted or higher > _most_rank(ground.shape):
            break
        rank = higher
        trained = ground.estimate(draft.recipe.with_("adapter.rank", rank)).trainable_parameters
    if rank > ranks[0]:
        seen = data.tokens * draft.recipe.train.epochs
        why = f"{seen / 1e6:.1f} M trained tokens want up to {wanted / 1e6:.1f} M parameters"
        source = REGRET
    draft.choose({"adapter.rank": rank}, "Rank", f"{rank} ({trained / 1e6:.1f} M trained)", why, source)
    draft.choose(
        {"adapter.alpha": 32.0},
        "Alpha",
        "32",
        "32 at every rank was not beaten; alpha = 2 x rank is a habit, not a law",
        REGRET,
    )
    draft.choose(
        {"adapter.targets": "all-linear"},
        "Targets",
        "all linear",
        "attention alone learns less than the MLPs alone, at equal size",
        f"{REGRET}; {BIDERMAN if data.text else QLORA}",
    )


def _whole_modules(draft: _Draft, ground: _Ground) -> None:
    """Say what it takes to train embeddings and head too; set how fast they would learn."""
    names = ("embed_tokens",) if ground.shape.tied else ("embed_tokens", "lm_head")
    before, after = (ground.estimate(recipe).device.expected for recipe in (
        _leanest(draft.recipe), _leanest(draft.recipe.with_("adapter.modules_to_save", names))
    ))  # fmt: skip
    why = (
        f"another language or script wants {' and '.join(names)} trained whole (adapter.modules_to_save), at a rate "
        f"2 to 10 times smaller: {(after - before) / GIB:.1f} GiB more"
    )
    settings = {"adapter.whole_rate_ratio": _WHOLE_RATE}
    draft.choose(settings, "Embeddings", "frozen", why, f"{UNSLOTH}; {ESTIMATE}")


def _most_rank(shape: ModelShape) -> int:
    return min(min(linear.inputs, linear.outputs) for _, linear in shape.all_linears())


def _learning_rate(draft: _Draft, shape: ModelShape, data: DataFacts) -> None:
    rate = advised_rate(shape.parameters, shape.hidden, _steps(draft, data))
    draft.choose({"train.learning_rate": rate.value}, "Learning rate", rate.shown, rate.why, rate.source)


def _method(draft: _Draft, ground: _Ground) -> None:
    if ground.shape.quantised:
        why = "these weights lie in 4 bits already; a merge wants the 16-bit model that they were made from"
        draft.choose({"method": "qlora"}, "Method", "QLoRA 4-bit", why, "the model's config.json")
        return
    if ground.budget_bytes is None:
        why = "no card whose memory 4 bits would save; on a CPU they only take time"
        draft.choose({"method": "lora"}, "Method", "LoRA 16-bit", why, "bitsandbytes unpacks NF4 in every product")
        return
    # Compared at their leanest: the micro-batch is chosen after the method, from what the method leaves.
    lora, qlora = (_leanest(draft.recipe.with_("method", method)) for method in ("lora", "qlora"))
    peaks = {recipe.method: ground.estimate(recipe).device.expected for recipe in (lora, qlora)}
    free = f"{ground.budget_bytes / GIB:.1f} GiB free"
    room = f"{peaks['lora'] / GIB:.1f} GiB at the leanest, in 4 bit {peaks['qlora'] / GIB:.1f}; {free}"
    if ground.fits(lora):
        why = f"it fits ({room}); 4 bit cost 0.009 to 0.10 of loss and 16 to 105 % of time"
        method: Method = "lora"
    elif peaks["qlora"] > _WORTHWHILE_SHARE * peaks["lora"]:
        why, method = f"4 bit would save less than a tenth here ({room})", "lora"
    else:
        why, method = f"16 bit does not fit ({room}); a merge goes back through the 16-bit base", "qlora"
    shown = "LoRA 16-bit" if method == "lora" else "QLoRA 4-bit"
    draft.choose({"method": method}, "Method", shown, why, f"{ESTIMATE}; {LITGPT}")


def _leanest(recipe: Recipe) -> Recipe:
    return recipe.with_("train.micro_batch", 1).with_("train.recompute", "all")


def _batch(draft: _Draft, ground: _Ground) -> None:
    if ground.budget_bytes is None:
        recompute, micro_batch = "all" if ground.shape.parameters > _SMALL_PARAMETERS else "none", 4
        why, source = "below 32 rows; small micro-batches, since a CPU gains little from large ones", REGRET
    else:
        recompute, micro_batch = next(_fitting(draft.recipe, ground), ("all", 1))
        kept = "activations computed again" if recompute == "all" else "activations kept, which is faster"
        why, source = f"below 32 rows; {micro_batch} at once fit, {kept}", f"{REGRET}; {ESTIMATE}"
    accumulation = ROWS_PER_STEP // micro_batch
    settings = {
        "train.micro_batch": micro_batch,
        "train.accumulation": accumulation,
        "train.recompute": recompute,
    }
    draft.choose(settings, "Rows a step", f"{ROWS_PER_STEP} ({micro_batch} x {accumulation})", why, source)


def _fitting(recipe: Recipe, ground: _Ground) -> Iterator[tuple[str, int]]:
    """Yield what is recomputed and micro-batches that fit, fastest first: no layer down to 2 rows, then all."""
    for recompute, sizes in (("none", _MICRO_BATCHES[:-1]), ("all", _MICRO_BATCHES)):
        for size in sizes:
            tried = recipe.with_("train.recompute", recompute).with_("train.micro_batch", size)
            if ground.fits(tried):
                yield recompute, size


def _held_out(draft: _Draft, data: DataFacts) -> None:
    steps, rows = _steps(draft, data), _held_out_rows(data)
    every = max(5, steps // 8)
    settings = {"eval.rows": rows, "eval.every": every, "eval.samples": min(3, rows), "train.checkpoint_every": every}
    share = f"{LEAST_ROWS} rows, the fewest that a verdict needs" if rows == LEAST_ROWS else "a tenth, 100 rows at most"
    why = f"{share}; looked at every {every} of about {steps} steps"
    draft.choose(settings, "Held out", f"{rows} rows", why, YOUR_DATA)


def _held_out_rows(data: DataFacts) -> int:
    return min(100, max(1, data.rows // 10, LEAST_ROWS if data.rows >= 4 * LEAST_ROWS else 0)) if data.rows > 1 else 0


def _steps(draft: _Draft, data: DataFacts) -> int:
    """Return the optimizer steps of the rows that are not held out."""
    rows, epochs = max(1, data.rows - _held_out_rows(data)), draft.recipe.train.epochs
    return total_steps_of(steps=0, epochs=epochs, rows=rows, rows_per_step=ROWS_PER_STEP)
