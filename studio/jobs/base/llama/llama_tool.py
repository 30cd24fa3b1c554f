"""Runs llama.cpp's converter and library, in a process and on an import path of their own.

This file is never imported: `tool_process.py` runs it as `python -I llama_tool.py TOOLS VERB ...`, where TOOLS is the
folder that `gguf_tools.py` filled. Its versions of `gguf`, `google.protobuf` and others are therefore never mixed with
ours. It knows nothing of the rest of the program. Results go into files; what it prints goes into the run's tool.log.

    vocab MODEL OUT.gguf NAME         tokenizer and config alone; says whether the architecture is known, and, where
                                      the folder has weights, whether each tensor has a place; reads none of them
    convert MODEL OUT.gguf TYPE NAME SPACE   f16, bf16 or q8_0; the name goes into the file
    lora ADAPTER BASE OUT.gguf        an adapter; of the base only config and tokenizer are read
    quantize IN.gguf OUT.gguf FTYPE   llama.cpp's number of a file type
    tokens GGUF TEXTS.json OUT.json SPACE   ids of each text, and with the special tokens that are added by default
    logits GGUF IDS.json OUT [LORA]   fp32 `[tokens, vocabulary]`, raw, all rows one after another
    stream GGUF ROWS.json             to stdout: size of the vocabulary (8 bytes), then fp32 logits, row after row; a
                                      row is its ids and the places whose logits are wanted
    speed GGUF IDS.json COUNT OUT     seconds to read a prompt, and to write up to COUNT tokens after it, greedily

SPACE is `true` or `false` where a SentencePiece vocabulary should, or should not, read a space before a text and after
each special token; `default` leaves that to the converter, and to the file.
"""

import json
import os
import runpy
import sys
import time
from array import array
from pathlib import Path
from typing import Any

_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
_BOOL = 2
"""`LLAMA_KV_OVERRIDE_TYPE_BOOL` in llama.h."""
_AT_ONCE = 128
"""Tokens that `stream` gives the model at once; llama.cpp holds the logits of all of them."""
_MOST_SECONDS = 10.0
"""After so long `speed` ends writing tokens."""


def main(tools: Path, verb: str, words: list[str]) -> None:
    """Run one verb; an exception ends the process with its traceback."""
    sys.path[:0] = [str(tools)]
    match verb:
        case "vocab" | "convert" | "lora":
            runpy.run_path(str(Path(__file__).with_name("llama_convert.py")))["convert"](tools, verb, words)
        case "quantize":
            _quantize(words[0], words[1], int(words[2]))
        case "tokens":
            _tokens(words[0], Path(words[1]), Path(words[2]), words[3])
        case "logits":
            _logits(words[0], Path(words[1]), Path(words[2]), words[3] if len(words) > 3 else "")
        case "stream":
            _stream(words[0], Path(words[1]))
        case "speed":
            _speed(words[0], Path(words[1]), int(words[2]), Path(words[3]))
        case _:
            sys.exit(f"unknown verb {verb}")


class _Llama:
    """A model in llama.cpp, on the CPU."""

    def __init__(self, path: str, *, vocab_only: bool, space: str = "default") -> None:
        self.ffi, self.lib = _library()
        settings = self.lib.llama_model_default_params()
        settings.vocab_only, settings.n_gpu_layers = vocab_only, 0
        if space != "default":
            said = self.ffi.new("struct llama_model_kv_override[2]")  # the second stays empty, which ends the list
            said[0].tag, said[0].key, said[0].val_bool = _BOOL, _SPACE_PREFIX.encode(), space == "true"
            settings.kv_overrides = said
        self.model = self.lib.llama_model_load_from_file(path.encode(), settings)
        if self.model == self.ffi.NULL:
            sys.exit(f"llama.cpp cannot load {path}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def tokens(self, text: str, *, add_special: bool) -> list[int]:
        """Return the token ids of a text; special tokens written in it are read as such."""
        data = text.encode()
        room = len(data) + 16
        found = self.ffi.new(f"llama_token[{room}]")
        count = self.lib.llama_tokenize(self.vocab, data, len(data), found, room, add_special, True)
        return [int(found[place]) for place in range(count)]

    def begin(self, tokens: int, at_once: int, lora: str = "") -> None:
        """Make a context for rows of up to `tokens` tokens, of which at most `at_once` go through the model at once."""
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch = max(32, tokens), max(32, min(tokens, at_once))
        settings.n_ubatch = settings.n_batch
        settings.n_threads = settings.n_threads_batch = _threads()
        self.context = self.lib.llama_init_from_model(self.model, settings)
        if self.context == self.ffi.NULL:
            sys.exit(f"llama.cpp has no memory for {tokens} tokens")
        if lora:
            adapter = self.lib.llama_adapter_lora_init(self.model, lora.encode())
            if adapter == self.ffi.NULL:
                sys.exit(f"llama.cpp cannot load the adapter {lora}")
            held, scales = self.ffi.new("struct llama_adapter_lora *[]", [adapter]), self.ffi.new("float[]", [1.0])
            self.lib.llama_set_adapters_lora(self.context, held, 1, scales)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(self.lib.llama_vocab_n_tokens(self.vocab))

    def forget(self) -> None:
        """Clear the cache of keys and values: what is read next is a new row."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def read(self, tokens: list[int], first: int, wanted: set[int]) -> None:
        """Run the model on tokens of a row, the first at place `first`; logits are computed at the wanted places."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, first + place, first + place in wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if self.lib.llama_decode(self.context, batch):
            sys.exit("llama.cpp cannot run the model")
        self.lib.llama_batch_free(batch)

    def found(self, place: int) -> Any:
        """Return a view of the fp32 logits `[vocabulary]` of one of the tokens that were read last, by its index."""
        return self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, place), 4 * self.vocabulary)

    def logits(self, rows: list[tuple[list[int], list[int]]], at_once: int, lora: str = "") -> Any:
        """Yield the bytes of the fp32 logits `[vocabulary]` at each wanted place.

        Args:
            rows: For each row its token ids, and the wanted places in it.
            at_once: Tokens that go through the model at once.
            lora: A LoRA file that is applied to the model; empty for none.
        """
        self.begin(max(len(ids) for ids, _ in rows), at_once, lora)
        for ids, places in rows:
            self.forget()
            wanted = set(places)
            for first in range(0, len(ids), at_once):
                part = ids[first : first + at_once]
                self.read(part, first, wanted)
                for place in range(len(part)):
                    if first + place in wanted:
                        yield bytes(self.found(place))


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


def _tokens(gguf: str, texts: Path, out: Path, space: str) -> None:
    llama = _Llama(gguf, vocab_only=True, space=space)
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
    rows = json.loads(ids.read_text("utf-8"))
    with out.open("wb") as file:
        for data in llama.logits([(row, list(range(len(row)))) for row in rows], max(map(len, rows)), lora):
            file.write(data)


def _stream(gguf: str, rows: Path) -> None:
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what a library prints goes to stderr from here on, not among the numbers
        llama = _Llama(gguf, vocab_only=False)
        out.write(llama.vocabulary.to_bytes(8, "little"))
        for data in llama.logits(json.loads(rows.read_text("utf-8")), _AT_ONCE):
            out.write(data)


def _speed(gguf: str, ids: Path, count: int, out: Path) -> None:
    llama = _Llama(gguf, vocab_only=False)
    prompt = json.loads(ids.read_text("utf-8"))
    llama.begin(len(prompt) + count, len(prompt))
    llama.read(prompt, 0, {len(prompt) - 1})  # not timed: the first pass also reads the file from the disk
    llama.forget()
    began = time.perf_counter()
    llama.read(prompt, 0, {len(prompt) - 1})
    token = _best(llama.found(len(prompt) - 1))
    read = time.perf_counter()
    done = 0
    while done < count and time.perf_counter() - read < _MOST_SECONDS:
        llama.read([token], len(prompt) + done, {len(prompt) + done})
        token, done = _best(llama.found(0)), done + 1
    seconds = {"prefill_seconds": read - began, "decode_seconds": time.perf_counter() - read, "decoded": done}
    seconds["threads"] = _threads()
    out.write_text(json.dumps(seconds), encoding="utf-8")


def _best(logits: Any) -> int:
    numbers = array("f", bytes(logits))
    return numbers.index(max(numbers))


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
