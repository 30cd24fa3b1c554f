"""Published chat templates: every answer is trained as the model is served, or it is said that it is not."""

from collections import Counter
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from studio.jobs.base.data.bounded import freeze_date
from studio.jobs.base.data.rows import Encoder, Encoding
from studio.jobs.base.tokenizer import load_tokenizer
from tests.fakes.tokenizers import sentencepiece_folder
from tests.jobs.template_cases import (
    DATE,
    FOLDER,
    KINDS,
    conversation,
    judge,
    judged,
    special_words,
    summary,
    tokenizer_for,
)

CORE = (
    "Qwen-Qwen3-0.6B",
    "openai-gpt-oss-120b",
    "GLM-4.6",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "own-always-asks",
    "own-no-system",
    "own-marks-answers",
)
"""Of each temper one: reasoning that history drops, other ends in history, no ends, refusals, a prompt that opens
reasoning, one that is always written, no system turns, blocks with headers."""


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


@pytest.mark.parametrize("name", CORE)
def test_a_core_of_templates(name: str) -> None:
    tokenizer = tokenizer_for(text_of(name), name)
    verdicts = {kind: judge(tokenizer, kind) for kind in KINDS}
    assert not {kind: verdict.why for kind, verdict in verdicts.items() if verdict.word == "wrong"}
    assert Counter(verdict.word for verdict in verdicts.values())["exact"] >= len(KINDS) // 3


class Asked(PreTrainedTokenizerFast):
    """Has a way of its own to tokenise, so that nothing else may be used."""

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return super().__call__(*texts, **options)


@pytest.mark.parametrize("name", CORE)
def test_where_tokens_stand_need_not_be_asked(name: str) -> None:
    """Examples are the same whether the tokenizer says where each token stands or special tokens tell."""
    rows = [conversation(kind) for kind in KINDS]
    tokenizer = tokenizer_for(text_of(name), name)
    told, _ = Encoder(tokenizer, Encoding(8192)).encode(rows)
    asked = copy(tokenizer)
    asked.__class__ = Asked
    expected, _ = Encoder(asked, Encoding(8192)).encode(rows)
    for of_row, others in zip(told, expected, strict=True):
        for one, other in zip(of_row, others, strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.labels.tolist() == other.labels.tolist()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("microsoft-Phi-3.5-mini-instruct", "LlamaTokenizer"),
        ("mistral_v1", "LlamaTokenizer"),
        ("own-no-stop", "LlamaTokenizer"),
        ("own-no-system", "GemmaTokenizer"),
        ("google-gemma-4-31B-it", "GemmaTokenizer"),
    ],
)
def test_templates_with_tokenizers_of_pieces(tmp_path: Path, name: str, kind: str) -> None:
    """Some put a space before every text, have no token for white space, or take it into a special token."""
    template = text_of(name)
    folder = sentencepiece_folder(tmp_path / name, template, kind=kind, special=special_words(template))
    tokenizer = load_tokenizer(folder)
    freeze_date(tokenizer, DATE)
    verdicts = {kind: judge(tokenizer, kind) for kind in KINDS}
    assert not {kind: verdict.why for kind, verdict in verdicts.items() if verdict.word == "wrong"}
    for kind in ("single", "multi", "white space", "tags", "special tokens", "reasoning"):
        assert verdicts[kind].word == "exact", f"{kind}: {verdicts[kind].why}"


EXACT = {
    "Qwen-Qwen3-0.6B": 15,
    "Qwen-Qwen2.5-7B-Instruct": 15,
    "HuggingFaceTB-SmolLM3-3B": 9,
    "openai-gpt-oss-120b": 12,
    "GLM-4.6": 15,
    "Apertus-8B-Instruct": 9,
}
"""How many kinds at least are exact with some templates, so that none is told or refused which need not be."""


@pytest.mark.slow
def test_every_template(capsys: pytest.CaptureFixture[str]) -> None:
    cases = list(judged(FOLDER))
    with capsys.disabled():
        print(f"\n{len({name for name, _, _ in cases})} templates, {len(cases)} cases\n{summary(cases)}")
    assert len({name for name, _, _ in cases}) >= 45
    assert not [f"{name}, {kind}: {verdict.why}" for name, kind, verdict in cases if verdict.word == "wrong"]
    exact = Counter(name for name, _, verdict in cases if verdict.word == "exact")
    assert {name: exact[name] for name, least in EXACT.items() if exact[name] < least} == {}
    # Without tools and reasoning hardly a template needs a deviation.
    plain = [verdict.word for _, kind, verdict in cases if kind in ("single", "multi")]
    assert plain.count("exact") >= 0.8 * len(plain)


def test_the_judge_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that could not fail would show nothing."""
    from studio.jobs.base.data.labelled import Labeller

    whole = Labeller.label

    def shifted(self: Labeller, rendered):  # type: ignore[no-untyped-def]
        made = whole(self, rendered)
        for examples in made:
            for _, learnt in examples:
                learnt[1:] = learnt[:-1].copy()
        return made

    monkeypatch.setattr(Labeller, "label", shifted)
    tokenizer = tokenizer_for(text_of("own-marks-answers"), "own-marks-answers")
    assert judge(tokenizer, "single").word == "wrong"
    monkeypatch.undo()
    assert judge(tokenizer, "single").word == "exact"
