"""What the faults share: a home with a neighbour in it, configurations, what an uninterrupted run gives, and rows."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from studio.core.recipe import Recipe
from studio.launch.start import resume
from studio.runs import supervise
from studio.runs.control import request, requested
from studio.runs.history import History
from studio.runs.job import Job, write_job
from studio.runs.layout import RunPaths, new_run
from studio.runs.queue import CPU, Queue
from studio.runs.requests import MergeRequest
from studio.runs.status import Status, run_status
from studio.runs.summary import summary_of
from studio.runs.watch import read_history
from tests.fakes.runs import wait_for
from tests.faults.table import Fault
from tests.faults.warm import CHECKOUT, Warm, WarmProcess, cold

SEED = int(os.environ.get("FAULTS_SEED", "20"))
KILLS = int(os.environ.get("FAULTS_KILLS", "20"))
_WORDS = "the run was killed and came back with every number that it had before as if nothing had been".split()  # noqa: SIM905


def _rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _asked(count: int) -> list[tuple[str, str]]:
    return [(f"say {n} of {_WORDS[n % len(_WORDS)]}", " ".join([str(n), *_WORDS[: 1 + n % 5]])) for n in range(count)]


def _chats(path: Path, turns: list[tuple[str, str]]) -> None:
    both = ((("user", asked), ("assistant", answer)) for asked, answer in turns)
    _rows(path, [{"messages": [{"role": role, "content": text} for role, text in row]} for row in both])


class Kit:
    """A home, its user's files, and what is done to runs in it."""

    def __init__(self, warm: Warm, model: Path, root: Path, baselines: "dict[str, Outcome]") -> None:
        self.warm, self.model, self.root, self._baselines = warm, model, root, baselines
        self.home, self.user = root / "home", root / "user"
        self.runs = self.home / "runs"
        for folder in (self.runs, self.user):
            folder.mkdir(parents=True)
        self._neighbours = {}
        (self.user / "thesis.txt").write_text("three years of work")
        neighbour = new_run(self.runs, "neighbour", 1.0)
        write_job(neighbour, Recipe(name="neighbour"))
        neighbour.adapter.mkdir()
        (neighbour.adapter / "adapter_model.safetensors").write_bytes(os.urandom(4096))
        neighbour.events.write_text(json.dumps({"kind": "finished", "at": 1.0, "outcome": "done"}) + "\n")
        self._kept = (self.user / "thesis.txt", neighbour.root)
        self._before = self.others()

    def others(self) -> dict[str, str]:
        """Return the checksums of files that no fault may touch: a neighbour run's, the user's, the base's."""
        files = [
            file for place in (*self._kept, self.model) for file in (place.rglob("*") if place.is_dir() else [place])
        ]
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}

    def kept(self) -> int:
        """Return how many files of others are as they were; fails where one is not."""
        assert self.others() == self._before
        return len(self._before)

    def recipe(self, kind: str, **more: Any) -> Recipe:
        """Return the recipe of a configuration: eight steps, a checkpoint every other one, an evaluation half-way."""
        settings = {
            "name": kind,
            "method": "lora",
            "model.base": str(self.model),
            "model.dtype": "fp32",
            "adapter.rank": 4,
            "adapter.alpha": 8.0,
            "adapter.dropout": 0.1,
            "data.path": str(self.user / "chats.jsonl"),
            "train.micro_batch": 2,
            "train.accumulation": 1,
            "train.seq_len": 96,
            "train.steps": 8,
            "train.learning_rate": 5e-3,
            "train.checkpoint_every": 2,
            "train.keep_checkpoints": 2,
            "train.recompute": "none",
            "train.packing": "off",
            "eval.rows": 2,
            "eval.every": 4,
            "eval.samples": 0,
            "device.device": "cpu",
            **(CONFIGURATIONS | _MORE)[kind],
            **more,
        }
        if not (self.user / "chats.jsonl").exists():
            self._write_data()
        recipe = Recipe()
        for path, value in settings.items():
            recipe = recipe.with_(path, self._placed(value))
        assert recipe.problems() == ()
        return recipe

    def _placed(self, value: Any) -> Any:
        """Return a setting with the user's folder in its paths."""
        if isinstance(value, list):
            return [{**source, "path": self._placed(source["path"])} for source in value]
        return value.replace("{user}", str(self.user)) if isinstance(value, str) else value

    def _write_data(self) -> None:
        for name, count in (("chats", 12), ("more", 20), ("many", 300)):
            _chats(self.user / f"{name}.jsonl", _asked(count))
        pairs = [{"prompt": f"say {n}", "chosen": " ".join(_WORDS[: 3 + n % 5]), "rejected": "no"} for n in range(12)]
        _rows(self.user / "pairs.jsonl", pairs)
        text = " ".join(["long"] * 90)
        _chats(self.user / "long.jsonl", [(f"{number} {text}", text[:300]) for number in range(14)])
        (self.user / "raw.txt").write_text(" ".join(_WORDS * 40))

    def new(self, job: Job | None = None, root: Path | None = None, name: str = "run") -> RunPaths:
        """Make a run's folder; without a job it is a plain LoRA's."""
        paths = new_run(root or self.runs, name, time.time())
        write_job(paths, job or self.recipe("LoRA fp32"))
        return paths

    def start(
        self, paths: RunPaths, module: str = "studio.jobs.train", *, anew: bool = False, **settings: Any
    ) -> WarmProcess:
        """Launch a worker, or resume the run where it has begun unless `anew`; `settings` become `FAULT_*`."""
        environment = {f"FAULT_{name.upper()}": str(value) for name, value in settings.items()}
        if paths.name.startswith(ENCODED):
            environment["FAULT_ALONE_BYTES"] = "20000"
        begun = not anew and (paths.events.exists() or paths.process.exists()) and not requested(paths, "queued")
        act = supervise.resume if begun else supervise.launch
        wait = {"wait_seconds": 0.0} if "hold" in settings else {}  # it may hold before it has the run
        return act(paths, module=module, popen=self.warm.popen, environment=environment, **wait).process  # type: ignore[return-value]

    def cold(self, paths: RunPaths, environment: Mapping[str, str], hold: str) -> "subprocess.Popen[bytes]":
        """Launch a worker that shares nothing with others, in an environment of its own."""
        environment = {**environment, "FAULT_HOLD": hold, "PYTHONPATH": str(CHECKOUT)}
        return supervise.launch(
            paths, "studio.jobs.train", popen=cold, environment=environment, wait_seconds=120
        ).process

    def held(self, process: WarmProcess) -> WarmProcess:
        """Wait until a worker has stopped itself at its moment."""
        wait_for(lambda: process.held or process.poll() is not None)
        assert process.held, f"it ended by {process.poll()} before its moment"
        return process

    def finish(self, paths: RunPaths, **settings: Any) -> "Outcome":
        """Run or resume to the end, and return what came of it."""
        code = self.start(paths, **settings).wait()
        assert code == 0, (read_history(paths).failed, paths.output.read_text()[-3000:])
        assert run_status(paths) is Status.finished
        return Outcome(paths)

    def whole(self, kind: str) -> "Outcome":
        """Return what an uninterrupted run of a configuration gives; run once for all tests of this process."""
        if kind not in self._baselines:
            # In a home of its own: what it leaves in the cache would spare the others that work.
            self._baselines[kind] = Outcome(self._uninterrupted(kind))
        return self._baselines[kind]

    def _uninterrupted(self, kind: str) -> RunPaths:
        paths = self.new(self.recipe(kind), name=slug(kind))
        began = time.monotonic()
        self.finish(paths)
        shutil.rmtree(self.home / "cache", ignore_errors=True)
        SECONDS[kind] = time.monotonic() - began
        return paths

    def join(self, paths: RunPaths) -> None:
        """Let a run wait in the queue for the CPU."""
        request(paths, "queued")
        Queue().add(paths, {CPU: {}})

    def adapter(self) -> Path:
        """Return a copy of a trained adapter among the user's files."""
        copy = self.user / "adapter"
        if not copy.exists():
            shutil.copytree(self.whole("LoRA fp32").folder / "adapter", copy)
        return copy

    def merged(self, out: Path) -> MergeRequest:
        """Return the request to merge that adapter into the base, in small shards."""
        return MergeRequest(str(self.adapter()), str(self.model), str(out))

    def crashed(self, template: RunPaths) -> RunPaths:
        """Return a copy of a run as it lies there, under another name."""
        copy = RunPaths(template.root.with_name(f"{template.name}-copy-{len(list(self.runs.iterdir()))}"))
        shutil.copytree(template.root, copy.root)
        return copy


def files_of(folder: Path) -> dict[str, str]:
    """Return the checksum of every file of a folder, by its name there."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Outcome:
    """What a run gave: every step's loss, gradient norm and rate, the evaluations, and its adapter."""

    def __init__(self, paths: RunPaths) -> None:
        self.folder = paths.root
        history = read_history(paths)
        self.steps = list(history.train.steps)
        self.numbers = [list(series) for series in (history.train.losses, history.train.grad_norms, history.train.lrs)]
        self.evals = [(event.step, event.loss) for event in history.evals]
        weights = paths.adapter / "adapter_model.safetensors"
        self.adapter = hashlib.sha256(weights.read_bytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and {**vars(self), "folder": 0} == {**vars(other), "folder": 0}

    __hash__ = None  # type: ignore[assignment]


ENCODED = "encode-processes"
SECONDS: dict[str, float] = {}
"""How long an uninterrupted run of each configuration took."""
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "LoRA fp32": {},
    "QLoRA NF4": {"method": "qlora"},
    "8-bit AdamW": {"train.optimizer": "adamw_8bit"},
    "streamed": {"model.stream": 1, "train.recompute": "all"},
    "recompute 1 layer": {"train.recompute": 1},
    "packing": {"train.packing": "on"},
    "DPO": {"train.objective": "dpo", "data.path": "{user}/pairs.jsonl"},
    "mixture": {
        "data.path": "embedded",
        "data.sources": [{"path": "{user}/chats.jsonl", "weight": 2}, {"path": "{user}/more.jsonl", "weight": 3}],
    },
    "raw text": {"data.path": "{user}/raw.txt", "eval.rows": 0},
    "encode processes": {"data.path": "{user}/many.jsonl"},
}


_MORE: dict[str, dict[str, Any]] = {
    # Twelve rows of 500 tokens: more than what lies free in a process's heap.
    "long rows": {
        "data.path": "{user}/long.jsonl",
        "train.seq_len": 512,
        "train.micro_batch": 12,
        "train.steps": 4,
        "eval.every": 2,
        "eval.samples": 1,
        "eval.sample_tokens": 4,
    }
}


def slug(kind: str) -> str:
    return kind.lower().replace(" ", "-")


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    server = Warm()
    yield server
    server.end()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fakes.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def baselines() -> dict[str, Outcome]:
    return {}


@pytest.fixture
def kit(
    warm: Warm, model: Path, tmp_path: Path, baselines: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kit]:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    yield Kit(warm, model, tmp_path, baselines)


@pytest.fixture
def crashed(kit: Kit) -> RunPaths:
    """A run that was killed after step 5, with checkpoints of steps 2 and 4."""
    paths = kit.new()
    process = kit.held(kit.start(paths, hold="step:5"))
    process.kill()
    process.wait()
    return paths


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Callable[..., Fault]]:
    """Begin a row: what is known of it when the test ends is in the table, also where the test failed."""
    rows = list[Fault]()

    def begin(name: str, made: str, **more: Any) -> Fault:
        rows.append(Fault(name, made, **more))
        return rows[-1]

    yield begin
    request.node.user_properties.extend(row.property() for row in rows)


def shown(row: Fault, paths: RunPaths, status: Status, since: float) -> History:
    """Wait until the run is shown as it stands, and note what is told and how long it took since a moment."""
    wait_for(lambda: run_status(paths) is status)
    row.shown_seconds = max(row.shown_seconds or 0.0, time.monotonic() - since)
    history = read_history(paths)
    failure = summary_of(paths, history, status)["failure"]
    row.told = f"{status}: {failure['message']}" if failure else str(status)
    return history


def resumed(kit: Kit, paths: RunPaths) -> None:
    """Resume a run by all of its checks, to its end."""
    assert resume(paths, popen=kit.warm.popen).process.wait() == 0, read_history(paths).failed
