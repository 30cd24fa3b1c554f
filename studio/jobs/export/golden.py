"""Five golden conversations, which the exported model must read as the same tokens as in training.

If a tokenizer was converted wrongly (special tokens split into letters, a start token twice), the model seems to have
learnt nothing (llama.cpp 7062). If an answer does not end with a stop token, the model seems never to stop.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.jobs.base.data.template import render, with_system_folded
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.probe.data import Message

CONVERSATIONS = (
    (("user", "What is the capital of France?"), ("assistant", "Paris.")),
    (("system", "Answer in one line."), ("user", "List files by size."), ("assistant", "ls -lS")),
    (("user", "Hi"), ("assistant", "Hello!"), ("user", "2 + 2?"), ("assistant", "4")),
    (
        ("user", "Indent this:\n\n\tdef f(x):\n        return  x**2  # 3.14e-10\n"),
        ("assistant", "```python\ndef f(x):\n    return x**2\n```"),
    ),
    (("user", "¿Größe? 日本語 العربية 🙂👩‍👩‍👧 \u00e9 \u00a0 1234567890"), ("assistant", "Ünïcödé — “ok” …")),
)
_DECOMPOSED = ("France", "the Cafe\u0301")
"""A replacement in the first conversation, after which a letter and its accent are two characters."""


@dataclass(frozen=True, slots=True)
class Golden:
    """What the golden conversations showed.

    Attributes:
        conversations: How many were compared.
        tokens: How many tokens they have together.
        ends_with_stop: Whether each one's last token, white space apart, is one at which llama.cpp stops.
        adds_bos: Whether llama.cpp itself puts the start token before a text.
        bos_doubled: Whether a program that adds the start token by itself would write it twice.
        composes: Whether the tokenizer joins letters and accents (NFC), so that llama.cpp, which does not, reads other
            tokens. Qwen's does; text that people type has them joined already.
    """

    conversations: int
    tokens: int
    ends_with_stop: bool
    adds_bos: bool
    bos_doubled: bool
    composes: bool


def golden_texts(tokenizer: Any) -> list[str]:
    """Return the conversations as the model's template writes them; plain texts where it has no template."""
    turns = [tuple(Message(role, words) for role, words in each) for each in CONVERSATIONS]
    if not tokenizer.chat_template:
        return ["\n".join(turn.content for turn in each) + (tokenizer.eos_token or "") for each in turns]
    made = render(tokenizer, turns)
    folded = render(tokenizer, [with_system_folded(each) for each in turns])
    return [
        text for text in (one if one is not None else other for one, other in zip(made, folded, strict=True)) if text
    ]


def check_golden(tool: LlamaTool, gguf: Path, tokenizers: Sequence[Any], space: str = "default") -> Golden:
    """Compare the tokens of every tokenizer with those of a GGUF file in llama.cpp.

    Args:
        tool: Runs llama.cpp.
        gguf: A model, or a vocabulary alone.
        tokenizers: The training run's, and perhaps the saved one; the first renders the texts.
        space: Whether a space is read before a text, in place of what the file says, see `llama_tool.py`.

    Raises:
        JobFailed: The tokens differ; the message says where.
    """
    texts = golden_texts(tokenizers[0])
    asked, answered = gguf.with_suffix(".texts.json"), gguf.with_suffix(".tokens.json")
    decomposed = texts[0].replace(*_DECOMPOSED)
    asked.write_text(json.dumps([*texts, decomposed]), encoding="utf-8")
    tool.run("tokens", gguf, asked, answered, space)
    found = json.loads(answered.read_text("utf-8"))
    asked.unlink()
    answered.unlink()
    *rows, last = found["rows"]
    for text, row in zip(texts, rows, strict=True):
        for tokenizer in tokenizers:
            _require_same(text, tokenizer(text, add_special_tokens=False).input_ids, row["ids"], tokenizer)
    ends = {int(token) for token in found["ends"]}
    return Golden(
        conversations=len(texts),
        tokens=sum(len(row["ids"]) for row in rows),
        ends_with_stop=all(_last(tokenizers[0], row["ids"]) in ends for row in rows),
        adds_bos=found["adds_bos"],
        bos_doubled=any(row["with_added"][:2] == [found["bos"]] * 2 for row in rows),
        composes=tokenizers[0](decomposed, add_special_tokens=False).input_ids != last["ids"],
    )


def _require_same(text: str, wanted: list[int], found: list[int], tokenizer: Any) -> None:
    if wanted == found:
        return
    place = next((i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), -1)
    began = plain(tokenizer.decode(wanted[max(0, place - 3) : place + 3]), one_line=True, limit=60)
    raise JobFailed(
        "gguf_tokens",
        f"llama.cpp reads a conversation as other tokens than the model was trained on ({len(found)} instead of "
        f"{len(wanted)}; the first difference is at token {place}, near {began!r}): the exported model would seem not "
        "to have learnt anything",
        "this tokenizer is not converted rightly yet; use the merged model with transformers or vLLM",
    )


def _last(tokenizer: Any, ids: list[int]) -> int:
    """Return the last token that is more than white space: templates write a new line after the stop token."""
    return next((token for token in reversed(ids) if tokenizer.decode([token]).strip()), -1)
