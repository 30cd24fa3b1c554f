"""Merges a LoRA or QLoRA adapter into its 16-bit base, in memory, and checks that the result behaves like the two.

A QLoRA adapter is merged into the 16-bit base as well: adding it to 4-bit weights and rounding again loses most of it.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from studio.core.errors import BadInput, JobFailed
from studio.core.events import Finished, Phase, Saved, Started
from studio.jobs.base.load import FourBit, base_folder, load_base, load_tokenizer
from studio.probe.adapter_folder import find_adapter
from studio.probe.models import BaseFound, find_base
from studio.probe.start import check_merge
from studio.runs.atomic import publish_folder, write_whole
from studio.runs.job import MergeRequest
from studio.runs.worker import Worker

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PROBE = "The quick brown fox jumps over the lazy dog. def add(a, b):\n    return a + b\n"


@dataclass(frozen=True, slots=True)
class Closeness:
    """Merged model against base + adapter on a fixed text: KL in nats, share of equal top tokens, largest logit gap."""

    tokens: int
    mean_kl: float
    same_top_token: float
    largest_logit_difference: float


def merge_run(worker: Worker, request: MergeRequest) -> None:
    """Merge as asked and leave the whole model folder at `request.out`.

    Raises:
        BadInput: The adapter or the base cannot be used.
        JobFailed: The merged weights are not finite.
        OSError: The disk is full or not writable; nothing half-made is left.
    """
    worker.emit(Started, job="merge", model=request.base or None)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    adapter = Path(request.adapter)
    worker.emit(Phase, name="finding the base model")
    word = request.base or find_adapter(adapter).base
    if not word:
        raise BadInput(f"{adapter.name} names no base model; say which one with --base")
    check_merge(request)
    base = find_base(word, request.revision)
    folder = base_folder(base, lambda name, fraction: worker.emit(Phase, name=name, fraction=fraction))
    worker.emit(Phase, name="loading the base model", detail="16 bit")
    model = PeftModel.from_pretrained(_load(base, request.dtype), str(adapter), autocast_adapter_dtype=True).eval()
    tokenizer = load_tokenizer(adapter if _has_tokenizer(adapter) else folder)
    ids = tokenizer(_PROBE, return_tensors="pt").input_ids
    separate = _logits(model, ids)
    worker.emit(Phase, name="merging")
    merged = model.merge_and_unload(safe_merge=True)
    closeness = _compare(_logits(merged, ids), separate)
    if not all(bool(torch.isfinite(p).all()) for p in merged.parameters()):
        raise JobFailed("merged_nonfinite", "the merged weights hold NaN or infinity", "merge in fp32: --dtype fp32")
    out = Path(request.out)
    worker.emit(Phase, name="saving")
    size = _save(merged, tokenizer, out)
    worker.emit(Saved, what="merged", path=str(out), size_bytes=size)
    report = {"merged": str(out), "adapter": str(adapter), "base": word, "closeness": asdict(closeness)}
    write_whole(worker.paths.report, json.dumps(report, indent=2))
    worker.emit(Finished, outcome="done", result=report)


def _load(base: BaseFound, dtype: str) -> Any:
    named = (base.config or {}).get("dtype") or (base.config or {}).get("torch_dtype")
    wanted = _DTYPES.get(dtype) or (torch.float32 if named == "float32" else _named_dtype(named))
    return load_base(base, method="lora", dtype=wanted, quant=FourBit(), attention="sdpa", device=torch.device("cpu"))


def _named_dtype(name: object) -> torch.dtype:
    return torch.float16 if name == "float16" else torch.bfloat16


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return fp32 logits `[seq, vocabulary]` of one row."""
    logits: Tensor = model(input_ids=ids).logits[0].float()
    return logits


def _compare(merged: Tensor, separate: Tensor) -> Closeness:
    ours, theirs = log_softmax(merged, -1), log_softmax(separate, -1)
    return Closeness(
        tokens=merged.shape[0],
        mean_kl=float(kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean()),
        same_top_token=float((merged.argmax(-1) == separate.argmax(-1)).float().mean()),
        largest_logit_difference=float((merged - separate).abs().max()),
    )


def _save(model: Any, tokenizer: Any, out: Path) -> int:
    """Write the folder aside, then give it its name; returns bytes on disk."""
    aside = out.with_name(f".writing-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(str(aside))
        tokenizer.save_pretrained(str(aside))
        publish_folder(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
