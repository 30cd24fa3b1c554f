"""Chat templates that write the date: a run keeps that of its first start, whenever it is resumed, audited or asked."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from studio.core.events import Warned
from studio.core.recipe import Recipe
from studio.jobs.base.data.bounded import apply_template, freeze_date
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.chat.session import Session
from studio.jobs.train import job as train_job
from studio.jobs.train.batches import StepBatches
from studio.probe.audit import audit_of_run
from studio.probe.chat import request_of_run
from studio.runs.chat import Sampling
from studio.runs.control import request, withdraw
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.fakes.tiny_model import make_tiny_model
from tests.fakes.tokenizers import ASK, LOOP, MARKED, ONE, byte_tokenizer, encode
from tests.jobs.adapter_cases import write_chats
from tests.jobs.audit_cases import audit
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_held_out import tokens_of
from tests.jobs.test_resume import at_step

DATED = "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}{{ today + '\n' }}"
FIRST, LATER = datetime(2026, 11, 29, 23, 59, 30), datetime(2027, 1, 5, 8, 0)


def set_clock(monkeypatch: pytest.MonkeyPatch, moment: datetime) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return moment

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(train_job, "datetime", Clock)


@pytest.fixture
def recipe(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The template of its base writes the date; rows are held out."""
    base = make_tiny_model(tmp_path / "dated")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = DATED + LOOP + ASK
    tokenizer.save_pretrained(base)
    made = recipe.with_("model.base", str(base)).with_("data.path", str(write_chats(tmp_path / "chats.jsonl")))
    return made.with_("eval.rows", 6).with_("eval.samples", 1)


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[set[bytes]]:
    """Token ids of the rows of each training in this process."""
    seen: list[set[bytes]] = []

    class Spied(StepBatches):
        def __init__(self, rows: Any, *args: Any, **more: Any) -> None:
            seen.append(set(tokens_of(rows)))
            super().__init__(rows, *args, **more)

    monkeypatch.setattr(train_job, "StepBatches", Spied)
    return seen


def stopped(train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda self: request(self.worker.paths, "stop"))
        paths = train(recipe)
    withdraw(paths, "stop")
    return paths


@pytest.mark.slow
def test_a_run_resumed_on_another_day_reads_the_same_tokens(
    recipe: Recipe, train: Train, trained_on: list[set[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, FIRST)
    paths = stopped(train, recipe, monkeypatch)
    before = set().union(*trained_on)
    trained_on.clear()
    set_clock(monkeypatch, LATER)
    train(recipe, paths)
    history = history_of(paths)
    assert history.finished is not None, history.failed
    assert history.last_step == 5
    assert set().union(*trained_on) == before
    warned = [event.message for event in read_events(paths.events) if isinstance(event, Warned)]
    assert "the chat template writes the date: this run keeps that of its first start, 29 Nov 2026" in warned
    trained_on.clear()
    train(recipe)
    assert not set().union(*trained_on) & before, "a new run has today's date"


@pytest.mark.slow
def test_a_run_is_audited_and_asked_with_the_date_it_was_trained_with(
    recipe: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, FIRST)
    paths = train(recipe)
    set_clock(monkeypatch, LATER)
    seen: list[str] = []
    whole = apply_template

    def spied(tokenizer: Any, chats: Any, **options: Any) -> Any:
        made = whole(tokenizer, chats, **options)
        seen.extend(text for text in made if isinstance(text, str))
        return made

    for module in ("data.spelling", "tokenizer"):
        monkeypatch.setattr(f"studio.jobs.base.{module}.apply_template", spied)
    monkeypatch.setattr("studio.jobs.chat.session.apply_template", spied)
    done, report = audit(tmp_path / "audit", audit_of_run(paths))
    assert report, history_of(done).failed
    audited = len(seen)
    session = Session(request_of_run(paths), lambda detail, fraction: None)
    asked = [{"role": "user", "content": "uno"}]
    session.answer("tuned", asked, Sampling(max_new_tokens=2), lambda event: None, lambda: False)
    assert len(seen) > audited > 0
    assert {text.partition("\n")[0] for text in seen} == {"29 Nov 2026"}


def test_only_the_date_is_another() -> None:
    """White space at the beginning, generation blocks and formats of every kind stay as transformers has them."""
    formats = "%A %a %B %b %d %-d %e %H:%M:%S %I %p %j %m %-m %Y-%m-%d %y %F %%"
    write = f"\n  {{% macro at(f) %}}{{{{ strftime_now(f) }}}}{{% endmacro %}}\n\n x {{{{ at('{formats}') }}}}"
    template = write + MARKED.replace("INSIDE", "'<|im_end|>'").replace("AFTER", "'\n'")
    tokenizer = byte_tokenizer(template)
    (plain,) = apply_template(byte_tokenizer(template.replace("strftime_now(f)", "f")), [[TURN]], tokenize=False)
    freeze_date(tokenizer, FIRST)
    (dated,) = apply_template(tokenizer, [[TURN]], tokenize=False)
    assert dated == plain.replace(formats, FIRST.strftime(formats))
    (example,), _, _ = encode(ONE, tokenizer)
    assert example.input_ids[example.labels >= 0].tolist() == tokenizer("Because.<|im_end|>").input_ids
    assert tokenizer.chat_template == template, "what is saved with the adapter asks the clock again"


TURN = {"role": "user", "content": "a"}


def test_an_adapter_of_a_run_without_a_log_has_todays_date(recipe: Recipe, train: Train, tmp_path: Path) -> None:
    paths = train(recipe.with_("train.steps", 1))
    paths.events.unlink()
    (text,) = apply_template(load_tokenizer(paths.adapter), [[TURN]], tokenize=False)
    assert text.startswith(datetime.now().strftime("%d %b %Y"))


def test_a_system_without_some_directives_writes_the_others() -> None:
    class Windows(datetime):
        def strftime(self, format: str) -> str:  # noqa: A002  as in datetime
            if "-" in format:
                raise ValueError("Invalid format string")
            return super().strftime(format)

    tokenizer = byte_tokenizer(DATED + LOOP + ASK)
    freeze_date(tokenizer, Windows(2026, 11, 29))
    text = apply_template(tokenizer, [[{"role": "user", "content": "a"}]], tokenize=False)[0]
    assert text.startswith("29 Nov 2026")
