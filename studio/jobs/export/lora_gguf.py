"""Writes an adapter as a GGUF file that llama.cpp and Ollama apply to a GGUF base; checked on that base if it is small.

llama.cpp scales each pair by alpha over its rank, and knows only one alpha. rsLoRA and alphas by layer are therefore
multiplied into the B matrices, in fp32, so that the product stays what was trained. peft keeps the matrices on all
experts of a layer as one wide pair; they are split into a pair of stacks `[experts, ...]` for each of llama.cpp's
tensors.
"""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.jobs.base.closeness import Closeness, padded, rows_of
from studio.jobs.base.data.template import starts_with_bos
from studio.jobs.base.llama.llama_answers import llama_logits
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.base.progress import read_fingerprint
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.base.weights.skeleton import ADAPTER, Skeleton, build_skeleton, clean_name
from studio.jobs.base.weights.streamed import adapted_logits
from studio.jobs.export.gguf_view import make_view
from studio.jobs.export.model_card import CARD, loss_line, model_card, training_of
from studio.jobs.export.modelfile import (
    MODELFILE,
    chat_form,
    context_of,
    generation_of,
    modelfile,
    stop_words,
    system_of,
)
from studio.jobs.export.work import TEXTS, Work, loss_of, tokens_for
from studio.probe.adapter_folder import AdapterFound, find_adapter
from studio.probe.export import refuse_what_gguf_lacks
from studio.probe.fingerprint import refuse_another_base
from studio.probe.gguf_header import read_gguf_header
from studio.probe.model_folder import CONFIG, check_folder, read_config
from studio.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_LARGEST_CHECKED_BYTES = 4 * 10**9
"""Largest base on which the file is checked, because checking needs all of the base as a GGUF file, too."""
_BROKEN_KL = 0.05
_PREFIX = "base_model.model."
"""What precedes the model's own names of modules in an adapter's file."""


def write_lora_gguf(work: Work, made: Path) -> dict[str, Any]:
    """Write an adapter as one GGUF file, with Modelfile and card beside it.

    Args:
        work: The export.
        made: A new folder.

    Returns:
        For the report: how many tensors the file has, how close it is to base and adapter, if that was checked, and
        which system prompt the Modelfile carries.

    Raises:
        BadInput: The base cannot be used, or is not the one that was trained on.
        JobFailed: llama.cpp's converter refuses the adapter, or the file does not act as the adapter does.
        OSError: The disk is full or not writable.
    """
    adapter, base = work.adapter or find_adapter(work.source), work.base()
    refuse_another_base(work.run, base, lambda folder: read_fingerprint(work.worker, folder))
    refuse_what_gguf_lacks(adapter, str(read_config(base / CONFIG).get("model_type")))
    made.mkdir()
    out = made / work.file_name
    tool = work.llama()
    work.say("converting")
    skeleton, folded = build_skeleton(base, adapter), work.folder / "adapter"
    wanted = fold(adapter, skeleton.adapted, folded)
    tool.run("lora", folded, make_view(work.folder / "asked", [base]), out)
    tensors = len(read_gguf_header(out).shapes)
    if tensors != wanted:
        raise JobFailed(
            "gguf_converter",
            f"the LoRA file holds {tensors} tensors, the adapter {wanted}",
            "merge the adapter and export the merged model instead",
        )
    loss = _check(work, tool, skeleton, base, out)
    checked = f"{tensors} tensors; on its base in llama.cpp, {loss_line(loss, 'base + adapter')}"
    system = _write_beside(work, out, adapter, base, checked)
    return {"tensors": tensors, "loss": asdict(loss) if loss else None, "system_prompt": system}


def fold(adapter: AdapterFound, adapted: PeftModel, folder: Path) -> int:
    """Write the adapter as llama.cpp expects it: scaled by one alpha over the rank, with a pair for each tensor.

    Args:
        adapter: The adapter; LoRA or rsLoRA, with or without patterns.
        adapted: The adapter on its base, which says how each pair is scaled and used.
        folder: A new folder.

    Returns:
        How many tensors were written.

    Raises:
        OSError: A file cannot be read or written.
    """
    folder.mkdir()
    alpha = float(adapter.config.get("lora_alpha") or 1)
    weights: dict[str, Tensor] = load_file(adapter.folder / ADAPTER_WEIGHTS)
    made: dict[str, Tensor] = {}
    for path, layer in adapted.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        by = layer.scaling[ADAPTER] * layer.r[ADAPTER] / alpha
        own = {name: weight for name, weight in weights.items() if name.startswith(f"{_PREFIX}{path}.lora_")}
        if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
            first, second = (own[f"{_PREFIX}{path}.lora_{part}.weight"] for part in "AB")
            own = _stacks(f"{_PREFIX}{clean_name(path)}", layer, first, second)
        for name, weight in own.items():
            scaled = ".lora_B." in name or ".lora_embedding_B" in name
            made[name] = (weight.float() * by if scaled else weight).contiguous()
    save_file(made, folder / ADAPTER_WEIGHTS)
    changed = {"use_rslora": False, "alpha_pattern": {}, "lora_alpha": alpha}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(dict(adapter.config) | changed), encoding="utf-8")
    return len(made)


def _stacks(experts: str, layer: Any, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Return A `[experts, rank, in]` and B `[experts, out, rank]` for each of llama.cpp's tensors.

    Args:
        experts: Name of the module of all experts.
        layer: peft's `ParamWrapper`; its `get_delta_weight` shows the order of ranks and experts.
        first: Its A, `[experts * rank, in]`.
        second: Its B, `[out, rank * experts]`; in `gate_up_proj` the first half of the rows belongs to the gate.
    """
    count = layer.num_experts
    stacked = first.reshape(count, -1, first.shape[-1])
    outputs = second.reshape(second.shape[0], -1, count).permute(2, 0, 1)
    names = {"gate_up_proj": ("gate_proj", "up_proj")}.get(layer.parameter_name, (layer.parameter_name,))
    made: dict[str, Tensor] = {}
    for name, output in zip(names, outputs.chunk(len(names), dim=1), strict=True):
        made |= {f"{experts}.{name}.lora_A.weight": stacked.clone(), f"{experts}.{name}.lora_B.weight": output}
    return made


def _check(work: Work, tool: LlamaTool, skeleton: Skeleton, base: Path, out: Path) -> Closeness | None:
    size_bytes = check_folder(base)[1]
    if size_bytes > _LARGEST_CHECKED_BYTES:
        work.warn(
            f"not tried on its base: that would need a GGUF file of {size_bytes / 1e9:.1f} GB. Number and names of the "
            "tensors are right"
        )
        return None
    work.say("checking", detail="answers of base and adapter")
    rows = rows_of(TEXTS, load_tokenizer(base), tokens_for(size_bytes))
    ids, mask = padded(rows)
    wanted = adapted_logits(skeleton, base, ids, mask)[mask.bool()]
    work.say("checking", detail="answers in llama.cpp")
    gguf = work.folder / "base.gguf"
    tool.run("convert", make_view(work.folder / "base", [base], weights=base), gguf, "f16", "base", "default")
    loss = loss_of(llama_logits(tool, gguf, rows, work.folder, str(out)), wanted)
    gguf.unlink()
    if loss.mean_kl > _BROKEN_KL:
        raise JobFailed(
            "gguf_differs",
            f"the LoRA file acts otherwise than the adapter (KL {loss.mean_kl:.3f} nats a token)",
            "merge the adapter and export the merged model instead",
        )
    return loss


def _write_beside(work: Work, file: Path, adapter: AdapterFound, base: Path, checked: str) -> dict[str, Any]:
    """Write Modelfile and card beside a file and return which system prompt the Modelfile carries."""
    own = (adapter.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter.folder if own else base)
    form = chat_form(tokenizer)
    system = system_of(form, work.trained_with)
    text = modelfile(
        "BASE",
        form,
        stops=stop_words(tokenizer),
        context=context_of(read_config(base / CONFIG)),
        generation=generation_of(base),
        adds_bos=starts_with_bos(tokenizer),
        system=system[0],
        adapter=f"./{file.name}",
    )
    shown = plain(Path(adapter.base).name or "the base model", one_line=True)
    head = f"# Put the base model here: a GGUF file of {shown}, or its name in Ollama.\n"
    (file.parent / MODELFILE).write_text(head + text, encoding="utf-8")
    use = [
        "On a GGUF file of the base model:",
        "",
        "```sh",
        f"llama-cli -m BASE.gguf --lora {shlex.quote(file.name)}",
        "```",
        "",
        "With Ollama: name the base in the Modelfile, then `ollama create tuned -f Modelfile`.",
    ]
    card = model_card(adapter, file.stem, training_of(work.request.run), checked=[checked], use=use, tag="gguf")
    (file.parent / CARD).write_text(card, encoding="utf-8")
    return work.tell_system(system)
