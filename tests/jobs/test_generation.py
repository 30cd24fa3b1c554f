"""Greedy answers: what a model finds most likely, whatever its own settings say, up to where a turn ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from studio.jobs.base.data.rows import Prompt
from studio.jobs.base.generation import greedy
from studio.jobs.base.tokenizer import stop_ids
from studio.jobs.train.between import answer

PROMPT = [10, 20, 30]
OWN_SETTINGS = {
    "repetition_penalty": 5.0,
    "num_beams": 3,
    "min_new_tokens": 8,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(100)),
}


@torch.no_grad()
def most_likely(model: Any, ids: list[int], stops: list[int], new_tokens: int) -> list[int]:
    made: list[int] = []
    while len(made) < new_tokens and not (made and made[-1] in stops):
        made.append(int(model(input_ids=torch.tensor([[*ids, *made]])).logits[0, -1].argmax()))
    return made


@pytest.fixture
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_models_own_settings_have_no_say_and_are_kept(model: Any, adapted: bool) -> None:
    model.generation_config = own = GenerationConfig(**OWN_SETTINGS)
    asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval() if adapted else model
    wanted = most_likely(model, PROMPT, [], 12)
    for stops in ([], [wanted[4]]):
        made = greedy(asked, PROMPT, stops=stops, new_tokens=12, cancelled=lambda: False)
        assert made == most_likely(model, PROMPT, stops, 12)
    assert len(made) < 8
    assert model.generation_config is own


def test_a_sample_ends_where_the_template_ends_a_turn_though_the_model_names_another_end(
    model: Any, tiny: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    wanted = most_likely(model, PROMPT, [], 12)
    # A model whose config and tokenizer name only the end of the text, and whose template ends a turn with another.
    tokenizer.eos_token, turn = "<pad>", tokenizer.convert_ids_to_tokens(wanted[3])
    tokenizer.add_special_tokens({"additional_special_tokens": [turn]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + turn + "{% endfor %}"
    assert stop_ids(tokenizer, None) == sorted({wanted[3], tokenizer.eos_token_id})
    first = wanted.index(wanted[3])
    prompt = Prompt(text="", input_ids=PROMPT, expected="")
    text = answer(
        model,
        tokenizer,
        prompt,
        new_tokens=12,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        cancelled=lambda: False,
    )
    assert text == tokenizer.decode(wanted[:first], skip_special_tokens=True).strip()


def test_a_stop_ends_a_sample_between_two_tokens(model: Any) -> None:
    asked = iter([False, False, True])
    assert len(greedy(model, PROMPT, stops=[], new_tokens=12, cancelled=lambda: next(asked))) == 3
