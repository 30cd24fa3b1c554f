"""The logits of a GGUF file, as llama.cpp computes them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from studio.core.errors import JobFailed
from studio.jobs.base.llama.tool_process import LlamaTool

_NUMBERS_AT_ONCE = 2**23
"""Most logits that are held at once: 32 MiB in fp32."""


def llama_logits(tool: LlamaTool, gguf: Path, rows: list[list[int]], work: Path, lora: str = "") -> Tensor:
    """Return fp32 logits `[tokens, vocabulary]`, all rows one after another.

    Args:
        tool: Runs llama.cpp.
        gguf: The model.
        rows: Token ids of each row.
        work: A folder for temporary files.
        lora: A LoRA file that is applied to the model; empty for none.

    Raises:
        JobFailed: llama.cpp cannot load or run it.
    """
    asked, answered = work / "ids.json", work / "logits.f32"
    asked.write_text(json.dumps(rows), encoding="utf-8")
    tool.run("logits", gguf, asked, answered, *([lora] if lora else []))
    logits = torch.from_numpy(np.fromfile(answered, np.float32).reshape(sum(map(len, rows)), -1))
    answered.unlink()
    return logits


def streamed_llama_logits(
    tool: LlamaTool, gguf: Path, rows: Sequence[tuple[list[int], list[int]]], work: Path, vocabulary: int
) -> Iterator[Tensor]:
    """Yield fp32 logits `[tokens, vocabulary]` of a few tokens at a time, all rows one after another.

    Args:
        tool: Runs llama.cpp; its `heed` is called in between.
        gguf: The model.
        rows: For each row its token ids, and the indices of the tokens whose logits are wanted.
        work: A folder for temporary files.
        vocabulary: How many tokens the model must have.

    Raises:
        JobFailed: llama.cpp cannot load or run it, or its vocabulary has another size.
    """
    asked = work / "rows.json"
    asked.write_text(json.dumps(rows), encoding="utf-8")
    left, most = sum(len(places) for _, places in rows), max(1, _NUMBERS_AT_ONCE // vocabulary)
    with tool.stream("stream", gguf, asked) as pipe:
        known = int.from_bytes(_read(pipe, 8), "little")
        if known != vocabulary:
            raise JobFailed(
                "gguf_vocabulary",
                f"the file's vocabulary has {known} tokens, the model's {vocabulary}",
                "name a file that was made from this model",
            )
        while left:
            tool.heed()
            some = min(left, most)
            logits = np.frombuffer(_read(pipe, 4 * some * vocabulary), np.float32).reshape(some, vocabulary)
            yield torch.from_numpy(logits)
            left -= some
    asked.unlink()


def _read(pipe: IO[bytes], size: int) -> bytearray:
    """Return exactly `size` bytes.

    Raises:
        EOFError: The pipe ends before.
    """
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = pipe.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        done += count
    return data
