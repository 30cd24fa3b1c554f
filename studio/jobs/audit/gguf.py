"""Measures GGUF files on the same rows and tokens as the walked forms, through llama.cpp in its own process.

The figures are those of llama.cpp in use: it rounds activations to the weights' format and keeps keys and values in 16
bit, so even an f16 file is close to its model but not equal to it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from studio.core.errors import JobFailed
from studio.core.events import Phase
from studio.core.text import plain
from studio.jobs.audit.figures import Ground
from studio.jobs.audit.scores import Head, TokenScores, score_given
from studio.jobs.audit.serving import LLAMA, NEW_TOKENS, NOT_ASKED, Speed, unmeasured
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.llama.llama_answers import streamed_llama_logits
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.base.progress import heed
from studio.probe.exported import GgufFile, exported_gguf, named_gguf
from studio.probe.llama_tools import is_whole, tools_folder
from studio.runs.layout import RunPaths

NONE_EXPORTED = "no GGUF file was exported from this run; export one, or name a file with --gguf"
_NO_LIBRARY = "llama.cpp's library is not here: export to a GGUF format once, which fetches it"


@dataclass(slots=True)
class GgufForms:
    """The GGUF files of one audit.

    Attributes:
        ground: What the walks of the audit share.
        files: The files, by the name of their variant.
        whys: By name, why a file could not be measured.
    """

    ground: Ground
    files: Mapping[str, GgufFile]
    whys: dict[str, str] = field(default_factory=dict)

    def scores(self, head: Head, finals: Tensor, targets: Tensor) -> dict[str, TokenScores]:
        """Return the figures of every file that llama.cpp can run; `whys` gets the reasons for the others.

        Args:
            head: Of the reference.
            finals: Its final hidden states `[tokens, hidden]`.
            targets: The token that follows each, `[tokens]`.

        Raises:
            Cancelled: The user asked for it.
        """
        tool = self.tool()
        if tool is None:
            self.whys |= dict.fromkeys(self.files, _NO_LIBRARY)
            return {}
        made = {}
        rows = [_row(example) for example in self.ground.rows.all]
        work = Path(self.ground.worker.paths.root)
        for name, file in self.files.items():
            self.ground.worker.emit(Phase, name="auditing", detail=f"{name} in llama.cpp")
            given = streamed_llama_logits(tool, file.path, rows, work, head.vocabulary)
            try:
                scores = score_given(given, finals, targets, head, self.ground.parts.form)
            except JobFailed as failed:
                self.whys[name] = plain(str(failed), one_line=True, limit=300)
                continue
            if bool(torch.isfinite(scores.loss).all()):
                made[name] = scores
            else:
                self.whys[name] = "its logits hold NaN or infinity"
        return made

    def speed(self, name: str, prompt: Sequence[int]) -> Speed:
        """Return how fast a file is served here; an empty prompt means that speed was not asked for.

        Raises:
            Cancelled: The user asked for it.
        """
        tool = self.tool()
        if not prompt or tool is None or name in self.whys:
            return unmeasured(self.whys.get(name, NOT_ASKED), LLAMA)
        self.ground.worker.emit(Phase, name="measuring speed", detail=name)
        return timed_gguf(tool, self.files[name].path, prompt, Path(self.ground.worker.paths.root))

    def tool(self) -> LlamaTool | None:
        """Return what runs llama.cpp; None where its library is not installed, because an audit does not fetch it."""
        if not is_whole(tools_folder()):
            return None
        return LlamaTool(tools_folder(), self.ground.worker.paths.tool_log, self._heed)

    def _heed(self) -> None:
        heed(self.ground.worker, "stopped; resuming goes on after the last whole block")


def gguf_files(trained: RunPaths, named: Sequence[str]) -> dict[str, GgufFile]:
    """Return the files to measure, by the name of their variant: those exported from a run, and those that are named.

    Args:
        trained: The training run.
        named: Paths of further files.

    Raises:
        BadInput: A named file is no GGUF file of a model.
    """
    made = {f"gguf {file.form}": file for file in exported_gguf(trained)}
    known = {file.path.resolve() for file in made.values()}
    for path in map(Path, named):
        file = named_gguf(path)
        if file.path.resolve() not in known:
            made[_free(f"gguf: {plain(file.path.stem, one_line=True, limit=40)}", made)] = file
    return made


def timed_gguf(tool: LlamaTool, gguf: Path, prompt: Sequence[int], work: Path) -> Speed:
    """Return how fast llama.cpp reads a prompt and writes after it, on the CPU.

    Args:
        tool: Runs llama.cpp.
        gguf: The model.
        prompt: Token ids.
        work: A folder for temporary files.
    """
    asked, answered = work / "prompt.json", work / "speed.json"
    asked.write_text(json.dumps(list(prompt)), encoding="utf-8")
    try:
        tool.run("speed", gguf, asked, str(NEW_TOKENS), answered)
        seconds = json.loads(answered.read_text("utf-8"))
    except JobFailed as failed:
        return unmeasured(str(failed), LLAMA)
    finally:
        asked.unlink()
        answered.unlink(missing_ok=True)
    return Speed(
        "measured",
        len(prompt) / seconds["prefill_seconds"],
        seconds["decoded"] / seconds["decode_seconds"],
        len(prompt),
        int(seconds["decoded"]),
        "cpu",
        int(seconds["threads"]),
        LLAMA,
    )


def _free(name: str, taken: Mapping[str, object]) -> str:
    return name if name not in taken else next(f"{name} {n}" for n in range(2, 10**6) if f"{name} {n}" not in taken)


def _row(example: Example) -> tuple[list[int], list[int]]:
    """Return a row's token ids up to the last that is needed, and the indices of tokens that a labelled one follows."""
    wanted = (example.labels[1:] != IGNORED).nonzero()[0]
    places: Sequence[int] = wanted.tolist()
    return example.input_ids[: max(places, default=0) + 1].tolist(), list(places)
