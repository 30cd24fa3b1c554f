"""Checks a PEFT adapter folder before anything heavy is loaded: its config, its weights, the base that it names."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.recipe import Recipe, field_text
from studio.core.text import plain
from studio.probe.fingerprint import difference, recorded_fingerprint
from studio.probe.safetensors_file import SafetensorsHeader, read_header
from studio.runs.checkpoints import ADAPTER_TENSORS, INITIAL_TENSORS, checkpoint_folders, damage_of, step_of
from studio.runs.job import read_job
from studio.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunPaths
from studio.runs.store import find_run
from studio.runs.watch import read_history

_PICKLE = "adapter_model.bin"
_IN_CONFIG = {
    "adapter.rank": "r",
    "adapter.alpha": "lora_alpha",
    "adapter.rslora": "use_rslora",
    "adapter.dora": "use_dora",
}
"""Fields of a recipe by their names in `adapter_config.json`, where PiSSA, too, has the rank that the file has."""
_FORM = tuple(f"adapter.{name}" for name in ("targets", "layers", "rank_pattern", "alpha_pattern", "modules_to_save"))
"""Other fields that decide which tensors an adapter has and how they are used, as the recipe of its run has them."""
_MOST_CONFIG_BYTES = 10 * 2**20


@dataclass(frozen=True, slots=True)
class AdapterFound:
    """A LoRA adapter whose files are whole.

    Attributes:
        folder: The PEFT folder.
        config: Its `adapter_config.json`.
        header: The header of its weights: names, shapes and formats.
    """

    folder: Path
    config: dict[str, Any]
    header: SafetensorsHeader

    @property
    def base(self) -> str:
        """The base model that it names; empty where it names none."""
        said = self.config.get("base_model_name_or_path")
        return said if isinstance(said, str) else ""

    @property
    def revision(self) -> str:
        """The revision of the base that it names; empty where it names none."""
        said = self.config.get("revision")
        return said if isinstance(said, str) else ""


def find_adapter(folder: Path) -> AdapterFound:
    """Return the adapter of a PEFT folder.

    Raises:
        BadInput: It is no adapter folder, a file is damaged or missing, the weights are a pickle, or it is not LoRA.
    """
    shown = plain(str(folder), one_line=True)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise BadInput(
            f"{shown} is no adapter folder: it has no {ADAPTER_CONFIG}. Name a finished run or a PEFT folder."
        )
    config = _config(folder / ADAPTER_CONFIG)
    method = config.get("peft_type")
    if method != "LORA":
        found = plain(str(method), one_line=True, limit=40)
        raise BadInput(
            f"{shown} holds an adapter of the kind {found}; only LoRA adapters (also DoRA, rsLoRA) are used."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise BadInput(
                f"{shown} has its weights only as a pickle ({_PICKLE}), and loading a pickle can run any code in it. "
                f"Wanted {ADAPTER_WEIGHTS}: save the adapter again with a newer peft where you trust its source."
            )
        raise BadInput(f"{shown} lacks {ADAPTER_WEIGHTS}: the adapter was not copied whole, or not saved to its end.")
    header = read_header(folder / ADAPTER_WEIGHTS)
    if not header.tensors:
        raise BadInput(f"{plain(str(folder / ADAPTER_WEIGHTS), one_line=True)} holds no tensor: there is no adapter.")
    return AdapterFound(folder, config, header)


def start_folder(word: str, runs_root: Path) -> Path:
    """Return the adapter's folder that `adapter.start` means: a PEFT folder, or the run of a path or name.

    Raises:
        BadInput: No run answers to the word.
    """
    folder = Path(word).expanduser()
    if "\0" not in word and (folder / ADAPTER_CONFIG).is_file():
        return folder.absolute()
    try:
        return find_run(runs_root, word).adapter.absolute()
    except BadInput as error:
        raise BadInput(f"adapter.start: found neither a PEFT folder nor a run. {error}") from error


def check_start(recipe: Recipe, base: Path | None, look: Callable[[Path], Mapping[str, Any]]) -> None:
    """Refuse to start from an adapter of another form or another base than the recipe's, as far as that is known.

    The names and shapes of its tensors are left to the job, which has the model.

    Args:
        recipe: Its `adapter.start` is a folder, or empty.
        base: The base model's folder; None where it is still to be downloaded.
        look: Returns the fingerprint of that: what is known of it where a user waits.

    Raises:
        BadInput: It is no adapter, or another one than wanted; the message names both.
    """
    if not recipe.adapter.start:
        return
    found = find_adapter(Path(recipe.adapter.start))
    run, shown = run_of_adapter(found.folder), plain(recipe.adapter.start, one_line=True)
    config = {path: found.config.get(key) for path, key in _IN_CONFIG.items()}
    there = {path: value for path, value in config.items() if value is not None}
    if run and (of_run := read_job(RunPaths(Path(run)), Recipe)):
        there = {path: of_run.get(path) for path in _FORM} | there
    if other := [path for path, value in there.items() if value != recipe.get(path)]:
        listed = "; ".join(
            f"{path}: found {field_text(path, there[path])}, wanted {field_text(path, recipe.get(path))}"
            for path in other
        )
        raise BadInput(
            f"adapter.start: the adapter {shown} has another form than the recipe: {plain(listed, one_line=True)}. "
            "Take its values into the recipe, or leave adapter.start empty."
        )
    trained = recorded_fingerprint(run)
    if trained is not None and base is not None and (differs := difference(trained, look(base))):
        raise BadInput(
            f"adapter.start: the adapter {shown} was trained on another base than model.base: {differs}. Name the base "
            "that it was trained on."
        )


def run_of_adapter(adapter: Path) -> str:
    """Return the training run that an adapter folder lies in; empty where it lies in none."""
    return str(adapter.parent) if RunPaths(adapter.parent).recipe.is_file() else ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state of a run's adapter that is still on the disk.

    Attributes:
        step: Optimizer steps.
        folder: The checkpoint's folder; None for the adapter that the run saved at its end.
        loss: Held-out loss after the same step; None where none was measured then.
        damage: What is wrong with the adapter's files in it; empty where they are whole.
    """

    step: int
    folder: Path | None
    loss: float | None
    damage: str = ""


def list_checkpoints(paths: RunPaths) -> list[Checkpoint]:
    """Return a training run's checkpoints by step, then its adapter, with the losses of their steps.

    The adapter's files in each checkpoint are read and compared with the checksums of when they were saved.
    """
    history = read_history(paths)
    losses = {event.step: event.loss for event in history.evals if math.isfinite(event.loss)}
    found = [
        Checkpoint(step, folder, losses.get(step), damage_of(folder, (ADAPTER_TENSORS, INITIAL_TENSORS)))
        for folder in checkpoint_folders(paths.checkpoints)
        if (step := step_of(folder))
    ]
    if (paths.adapter / ADAPTER_CONFIG).is_file():
        last = history.last_step or 0
        found = [one for one in found if one.step != last] + [Checkpoint(last, None, losses.get(last))]
    return found


def best_of(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """Return the undamaged checkpoint with the lowest held-out loss, None where none has a loss."""
    measured = [(one.loss, -one.step, one) for one in checkpoints if one.loss is not None and not one.damage]
    return min(measured, key=lambda item: item[:2])[2] if measured else None


def adapter_of_checkpoint(
    checkpoint: Path, adapter: Path, into: Path, write_difference: Callable[[Path, Path, Path], None]
) -> Path:
    """Write a PEFT folder of a checkpoint's weights, with config and tokenizer of the run's adapter; return it.

    Args:
        checkpoint: A whole checkpoint of a training run.
        adapter: The adapter that the run saved at its end.
        into: The new folder; one that is there is replaced.
        write_difference: Called where the run changed its base (PiSSA): with the checkpoint's weights, what was taken
            out of the base, and the file for weights that fit the unchanged base.

    Raises:
        BadInput: The checkpoint is damaged, or there is no whole adapter beside it.
        OSError: The disk refuses.
    """
    shown = plain(str(checkpoint), one_line=True)
    if why := damage_of(checkpoint, (ADAPTER_TENSORS, INITIAL_TENSORS)):
        raise BadInput(f"the checkpoint {shown} is damaged: {why}. Choose another one.")
    find_adapter(adapter)
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(adapter, into, ignore=shutil.ignore_patterns(ADAPTER_WEIGHTS))
    if (checkpoint / INITIAL_TENSORS).is_file():
        write_difference(checkpoint / ADAPTER_TENSORS, checkpoint / INITIAL_TENSORS, into / ADAPTER_WEIGHTS)
    else:
        shutil.copyfile(checkpoint / ADAPTER_TENSORS, into / ADAPTER_WEIGHTS)
    return into


def _config(path: Path) -> dict[str, Any]:
    shown = plain(str(path), one_line=True)
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise BadInput(f"{shown} is larger than 10 MiB and cannot be what its name says.")
        table = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise BadInput(f"{shown} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{shown} is not JSON: {plain(str(error), one_line=True, limit=120)}.") from None
    if not isinstance(table, dict):
        raise BadInput(f"{shown} is not a JSON object.")
    return table
