"""The run directory: which file lies where, and how a new one gets its name."""

import os
import re
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.text import plain

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of a PEFT folder without which there is no adapter."""
_OWNER_ONLY = 0o700
_LONGEST_SLUG = 48
_MOST_TWINS = 1000


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The places inside one run directory. That a place has a name here does not mean that the file exists."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.root.name

    @property
    def recipe(self) -> Path:
        """What the run was made from, as resolved; never edited."""
        return self.root / "recipe.toml"

    @property
    def extensions(self) -> Path:
        """The steps that the run was given beyond its plan; written by who asked for them."""
        return self.root / "extensions.json"

    @property
    def plan(self) -> Path:
        """The memory estimate at launch."""
        return self.root / "plan.json"

    @property
    def reference(self) -> Path:
        """What the base says of each pair of answers that the run sees, with which DPO compares."""
        return self.root / "reference.safetensors"

    @property
    def events(self) -> Path:
        """The append-only log of the worker."""
        return self.root / "events.jsonl"

    @property
    def index(self) -> Path:
        """What stands where in a long log, for readers of it; it can be deleted, and is made again."""
        return self.root / "events.index"

    @property
    def output(self) -> Path:
        """What the worker's process printed."""
        return self.root / "output.log"

    @property
    def process(self) -> Path:
        """Which process is, or was, the worker; written by the worker."""
        return self.root / "process.json"

    @property
    def launch(self) -> Path:
        """Which process was started last, and how long the log was then; written by who started it."""
        return self.root / "launch.json"

    @property
    def lock(self) -> Path:
        """The lock that the worker holds while it lives."""
        return self.root / "worker.lock"

    @property
    def control(self) -> Path:
        """Requests to the worker: a file is a request."""
        return self.root / "control"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint, from which a stopped or crashed run is resumed."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result of training: a PEFT folder."""
        return self.root / "adapter"

    @property
    def identity(self) -> Path:
        """What a training run was made from, tensor by tensor and row by row; written at its first start."""
        return self.root / "identity.json"

    @property
    def shrunk(self) -> Path:
        """What a training that memory was refused does otherwise than its recipe says; written by the training job."""
        return self.root / "shrunk.json"

    @property
    def restarts(self) -> Path:
        """How often a guard has restarted the run after a crash; written by the guard."""
        return self.root / "restarts.json"

    @property
    def held_out(self) -> Path:
        """Which rows were held out and which were trained on, by content; written by the training job."""
        return self.root / "held_out.json"

    @property
    def system_prompt(self) -> Path:
        """The system prompt that most rows begin with; written by the training job, read by chats."""
        return self.root / "system_prompt.json"

    @property
    def template(self) -> Path:
        """The chat template that the recipe named at the run's first start; written by the training job."""
        return self.root / "template.jinja"

    @property
    def report(self) -> Path:
        """The summary that a job leaves at its end."""
        return self.root / "report.json"

    @property
    def report_text(self) -> Path:
        """An audit's summary for a reader, beside its pictures."""
        return self.root / "report.md"

    @property
    def audit(self) -> Path:
        """The report of an audit of this training run's adapter, which a model card quotes; written by the audit."""
        return self.root / "audit.json"

    @property
    def audit_parts(self) -> Path:
        """What an audit has measured so far; removed at its end."""
        return self.root / "audit"

    @property
    def lanes(self) -> Path:
        """The training runs of a race, by lane."""
        return self.root / "lanes.json"

    @property
    def checkpoint_adapter(self) -> Path:
        """A PEFT folder that a merge makes of a checkpoint."""
        return self.root / "checkpoint-adapter"

    @property
    def merge(self) -> Path:
        """The run, inside an export's, of the merge that the export needs first."""
        return self.root / "merge"

    @property
    def merged(self) -> Path:
        """The merged model of the demo's run."""
        return self.root / "merged"

    @property
    def tool_log(self) -> Path:
        """What llama.cpp printed."""
        return self.root / "tool.log"

    @property
    def reserve(self) -> Path:
        """Room that is given back to the log when the disk is full."""
        return self.root / ".reserve"

    @property
    def next(self) -> Path:
        """The name of the run that was started when this one had ended; written by this one's process."""
        return self.root / "next.txt"

    @property
    def note(self) -> Path:
        """What the user wrote on the run."""
        return self.root / "note.txt"

    @property
    def beside(self) -> Path:
        """What went wrong beside the run: in the user's command, in trackers; a file for each."""
        return self.root / "beside"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, where its package is installed."""
        return self.root / "tensorboard"

    @property
    def exists(self) -> bool:
        """Whether the folder is a run: it holds a recipe or a log, and no pipe or device under the name of a file."""
        return (self.recipe.is_file() or self.events.is_file()) and not _never_ends(self.root)


_ANY = RunPaths(Path())
_READ = {path.name for path in (_ANY.recipe, _ANY.events, _ANY.plan, _ANY.output, _ANY.process, _ANY.launch)}
_READ |= {path.name for path in (_ANY.report, _ANY.next, _ANY.note, _ANY.identity, _ANY.held_out)}
_READ |= {_ANY.system_prompt.name, _ANY.index.name, _ANY.extensions.name}
"""The names of the files that are read of a run to list or show it."""


def new_run(runs_root: Path, name: str, now: float) -> RunPaths:
    """Make the folder of a new run, `<slug>-YYYYmmdd-HHMMSS`, readable by the owner only.

    Args:
        runs_root: Where runs live; made if missing.
        name: Any text; only letters, digits, dots and dashes of it reach the folder's name.
        now: Unix seconds, shown in local time.

    Raises:
        BadInput: The folder cannot be made there.
    """
    stem = f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"
    try:
        runs_root.mkdir(mode=_OWNER_ONLY, parents=True, exist_ok=True)
        for twin in range(1, _MOST_TWINS):
            paths = RunPaths(runs_root / (stem if twin == 1 else f"{stem}-{twin}"))
            try:
                paths.root.mkdir(mode=_OWNER_ONLY)
            except FileExistsError:
                continue
            paths.control.mkdir(mode=_OWNER_ONLY)
            return paths
    except OSError as error:
        raise BadInput(
            f"no run folder can be made in {plain(str(runs_root), one_line=True)}: {error.strerror}. "
            "Choose another place with --runs-dir or LORA_STUDIO_HOME."
        ) from error
    raise BadInput(f"{_MOST_TWINS} runs are named {stem} already: wait a second or choose another name.")


def _never_ends(folder: Path) -> bool:
    """Whether a file of `_READ` is a pipe or a device, directly or through a link: reading it might never end."""
    try:
        with os.scandir(folder) as entries:
            odd = [entry for entry in entries if entry.name in _READ and not entry.is_file(follow_symlinks=False)]
            return any(not (entry.is_file() or entry.is_dir()) and Path(entry).exists() for entry in odd)
    except OSError:
        return False


def slug(name: str) -> str:
    """Return a folder-name part made of `a-z0-9._-` from any text; never empty, hidden or longer than 48."""
    ascii_text = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    dashed = re.sub(r"[^a-z0-9._]+", "-", ascii_text.lower())
    flat = re.sub(r"[-.]{2,}", "-", dashed)
    return flat[:_LONGEST_SLUG].strip("-._") or "run"
