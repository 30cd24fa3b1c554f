"""Logits of a GGUF file in llama.cpp."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from studio.jobs.base.llama.tool_process import LlamaTool


def llama_logits(tool: LlamaTool, gguf: Path, rows: list[list[int]], work: Path, lora: str = "") -> Tensor:
    """Return fp32 logits `[tokens, vocabulary]`, all rows one after another.

    Args:
        tool: Runs llama.cpp.
        gguf: The model.
        rows: Token ids.
        work: A folder for what lies about meanwhile.
        lora: A LoRA file that is put onto the model; empty for none.

    Raises:
        JobFailed: llama.cpp cannot load or run it.
    """
    asked, answered = work / "ids.json", work / "logits.f32"
    asked.write_text(json.dumps(rows), encoding="utf-8")
    tool.run("logits", gguf, asked, answered, *([lora] if lora else []))
    logits = torch.from_numpy(np.fromfile(answered, np.float32).reshape(sum(map(len, rows)), -1))
    answered.unlink()
    return logits
