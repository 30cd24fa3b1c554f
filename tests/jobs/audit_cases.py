"""What the tests of the audit share: rows, variants of a model folder, and the same figures by the plainest way."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from studio.jobs.audit.__main__ import _body
from studio.jobs.audit.blocks import Parts, parts_of
from studio.jobs.audit.variants import folder_variants
from studio.jobs.audit.walk import Variant
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.probe.audit import read_report
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest

CPU = torch.device("cpu")
Change = Callable[[str, Tensor], Tensor]


def examples(*lengths: int, seed: int = 0, vocabulary: int = 256) -> list[Example]:
    """Random rows; the second half of each has labels."""
    draw = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = draw.integers(0, vocabulary, length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 2] = IGNORED
        made.append(Example(ids, labels))
    return made


def variants_of(folder: Path, names: Sequence[str], **more: Any) -> tuple[Parts, list[Variant]]:
    weights = FolderWeights.of(folder)
    return parts_of(weights.clean), folder_variants(weights, names, **more)


def whole_model(folder: Path, change: Change | None = None) -> nn.Module:
    """All of a model in fp32, every weight of a linear layer but the head changed, and every stack of experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model if change is None else changed(model, change)


def changed(model: nn.Module, change: Change) -> nn.Module:
    """The model itself, its linear layers but the head and its stacks of experts changed."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            module.weight.data = change(name, module.weight.data)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and ".experts." in name:
            parameter.data = change(name, parameter.data)
    return model


def rounded(name: str) -> Change:
    """bitsandbytes' own rounding there and back, of a whole weight."""
    code, _, nested = name.partition("+")

    def change(_: str, weight: Tensor) -> Tensor:
        # A stack of experts as rows of one block each: bitsandbytes is wrong on a CPU where rows are shorter.
        flat = weight.reshape(-1, 64) if weight.dim() == 3 else weight
        packed, state = quantize_4bit(flat, quant_type=code, compress_statistics=bool(nested))
        back: Tensor = dequantize_4bit(packed, state)
        return back.view_as(weight)

    return change


def plain_model(folder: Path, name: str) -> nn.Module:
    """The variant of this name, whole."""
    if name == "int8":
        bits = BitsAndBytesConfig(load_in_8bit=True)
        options: dict[str, Any] = {"quantization_config": bits, "device_map": {"": "cpu"}}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return whole_model(folder, None if name == "16-bit" else rounded(name))


@torch.no_grad()
def log_probabilities(model: nn.Module, rows: Sequence[Example]) -> list[Tensor]:
    """Of every token at every place with a label, full logits in fp32, row by row."""
    said = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()[None]
        said.append(model(input_ids=ids).logits[0, :-1][_labelled(row)].float().log_softmax(-1))
    return said


def figures_of(found: Sequence[Tensor], meant: Sequence[Tensor], rows: Sequence[Example]) -> tuple[float, float, float]:
    """Mean loss, mean KL from the reference, share of equal top tokens."""
    losses, kls, same = [], [], []
    for row, ours, theirs in zip(rows, found, meant, strict=True):
        labels = torch.from_numpy(row.labels[1:]).long()[_labelled(row)]
        losses.append(-ours.gather(1, labels[:, None])[:, 0])
        kls.append((theirs.exp() * (theirs - ours)).sum(-1))
        same.append((ours.argmax(-1) == theirs.argmax(-1)).float())
    return tuple(float(torch.cat(part).double().mean()) for part in (losses, kls, same))  # type: ignore[return-value]


def plain_figures(model: nn.Module, reference: nn.Module, rows: Sequence[Example]) -> tuple[float, float, float]:
    """The figures of a model beside another."""
    return figures_of(log_probabilities(model, rows), log_probabilities(reference, rows), rows)


def _labelled(row: Example) -> Tensor:
    return torch.from_numpy(row.labels[1:]) != IGNORED


def audit(root: Path, request: AuditRequest) -> tuple[RunPaths, dict[str, Any]]:
    """Run the audit job in this process, in a new folder or again in an old one; its report is empty where none is."""
    paths = RunPaths(root)
    if not paths.recipe.is_file():
        root.mkdir()
        paths.control.mkdir()
        write_job(paths, request)
    run_job(root, _body)
    return paths, read_report(paths) or {}
