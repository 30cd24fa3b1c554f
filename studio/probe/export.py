"""Checks what an export needs: a model, a format that suits it, room on disk and in memory. The job checks it again."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.export_formats import FORMATS, whole_formats
from studio.core.text import plain
from studio.probe.adapter_folder import AdapterFound, find_adapter
from studio.probe.hub import knows_token
from studio.probe.merge import check_merge
from studio.probe.model_folder import check_folder
from studio.probe.models import find_base
from studio.probe.space import check_memory, check_out, check_space
from studio.runs.chain import beside
from studio.runs.layout import ADAPTER_CONFIG
from studio.runs.requests import ExportRequest, MergeRequest

_GGUF = ".gguf"
_PAIR = ("lora_A.", "lora_B.", "lora_embedding_A", "lora_embedding_B")
EXPERTS_IN_GGUF = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Models whose adapters on fused experts were tried in llama.cpp: others order gate and up otherwise, or transpose."""


def check_export(request: ExportRequest) -> None:
    """Check the source of an export and the place of its output.

    Raises:
        BadInput: An unknown format, no whole adapter or model (16 or 32 bit), an output that already holds something,
            or a disk without room.
    """
    form, source, out = request.format, Path(request.source), Path(request.out)
    if form not in FORMATS:
        found = plain(form, one_line=True, limit=40)
        raise BadInput(f"the format {found} is not known here; wanted one of {', '.join(FORMATS)}.")
    if out.suffix == _GGUF and not FORMATS[form].gguf:
        raise BadInput(f"{form} is a folder: name one with --out, not {plain(out.name, one_line=True)}.")
    if not out.name.isprintable():
        raise BadInput(
            f"the name {plain(out.name, one_line=True)} of the output has control characters: leave them out."
        )
    refuse_on_the_grid(request.onto, form)
    if request.push and not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", request.push, re.ASCII):
        shown = plain(request.push, one_line=True, limit=80)
        raise BadInput(f"{shown} is no name of a hub repository: wanted OWNER/NAME.")
    if FORMATS[form].of_adapter or (source / ADAPTER_CONFIG).is_file():
        adapter = find_adapter(source)
        if FORMATS[form].of_adapter and FORMATS[form].gguf:
            base = find_base(_base_word(request, adapter), request.revision)
            refuse_what_gguf_lacks(adapter, str((base.config or {}).get("model_type")))
        check_out(out)
        needed = adapter.header.buffer_bytes
        if not FORMATS[form].of_adapter:
            size_bytes = _check_base(request, adapter)
            check_loading(form, size_bytes)
            needed = export_estimate(form, size_bytes, merges=True).disk_bytes
        check_space(out.parent, needed, "--out")
        return
    config, size_bytes = _check_merged(source)
    if isinstance(config.get("quantization_config"), dict):
        raise BadInput(
            f"{plain(request.source, one_line=True)} is quantised already: rounding it again would lose more. "
            "Export from the merged 16-bit model."
        )
    check_out(out)
    check_loading(form, size_bytes)
    check_space(out.parent, export_estimate(form, size_bytes).disk_bytes, "--out")


def check_token(request: ExportRequest) -> None:
    """Check that the upload can be made, if one is asked for.

    Raises:
        BadInput: No token for the hub is known.
    """
    if request.push and not knows_token():
        raise BadInput(
            "to upload, the hub wants a token, and none is known on this computer: log in with hf auth login, or set "
            "HF_TOKEN; or leave --push out."
        )


def check_exports(request: MergeRequest) -> None:
    """Check the exports that follow a merge, and that the disk has room for all of them together.

    Raises:
        BadInput: One of them cannot be made as asked.
    """
    if not request.then:
        return
    merged = Path(request.out)
    size = find_base(request.base, request.revision).size_bytes if request.base else 0
    kept = most = size
    for form in request.then:
        if form not in whole_formats():
            shown = plain(form, one_line=True, limit=40)
            raise BadInput(f"a merged model cannot be exported as {shown}: wanted one of {', '.join(whole_formats())}.")
        refuse_on_the_grid(request.onto, form)
        check_out(beside(merged, form))
        check_loading(form, size)
        taken = export_estimate(form, size)
        most = max(most, kept + taken.disk_bytes)
        kept += taken.out_bytes
    check_space(merged.parent, max(kept, most), "--out")


def check_loading(form: str, size_bytes: int) -> None:
    """Make sure that a model fits in memory if the format loads all of it, as bitsandbytes must to quantise it.

    Raises:
        BadInput: It needs more than is free.
    """
    if FORMATS[form].gguf:  # a tensor at a time
        return
    check_memory(
        export_estimate(form, size_bytes).memory_bytes,
        f"an export to {form} loads the whole model: about",
        "close other programs, export a GGUF format (a tensor at a time), or load the merged model with load_in_4bit "
        "where it is used.",
    )


def refuse_on_the_grid(onto: str, form: str) -> None:
    """Refuse to quantise to 4 bits a model that was merged onto dequantised 4-bit weights.

    Raises:
        BadInput: It is asked for.
    """
    if onto == "dequantized" and FORMATS[form].four_bits:
        raise BadInput(
            "a model merged onto dequantized weights has the values of 4-bit weights, plus what was learnt: rounding "
            "it to 4 bits again erases what was learnt (measured: KL 1.99 to the trained model, 2.05 without any "
            "adapter). Export nf4 from a merge onto original."
        )


def refuse_what_gguf_lacks(adapter: AdapterFound, kind: str) -> None:
    """Refuse an adapter that holds more than pairs of matrices, or matrices on experts whose layout is not known.

    Args:
        adapter: The adapter to export.
        kind: `model_type` of its base.

    Raises:
        BadInput: It does; the message names what it holds.
    """
    names = list(adapter.header.tensors)
    other = next((name for name in names if not any(part in name for part in _PAIR)), "")
    found = "DoRA's magnitudes" if adapter.config.get("use_dora") else plain(other, one_line=True)
    on_experts = any(".experts.lora_" in name or ".experts.base_layer." in name for name in names)
    if not found and on_experts and kind not in EXPERTS_IN_GGUF:
        found = f"matrices on all experts of a layer of {plain(kind, one_line=True, limit=40)} at once"
    if found:
        raise BadInput(
            f"a LoRA file of llama.cpp holds pairs of matrices for tensors it knows, and this adapter has {found}: "
            "merge it and export the merged model (--format q8_0 or another)."
        )


@dataclass(frozen=True, slots=True)
class ExportEstimate:
    """What an export is estimated to take.

    Small models, of which half are embeddings, keep more bits a weight than is assumed here.

    Attributes:
        out_bytes: Size of the result.
        disk_bytes: Most room on the disk while it is made.
        memory_bytes: Memory of the job's process and llama.cpp's together, their libraries included.
        seconds: Least and most time, with the checks, without a merge before it.
    """

    out_bytes: int
    disk_bytes: int
    memory_bytes: int
    seconds: tuple[float, float]


_LIBRARIES_BYTES, _CONVERTER_BYTES = 700 * 10**6, 300 * 10**6
_ANSWERS_BYTES = 250 * 10**6
"""Room on the disk for the logits that are compared, of 384 tokens and a vocabulary of 160k, and for a file of the
vocabulary alone."""
_SHARE_AT_ONCE, _SHARE_LOADED = 0.25, 1.4
"""The most memory, as a share of the 16-bit weights: for one tensor at a time (several times its size), and for the
whole model. Measured for a model of 2.4 GB: 1.5 GB resident for GGUF formats (two processes, without the pages of
files, which the system takes back), 3.7 for nf4, 3.9 for int8."""


def export_estimate(form: str, size_bytes: int, *, merges: bool = False) -> ExportEstimate:
    """Return what an export of a model takes.

    Args:
        form: One of the formats of whole models.
        size_bytes: Size of the model in 16 bit.
        merges: Whether an adapter is merged first.
    """
    known = FORMATS[form]
    out = int(size_bytes * known.bits / 16)
    merged = size_bytes if merges else 0
    if not known.gguf:
        memory = int(size_bytes * _SHARE_LOADED) + _LIBRARIES_BYTES
        return ExportEstimate(out, merged + out, memory, _seconds(form, size_bytes))
    between = size_bytes if known.sixteen_first else 0
    # The merged model is deleted once it is converted.
    most = max(merged + (between or out), between + out) + _ANSWERS_BYTES
    memory = int(size_bytes * _SHARE_AT_ONCE) + _LIBRARIES_BYTES + _CONVERTER_BYTES
    return ExportEstimate(out, most, memory, _seconds(form, size_bytes))


def _seconds(form: str, size_bytes: int) -> tuple[float, float]:
    """Return least and most seconds: two busy cores took up to 98 s a GB for K-quants and 45 for others.

    The lower end is for desktops, which have more cores.
    """
    slowest = FORMATS[form].seconds_per_gb * size_bytes / 1e9
    return 8 + 0.1 * slowest, 30 + slowest


def _check_base(request: ExportRequest, adapter: AdapterFound) -> int:
    """Return the size of the base that an adapter is merged into first.

    Raises:
        BadInput: It cannot be merged into.
    """
    word = _base_word(request, adapter)
    merge = MergeRequest(request.source, word, request.out, request.revision, onto=request.onto, run=request.run)
    check_merge(merge)
    return find_base(word, request.revision).size_bytes


def _base_word(request: ExportRequest, adapter: AdapterFound) -> str:
    if word := request.base or adapter.base:
        return word
    raise BadInput(f"{plain(adapter.folder.name, one_line=True)} names no base model; say which one with --base.")


def _check_merged(source: Path) -> tuple[dict[str, Any], int]:
    shown = plain(str(source), one_line=True)
    try:
        if not source.is_dir():
            raise BadInput(f"there is no model folder {shown}: merge first, with lora-studio merge.")
        return check_folder(source)
    except OSError as error:
        raise BadInput(f"{shown} cannot be looked at: {error.strerror or error}.") from None
