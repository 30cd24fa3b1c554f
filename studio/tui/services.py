"""What the screens ask of the rest of the program: to start runs, to look at the machine, to keep answers.

A call may take seconds, so a screen makes it from a thread. Each method imports what it needs when it is called: the
first frame needs none of it, and with the estimator alone it would take 335 ms of CPU time instead of 292.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED, Recipe
from studio.core.text import plain
from studio.runs.layout import RunPaths

if TYPE_CHECKING:
    from studio.core.columns import Pairs
    from studio.core.recommendation import DataFacts, Recommendation
    from studio.core.shape import ModelShape
    from studio.probe.data.opened import Progress
    from studio.probe.data.sampled import RowsGuess
    from studio.probe.forecast import Forecaster
    from studio.probe.local_models import Listed
    from studio.probe.machine import Machine
    from studio.probe.plan import PlanDevice
    from studio.probe.setup import Answers, DataChecked
    from studio.runs.chat import ChatProcess, ChatRequest
    from studio.runs.extension import Wish
    from studio.runs.job import Job
    from studio.runs.last_recipe import LastRecipe
    from studio.runs.show import ShowProcess, ShowRequest
    from studio.tui.merging import MergeFacts
    from studio.tui.model_fits import CardFits

_CARD, _THEME, _VISIT = "planned_card", "theme", "visit"
_LONGEST_NAME = 60


class Services:
    """The real services; a test gives its own in their place."""

    def at_work(self, recipe: Recipe) -> list[str]:
        """Return the names of the runs that are at work on the card that a recipe would use; none for the CPU."""
        from studio.launch.queued import at_work
        from studio.probe.device import place_of

        return [paths.name for paths in at_work(place_of(recipe.device.device))]

    def start(
        self, job: "Job", runs_root: Path, progress: "Progress | None" = None, *, queue: bool = False
    ) -> RunPaths:
        """Check a job, make its run and launch its worker. The worker of a merge launches the exports that follow it.

        Args:
            job: What to do.
            runs_root: Where runs live.
            progress: Told how far the check of the data is.
            queue: Whether the run waits until its card is free.

        Raises:
            StudioError: The job cannot be done as it is asked for, or its worker cannot be started.
        """
        from studio.launch.start import start

        told = progress or (lambda done, total: None)
        return start(job, runs_root, progress=told, queue=lambda checked: queue)

    def resume(self, paths: RunPaths, *, from_start: bool = False) -> None:
        """Launch a new worker for a run that has ended early.

        Args:
            paths: The run.
            from_start: Whether it may start over where no checkpoint is whole.

        Raises:
            NoWholeCheckpoint: No checkpoint is whole, so that the run could only start over.
            StudioError: It cannot be resumed.
        """
        from studio.launch.start import resume

        resume(paths, from_start=from_start)

    def extension(self, paths: RunPaths, wish: "Wish") -> str:
        """Return in words what a wish for further steps does with a training run that has ended.

        Raises:
            StudioError: The run cannot be extended.
        """
        from studio.launch.start import plan_extension

        return plan_extension(paths, wish)[1]

    def extend(self, paths: RunPaths, wish: "Wish") -> None:
        """Launch a new worker for a training run that has ended, to train longer.

        Raises:
            StudioError: It cannot be extended or resumed.
        """
        from studio.launch.start import extend

        extend(paths, wish)

    def end_now(self, paths: RunPaths) -> None:
        """End a worker at once, without waiting for it to save."""
        from studio.runs.supervise import stop

        stop(paths, grace_seconds=0.0)

    def chat(self, request: "ChatRequest") -> "ChatProcess":
        """Start a chat's process.

        Raises:
            StudioError: It cannot be started.
        """
        from studio.runs.chat import ChatProcess

        return ChatProcess(request)

    def show_data(self, request: "ShowRequest") -> "ShowProcess":
        """Start a process that reads data with a model's tokenizer.

        Raises:
            StudioError: It cannot be started.
        """
        from studio.runs.show import ShowProcess

        return ShowProcess(request)

    def guess_data(self, recipe: Recipe) -> "RowsGuess | None":
        """Return what the beginning of a recipe's data tells of its rows, without a tokenizer; None where it cannot."""
        from studio.probe.pace import guess_of

        return guess_of(recipe)

    def glance_at_data(self, recipe: Recipe) -> "ShowProcess | None":
        """Start a process that looks at data without being asked; None where that would take long, or need the network.

        Raises:
            StudioError: It cannot be started.
        """
        from studio.probe.glance import can_glance
        from studio.runs.show import ShowProcess, ShowRequest

        return ShowProcess(ShowRequest(recipe, gentle=True)) if can_glance(recipe) else None

    def merge_facts(self, paths: RunPaths) -> "MergeFacts":
        """Look at a run that is to be merged.

        Raises:
            StudioError: It is no training run.
        """
        from studio.tui.merging import read_facts

        return read_facts(paths)

    def card(self) -> str:
        """Return in a few words the card, or the CPU, that a run would use on this machine."""
        from studio.probe.device import look, place_of

        sight = look()
        place = place_of("auto", sight)
        gpu, more = place.card, f" (+{len(sight.cards) - 1})" if sight.cards and len(sight.cards) > 1 else ""
        if gpu is None:
            return "no card can be used: lora-studio doctor" if place.refusal else "no NVIDIA card: the CPU"
        if place.refusal:
            return f"{gpu.name}{more} cannot be used: lora-studio doctor"
        total = f" {gpu.total_bytes / 2**30:.1f} GiB" if gpu.total_bytes else ""
        used = f" · {gpu.used_bytes / 2**30:.1f} in use" if gpu.used_bytes is not None else ""
        heat = f" · {gpu.celsius} C" if gpu.celsius is not None else ""
        return f"{gpu.name}{total}{more}{used}{heat}"

    def forecaster(self, recipe: Recipe, planned: str) -> "Forecaster":
        """Return an estimator for the model of a recipe on a card.

        Args:
            recipe: Names the model and, where nothing else is planned for, the device.
            planned: A card of the catalogue; empty for this machine's.

        Raises:
            StudioError: The model cannot be looked at, or the catalogue has no such card.
        """
        from studio.core.gpu_catalogue import find_gpu
        from studio.probe.device import place_of
        from studio.probe.forecast import Forecaster
        from studio.probe.machine import ram_bytes
        from studio.probe.pace import calibrated
        from studio.probe.plan import device_from_catalogue, device_of

        shape = _shape(recipe.model.base, recipe.model.revision)
        device = device_from_catalogue(find_gpu(planned)) if planned else device_of(place_of(recipe.device.device))
        return Forecaster(shape, device, calibrated, ram_bytes())

    def spills(self) -> bool:
        """Return whether the driver moves what does not fit on the card into main memory, as on Windows and WSL."""
        from studio.probe.machine import spills_to_ram

        return spills_to_ram()

    def free_ram_bytes(self) -> int | None:
        """Return the main memory that a run on the CPU can get, in bytes; None where the system does not tell."""
        from studio.probe.machine import free_ram_bytes

        return free_ram_bytes()

    def machine(self, runs_root: Path) -> "Machine":
        """Read the machine, and the disk that runs are written to."""
        from studio.probe.machine import read_machine

        return read_machine(runs_root)

    def models(self) -> "list[Listed]":
        """List the models that lie on this machine."""
        from studio.probe.local_models import likely_places, local_models

        return local_models(likely_places())

    def search_hub(self, words: str) -> list[str]:
        """Return the ids of models on the hub that words find, the most used first.

        Raises:
            BadInput: The hub cannot be asked.
        """
        from studio.probe.local_models import search_hub

        return search_hub(words)

    def planned_device(self, card: str) -> "PlanDevice":
        """Return a card of the catalogue, or with an empty `card` the device that a run would get on this machine.

        Raises:
            BadInput: The catalogue has no such card.
        """
        from studio.core.gpu_catalogue import find_gpu
        from studio.probe.device import place_of
        from studio.probe.plan import device_from_catalogue, device_of

        return device_from_catalogue(find_gpu(card)) if card else device_of(place_of("auto"))

    def known_fits(self, card: str) -> "CardFits | None":
        """Return which known models the device of `planned_device` trains; takes two seconds for each one.

        Raises:
            BadInput: The catalogue has no such card.
        """
        from studio.tui.model_fits import fits_of

        return fits_of(self.planned_device(card))

    def shape(self, base: str, card: str) -> "ModelShape":
        """Look at a model that is to be trained on a card of the catalogue, or with an empty `card` on this machine's.

        Raises:
            BadInput: It cannot be used.
        """
        from studio.probe.setup import shape_for

        return shape_for(base, card)

    def data_files(self) -> list[Path]:
        """List data files nearby."""
        from studio.probe.setup import data_files

        return data_files(Path.cwd())

    def check_data(self, word: str, base: str, columns: "Pairs", progress: "Progress | None" = None) -> "DataChecked":
        """Read and measure a data file.

        Raises:
            BadInput: It cannot be read.
        """
        from studio.probe.setup import check_data

        return check_data(word, base, columns, progress)

    def recommend(self, answers: "Answers", shape: "ModelShape", data: "DataFacts") -> "Recommendation":
        """Recommend a recipe.

        Raises:
            BadInput: The answers cannot be used.
        """
        from studio.probe.setup import recommendation_for

        return recommendation_for(answers, shape, data)

    def recall_answers(self) -> "Answers":
        """Return the answers that the guided set-up got on the last visit."""
        from studio.probe.setup import recall_answers

        return recall_answers()

    def keep_answers(self, answers: "Answers") -> None:
        """Keep the answers of the guided set-up for the next visit.

        Raises:
            OSError: They cannot be written.
        """
        from studio.probe.setup import keep_answers

        keep_answers(answers)

    def recall_planned(self) -> str:
        """Return the card of the catalogue that was planned for last; empty for none, or where the file is damaged."""
        return _recall(_CARD, "card")

    def keep_planned(self, name: str) -> None:
        """Keep the planned card for the next visit; an empty name plans for this machine again.

        Raises:
            OSError: It cannot be written.
        """
        _keep(_CARD, "card", name)

    def recall_theme(self) -> str:
        """Return the theme that was chosen last; empty for none, or where the file is damaged."""
        return _recall(_THEME, "theme")

    def keep_theme(self, name: str) -> None:
        """Keep the name of the theme for the next visit.

        Raises:
            OSError: It cannot be written.
        """
        _keep(_THEME, "theme", name)

    def recall_visit(self) -> float | None:
        """Return when the last visit looked at the runs last, in unix seconds; None where there was none."""
        try:
            return float(_recall(_VISIT, "looked_at"))
        except ValueError:
            return None

    def keep_visit(self, looked_at: float) -> None:
        """Keep when the runs were looked at last.

        Raises:
            OSError: It cannot be written.
        """
        _keep(_VISIT, "looked_at", str(looked_at))

    def keep_recipe(self, last: "LastRecipe") -> None:
        """Keep the recipe that was turned last for the next visit.

        Raises:
            OSError: It cannot be written.
            BadInput: It cannot be written as TOML.
        """
        from studio.runs.last_recipe import keep_last_recipe

        keep_last_recipe(last)


def _shape(base: str, revision: str) -> "ModelShape":
    from studio.probe.shape import find_shape

    try:
        here = base == EMBEDDED or Path(base).expanduser().exists()
        return find_shape(base, revision) if here else _hub_shape(base, revision)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such home, a NUL
        raise BadInput(f"The model {plain(base, one_line=True, limit=80)} cannot be looked at: {error}.") from None


@lru_cache(maxsize=32)
def _hub_shape(base: str, revision: str) -> "ModelShape":
    """Look at a model on the hub. The answer is kept, because every new look at the card comes by here."""
    from studio.probe.shape import find_shape

    return find_shape(base, revision)


def _recall(name: str, key: str) -> str:
    from studio.runs.atomic import read_object
    from studio.runs.home import studio_home

    word = read_object(studio_home() / f"{name}.json").get(key)
    return plain(word, one_line=True, limit=_LONGEST_NAME) if isinstance(word, str) else ""


def _keep(name: str, key: str, word: str) -> None:
    from studio.runs.atomic import write_whole
    from studio.runs.home import studio_home

    home = studio_home()
    home.mkdir(parents=True, exist_ok=True)
    write_whole(home / f"{name}.json", json.dumps({key: word}) + "\n")
