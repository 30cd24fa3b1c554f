"""How llama.cpp reads a model, found out from config, tokenizer and the names of tensors, before minutes of merging.

Whether it knows the architecture, has a place for every tensor, and makes the tokens of the training run of five
conversations. Where a SentencePiece vocabulary gets a space before a text and after each special token in one of the
two and not in the other, the file is told to do as the run did.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import JobFailed
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.export.gguf_view import strips_after_tokens
from studio.jobs.export.golden import check_golden
from studio.probe.gguf_header import read_gguf_header
from studio.probe.model_folder import CONFIG, read_config

_KIND = "tokenizer.ggml.model"
_PHI3 = ("phi-3", "phi3")
"""llama.cpp drops white space after special tokens where `general.name` has one of these (llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file must say so that llama.cpp reads texts as the training run did.

    Attributes:
        name: `general.name`.
        space: Whether a space is read before a text: `true`, `false`, or `default` for what the converter writes.
    """

    name: str
    space: str = "default"


def ask_llama(tool: LlamaTool, view: Path, trained: Any, title: str, vocabulary: Path) -> Reading:
    """Return how the file is to be written.

    Args:
        tool: Runs llama.cpp.
        view: From `make_view`; where it has weights, every tensor is looked up, too.
        trained: The tokenizer of the training run.
        title: What the file is called.
        vocabulary: A new file that holds the vocabulary meanwhile.

    Raises:
        JobFailed: llama.cpp does not know the model, or makes other tokens.
    """
    phi3 = read_config(view / CONFIG).get("model_type") == "phi3" and strips_after_tokens(view)
    name = f"{title} (Phi-3)" if phi3 and not any(word in title.lower() for word in _PHI3) else title
    tool.run("vocab", view, vocabulary, name)
    try:
        check_golden(tool, vocabulary, [trained])
    except JobFailed:
        if read_gguf_header(vocabulary).metadata.get(_KIND) != "llama":
            raise
        if space := _right_space(tool, vocabulary, trained):
            return Reading(name, space)
        raise
    return Reading(name)


def _right_space(tool: LlamaTool, vocabulary: Path, trained: Any) -> str:
    for space in ("false", "true"):
        try:
            check_golden(tool, vocabulary, [trained], space)
        except JobFailed:
            continue
        return space
    return ""
