"""Writes and reads checkpoints: adapter, optimizer and random state in safetensors files, and a marker written last.

A checkpoint is complete or is not there. `studio.runs.checkpoints` decides which ones are complete. Nothing is pickled,
so reading a checkpoint cannot run code.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.core.errors import JobFailed
from studio.jobs.train.adapter import adapter_weights
from studio.jobs.train.optimizer import restore_state
from studio.runs.atomic import publish_folder, write_whole
from studio.runs.checkpoints import ADAPTER_TENSORS, INITIAL_TENSORS, MARKER, file_stamp, keep_best, outdated

_OPTIMIZER, _RANDOM, _STATE = "optimizer.safetensors", "random.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a training stands besides its weights.

    Attributes:
        step: Optimizer steps taken.
        tokens: Tokens of all rows trained on so far, without padding.
        seconds: Time in steps so far.
        scaler: The fp16 loss scaler's state; empty where no scaler is at work.
        packed: Whether rows are packed.
    """

    step: int
    tokens: int
    seconds: float
    scaler: dict[str, float]
    packed: bool = False


def save_checkpoint(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    keep: int,
    initial: Mapping[str, Tensor] | None = None,
    held_out_loss: float | None = None,
) -> Path:
    """Write a checkpoint for `state.step`, delete all but the newest `keep` and the best, and return its folder.

    Args:
        folder: Holds the run's checkpoints.
        model: Its adapter is saved.
        optimizer: Its state is saved.
        state: Where the training stands.
        keep: How many checkpoints stay.
        initial: The adapter that PiSSA subtracted from the base; a resume must subtract the same one.
        held_out_loss: That of this very step; None where it was not measured.

    Raises:
        OSError: The disk is full or not writable; nothing half-made is left.
        SafetensorError: The same, raised by safetensors.
    """
    final = folder / f"step-{state.step:08d}"
    scratch = folder / f".writing-{final.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_file(_on_host(adapter_weights(model)), scratch / ADAPTER_TENSORS)
        if initial:
            save_file(dict(initial), scratch / INITIAL_TENSORS)
        tensors, numbers = _flatten(optimizer.state_dict()["state"])
        save_file(_on_host(tensors), scratch / _OPTIMIZER)
        save_file(random_state(), scratch / _RANDOM)
        write_whole(scratch / _STATE, json.dumps({"train": asdict(state), "optimizer": numbers}))
        files = {path.name: file_stamp(path) for path in sorted(scratch.iterdir())}
        write_whole(scratch / MARKER, json.dumps({"step": state.step, "files": files}))
        publish_folder(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if held_out_loss is not None:
        keep_best(final, held_out_loss)
    for old in outdated(folder, keep):
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_initial(path: Path) -> dict[str, Tensor]:
    """Return the adapter that PiSSA subtracted from the base before the first step; empty without PiSSA."""
    return load_file(path / INITIAL_TENSORS) if (path / INITIAL_TENSORS).is_file() else {}


def load_checkpoint(path: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restore adapter, optimizer and random state, and return where the training stood.

    Raises:
        JobFailed: The adapter in the checkpoint does not have the tensors of this model's adapter.
    """
    weights = load_file(path / ADAPTER_TENSORS)
    expected = adapter_weights(model)
    if {name: weight.shape for name, weight in weights.items()} != {name: one.shape for name, one in expected.items()}:
        raise JobFailed(
            "foreign_checkpoint",
            f"the checkpoint {path.name} holds other adapter tensors than this recipe makes: it is another run's",
            "move it out of the run's checkpoints folder, then continue with: lora-studio runs resume RUN",
        )
    set_peft_model_state_dict(model, weights)
    saved = json.loads((path / _STATE).read_text(encoding="utf-8"))
    # Parameter groups are this run's own: the loop sets their learning rate before every step.
    tables = optimizer.state_dict()
    restore_state(optimizer, {**tables, "state": _unflatten(load_file(path / _OPTIMIZER), saved["optimizer"])})
    restore_random(load_file(path / _RANDOM))
    return TrainState(**saved["train"])


def _flatten(state: dict[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split optimizer state `{parameter: {name: tensor or number}}` into tensors and numbers, keyed `parameter/name`.

    bitsandbytes puts its own tensors one level deeper (optim/optimizer.py state_dict): `parameter/name/inner`.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, entries in state.items():
        for name, value in entries.items():
            nested = value.items() if isinstance(value, dict) else [("", value)]
            for inner, leaf in nested:
                key = f"{parameter}/{name}/{inner}" if inner else f"{parameter}/{name}"
                (tensors if isinstance(leaf, Tensor) else numbers)[key] = leaf
    return tensors, numbers


def _unflatten(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        parameter, name, *inner = key.split("/")
        entries = state.setdefault(int(parameter), {})
        if inner:
            entries.setdefault(name, {})[inner[0]] = value
        else:
            entries[name] = value
    return state


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Cloned, because safetensors refuses tensors that share memory.
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's random numbers, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random(states: dict[str, Tensor]) -> None:
    """Set the state of torch's random numbers, as `random_state` returned it; devices that are gone are passed over."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name != "cpu" and torch.cuda.is_available() and int(name[4:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[4:]))
