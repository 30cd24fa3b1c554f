"""The chat's model side: the right template, the right end, base and tuned from one loaded base."""

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.base.tokenizer import stop_ids
from studio.jobs.chat.session import Session, token_ids
from studio.probe.chat import chat_request, request_of_run
from studio.runs.chat import (
    EVENTS,
    Answered,
    ChatEvent,
    ChatProcess,
    ChatRequest,
    Conversation,
    Piece,
    Ready,
    Sampling,
    TurnDone,
)
from studio.runs.piped import Loading, NotAnswered, event_in, event_line
from studio.runs.system_prompt import SystemPrompt
from tests.fakes.tiny_model import make_tiny_model, tiny_tokenizer
from tests.jobs.conftest import Merge, Train
from tests.jobs.merge_cases import ATTENTION, make_adapter, make_base

QUESTION = [{"role": "user", "content": "uno"}]


def _load(request: ChatRequest) -> Session:
    return Session(request, lambda detail, fraction: None)


def _answer(
    session: Session, side: str, messages: list[dict[str, str]] | None = None, **knobs: float
) -> tuple[str, Answered]:
    events: list[ChatEvent] = []
    sampling = Sampling(**{"max_new_tokens": 24, **knobs})  # type: ignore[arg-type]
    session.answer(side, messages or QUESTION, sampling, events.append, lambda: False)  # type: ignore[arg-type]
    *pieces, end = events
    assert isinstance(end, Answered)
    return "".join(event.text for event in pieces if isinstance(event, Piece)), end


@torch.no_grad()
def _meant(base: Path, adapter: Path | None, tokens: int = 24) -> str:
    """What transformers and peft answer by themselves."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    made = model.eval().generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=257)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", "llama", torch.float32, tie_word_embeddings=False)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base, target_modules="all-linear")


@pytest.mark.parametrize("streamed", [0, 2])
def test_both_sides_answer_as_the_libraries_do(base: Path, adapter: Path, streamed: int) -> None:
    session = _load(ChatRequest(str(base), str(adapter), dtype="fp32", streamed=streamed))
    assert session.sides == ("tuned", "base")
    tuned, plain = _meant(base, adapter), _meant(base, None)
    assert tuned != plain
    for _ in range(2):  # one side must leave nothing behind for the other
        assert _answer(session, "tuned")[0] == tuned
        assert _answer(session, "base")[0] == plain


def test_a_trained_answer_ends_at_the_stop_token(recipe: Recipe, train: Train) -> None:
    run = train(recipe.with_("train.steps", 60).with_("adapter.rank", 8))
    session = _load(request_of_run(run))
    text, end = _answer(session, "tuned", [{"role": "user", "content": "three"}])
    assert (text, end.reason, end.tokens) == ("tres", "stop", 4)
    assert _answer(session, "base", [{"role": "user", "content": "three"}])[0] != "tres"


def test_a_run_knows_its_system_prompt_and_does_not_answer_on_another_base(
    recipe: Recipe, train: Train, data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows[:4]:
        row["messages"].insert(0, {"role": "system", "content": "Translate."})
    data.write_text("\n".join(map(json.dumps, rows)))
    run = train(recipe.with_("train.steps", 1))
    assert request_of_run(run).trained_with == SystemPrompt("Translate.", 4, 6)
    assert chat_request(str(run.adapter), tmp_path).trained_with.usual == "Translate."
    other = make_tiny_model(tmp_path / "other", seed=7)
    with pytest.raises(BadInput, match=r"is not the base that this adapter was trained on: .* other numbers"):
        _load(request_of_run(run, base=str(other)))


def test_a_merged_model_answers_as_base_and_adapter(base: Path, adapter: Path, merge: Merge, tmp_path: Path) -> None:
    merge(adapter, base, tmp_path / "out")
    session = _load(ChatRequest(str(tmp_path / "out"), dtype="fp32"))
    assert session.sides == ("tuned",)
    assert _answer(session, "tuned")[0] == _meant(base, adapter)


def test_the_base_answers_beside_what_was_merged_into_it(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path
) -> None:
    run = merge(adapter, base, tmp_path / "out")
    request = replace(request_of_run(run), dtype="fp32")
    session = _load(request)
    assert session.sides == ("tuned", "base")
    for _ in range(2):
        assert _answer(session, "tuned")[0] == _meant(base, adapter)
        assert _answer(session, "base")[0] == _meant(base, None)
    assert chat_request(str(tmp_path / "out"), tmp_path, base=str(base)).beside == str(base)
    assert request_of_run(run, base_only=True) == ChatRequest(str(base))


@pytest.mark.parametrize("fault", ["gone", "memory", "vocabulary"])
def test_what_was_merged_answers_alone_where_its_base_cannot(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    larger = make_adapter(tmp_path / "larger", base, vocabulary=264, target_modules=ATTENTION)
    run = merge(larger if fault == "vocabulary" else adapter, base, tmp_path / "out")
    request = replace(request_of_run(run), dtype="fp32")
    if fault == "gone":
        base.rename(tmp_path / "elsewhere")
    if fault == "memory":
        memory = namedtuple("memory", "available")
        free = iter([10**12, 10**6])
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory(next(free)))
    session = _load(request)
    assert session.sides == ("tuned",)
    assert "Only the merged model answers" in session.notes[-1]
    assert _answer(session, "tuned")[1].tokens > 0


def test_sampling_is_the_same_for_the_same_seed(base: Path, adapter: Path) -> None:
    session = _load(ChatRequest(str(base), str(adapter), dtype="fp32"))
    warm = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first, again = (_answer(session, "tuned", **warm, seed=1)[0] for _ in range(2))
    assert first == again
    assert first != _answer(session, "tuned", **warm, seed=2)[0]


def test_a_models_own_sampling_does_not_reach_a_greedy_answer(base: Path) -> None:
    meant = _meant(base, None)
    own = GenerationConfig(do_sample=True, temperature=2.0, top_k=3, repetition_penalty=1.4, eos_token_id=257)
    own.save_pretrained(base)
    assert _answer(_load(ChatRequest(str(base), dtype="fp32")), "tuned")[0] == meant


def test_added_tokens_of_the_adapter_fit(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "larger", base, vocabulary=264, target_modules=ATTENTION)
    assert _answer(_load(ChatRequest(str(base), str(adapter), dtype="fp32")), "tuned")[1].tokens > 0


def test_an_answer_is_stopped_between_two_tokens(base: Path) -> None:
    session, asked, events = _load(ChatRequest(str(base), dtype="fp32")), list[bool](), list[ChatEvent]()

    def cancelled() -> bool:
        asked.append(len(asked) >= 5)
        return asked[-1]

    session._stops = []
    session.answer("tuned", QUESTION, Sampling(max_new_tokens=400), events.append, cancelled)
    assert isinstance(events[-1], Answered)
    assert (events[-1].reason, events[-1].tokens) == ("cancelled", 6)


def test_the_oldest_turns_make_room(base: Path) -> None:
    session = _load(ChatRequest(str(base), dtype="fp32"))  # a context of 512 tokens, one a byte
    said = Conversation("be brief")
    for _ in range(6):
        said.add("tuned", "q" * 40, "a" * 40)
    end = _answer(session, "tuned", said.messages("tuned", "and now?"))[1]
    assert end.dropped_turns > 0
    with pytest.raises(BadInput, match="tokens; the model's context is"):
        _answer(session, "tuned", [{"role": "user", "content": "q" * 600}])


def test_an_answer_that_fills_the_context_says_so(base: Path) -> None:
    session = _load(ChatRequest(str(base), dtype="fp32"))
    session._stops = []
    end = _answer(session, "tuned", [{"role": "user", "content": "q" * 300}], max_new_tokens=500)[1]
    assert end.reason == "context"


def test_a_memory_without_room_is_said_before_loading(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(10**6))
    with pytest.raises(BadInput, match="GB of memory"):
        _load(ChatRequest(str(base)))


def test_a_template_without_a_system_turn_gets_it_before_the_question() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "be brief"}, *QUESTION]
    assert tokenizer.decode(token_ids(tokenizer, messages)) == "be brief\n\nuno"


def test_the_end_of_a_turn_is_a_stop_where_no_config_names_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<pad>"
    assert stop_ids(tokenizer, None) == [257, 258]
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[256, 258])) == [256, 257, 258]


def test_every_event_survives_its_line() -> None:
    events = [
        Loading("x", 0.5), Ready(("tuned",), "cpu", "bf16", ("a",)), Piece("base", "\u2028\x1b"), TurnDone(),
        Answered("base", 3, 0.5, "stop", 1), NotAnswered("no", "do", False, True),
    ]  # fmt: skip
    assert [event_in(event_line(event), EVENTS) for event in events] == events
    assert event_in("a library says something", EVENTS) is None
    assert event_in('{"kind": "Piece"}', EVENTS) is None


@pytest.mark.slow
def test_the_real_process(recipe: Recipe, train: Train, tmp_path: Path) -> None:
    run = train(recipe.with_("train.steps", 60).with_("adapter.rank", 8))
    with ChatProcess(chat_request(str(run.adapter), tmp_path)) as process:
        ready = list(process.events(until=Ready))[-1]
        assert isinstance(ready, Ready), ready
        said = Conversation()
        process.ask({"tuned": said.messages("tuned", "five")}, Sampling(max_new_tokens=12))
        heard = list(process.events(until=TurnDone))
        assert "".join(event.text for event in heard if isinstance(event, Piece)) == "cinco"
        process.ask({"tuned": [{"role": "user", "content": "q" * 4000}]}, Sampling())
        failed, done = process.events(until=TurnDone)
        assert isinstance(failed, NotAnswered)
        assert not failed.fatal
        assert isinstance(done, TurnDone)
        process.ask({side: said.messages(side, "six") for side in ready.sides}, Sampling(max_new_tokens=400))
        process.cancel()
        ends = [event for event in process.events(until=TurnDone) if isinstance(event, Answered)]
        assert sum(end.tokens for end in ends) < 200
