"""The formats that an adapter or a merged model can be exported to, and what an export found out, in words.

A format is a row here, a module in `studio/jobs/export/` that writes it, and that module's place in
`studio/jobs/export/job.py:WRITERS`; the verbs, checks and screens follow from the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """A format.

    Attributes:
        words: What it is, for a person who chooses one.
        bits: Mean bits per weight of an 8B model, which has 16 before; 0 for a format of the adapter alone.
        seconds_per_gb: Seconds that a GB of 16-bit weights takes on two busy cores.
        gguf: The result is one GGUF file, which is made a tensor at a time and may be named by itself; any other is a
            folder, for which the whole model is loaded.
        sixteen_first: It is made from a 16-bit GGUF file, which needs room beside it meanwhile.
        four_bits: It rounds to 4 bits with scales of the same kind as those of a 4-bit base.
    """

    words: str
    bits: float = 0.0
    seconds_per_gb: float = 0.0
    gguf: bool = False
    sixteen_first: bool = False
    four_bits: bool = False

    @property
    def of_adapter(self) -> bool:
        """Whether it holds an adapter alone."""
        return not self.bits


def _gguf(name: str, bits: float, seconds_per_gb: float = 45.0, *, sixteen_first: bool = False) -> ExportFormat:
    words = f"GGUF {name.upper()} (llama.cpp, Ollama)"
    return ExportFormat(words, bits, seconds_per_gb, gguf=True, sixteen_first=sixteen_first)


FORMATS: dict[str, ExportFormat] = {
    "peft": ExportFormat("adapter with a card (peft)"),
    "lora-gguf": ExportFormat("adapter as GGUF (llama.cpp, Ollama)", gguf=True),
    # With double quantisation; 4.127 bits in linear layers and 16 in embeddings and head, with a vocabulary of 128k.
    "nf4": ExportFormat("4-bit folder (bitsandbytes)", 5.7, 55.0, four_bits=True),
    # 8 bits in linear layers, outliers apart.
    "int8": ExportFormat("8-bit folder (bitsandbytes)", 9.05, 45.0),
    # Bits as llama.cpp's own figures have them (tools/quantize/README.md).
    "f16": _gguf("f16", 16.0),
    "bf16": _gguf("bf16", 16.0),
    "q8_0": _gguf("q8_0", 8.5),
    "q6_k": _gguf("q6_k", 6.5633, 110.0, sixteen_first=True),
    "q5_k_m": _gguf("q5_k_m", 5.7036, 110.0, sixteen_first=True),
    "q4_k_m": _gguf("q4_k_m", 4.8944, 110.0, sixteen_first=True),
}
"""All formats by name: those of an adapter alone, then those of a whole model, llama.cpp's by size."""


def whole_formats() -> tuple[str, ...]:
    """Return the formats of a whole model."""
    return tuple(name for name, form in FORMATS.items() if not form.of_adapter)


def gguf_formats() -> tuple[str, ...]:
    """Return llama.cpp's file types for whole models."""
    return tuple(name for name in whole_formats() if FORMATS[name].gguf)


def formats_help() -> str:
    """Return what the formats are, in a sentence for the command line, with the size of a whole model in each."""
    said = []
    for name, form in FORMATS.items():
        share = "" if form.of_adapter else f", {form.bits / 16:.0%}"
        said.append(f"{name}: {form.words}{share}")
    return f"the format, and its size as a share of the 16-bit model; {'; '.join(said)}"


def export_checks(result: Mapping[str, Any]) -> list[str]:
    """Return what an export's own checks found, a line each.

    Args:
        result: Of the run, from its report.
    """
    golden, loss = result.get("golden"), result.get("loss")
    lines = []
    if isinstance(golden, dict):
        lines.append(
            f"tokens: {golden['conversations']} conversations read the same in training, in the saved tokenizer and in "
            f"llama.cpp; each ends with a stop token: {'yes' if golden['ends_with_stop'] else 'no'}"
        )
    if isinstance(loss, dict):
        lines.append(
            f"answers: KL {loss['mean_kl']:.2g} nats a token to what it was made from, same most likely token at "
            f"{loss['same_top_token']:.1%} of {loss['tokens']} tokens"
        )
    system = result.get("system_prompt")
    if isinstance(system, dict):
        told = {
            "training": f"the training's, with which {system['rows']} of {system['of']} rows begin",
            "template": "the chat template's own",
        }
        lines.append(f"system prompt in the Modelfile: {told.get(system['from'], 'none')}")
    return lines
