"""Small tokenizers made on the spot, and what a test wants to know of rows encoded with them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.rows import Example
from studio.probe.data import Conversation, Message
from tests.fakes.prose import prose

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|return|>")
LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = LOOP + ASK
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + INSIDE }}{% endgeneration %}{{ AFTER }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
) + ASK


def byte_tokenizer(template: str | None = CHATML, *, adds_bos: bool = False, **tokens: str | None) -> Any:
    """One token per byte, so that every boundary is a token boundary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | tokens
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **{k: v for k, v in named.items() if v is not None})
    fast.chat_template = template
    return fast


def metaspace_tokenizer(template: str) -> Any:
    """Words with the space before them in one token, as SentencePiece models have them."""
    words = "▁ ▁Why ▁Because ▁[INST] ▁[/INST] Why Because ? . ▁Be ▁brief".split()  # noqa: SIM905
    vocab = {word: index for index, word in enumerate(["<unk>", *words])}
    vocab |= {chr(code): len(vocab) + place for place, code in enumerate(range(33, 127)) if chr(code) not in vocab}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.normalizer = normalizers.Replace("\n", " ")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")])
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def sentencepiece_folder(folder: Path, template: str, *, kind: str, special: Sequence[str], **config: Any) -> Path:
    """Write the tokenizer of a Llama-2 or Gemma model: pieces with `▁` for a space, bytes for what they lack.

    Args:
        folder: Gets `tokenizer.json` and `tokenizer_config.json`.
        template: Of the chat.
        kind: `LlamaTokenizer` or `GemmaTokenizer`.
        special: Further special tokens.
        config: More of `tokenizer_config.json`; bos and eos are what that kind of model has.
    """
    named = ("<pad>", "<eos>", "<bos>", "<unk>") if kind == "GemmaTokenizer" else ("<unk>", "<s>", "</s>")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    text = prose()
    learner.train_from_iterator(text.splitlines(), trainers.BpeTrainer(vocab_size=900, show_progress=False))
    pieces = [piece for piece, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1])]
    words = [*named, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {word: place for place, word in enumerate(dict.fromkeys(words))}
    # SentencePiece joins whatever gives a piece: every way to split one is a merge.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    strips = kind == "LlamaTokenizer"  # as Phi-3's do
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in named])
    made.add_special_tokens([AddedToken(word, special=True, normalized=False, rstrip=strips) for word in special])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    bos, eos = ("<bos>", "<eos>") if kind == "GemmaTokenizer" else ("<s>", "</s>")
    table = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos, "unk_token": "<unk>", "pad_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps({**table, "chat_template": template, **config}))
    return folder


def qwen_folder(folder: Path, special: Sequence[str], **config: Any) -> Path:
    """Write the tokenizer of a Qwen model with a small vocabulary; its class brings how texts are split."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=letters)
    made.train_from_iterator(prose().splitlines(), trainer)
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", **config}))
    return folder


def chat(*turns: tuple[str, str], number: int = 1) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), number)


ONE = chat(("user", "Why?"), ("assistant", "Because."))
TWO = chat(("system", "Be brief."), ("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"))


def encode(row: Any, tokenizer: Any, **options: Any) -> tuple[list[Example], RowReport, list[str]]:
    said: list[str] = []
    rows = row if isinstance(row, list) else [row]
    examples, report = encode_rows(rows, tokenizer, **({"seq_len": 4096, "warn": said.append} | options))
    return examples, report, said


def learnt(example: Example, tokenizer: Any) -> list[str]:
    """The labelled stretches as text."""
    runs: list[list[int]] = []
    inside = False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORED:
            assert label == token
            runs = [*runs, []] if not inside else runs
            runs[-1].append(int(label))
        inside = label != IGNORED
    return [tokenizer.decode(run) for run in runs]
