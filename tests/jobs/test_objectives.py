"""An objective is one file: a toy one that no recipe can name goes through the real job, its checkpoints and traces.

The toy is shown an answer and the same answer spelled backwards, and learns to find the first one more likely. Its
examples, batches, loss, denominator and metric are its own; what it stands on is the loss of each row. A shipped one
would touch six files: the recipe's field, the data form, itself, the job that chooses it, the estimator, the guide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from studio.core.events import Evaluated, StepDone
from studio.core.recipe import Recipe
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.rows import Example
from studio.jobs.measure.fake import fake_world
from studio.jobs.measure.storages import Storages
from studio.jobs.measure.trace import Target, run_engine
from studio.jobs.train.head import TokenLoss
from studio.jobs.train.job import train_run
from studio.jobs.train.objectives import Batch, Objective
from studio.jobs.train.objectives.supervised import SUPERVISED
from studio.probe.data import Conversation, Message, Row, read_data
from studio.runs.control import request, withdraw_all
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_resume import at_step


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A row as it is, and with its answer spelled backwards."""

    right: Example
    wrong: Example

    @property
    def input_ids(self) -> Any:
        """Both go through the model."""
        return np.concatenate([self.right.input_ids, self.wrong.input_ids])


class Ranking:
    """The right answer is to be more likely than the wrong one."""

    packs = False

    def encode(self, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, *, warn: Any, **others: Any) -> Any:
        """Return pairs."""
        seq_len = recipe.train.seq_len
        sides = [encode_rows(some, tokenizer, seq_len=seq_len, warn=warn)[0] for some in (rows, _backwards(rows))]
        return [Pair(right, wrong) for right, wrong in zip(*sides, strict=True)]

    def longest(self, seq_len: int, vocabulary: int) -> Pair:
        """Return a pair of full rows."""
        row = SUPERVISED.longest(seq_len, vocabulary)
        return Pair(row, row)

    def batch(self, examples: Sequence[Pair], *, pad_id: int, device: torch.device, packed: bool = False) -> Batch:
        """Return two rows for each pair."""
        assert not packed
        rows = [row for pair in examples for row in (pair.right, pair.wrong)]
        return {"pairs": len(examples), **SUPERVISED.batch(rows, pad_id=pad_id, device=device)}

    def loss(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the sum over pairs of -log sigmoid(log p(right) - log p(wrong))."""
        return nn.functional.softplus(_by_how_much(tokens, batch)).sum()

    def denominator(self, examples: Sequence[Pair]) -> int:
        """Return the number of pairs."""
        return len(examples)

    def metric(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return 1 for each pair that is ranked wrongly."""
        return (_by_how_much(tokens, batch) >= 0).float()


TOY: Objective = Ranking()


def _by_how_much(tokens: TokenLoss, batch: Batch) -> Tensor:
    """Return by how much the wrong answer of each pair is more likely, `[pairs]`."""
    inputs = {name: value for name, value in batch.items() if name != "pairs"}
    right, wrong = tokens.row_losses(**inputs).view(batch["pairs"], 2).unbind(1)
    return right - wrong


def _backwards(rows: Sequence[Row]) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        assert isinstance(row, Conversation)
        *before, answer = row.messages
        found.append(replace(row, messages=(*before, Message("assistant", answer.content[::-1]))))
    return found


@pytest.fixture
def learn(train: Train) -> Train:
    """Run the training job with the toy."""
    return lambda recipe, again=None: train(recipe, again, lambda worker: train_run(worker, recipe, TOY))


def losses(paths: RunPaths) -> list[float]:
    history = history_of(paths)
    assert history.failed is None, history.failed
    return list(history.train.losses)


def plain_loss(recipe: Recipe, tiny: Path) -> tuple[float, float]:
    """Return the mean loss over all pairs and the share ranked wrongly, from transformers' own logits alone."""
    tokenizer, rows = AutoTokenizer.from_pretrained(tiny), read_data(Path(recipe.data.path)).rows
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()

    def likelihood(example: Example) -> float:
        ids, labels = (torch.from_numpy(array).long() for array in (example.input_ids, example.labels))
        chances = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        wanted = labels[1:] >= 0
        return float(chances[wanted].gather(1, labels[1:][wanted, None]).sum())

    with torch.no_grad():
        pairs = TOY.encode(rows, tokenizer, recipe, warn=print)
        gaps = torch.tensor([likelihood(pair.right) - likelihood(pair.wrong) for pair in pairs])  # type: ignore[attr-defined]
    return float(-nn.functional.logsigmoid(gaps).mean()), float((gaps <= 0).float().mean())


@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_loss_and_denominator_are_the_objectives_own(learn: Train, recipe: Recipe, tiny: Path, loss: str) -> None:
    paths = learn(recipe.with_("train.micro_batch", 6).with_("train.steps", 12).with_("train.loss", loss))
    seen = losses(paths)
    assert seen[0] == pytest.approx(plain_loss(recipe, tiny)[0], rel=1e-5)
    assert seen[-1] < seen[0] / 2
    steps = [event for event in read_events(paths.events) if isinstance(event, StepDone)]
    assert [step.loss_tokens for step in steps] == [6] * 12
    assert (paths.adapter / "adapter_model.safetensors").is_file()


def test_micro_batches_change_nothing(learn: Train, recipe: Recipe) -> None:
    at_once = losses(learn(recipe))
    one_by_one = losses(learn(recipe.with_("train.micro_batch", 1).with_("train.accumulation", 2)))
    assert one_by_one == pytest.approx(at_once, rel=1e-4)


def test_held_out_rows_are_measured_by_the_metric(learn: Train, recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(Path(recipe.data.path).read_text().replace('"content": "', '"content": "and ', 1))
    apart = recipe.with_("data.eval_path", str(held)).with_("train.steps", 2)
    rows = [event for event in read_events(learn(apart).events) if isinstance(event, Evaluated)]
    first = rows[0]
    assert (first.rows, first.loss_tokens) == (1, 1)
    only = tmp_path / "only.jsonl"
    only.write_text(held.read_text().splitlines()[0])
    assert first.loss == plain_loss(recipe.with_("data.path", str(only)), tiny)[1]
    assert {row.loss for row in rows} <= {0.0, 1.0}


def test_rows_that_cannot_be_packed_are_padded(learn: Train, recipe: Recipe) -> None:
    paths = learn(recipe.with_("train.packing", "on"))
    assert losses(paths) == losses(learn(recipe))
    assert "packing" in [warning.topic for warning in history_of(paths).warnings]


def test_resumed_equals_uninterrupted(learn: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe.with_("adapter.dropout", 0.2)
    whole = learn(recipe)
    at_step(monkeypatch, 3, lambda self: request(self.worker.paths, "stop"))
    parts = learn(recipe)
    assert list(history_of(parts).train.steps) == [1, 2, 3]
    withdraw_all(parts)
    learn(recipe, again=parts)
    assert losses(parts) == losses(whole)
    one, other = (load_file(paths.adapter / "adapter_model.safetensors") for paths in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_trace_runs_the_objectives_own_step(recipe: Recipe, tiny: Path) -> None:
    """Fake and real tensors agree to the byte, and a pair takes more than a row does."""
    config, target = AutoConfig.from_pretrained(tiny), Target("cpu", "fp32")

    def peaks(objective: Objective, *, fake: bool) -> dict[str, dict[str, int]]:
        storages = Storages()
        if not fake:
            run_engine(config, recipe, target, storages, objective=objective)
        else:
            with fake_world() as numbers, torch.random.fork_rng(devices=[]):
                run_engine(config, recipe, target, storages, numbers, objective=objective)
        return storages.log.peaks()

    traced = peaks(TOY, fake=True)
    assert traced == peaks(TOY, fake=False)
    alone = peaks(SUPERVISED, fake=True)
    assert traced["forward"]["activations"] > 1.5 * alone["forward"]["activations"]
