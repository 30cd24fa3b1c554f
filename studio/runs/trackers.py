"""Trackers of experiments: each gets a run's figures through its own library, in a process of its own.

None of them asks anything: W&B without a key writes offline. The libraries are looked up when a run asks for them.
"""

import os
import time
from collections.abc import Callable
from netrc import NetrcParseError, netrc
from typing import Any
from urllib.parse import urlsplit

from studio.core.errors import BadInput
from studio.core.events import Evaluated, MemorySeen, RunEvent, Sink, Started, StepDone
from studio.core.recipe import Recipe
from studio.runs.atomic import read_object, write_whole
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.supervise import ASKED_WANDB_MODE

PROJECT = "lora-studio"

Tell = Callable[[str], None]


def figures_in(event: RunEvent) -> tuple[int, dict[str, float]] | None:
    """Return the step and the named figures of an event; None for others."""
    match event:
        case StepDone():
            found = {"train/loss": event.loss, "train/learning_rate": event.learning_rate,
                     "train/grad_norm": event.grad_norm, "train/seconds": event.seconds}  # fmt: skip
            if event.seconds > 0:
                found["train/tokens_per_second"] = event.tokens / event.seconds
            if event.margin is not None:
                found |= {"train/margin": event.margin, "train/accuracy": event.accuracy or 0.0}
            return event.step, found
        case Evaluated():
            return event.step, {"eval/loss": event.loss}
        case MemorySeen():
            known = {"memory/peak_bytes": event.peak_bytes, "memory/resident_bytes": event.resident_bytes}
            return event.step, {name: float(value) for name, value in known.items() if value is not None}
    return None


def _table(paths: RunPaths) -> dict[str, Any]:
    """Return the fields of a run's recipe by their paths; of one that cannot be read nothing."""
    try:
        recipe = read_job(paths, Recipe)
    except BadInput:
        return {}
    tables = recipe.to_dict() if recipe else {}
    flat = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    return flat | {f"{part}.{name}": value for part, table in tables.items() if isinstance(table, dict)
                   for name, value in table.items()}  # fmt: skip


class TensorBoard:
    """Writes TensorBoard's files into `tensorboard/` of the run."""

    def __init__(self, paths: RunPaths, tell: Tell) -> None:
        """Open a file."""
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(paths.tensorboard), flush_secs=10)

    def take(self, event: RunEvent) -> None:
        """Write the figures of an event. At a resume, the steps that are done again replace those of before."""
        if isinstance(event, Started) and event.resumed_from:
            log = self._event(wall_time=event.at, step=event.resumed_from + 1)
            log.session_log.status = log.session_log.START
            self._writer.add_event(log)
        if found := figures_in(event):
            step, figures = found
            values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
            self._writer.add_event(self._event(wall_time=event.at, step=step, summary=self._summary(value=values)))

    def close(self, ended: str) -> None:
        """Write what is left."""
        self._writer.close()


def _has_wandb_key() -> bool:
    """Return whether W&B's library will find a key, in the environment or in the file that its login writes."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


class WandB:
    """Sends to W&B, or writes offline where no key is set up."""

    def __init__(self, paths: RunPaths, tell: Tell) -> None:
        """Begin, or go on with, the run of this name."""
        os.environ.pop("WANDB_MODE", None)  # "disabled", which the job's own process has
        mode = os.environ.pop(ASKED_WANDB_MODE, "")
        os.environ["WANDB_SILENT"] = "true"
        import wandb  # noqa: PLC0415

        if not mode:
            mode = "online" if _has_wandb_key() else "offline"
            if mode == "offline":
                tell("wandb has no key and writes offline; send it later with: wandb sync, in the run's folder wandb")
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, init_timeout=60
        )
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        self._run = wandb.init(
            project=project, name=paths.name, id=paths.name, resume="allow", dir=str(paths.root), mode=mode,
            config=_table(paths), settings=settings,
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def take(self, event: RunEvent) -> None:
        """Send the figures of an event."""
        if found := figures_in(event):
            self._run.log({"step": found[0], **found[1]})

    def close(self, ended: str) -> None:
        """Say how it ended."""
        self._run.finish(exit_code=0 if ended in ("finished", "stopped") else 1)


class MLflow:
    """Sends to the MLflow server of `MLFLOW_TRACKING_URI`, or writes into `mlruns/` of the run without one."""

    def __init__(self, paths: RunPaths, tell: Tell) -> None:
        """Begin, or go on with, the run of this name."""
        # A server that does not answer is asked again for minutes otherwise.
        for name, value in (("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")):
            os.environ.setdefault(name, value)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow import MlflowClient  # noqa: PLC0415
        from mlflow.entities import Metric  # noqa: PLC0415

        self._metric = Metric
        where = os.environ.get("MLFLOW_TRACKING_URI") or (paths.root / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=where)
        kept = paths.beside / "mlflow-run.json"
        known = read_object(kept).get("run_id")
        if isinstance(known, str):
            self._run = known
            self._client.set_terminated(known, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=paths.name).info.run_id
        paths.beside.mkdir(mode=0o700, exist_ok=True)
        write_whole(kept, f'{{"run_id": "{self._run}"}}\n')
        for path, value in _table(paths).items():
            self._client.log_param(self._run, path, str(value)[:500])

    def take(self, event: RunEvent) -> None:
        """Send the figures of an event."""
        if found := figures_in(event):
            at = int(event.at * 1000)
            metrics = [self._metric(name, value, at, found[0]) for name, value in found[1].items()]
            self._client.log_batch(self._run, metrics=metrics)

    def close(self, ended: str) -> None:
        """Say how it ended."""
        states = {"finished": "FINISHED", "stopped": "KILLED"}
        self._client.set_terminated(self._run, states.get(ended, "FAILED"), int(time.time() * 1000))


class Trackio:
    """Writes where trackio keeps its projects, or sends to what `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` names."""

    def __init__(self, paths: RunPaths, tell: Tell) -> None:
        """Begin, or go on with, the run of this name."""
        import trackio  # noqa: PLC0415

        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._run = trackio.init(
            project=project, name=paths.name, config=_table(paths), resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def take(self, event: RunEvent) -> None:
        """Send the figures of an event."""
        if found := figures_in(event):
            self._run.log(found[1], step=found[0])

    def close(self, ended: str) -> None:
        """Write what is left."""
        self._run.finish()


SINKS: dict[str, Callable[[RunPaths, Tell], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""What makes each tracker, by the name of its library."""
