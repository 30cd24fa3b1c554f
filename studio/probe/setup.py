"""The guided set-up without its screens: the answers, what follows from them on this machine, where they are kept."""

import json
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from studio.core.base_form import refusal
from studio.core.columns import Columns, Pairs
from studio.core.errors import BadInput
from studio.core.goals import GOALS, Goal
from studio.core.gpu_catalogue import find_gpu
from studio.core.recipe import EMBEDDED, Recipe
from studio.core.recommendation import DataFacts, Recommendation, recommend
from studio.core.shape import ModelShape
from studio.core.text import plain
from studio.probe.data import DataSet, Finding, Preference, Reading, Row, first_row, inspect_data
from studio.probe.data.chosen_files import holds_rows
from studio.probe.data.formats import UnknownColumns
from studio.probe.data.lengths import bars_of, estimated_tokens, texts_of
from studio.probe.data.opened import Progress
from studio.probe.data.places import absolute_word, is_saved
from studio.probe.device import place_of
from studio.probe.machine import ram_bytes
from studio.probe.models import find_base, refuse_untrainable
from studio.probe.plan import device_from_catalogue, device_of
from studio.probe.reasoning_advice import reasoning_advice
from studio.probe.shape import find_shape, shape_of_base
from studio.runs.atomic import read_object, write_whole
from studio.runs.home import SETUP_FILE, studio_home

_MOST_BYTES = 64 * 1024
_COUNTED_ROWS = 2000
_LONGEST_COUNTED = 50
_SHOWN = 100
_MOST_BARS = 6
_CHARACTERS_PER_TOKEN = 3.0
"""Low on purpose (English has about four, code about three): it is better to estimate a row too long than to cut it."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The user's answers so far.

    Attributes:
        base: The model: embedded, a folder or a hub id.
        data: The file, or embedded.
        goal: What it is for.
        card: A card of the catalogue to plan for; empty for this machine's.
        step: The step that the set-up was left at.
        done: Whether the user has gone through it once.
        columns: What the file calls our columns, where the user has said so.
    """

    base: str = EMBEDDED
    data: str = EMBEDDED
    goal: Goal = "task"
    card: str = ""
    step: str = ""
    done: bool = False
    columns: Pairs = ()


@dataclass(frozen=True, slots=True)
class DataChecked:
    """A data file that was read.

    Attributes:
        data: Its rows, and what was found on the way.
        facts: What a recommendation needs to know of it.
        advice: What to consider of these rows for this model; empty where there is nothing.
        unknown: Where its columns make no known row, their names, each with what the first row has there.
        edges: Edges of bars of the rows' lengths in tokens, one more than bars; a row's tokens follow from its
            characters.
        counts: The rows of each bar; of pairs of answers both sides.
    """

    data: DataSet
    facts: DataFacts
    advice: str = ""
    unknown: tuple[tuple[str, str], ...] = ()
    edges: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether it can be trained on as it is."""
        return bool(self.data.rows) and not any(finding.fatal for finding in self.data.findings)


def recall_answers(home: Path | None = None) -> Answers:
    """Return the answers of the last visit; a missing or damaged one has its value of the first visit."""
    return _sound_answers(read_object((home or studio_home()) / SETUP_FILE, _MOST_BYTES))


def keep_answers(answers: Answers, home: Path | None = None) -> None:
    """Keep the answers for the next visit.

    Raises:
        OSError: They cannot be written.
    """
    folder = home or studio_home()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SETUP_FILE, json.dumps(asdict(answers), indent=1) + "\n")


def data_files(folder: Path, most: int = 20) -> list[Path]:
    """Return the data files, and folders that `datasets` saved, in a folder and in its `data`, by name."""
    found: list[Path] = []
    for place in (folder, folder / "data"):
        try:
            entries = sorted(place.iterdir())
        except OSError:
            continue
        found += [path for path in entries if (holds_rows(path.name) and path.is_file()) or is_saved(path)]
    return found[:most]


def check_data(word: str, base: str, columns: Pairs = (), progress: Progress | None = None) -> DataChecked:
    """Read a data file whole and measure it, in the model's tokens where they can be counted here.

    Args:
        word: What names the data.
        base: The model.
        columns: What the file calls our columns; empty where its names are known.
        progress: Told (done, total) while data are downloaded and read; may raise to end it.

    Raises:
        BadInput: It cannot be read at all.
    """
    path = Path(word)
    if word != EMBEDDED:
        try:
            path = path.expanduser()
        except RuntimeError:
            raise BadInput(f"There is no home folder for {plain(word, one_line=True, limit=200)}.") from None
    try:
        data = inspect_data(path, Reading(columns=columns), progress=progress)
        if "preference_pair" in data.finding_counts:  # two answers, of which one is preferred: these can be learnt, too
            data = inspect_data(path, Reading(columns=columns, wants="pairs"), progress=progress)
        unknown = _unknown_columns(path) if not data.rows and "wrong_columns" in data.finding_counts else ()
    except UnknownColumns as error:
        unknown = _unknown_columns(path)
        finding = Finding("wrong_columns", 1, "", str(error), fatal=True)
        data = DataSet(path, "unknown", (), (), (), (finding,), {finding.kind: 1}, 0)
    facts, tokens = _facts(absolute_word(str(path)), data, base)
    bars = bars_of(tokens, _MOST_BARS) if tokens else ((), ())
    return DataChecked(data, replace(facts, columns=columns), _advice(base, data), unknown, *bars)


def _unknown_columns(path: Path) -> tuple[tuple[str, str], ...]:
    """Return the columns of a file and what its first row has there; nothing where they are known or cannot be read."""
    try:
        row = first_row(path)
    except (BadInput, OSError):
        return ()
    return tuple((str(name), plain(str(value), one_line=True, limit=_SHOWN)) for name, value in row.items())


def _advice(base: str, data: DataSet) -> str:
    try:
        return reasoning_advice(find_base(base).path, data.rows)
    except (BadInput, OSError, RuntimeError, ValueError):  # not found, a name too long, a NUL
        return ""


def goal_for(goal: Goal, facts: DataFacts) -> Goal:
    """Return the goal that fits the data: raw text is to continue pre-training with, unless another was chosen."""
    usual = Answers().goal
    return "text" if facts.text and goal == usual else usual if goal == "text" and not facts.text else goal


def recipe_to_show(answers: Answers) -> Recipe:
    """Return a recipe of the model and the data of some answers, with defaults besides, to look at the rows."""
    recipe = Recipe().with_("model.base", answers.base).with_("data.path", absolute_word(answers.data))
    return recipe.with_("data.columns", answers.columns)


def shape_for(base: str, card: str) -> ModelShape:
    """Return the shape of a model that can be trained on.

    To plan for another card its config is enough: weights and tokenizer may lie on that card's machine.

    Args:
        base: The model: embedded, a folder or a hub id.
        card: A card of the catalogue to plan for; empty for this machine's.

    Raises:
        BadInput: There is no such model, or it cannot be trained on.
    """
    try:
        planned = bool(card) and not Path(base).expanduser().is_file()
        if not planned:
            found = find_base(base)
            refuse_untrainable(found, "qlora")
            return shape_of_base(found)
        shape = find_shape(base)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such home, a NUL
        raise BadInput(f"The model {plain(base, one_line=True, limit=80)} cannot be looked at: {error}.") from None
    if why := refusal(shape.quantised, "qlora"):
        raise BadInput(f"The base model {plain(base, one_line=True, limit=200)} is {why}.")
    return shape


def recommendation_for(answers: Answers, shape: ModelShape, data: DataFacts) -> Recommendation:
    """Return the recommendation for the answers, on the card that they mean.

    Raises:
        BadInput: There is no such card, or the model cannot be adapted.
    """
    device = device_from_catalogue(find_gpu(answers.card)) if answers.card else device_of(place_of("auto"))
    ram = None if answers.card else ram_bytes()  # another card is in another computer
    return recommend(
        answers.goal, answers.base, shape, data, gpu=device.gpu, budget_bytes=device.free_bytes, ram_bytes=ram
    )


def _facts(path: str, data: DataSet, base: str) -> tuple[DataFacts, list[float]]:
    """Return what a recommendation needs of the rows, and the tokens of each sequence by its characters.

    Some rows and the longest are counted, the rest estimated.

    The model's chat template is not applied: it is a program by strangers, and runs only in jobs, within limits.
    """
    pairs = bool(data.rows) and isinstance(data.rows[0], Preference)
    characters, rows_of = array("q"), array("q")
    for place, row in enumerate(data.rows):
        for one in _sequences(row):
            characters.append(sum(map(len, texts_of(one))))
            rows_of.append(place)
    if not characters:
        return DataFacts(path, 0, 0, 0), []
    text = data.format == "text"
    every = max(1, len(characters) // _COUNTED_ROWS)
    longest = sorted(range(len(characters)), key=characters.__getitem__)[-_LONGEST_COUNTED:]
    chosen = list(range(0, len(characters), every))
    try:
        counted = estimated_tokens([_sequence(data.rows, rows_of, place) for place in (*chosen, *longest)], base)
    except BadInput:
        most = int(max(characters) / _CHARACTERS_PER_TOKEN)
        total = int(sum(characters) / _CHARACTERS_PER_TOKEN)
        facts = DataFacts(path, len(data.rows), total, most, counted=False, pairs=pairs, text=text)
        return facts, [one / _CHARACTERS_PER_TOKEN for one in characters]
    share = sum(counted[: len(chosen)]) / max(1, sum(characters[place] for place in chosen))
    facts = DataFacts(path, len(data.rows), int(share * sum(characters)), max(counted), pairs=pairs, text=text)
    return facts, [share * one for one in characters]


def _sequences(row: Row) -> tuple[Row, ...]:
    """Return what goes through a model of a row: of a pair of answers both sides."""
    return row.sides if isinstance(row, Preference) else (row,)


def _sequence(rows: Sequence[Row], rows_of: Sequence[int], place: int) -> Row:
    """Return the sequence at a place among those of all rows; `rows_of` says which row each is of."""
    found = _sequences(rows[rows_of[place]])
    return found[place - bisect_left(rows_of, rows_of[place])]


def _sound_answers(table: Mapping[str, Any]) -> Answers:
    kinds = {item.name: type(getattr(Answers(), item.name)) for item in fields(Answers)}
    given = {name: table[name] for name, kind in kinds.items() if type(table.get(name)) is kind}
    columns = table.get("columns")
    if isinstance(columns, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in columns):
        pairs = tuple((pair[0], pair[1]) for pair in columns)
        if not any(Columns().wrong(pairs)):
            given["columns"] = pairs
    if given.get("goal") not in GOALS:
        given.pop("goal", None)
    if any(isinstance(value, str) and "\0" in value for value in given.values()):
        return Answers()
    return Answers(**given)
