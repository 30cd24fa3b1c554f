"""Named templates and template files: what is learnt with them, which end they have, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from studio.core.errors import BadInput
from studio.core.events import Warned
from studio.core.named_templates import NAMED, NamedTemplate
from studio.core.recipe import Recipe
from studio.jobs.base.data.chosen_template import untrained_tokens, use_template
from studio.jobs.base.data.rows import sample_prompts
from studio.jobs.base.tokenizer import load_tokenizer, stop_ids
from studio.jobs.merge.folder_files import write_folder_files
from studio.jobs.train import job
from studio.probe.models import find_base
from studio.probe.named_template import check_template, marks_in, template_of
from studio.runs.log import read_events
from studio.runs.status import Status, run_status
from tests.fakes.tokenizers import byte_tokenizer, chat, encode, learnt
from tests.jobs.conftest import Train

MINE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TURNS = (("system", "Be brief"), ("user", "Why?"), ("assistant", "Because."), ("user", "How?"), ("assistant", "So."))


def with_tokens(*words: str, adds_bos: bool = False, **named: str | None) -> Any:
    tokenizer = byte_tokenizer(None, adds_bos=adds_bos, **named)
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    return tokenizer


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_teaches_each_answer_with_its_end(name: str, adds_bos: bool) -> None:
    chosen = NAMED[name]
    tokenizer = with_tokens(*chosen.tokens, adds_bos=adds_bos, eos_token="</s>")
    said: list[str] = []
    use_template(tokenizer, chosen, said.append)
    end = chosen.end or "</s>"
    assert tokenizer.eos_token == end and f"the chat template is {name}" in said[0]
    assert tokenizer.convert_tokens_to_ids(end) in stop_ids(tokenizer, None)
    (example,), report, _ = encode(chat(*TURNS), tokenizer)
    space = " " if name in ("mistral", "vicuna") else ""
    assert [part.lstrip() for part in learnt(example, tokenizer)] == [f"Because.{end}", f"So.{end}"]
    assert all(part.startswith(space) for part in learnt(example, tokenizer))
    assert not report.split and not report.moved and not report.stop_added and not report.unseen.rows
    assert bool(example.input_ids[0] == tokenizer.bos_token_id) is adds_bos
    # The prompt that is served is the beginning of what was trained.
    (prompt,) = sample_prompts([chat(*TURNS)], tokenizer, 1, seq_len=1000)
    assert example.input_ids[: len(prompt.input_ids)].tolist() == list(prompt.input_ids)


@pytest.mark.parametrize("name", [name for name, template in NAMED.items() if template.tokens])
def test_a_tokenizer_without_its_tokens_is_refused(name: str) -> None:
    tokenizer = byte_tokenizer(None)
    lacks = [token for token in NAMED[name].tokens if token not in tokenizer.get_vocab()]
    if not lacks:
        use_template(tokenizer, NAMED[name], print)
        return
    with pytest.raises(BadInput, match="needs special tokens that this tokenizer lacks") as caught:
        use_template(tokenizer, NAMED[name], print)
    assert lacks[0] in str(caught.value) and "alpaca" in str(caught.value) and "modules_to_save" in str(caught.value)


def test_a_file_of_ones_own_ends_as_it_writes() -> None:
    tokenizer = byte_tokenizer("old")
    said: list[str] = []
    use_template(tokenizer, NamedTemplate("mine.jinja", MINE), said.append)
    assert tokenizer.eos_token == "<|end|>"
    assert "in place of the model's own" in said[0] and "answers end with <|end|>" in said[0]
    (example,), _, _ = encode(chat(*TURNS), tokenizer)
    assert learnt(example, tokenizer) == ["Because.<|end|>", "So.<|end|>"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (MINE.replace("<|end|>", "<|stop|>"), "lacks: <|stop|>"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write a question"),
        ("{{ raise_exception('no') }}", "refuses a question"),
        ("{% for %}", "refuses a question"),
    ],
)
def test_a_file_that_cannot_serve_is_refused(text: str, told: str) -> None:
    with pytest.raises(BadInput, match=r"mine\.jinja") as caught:
        use_template(byte_tokenizer(), NamedTemplate("mine.jinja", text), print)
    assert told in str(caught.value)


def test_marks_that_are_cut_into_pieces_are_told() -> None:
    said: list[str] = []
    text = MINE.replace("[{{ m.role }}]", "<|{{ m.role }}|><|turn|>").replace("[assistant]", "<|assistant|><|turn|>")
    use_template(byte_tokenizer(), NamedTemplate("mine.jinja", text), said.append)
    assert marks_in(text) == ["<|turn|>", "<|end|>", "<|assistant|>"]
    assert any("cuts into pieces" in line and "<|turn|>" in line and "<|end|>" not in line for line in said)


def test_a_template_is_found_or_refused_before_a_run_is_made(tmp_path: Path, tiny: Path) -> None:
    assert template_of("") is None and template_of("llama3") is NAMED["llama3"]
    base = find_base(str(tiny))
    with pytest.raises(BadInput, match=r"no template lama3\. Wanted one of chatml, "):
        template_of("lama3")
    with pytest.raises(BadInput, match=r"lacks: <\|start_header_id\|>"):
        check_template(Recipe().with_("data.template", "llama3"), base)
    check_template(Recipe().with_("data.template", "chatml"), base)
    mine = tmp_path / "mine.jinja"
    for text, told in (
        ("", "is empty"),
        ("{% for %}", "it is no template"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "the assistant says",
        ),
        ("{% for m in range(10**9) %}{% endfor %}", "it takes too long|it is no template|does not write"),
    ):
        mine.write_text(text)
        with pytest.raises(BadInput, match=told):
            check_template(Recipe().with_("data.template", str(mine)), base)
    mine.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="cannot be read"):
        template_of(str(mine))


def test_a_run_keeps_its_template_and_saves_it_with_the_adapter(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(MINE.replace("<|end|>", "<|im_start|>"))
    recipe = recipe.with_("data.template", str(mine)).with_("train.steps", 2)
    paths = train(recipe)
    assert paths.template.read_text() == mine.read_text()
    saved = load_tokenizer(paths.adapter)
    assert saved.chat_template == mine.read_text() and saved.eos_token == "<|im_start|>"
    said = [event.message for event in read_events(paths.events) if isinstance(event, Warned)]
    assert sum("the chat template is" in line for line in said) == 1
    # A run that goes on keeps it, whatever became of the file.
    mine.write_text("{{ 'another' }}")
    going_on = train(recipe, again=paths)
    assert (
        run_status(going_on) is Status.finished
        and load_tokenizer(going_on.adapter).chat_template == saved.chat_template
    )
    mine.unlink()
    assert run_status(train(recipe, again=paths)) is Status.finished


def test_a_merged_model_stops_where_the_template_ends(train: Train, recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(MINE.replace("<|end|>", "<|im_start|>"))
    paths = train(recipe.with_("data.template", str(mine)).with_("train.steps", 1))
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    for name, kept in (("generation_config.json", True), ("config.json", False)):
        (base / "generation_config.json").unlink(missing_ok=True)
        if kept:
            (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
        out = tmp_path / f"merged-{kept}"
        write_folder_files(out_of(out), base, paths.adapter, dtype=None, untied=False, vocabulary=None)
        assert json.loads((out / name).read_text())["eos_token_id"] == [257, 256]
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == (257 if kept else [257, 256])


def out_of(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_tokens_that_the_base_has_never_seen_are_told(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = torch.ones(300, 8)
    tokenizer = byte_tokenizer()
    embeddings[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 1e-20
    assert untrained_tokens(tokenizer, NAMED["chatml"].text, embeddings) == ["<|im_end|>"]
    made = job.trainable_model

    def zeroed(*args: Any, **more: Any) -> Any:
        found = made(*args, **more)
        with torch.no_grad():
            found[0].get_base_model().get_input_embeddings().weight[257] = 0
        return found

    monkeypatch.setattr(job, "trainable_model", zeroed)
    paths = train(recipe.with_("data.template", "chatml").with_("train.steps", 1))
    said = [event.message for event in read_events(paths.events) if isinstance(event, Warned)]
    assert any("the base has never seen <|im_end|>" in line and "embed_tokens" in line for line in said), said
