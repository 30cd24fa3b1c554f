"""The looks, texts and options of the guided set-up: what was found, what follows from it, what each step offers.

Text from files and from the machine is never read as markup.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from textual.content import Content

from studio.core.errors import StudioError
from studio.core.goals import GOALS, Goal
from studio.core.gpu_catalogue import CATALOGUE, GIB
from studio.core.recipe import EMBEDDED, Recipe
from studio.core.recommendation import Recommendation
from studio.core.shape import ModelShape
from studio.core.text import plain, plain_path
from studio.probe.data import Preference
from studio.probe.data.opened import Progress
from studio.probe.hub import is_hub_id
from studio.probe.local_models import Listed
from studio.probe.machine import Machine
from studio.probe.setup import Answers, DataChecked, goal_for
from studio.tui.panels.data_text import bars_text
from studio.tui.panels.setup_step import Shown, path_line
from studio.tui.readable import UNKNOWN, count, gib
from studio.tui.reading import STAGES, process_words
from studio.tui.services import Services

HERE, OTHER = "here", "other"
"""The machine step's answers beside the name of a card."""

Then = Literal["launch", "configure", "save"]
Options = list[tuple[str, Shown]]
"""Values and what is shown for them."""

_LABEL = 10
_WORD = 15
_MOST_NAMED = 12
_MOST_FINDINGS = 8
_EXAMPLE, _MOST_EXAMPLES = 160, 6
_BARS = 44
"""Cells for bars: as many as the words of a step have where they stand beside its options."""
_TWO_COLUMNS = 60
_LEAST_NAME, _NAME_ABOVE = 20, 76
_LEVELS = {"fits": "$text-success bold", "tight": "$text-warning bold", "does not fit": "$text-error bold"}

Parts = list[str | tuple[str, str]]


@dataclass(frozen=True, slots=True)
class SetupDone:
    """How the set-up ended.

    Attributes:
        recipe: The recommended recipe.
        then: Whether to start it, to look at it on the configure screen, or to save it to a file.
        card: The card of the catalogue that was planned for; empty for this machine's.
    """

    recipe: Recipe
    then: Then
    card: str


def machine_text(machine: Machine, runs_root: Path) -> Content:
    """Return the machine as it was found."""
    from studio.probe.checkup import trouble_of  # noqa: PLC0415  0.05 s that no other text pays

    parts: Parts = []
    for number, gpu in enumerate(machine.cards or ()):
        total = f"{gib(gpu.total_bytes)} GiB" if gpu.total_bytes else "size not available"
        free = f", {gib(gpu.free_bytes)} free now" if gpu.free_bytes is not None else ""
        level = f", compute capability {'.'.join(map(str, gpu.capability))}" if gpu.capability else ""
        parts += _row("Card" if not number else "", f"{gpu.name}, {total}{free}{level}")
        if others := [process_words(process) for process in (gpu.processes or ())[:_MOST_FINDINGS]]:
            parts += _row("", f"in use by {', '.join(others)}")
    if machine.cards is None:
        parts += _row("Card", "no NVIDIA driver answers: training runs on the CPU")
    elif not machine.cards:
        parts += _row("Card", "the driver answers, but shows no card")
    parts += _row("Driver", machine.driver or UNKNOWN)
    if trouble := trouble_of(machine):
        parts.append((f"\n{trouble}\n\n", "$text-error"))
    ram = f"{gib(machine.ram_bytes)} GiB, {gib(machine.free_ram_bytes)} free" if machine.ram_bytes else UNKNOWN
    parts += _row("Memory", ram)
    where = plain(str(runs_root), one_line=True)
    parts += _row("Disk", f"{gib(machine.disk_bytes)} GiB free for runs in {where}" if machine.disk_bytes else UNKNOWN)
    parts += _row("Cores", str(machine.cores or UNKNOWN))
    parts += _row("System", plain(machine.system, one_line=True, limit=80))
    if machine.spills:
        parts.append(
            "\nOn Windows and WSL the driver moves what does not fit into main memory, many times slower. A run keeps "
            "to what is free on the card when it starts, and fails beyond it: close what else uses the card.\n"
        )
    return Content.assemble(*parts)


def model_line(model: Listed, cells: int) -> Content:
    """Return one model of the list, in a number of cells."""
    word = model.word
    if word == EMBEDDED:
        word = "embedded: SmolLM2-135M-Instruct"
    size = f"  {model.size_bytes / GIB:.1f} GiB" if model.size_bytes else ""
    note = "  cannot be used" if model.problem else ""
    where = {"hub": "  in the cache" if model.path else "  on the hub", "folder": "", "embedded": ""}[model.kind]
    if model.kind == "hub" and not model.path:
        from studio.probe.known_models import is_gated  # noqa: PLC0415  2 ms that only models of the hub pay

        where += ", gated" if is_gated(model.word) else ""
    about = f"{size}{where}{note}"
    return Content.assemble(plain_path(word, max(_LEAST_NAME, cells - len(about))), about)


def model_text(base: str, shape: ModelShape, needs: Content) -> Content:
    """Return what is known of a model that was looked at, and what it takes of the card."""
    return Content.assemble(
        (plain_path(base, _NAME_ABOVE), "bold"),
        f"\n{shape.family}, {shape.parameters / 1e9:.2f} B parameters, {shape.layers} layers of width {shape.hidden}, "
        f"{count(shape.vocabulary)} words of vocabulary\n",
        f"16-bit weights {2 * shape.parameters / GIB:.1f} GiB\n\n",
        needs,
        (f"\n\n{plain(shape.origin, one_line=True)}" if shape.origin else "", "$text-warning"),
    )


def data_text(checked: DataChecked) -> Content:
    """Return what a data file is, what is wrong with it, and one row."""
    data, facts = checked.data, checked.facts
    parts: Parts = [(plain_path(data.path.name, _NAME_ABOVE), "bold")]
    if checked.unknown:
        names = ", ".join(plain(name, one_line=True, limit=40) for name, _ in checked.unknown[:_MOST_NAMED])
        more = len(checked.unknown) - _MOST_NAMED
        parts.append(f"\nIts columns are not known: {names}{f' and {more} more' if more > 0 else ''}.\n")
        parts.append(("Enter asks which of them is the prompt and which the answer.", "bold"))
        return Content.assemble(*parts)
    parts.append(f"\n{plain(data.described(), one_line=True) if data.rows else 'no row can be used'}\n")
    if words := data.beside_words():
        parts.append(f"{words}\n")
    if facts.rows:
        about = "" if facts.counted else "about "
        how = "" if facts.counted else " (from the characters: this model's tokenizer is not here yet)"
        parts.append(
            f"{about}{count(facts.tokens)} tokens of text, the longest row {about}{count(facts.longest_tokens)}{how}; "
            f"what a chat template adds to each is not counted\n"
        )
    for note in (*data.notes(), *filter(None, (checked.advice,))):
        parts += [("note  ", "$text-warning"), f"{plain(note, one_line=True, limit=400)}\n"]
    fatal = [finding for finding in data.findings if finding.fatal][:_MOST_FINDINGS]
    for finding in fatal:
        parts += [
            ("error  ", "$text-error bold"),
            f"row {finding.row}: {plain(finding.message, one_line=True, limit=300)}\n",
        ]
    if sum(data.finding_counts.values()) > len(fatal):
        parts.append("all that was found, row by row: lora-studio data check FILE\n")
    if not checked.sound:
        parts.append(("Correct the file before training, or choose another.\n", "$text-error"))
    elif data.rows:
        for row in data.rows[:_MOST_EXAMPLES]:
            if row.prompt:
                parts += [("\nasked   ", "dim"), _example(row.prompt), ("\nanswer  ", "dim"), _example(row.answer)]
                if isinstance(row, Preference):
                    parts += [("\nnot     ", "dim"), _example(row.sides[1].messages[-1].content)]
            else:
                parts += [("\ntext    ", "dim"), _example(row.answer)]
            parts.append("\n")
    return Content.assemble(*parts)


def goal_line(goal: Goal) -> Content:
    """Return one goal of the list."""
    words = GOALS[goal]
    return Content.assemble((f"{words.label:24}", "bold"), words.example)


def goal_text(goal: Goal) -> Content:
    """Return whether fine-tuning suits a goal, and what to try instead or before."""
    words = GOALS[goal]
    head = "Before you train" if words.fits else "Fine-tuning is not the first tool for this"
    return Content.assemble((f"{head}\n", "$text-warning bold" if not words.fits else "bold"), words.instead)


def recommendation_text(recommendation: Recommendation, width: int) -> Content:
    """Return every choice with its reason and source, for a text of `width` columns."""
    parts: Parts = []
    for choice in recommendation.choices:
        parts += [f"{choice.label:{_WORD}}", (f"{choice.shown}\n", "bold")]
        for words, style in ((_sentence(choice.why), ""), (choice.source, "dim italic")):
            lines = textwrap.wrap(plain(words, one_line=True), max(20, width - _WORD)) if width > _TWO_COLUMNS else []
            lines = lines or textwrap.wrap(plain(words, one_line=True), max(20, width - 2))
            indent = " " * (_WORD if width > _TWO_COLUMNS else 2)
            parts += [(f"{indent}{line}\n", style) for line in lines]
    if recommendation.streamed:
        parts += [f"{line}\n" for line in textwrap.wrap(recommendation.streamed.words, max(20, width))]
    return Content.assemble(*parts)


def verdict_text(recommendation: Recommendation, card: str) -> Content:
    """Return whether the recommendation fits, in one or two lines.

    Args:
        recommendation: What the set-up recommends.
        card: The card that is planned for; empty for this machine's.
    """
    if recommendation.verdict is None or recommendation.budget_bytes is None:
        return Content("It runs on this machine's CPU: slow, and sure to fit only for small models.")
    device = recommendation.estimate.device
    where = f"planned for {plain(card, one_line=True)}" if card else "on this machine's card"
    stage = STAGES.get(recommendation.estimate.stage, recommendation.estimate.stage)
    return Content.assemble(
        (recommendation.verdict, _LEVELS[recommendation.verdict]),
        f": {gib(device.expected)} GiB expected ({gib(device.low)}-{gib(device.high)}) of "
        f"{gib(recommendation.budget_bytes)}, highest {stage}; {where}.",
        "" if recommendation.verdict == "fits" else " On the next screen f looks for what fits.",
    )


def refused_text(reason: str) -> Content:
    """Return why something cannot be used."""
    return Content.styled(plain(reason, limit=1500), "$text-error")


def card_options(card: str) -> Options:
    """Offer this machine, the card of the catalogue that was chosen before, the choice by a word, and the catalogue."""
    chosen = [(card, Content(f"Plan for {plain(card, one_line=True)}"))] if card else []
    others = [
        (gpu.name, Content.assemble(f"{gpu.name:24}", f"{gib(gpu.total_bytes):>6} GiB"))
        for gpu in CATALOGUE.values()
        if gpu.name != card
    ]
    here = (HERE, Content("This machine, as it is"))
    return [here, *chosen, (OTHER, Content("Plan for another card ...")), *others]


def data_options(files: Sequence[str], chosen: str) -> Options:
    """Offer the embedded data and the files that were found; a chosen file that is not among them comes first."""
    options: Options = [(EMBEDDED, Content("embedded: questions about Python's standard library"))]
    options += [(file, path_line(file)) for file in files]
    return options if chosen in (EMBEDDED, *files) else [(chosen, path_line(chosen)), *options]


def goal_options() -> Options:
    """Offer every goal."""
    return [(goal, goal_line(goal)) for goal in GOALS]


def end_options() -> Options:
    """Offer what can be done with the recommended recipe."""
    words: dict[Then, str] = {
        "launch": "Start training now",
        "configure": "Look at every knob first",
        "save": "Save the recipe to a file",
    }
    return [(then, Content(text)) for then, text in words.items()]


def likely_end(recommendation: Recommendation, card: str) -> Then:
    """Return the option that the cursor begins on: to start, where the recipe is for this machine and fits."""
    return "launch" if recommendation.verdict in (None, "fits") and not card else "configure"


def goal_of(word: str) -> Goal:
    """Return the goal that an option stands for."""
    return next(goal for goal in GOALS if goal == word)


def end_of(word: str) -> Then:
    """Return what an option of the last step does."""
    return "launch" if word == "launch" else "save" if word == "save" else "configure"


def is_model(word: str) -> bool:
    """Return whether a line names a model rather than words to search for."""
    # A path with a NUL names nothing: looked at as a model it is refused, and the hub is not asked for it.
    if word == EMBEDDED or word.startswith((".", "~")) or "\0" in word:
        return True
    try:
        if Path(word).is_dir():
            return True
    except OSError:
        return False
    return "/" in word and (is_hub_id(word) or word.startswith("/"))


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _row(label: str, words: str) -> Parts:
    return [(f"{label:{_LABEL}}", "dim"), f"{words}\n"]


def _example(text: str) -> str:
    return plain(text, one_line=True, limit=_EXAMPLE)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look has found: what to say of it, the answers with it where it can be used, columns that nobody knows."""

    words: Content
    answers: Answers | None = None
    unknown: tuple[tuple[str, str], ...] = ()


class Lookup:
    """Looks at the model and the data that answers name, and remembers what it found."""

    def __init__(self, services: Services) -> None:
        """Look through the services."""
        self._recommend = services.recommend
        # The cursor comes by the same options again and again.
        self._shape = lru_cache(maxsize=32)(services.shape)
        self._search_hub, self._device = services.search_hub, services.planned_device
        self._told: Progress | None = None
        self._checked = lru_cache(maxsize=8)(
            lambda word, base, columns: services.check_data(word, base, columns, self._told)
        )

    def model(self, answers: Answers) -> Seen:
        """Look at the model of some answers."""
        try:
            shape = self._shape(answers.base, answers.card)
            return Seen(model_text(answers.base, shape, self._needs(shape, answers.card)), answers)
        except StudioError as error:
            return Seen(refused_text(str(error)))

    def _needs(self, shape: ModelShape, card: str) -> Content:
        """Return what a model takes of the card; why it cannot be told is no reason against the model."""
        from studio.tui.model_fits import larger_text, needs_of, needs_text  # noqa: PLC0415  with the estimator

        try:
            device = self._device(card)
            name = device.gpu.name if device.gpu else ""
            bars = needs_text(needs_of(shape, device), name, device.free_bytes)
            return Content.assemble(bars, larger_text(shape, device))
        except StudioError as error:
            return refused_text(str(error))

    def hub(self, words: str) -> tuple[list[Listed], Content]:
        """Search the hub and return models, with what is to be said of the search; without a line, known ones.

        Raises:
            StudioError: The hub cannot be asked, and no known model has such a name.
        """
        try:
            found = self._search_hub(words)
            told = (
                f"{len(found)} found on the hub, the most used first." if found else "The hub has nothing of that name."
            )
        except StudioError as error:
            from studio.probe.known_models import names_with  # noqa: PLC0415  2 ms that only a dead line pays

            if not (found := names_with(words)):
                raise
            told = f"{error} {len(found)} of that name can be planned without it: choose their card in the first step."
        return [Listed(word, "hub") for word in found], Content(told)

    def data(self, answers: Answers, told: Progress | None = None) -> Seen:
        """Read the data of some answers; `told` is told (done, total) and may raise to end it."""
        self._told = told
        try:
            checked = self._checked(answers.data, answers.base, answers.columns)
        except StudioError as error:
            return Seen(refused_text(str(error)))
        words = data_text(checked)
        if checked.sound and len(checked.counts) > 1:
            title = "Tokens of a row, by its characters"
            words = Content.assemble(words, "\n", bars_text(checked.edges, checked.counts, _BARS, title))
        goal = goal_for(answers.goal, checked.facts)
        fitting = replace(answers, data=checked.facts.path, goal=goal)
        return Seen(words, fitting if checked.sound else None, checked.unknown)

    def recommendation(self, answers: Answers) -> Recommendation:
        """Return the recommendation.

        Raises:
            StudioError: Model, data or card cannot be used.
        """
        checked = self._checked(answers.data, answers.base, answers.columns)
        return self._recommend(answers, self._shape(answers.base, answers.card), checked.facts)
