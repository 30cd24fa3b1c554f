"""From a raw row of a published form to the tokens that are learnt, through a published chat template (Qwen 3)."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.labels import IGNORED
from studio.probe.data import read_data
from tests.fakes.data_rows import GOOD
from tests.fakes.tokenizers import byte_tokenizer

TEMPLATE = Path(__file__).parents[1] / "templates" / "Qwen-Qwen3-0.6B.jinja"
NO_THOUGHT = "<think>\n\n</think>\n\n"
CALLED = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>'

# name in GOOD: (what each example learns, what its prompt holds)
LEARNT: dict[str, tuple[list[str], str]] = {
    "OpenAI's weight 0": ([f"{NO_THOUGHT}So.<|im_end|>"], "assistant\nNo idea.<|im_end|>"),
    "axolotl's train": ([f"{NO_THOUGHT}So.<|im_end|>"], "assistant\nNo idea.<|im_end|>"),
    "ms-swift's loss": ([f"{NO_THOUGHT}So.<|im_end|>"], "assistant\nNo idea.<|im_end|>"),
    "axolotl's train_detail": (["use.<|im_end|>"], "user\nWhy?"),
    "TRL, answers in the prompt": ([f"{NO_THOUGHT}So.<|im_end|>"], "assistant\nBecause.<|im_end|>"),
    "LLaMA-Factory's history": (
        [f"{NO_THOUGHT}Because.<|im_end|>", f"{NO_THOUGHT}So.<|im_end|>"],
        "system\nBe brief.<|im_end|>",
    ),
    "reasoning": (["<think>\nHm.\n</think>\n\nBecause.<|im_end|>"], "user\nWhy?"),
    "reasoning in a column": (["<think>\nHm.\n</think>\n\nBecause.<|im_end|>"], "user\nWhy?"),
    "SmolLM3's template variables": (["Because.<|im_end|>"], NO_THOUGHT),
    "xLAM": ([NO_THOUGHT + CALLED], '"type": "integer"'),
    **dict.fromkeys(
        ("OpenAI, tool_calls", "OpenAI's function_call", "LLaMA-Factory's function_call", "Hermes"),
        (
            [NO_THOUGHT + CALLED, f"{NO_THOUGHT}Because.<|im_end|>"],
            '<tools>\n{"type": "function", "function": {"name": "look"',
        ),
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(TEMPLATE.read_text("utf-8"))


@pytest.mark.parametrize("name", LEARNT)
def test_what_a_row_says_is_what_is_learnt(tmp_path: Path, tokenizer: Any, name: str) -> None:
    wanted, told = LEARNT[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD[name].row) + "\n")
    said: list[str] = []
    examples, _ = encode_rows(read_data(path).rows, tokenizer, seq_len=8192, warn=said.append)
    assert [tokenizer.decode(one.input_ids[one.labels != IGNORED]) for one in examples] == wanted
    assert all(told in tokenizer.decode(one.input_ids) for one in examples)
    assert not any("refus" in words or "left out" in words for words in said)
