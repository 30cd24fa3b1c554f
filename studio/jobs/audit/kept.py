"""Keeps on disk what an audit has done so far, so that it need not be done again after a stop or a kill.

A finished part is kept as JSON, a walk as the hidden states after its last finished block.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.jobs.audit.blocks import Rounding
from studio.jobs.audit.walk import BlockSeen, Carried
from studio.runs.atomic import mend_folder, publish_folder, write_whole
from studio.runs.layout import ADAPTER_WEIGHTS, RunPaths
from studio.runs.requests import AuditRequest
from studio.runs.worker import Worker

_EVERY_SECONDS = 60.0
_STATES, _WALK = "states.safetensors", "walk.json"


class KeptPart:
    """A part that is kept as JSON, until the audit has ended and its folder of parts is deleted."""

    def __init__(self, worker: Worker, request: AuditRequest, name: str, *about: object) -> None:
        """Name a part.

        Args:
            worker: Of the audit.
            request: What was asked for; a part of another request is not used.
            name: Name of the file.
            about: What else the part depends on; must be possible to write as JSON.
        """
        self._file = worker.paths.audit_parts / f"{name}.json"
        self._about = json.loads(json.dumps([asdict(request), stamp_of(request), *about]))

    def load(self) -> Any:
        """Return the kept part; None where there is none that can be used."""
        try:
            table = json.loads(self._file.read_bytes())
            return table["part"] if table["about"] == self._about else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def keep(self, part: Any) -> None:
        """Keep the part, in place of an earlier one.

        Raises:
            OSError: The disk refuses.
        """
        self._file.parent.mkdir(exist_ok=True)
        write_whole(self._file, json.dumps({"about": self._about, "part": part}))


class KeptWalk:
    """The kept state of one walk.

    Attributes:
        folder: Where the state is kept; it is complete or not there.
    """

    def __init__(self, folder: Path, about: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Look for the state of an earlier process.

        Args:
            folder: Where the state is kept.
            about: Describes what is measured; a state with another description is deleted.
            clock: Returns the time in seconds.
        """
        self.folder, self._about, self._clock = folder, about, clock
        self._kept_at = clock()
        mend_folder(folder)

    def load(self) -> Carried | None:
        """Return the state; None where there is none that can be used."""
        try:
            table = json.loads((self.folder / _WALK).read_text("utf-8"))
            if table["about"] == self._about:
                hidden: dict[str, list[Tensor]] = {}
                for number, _ in enumerate(table["variants"]):
                    hidden |= _by_variant(load_file(self.folder / f"{number:03d}-{_STATES}"))
                return Carried(hidden, [_seen(entry) for entry in table["seen"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            pass  # damaged: the walk begins again
        shutil.rmtree(self.folder, ignore_errors=True)
        return None

    def keep(self, carried: Carried, *, now: bool = False) -> None:
        """Keep the state once a minute, or now.

        Raises:
            OSError: The disk is full or not writable; the state that was kept before stays.
            SafetensorError: The same, raised by safetensors.
        """
        if not now and self._clock() - self._kept_at < _EVERY_SECONDS:
            return
        scratch = self.folder.with_name(f".{self.folder.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            self._write(scratch, carried)
            publish_folder(scratch, self.folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._kept_at = self._clock()

    def _write(self, scratch: Path, carried: Carried) -> None:
        for number, (name, batches) in enumerate(carried.hidden.items()):
            # One file for each variant, because safetensors holds a copy of everything that goes into a file.
            tensors = {f"{name}|{place:06d}": states.contiguous() for place, states in enumerate(batches)}
            save_file(tensors, scratch / f"{number:03d}-{_STATES}")
        seen = [asdict(one) for one in carried.seen]
        (scratch / _WALK).write_text(json.dumps({"about": self._about, "variants": list(carried.hidden), "seen": seen}))


def stamp_of(request: AuditRequest) -> list[int]:
    """Return size and time of the audited run's adapter, which change if it is trained further; empty without a run."""
    if not request.run:
        return []
    seen = (RunPaths(Path(request.run)).adapter / ADAPTER_WEIGHTS).stat()
    return [seen.st_size, seen.st_mtime_ns]


def _by_variant(tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    hidden: dict[str, list[Tensor]] = {}
    for key in sorted(tensors):
        hidden.setdefault(key.rpartition("|")[0], []).append(tensors[key])
    return hidden


def _seen(entry: dict[str, Any]) -> BlockSeen:
    roundings = {
        variant: {name: Rounding(**values) for name, values in linears.items()}
        for variant, linears in entry["roundings"].items()
    }
    return BlockSeen(**entry | {"roundings": roundings})
