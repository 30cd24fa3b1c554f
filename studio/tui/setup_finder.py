"""What the guided set-up looks up, as plain callables, so that tests look nowhere. All may take seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # together 0.2 s to import: threads bring them
    from studio.core.recommendation import DataFacts, Recommendation
    from studio.core.shape import ModelShape
    from studio.probe.local_models import Listed
    from studio.probe.machine import Machine
    from studio.probe.setup import Answers, DataChecked


def _machine(runs_root: Path) -> "Machine":
    from studio.probe.machine import read_machine  # noqa: PLC0415

    return read_machine(runs_root)


def _models() -> "list[Listed]":
    from studio.probe.local_models import likely_places, local_models  # noqa: PLC0415

    return local_models(likely_places())


def _search(words: str) -> list[str]:
    from studio.probe.local_models import search_hub  # noqa: PLC0415

    return search_hub(words)


def _shape(base: str, card: str) -> "ModelShape":
    from studio.probe.setup import shape_for  # noqa: PLC0415

    return shape_for(base, card)


def _files() -> list[Path]:
    from studio.probe.setup import data_files  # noqa: PLC0415

    return data_files(Path.cwd())


def _check(word: str, base: str) -> "DataChecked":
    from studio.probe.setup import check_data  # noqa: PLC0415

    return check_data(word, base)


def _recommend(answers: "Answers", shape: "ModelShape", data: "DataFacts") -> "Recommendation":
    from studio.probe.setup import recommendation_for  # noqa: PLC0415

    return recommendation_for(answers, shape, data)


def _recall() -> "Answers":
    from studio.probe.setup import recall_answers  # noqa: PLC0415

    return recall_answers()


def _keep(answers: "Answers") -> None:
    from studio.probe.setup import keep_answers  # noqa: PLC0415

    keep_answers(answers)


@dataclass(frozen=True, slots=True)
class Finder:
    """Looks things up for the set-up; call from a thread.

    Attributes:
        machine: Reads the machine.
        models: Lists the models here.
        search: Asks the hub; raises BadInput.
        shape: Looks at a model, for a card of the catalogue or (empty) this machine; raises BadInput.
        files: Lists data files nearby.
        check: Reads and measures a data file; raises BadInput.
        recommend: Recommends a recipe; raises BadInput.
        recall: Returns the answers of the last visit.
        keep: Keeps the answers; raises OSError.
    """

    machine: "Callable[[Path], Machine]" = _machine
    models: "Callable[[], list[Listed]]" = _models
    search: Callable[[str], list[str]] = _search
    shape: "Callable[[str, str], ModelShape]" = _shape
    files: Callable[[], list[Path]] = _files
    check: "Callable[[str, str], DataChecked]" = _check
    recommend: "Callable[[Answers, ModelShape, DataFacts], Recommendation]" = _recommend
    recall: "Callable[[], Answers]" = _recall
    keep: "Callable[[Answers], None]" = _keep
