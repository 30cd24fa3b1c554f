"""An adapter as a GGUF file that llama.cpp and Ollama put onto a GGUF base, checked on that base where it is small.

llama.cpp scales by alpha over the rank of each tensor and knows one alpha: rsLoRA and alphas by layer are folded into
the B matrices, in fp32, so that what is added stays what was trained.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.core.errors import JobFailed
from studio.jobs.base.llama.llama_answers import llama_logits
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.base.load import load_tokenizer
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.jobs.base.weights.streamed import adapted_logits
from studio.jobs.export.answers import TEXTS, Loss, compare, padded, rows_of
from studio.jobs.export.gguf_view import make_view
from studio.jobs.export.work import Work
from studio.probe.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFound
from studio.probe.gguf_header import read_gguf_header
from studio.probe.model_folder import check_folder

_LARGEST_CHECKED_BYTES = 4 * 10**9
"""Of a base: checking needs all of it as a GGUF file once more."""
_BROKEN_KL = 0.05


@dataclass(frozen=True, slots=True)
class LoraMade:
    """A LoRA file that was checked; `loss` is against base + adapter, None where the base was too large for it."""

    tensors: int
    loss: Loss | None

    @property
    def report(self) -> dict[str, Any]:
        """For the run's report."""
        return {"tensors": self.tensors, "loss": asdict(self.loss) if self.loss else None}


def make_lora_gguf(work: Work, adapter: AdapterFound, base: Path, out: Path) -> LoraMade:
    """Write an adapter as one GGUF file.

    Args:
        work: The export.
        adapter: What to write.
        base: The base model's folder.
        out: The file.

    Raises:
        BadInput: The base cannot be used.
        JobFailed: llama.cpp's converter refuses it, or the file does not act as the adapter does.
        OSError: The disk is full or not writable.
    """
    tool = work.llama()
    work.say("converting")
    folded = fold_scaling(adapter, work.folder / "adapter")
    tool.run("lora", folded, make_view(work.folder / "asked", [base]), out)
    tensors = len(read_gguf_header(out).shapes)
    if tensors != len(adapter.header.tensors):
        raise JobFailed(
            "gguf_converter",
            f"the LoRA file holds {tensors} tensors, the adapter {len(adapter.header.tensors)}",
            "merge the adapter and export the merged model instead",
        )
    return LoraMade(tensors, _check(work, tool, adapter, base, out))


def fold_scaling(adapter: AdapterFound, folder: Path) -> Path:
    """Write the adapter anew so that alpha over rank is its scaling everywhere; return the folder.

    Args:
        adapter: Any plain or rank-stabilised LoRA adapter, with or without patterns.
        folder: A new folder.

    Raises:
        OSError: A file cannot be read or written.
    """
    folder.mkdir()
    config = dict(adapter.config)
    alpha = float(config.get("lora_alpha") or 1)
    patterns = config.get("alpha_pattern") or {}
    weights: dict[str, Tensor] = load_file(adapter.folder / ADAPTER_WEIGHTS)
    for name, weight in weights.items():
        if ".lora_B." not in name and ".lora_embedding_B" not in name:
            continue
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        own = float(patterns.get(get_pattern_key(list(patterns), module), alpha))
        rank = weight.shape[1]
        scaling = own / (rank**0.5 if config.get("use_rslora") else rank)
        weights[name] = (weight.float() * (scaling * rank / alpha)).contiguous()
    save_file(weights, folder / ADAPTER_WEIGHTS)
    changed = {"use_rslora": False, "alpha_pattern": {}, "lora_alpha": alpha}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | changed), encoding="utf-8")
    return folder


def _check(work: Work, tool: LlamaTool, adapter: AdapterFound, base: Path, out: Path) -> Loss | None:
    size_bytes = check_folder(base)[1]
    if size_bytes > _LARGEST_CHECKED_BYTES:
        work.warn(
            f"not tried on its base: that would need a GGUF file of {size_bytes / 1e9:.1f} GB. Number and names of the "
            "tensors are right"
        )
        return None
    work.say("checking", detail="answers of base and adapter")
    rows = rows_of(TEXTS, load_tokenizer(base), size_bytes / 2)
    ids, mask = padded(rows)
    wanted = adapted_logits(build_skeleton(base, adapter), base, ids, mask)[mask.bool()]
    work.say("checking", detail="answers in llama.cpp")
    gguf = work.folder / "base.gguf"
    tool.run("convert", make_view(work.folder / "base", [base], weights=base), gguf, "f16", "base", "default")
    loss = compare(llama_logits(tool, gguf, rows, work.folder, str(out)), wanted)
    gguf.unlink()
    if loss.mean_kl > _BROKEN_KL:
        raise JobFailed(
            "gguf_differs",
            f"the LoRA file acts otherwise than the adapter (KL {loss.mean_kl:.3f} nats a token)",
            "merge the adapter and export the merged model instead",
        )
    return loss
