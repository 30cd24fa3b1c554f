"""Pairs of answers: losses and gradients from the papers' equations, whole runs, and what is refused."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from studio.core.errors import BadInput
from studio.core.events import PAIR_FIGURES, Evaluated, StepDone
from studio.core.left_out import left_out_in_words
from studio.core.measured import height
from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.jobs.base.data import encode
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Encoder, Encoding, Example
from studio.jobs.measure.storages import Storages
from studio.jobs.measure.trace import Target, run_engine, trace
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.objectives.of_recipe import objective_of
from studio.jobs.train.objectives.pairs import Pair, encode_pairs
from studio.jobs.train.objectives.preference import odds_losses
from studio.jobs.train.packing import can_pack
from studio.jobs.train.step_model import StepModel, evaluating
from studio.probe.data import Message, Preference
from studio.probe.held_out import rows_of_run
from studio.probe.preflight import check_training
from studio.runs.control import request, withdraw_all
from studio.runs.held_out import read_record
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.jobs.conftest import Merge, Train, history_of
from tests.jobs.test_resume import at_step

CPU = torch.device("cpu")
PAIRS = [
    ("one", "uno", "eins"),
    ("two and a half", "dos y medio, por favor", "zwei"),
    ("three", "tres", "drei, wenn es sein muss, und keins mehr"),
    ("four", "cuatro", "vier"),
    ("five times", "cinco veces", "fuenfmal"),
]


def preference(question: str, chosen: str, rejected: str, number: int = 1) -> Preference:
    asked = (Message("system", "Translate."), Message("user", question))
    return Preference(asked, (Message("assistant", chosen),), (Message("assistant", rejected),), number)


ROWS = [preference(*words, number) for number, words in enumerate(PAIRS, 1)]


@dataclass(frozen=True, slots=True)
class Stage:
    """A tiny model with an adapter that says something, its pairs, and their reference."""

    model: Any
    pairs: Sequence[Pair]

    def step_model(self, recipe: Recipe) -> StepModel:
        return StepModel(self.model, recipe.train.loss, nullcontext, objective_of(recipe))

    def referenced(self, step_model: StepModel) -> list[Pair]:
        batch = step_model.objective.batch(self.pairs, pad_id=0, device=CPU)
        with evaluating(step_model):
            values = step_model.reference(batch).tolist()
        return [replace(pair, reference=tuple(both)) for pair, both in zip(self.pairs, values, strict=True)]


@pytest.fixture
def stage(tiny: Path, recipe: Recipe) -> Stage:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(3)
    model = attach_adapter(base, recipe.adapter, recompute="none")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return Stage(model, encode_pairs(ROWS, tokenizer, Encoding(64), warn=print))


@dataclass(frozen=True, slots=True)
class Answers:
    """What the papers' equations are written in, for one pair: log-probabilities of every token after the first."""

    chosen: Tensor
    rejected: Tensor
    chosen_is_answer: Tensor
    rejected_is_answer: Tensor

    @classmethod
    def of(cls, model: nn.Module, pair: Pair) -> "Answers":
        found: list[Tensor] = []
        for side in pair.sides:
            ids = torch.from_numpy(side.input_ids).long()
            scores = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
            found.append(scores.gather(1, ids[1:, None]).squeeze(1))
        masks = [torch.from_numpy(side.labels[1:] != IGNORED) for side in pair.sides]
        return cls(*found, *masks)

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        return self.chosen[self.chosen_is_answer].sum(), self.rejected[self.rejected_is_answer].sum()

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        return self.chosen[self.chosen_is_answer].mean(), self.rejected[self.rejected_is_answer].mean()


def written_out(model: Any, pair: Pair, recipe: Recipe) -> Tensor:
    """Return a pair's loss as the papers write it, with whole logits and one sequence at a time."""
    beta, flipped = recipe.train.beta, recipe.train.label_smoothing
    policy = Answers.of(model, pair)
    if recipe.train.objective == "orpo":
        chosen, rejected = policy.means
        odds_chosen, odds_rejected = (x.exp() / (1 - x.exp()) for x in (chosen, rejected))
        nll = -chosen if recipe.data.answers_only else -policy.chosen.mean()
        return nll - beta * torch.sigmoid(torch.log(odds_chosen / odds_rejected)).log()
    with torch.no_grad(), model.disable_adapter():
        base = Answers.of(model, pair)
    (chosen, rejected), (base_chosen, base_rejected) = policy.sums, base.sums
    margin = beta * (chosen - base_chosen) - beta * (rejected - base_rejected)
    clean, wrong = -torch.sigmoid(margin).log(), -torch.sigmoid(-margin).log()
    return ((1 - flipped) * clean - flipped * wrong) / (1 - 2 * flipped)


SETTINGS = [
    {"train.objective": "dpo"},
    {"train.objective": "dpo", "train.beta": 0.5, "train.label_smoothing": 0.1, "train.loss": "full"},
    {"train.objective": "orpo"},
    {"train.objective": "orpo", "train.beta": 1.0, "data.answers_only": False},
    {"train.objective": "orpo", "data.answers_only": False, "train.loss": "full"},
]


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    for path, value in settings.items():
        recipe = recipe.with_(path, value)
    assert recipe.problems() == ()
    return recipe


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s.values())))
def test_losses_and_gradients_are_the_papers(
    stage: Stage, recipe: Recipe, settings: dict[str, Any], packed: bool
) -> None:
    """However the pairs are cut into micro-batches, whose rows differ in length."""
    recipe = with_settings(recipe, settings)
    step_model = stage.step_model(recipe)
    assert step_model.loss_path == recipe.train.loss
    stage.model.eval()
    if packed:
        with step_model.supervised():
            assert can_pack(step_model, [side for pair in stage.pairs for side in pair.sides], CPU)
    pairs = stage.referenced(step_model)
    wanted = torch.stack([written_out(stage.model, pair, recipe) for pair in pairs]).mean()
    wanted.backward()
    expected = gradients(stage.model)
    assert len(expected) > 20
    for cut in ([pairs], [pairs[:1], pairs[1:]], [[pair] for pair in pairs]):
        total = torch.zeros(())
        for part in cut:
            batch = step_model.objective.batch(part, pad_id=0, device=CPU, packed=packed)
            loss = step_model(batch) / step_model.objective.denominator(pairs)
            loss.backward()
            total += loss.detach()
        assert float(total) == pytest.approx(float(wanted.detach()), rel=1e-5)
        seen = gradients(stage.model)
        assert seen.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(seen[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max())), name


@pytest.mark.parametrize("means", [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (1e-7, -1.0)], ids=str)
def test_an_answer_of_which_the_model_is_certain_leaves_the_odds_finite(means: tuple[float, float]) -> None:
    """Its log-probability rounds to 0, or to a hair above it."""
    both = torch.tensor([means], requires_grad=True)
    loss = odds_losses(both)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert both.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(both.grad).all()
    wanted = {True: 0.0, False: math.log(2)}[means[0] != means[1]] if means[0] >= means[1] else 16.5
    assert float(loss.detach()) == pytest.approx(wanted, abs=0.1)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
TRACED = [
    {"train.objective": "orpo", "method": "lora", "train.recompute": "none"},
    {"train.objective": "dpo", "method": "qlora"},
    {"train.objective": "dpo", "method": "lora", "train.loss": "full", "train.accumulation": 2},
    {"train.objective": "dpo", "method": "lora", "adapter.modules_to_save": ("lm_head",)},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [TRACED[0], *(pytest.param(settings, marks=pytest.mark.slow) for settings in TRACED[1:])],
    ids=lambda s: " ".join(map(str, s.values())),
)
def test_the_plan_is_the_trace_of_a_pair(settings: dict[str, Any]) -> None:
    """A trace has every byte of a real step, and the plan is within 2 % of it in every stage."""
    small = {"adapter.rank": 4, "train.micro_batch": 1, "train.seq_len": 96, "train.accumulation": 1}
    recipe = with_settings(Recipe(), {**small, **settings, "device.device": "cpu"})
    seen = trace(recipe, LLAMA, Target("cpu", "bf16")).log.peaks()
    torch.manual_seed(0)
    storages = Storages()
    bnb.functional.name2qmap.clear()
    objective = objective_of(recipe)
    run_engine(AutoConfig.for_model(**LLAMA), recipe, Target("cpu", "bf16"), storages, objective=objective)
    assert seen == storages.log.peaks()
    planned = dict(estimate_vram(shape_from_config(LLAMA), setup_of(recipe.with_("model.dtype", "bf16"))).stages)
    traced = {stage: height(parts) for stage, parts in seen.items()}
    assert max(planned[stage] for stage in traced) == pytest.approx(max(traced.values()), rel=0.02)
    # A pair is two sequences: no second base, and nothing but a few numbers for each token besides.
    alone = recipe.with_("train.objective", "sft").with_("train.micro_batch", 2)
    two_rows = {stage: height(parts) for stage, parts in trace(alone, LLAMA, Target("cpu", "bf16")).log.peaks().items()}
    assert traced == {stage: pytest.approx(size, rel=0.001) for stage, size in two_rows.items()}


@pytest.fixture
def pairs(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The tiny recipe, which learns from pairs of answers by DPO and holds one out."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": question, "chosen": chosen, "rejected": rejected} for question, chosen, rejected in PAIRS]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = {"data.path": str(path), "train.objective": "dpo", "eval.rows": 1, "eval.samples": 1}
    return with_settings(recipe, settings)


def steps_of(paths: RunPaths) -> list[StepDone]:
    return [event for event in read_events(paths.events) if isinstance(event, StepDone)]


def evaluations_of(paths: RunPaths) -> list[Evaluated]:
    return [event for event in read_events(paths.events) if isinstance(event, Evaluated)]


@pytest.mark.parametrize(
    ("objective", "packing"),
    [
        ("dpo", "off"),
        ("orpo", "on"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("dpo", "on"), ("orpo", "off"), ("orpo", "on"))),
    ],
)
def test_a_run_learns_to_prefer(train: Train, pairs: Recipe, objective: str, packing: str) -> None:
    recipe = with_settings(pairs, {"train.objective": objective, "train.packing": packing, "train.steps": 25})
    paths = train(recipe.with_("train.micro_batch", 4).with_("eval.every", 10))
    assert history_of(paths).failed is None, history_of(paths).failed
    steps, evaluations = steps_of(paths), evaluations_of(paths)
    first, last = steps[0], steps[-1]
    assert first.loss_tokens == 4
    assert last.loss < first.loss / 2
    assert None not in (last.margin, first.margin, last.accuracy)
    assert last.margin > first.margin  # type: ignore[operator]
    assert last.accuracy == 1
    assert [event.step for event in evaluations] == [0, 10, 20, 25]
    for event in (first, last, *evaluations):
        figures = {name: getattr(event, name) for name in PAIR_FIGURES}
        assert None not in figures.values()
        assert figures["margin"] == pytest.approx(figures["chosen_reward"] - figures["rejected_reward"], abs=1e-5)
    if objective == "dpo":
        assert first.loss == pytest.approx(math.log(2), abs=1e-4)  # the adapter says nothing yet
        before = evaluations[0]
        assert (before.margin, before.chosen_reward, before.accuracy) == (0, 0, 0), "exactly: in the same batches"
        assert paths.reference.is_file()
    assert [event.rows for event in evaluations] == [1] * 4
    assert history_of(paths).samples[0].expected in {chosen for _, chosen, _ in PAIRS}
    assert (paths.adapter / "adapter_model.safetensors").is_file()
    planned = history_of(paths).planned
    assert planned is not None
    if packing == "on":  # the four pairs of a step share one sequence, so that nothing is padded
        assert planned.batch_tokens == first.tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({"train.objective": "orpo"}, {"train.packing": "on"})),
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted(
    train: Train, pairs: Recipe, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """To the bit: what the base says of the pairs is read from the run's folder, not measured in other batches."""
    recipe = with_settings(pairs, {"adapter.dropout": 0.2, "train.steps": 6, "train.micro_batch": 2, **settings})
    whole = train(recipe)
    at_step(monkeypatch, 3, lambda self: request(self.worker.paths, "stop"))
    parts = train(recipe)
    assert [step.step for step in steps_of(parts)] == [1, 2, 3]
    withdraw_all(parts)
    monkeypatch.setattr("studio.jobs.train.step_model.StepModel.reference", None)
    train(recipe, again=parts)
    assert history_of(parts).failed is None, history_of(parts).failed
    told = [[(s.step, s.loss, s.margin, s.chosen_logp) for s in steps_of(paths)] for paths in (whole, parts)]
    assert told[0] == told[1]
    assert evaluations_of(whole)[-1].loss == evaluations_of(parts)[-1].loss
    one, other = (load_file(paths.adapter / "adapter_model.safetensors") for paths in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_base_is_measured_once(train: Train, pairs: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only on pairs that the run will see, however often, and on those that are held out."""
    seen: list[int] = []
    measure = StepModel.reference

    def counted(self: StepModel, batch: Any) -> Tensor:
        seen.append(batch["input_ids"].shape[0] // 2)
        return measure(self, batch)

    monkeypatch.setattr(StepModel, "reference", counted)
    train(with_settings(pairs, {"train.steps": 8, "eval.every": 2}))
    assert sum(seen) == 4 + 1
    seen.clear()
    train(with_settings(pairs, {"train.steps": 1, "train.micro_batch": 2}))
    assert sum(seen) == 2 + 1


@pytest.mark.slow
def test_micro_batches_change_nothing(train: Train, pairs: Recipe) -> None:
    for objective in ("dpo", "orpo"):
        recipe = with_settings(pairs, {"train.objective": objective, "train.micro_batch": 4, "train.steps": 4})
        at_once = [step.loss for step in steps_of(train(recipe))]
        cut = with_settings(recipe, {"train.micro_batch": 1, "train.accumulation": 4})
        assert [step.loss for step in steps_of(train(cut))] == pytest.approx(at_once, rel=1e-4)


def test_rows_and_objective_must_go_together(pairs: Recipe, recipe: Recipe) -> None:
    with pytest.raises(BadInput, match=r'rejected answer; wanted one answer.* train.objective = "dpo"'):
        check_training(pairs.with_("train.objective", "sft"))
    with pytest.raises(BadInput, match=r"no two answers; wanted prompt, chosen and rejected.*leave train.objective"):
        check_training(with_settings(recipe, {"train.objective": "orpo"}))
    assert check_training(pairs).data.described().endswith("5 rows")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"train.objective": "dpo", "train.loss": "liger"}, "train.loss"),
        ({"train.objective": "orpo", "train.label_smoothing": 0.1}, "train.label_smoothing"),
        ({"train.objective": "dpo", "adapter.init": "pissa"}, "adapter.init"),
        ({"train.objective": "dpo", "data.answers_only": False}, "data.answers_only"),
        ({"train.objective": "dpo", "train.beta": 0.0}, "train.beta"),
        ({"train.objective": "dpo", "train.label_smoothing": 0.5}, "train.label_smoothing"),
    ],
    ids=str,
)
def test_what_does_not_go_with_an_objective_is_refused(recipe: Recipe, settings: dict[str, Any], field: str) -> None:
    for path, value in settings.items():
        recipe = recipe.with_(path, value)
    assert [problem.path for problem in recipe.problems()] == [field]


@pytest.mark.slow
def test_a_collapse_is_told_in_the_run_once(train: Train, pairs: Recipe) -> None:
    """At a rate far too high both answers of held-out pairs become unlikely."""
    recipe = with_settings(pairs, {"train.learning_rate": 0.2, "train.steps": 12, "eval.every": 3, "train.beta": 0.001})
    told = [warning.topic for warning in history_of(train(recipe)).warnings]
    assert told.count("chosen") == 1


@pytest.mark.slow
def test_a_damaged_reference_is_measured_again(train: Train, pairs: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_settings(pairs, {"train.steps": 4})
    at_step(monkeypatch, 2, lambda self: request(self.worker.paths, "stop"))
    paths = train(recipe)
    withdraw_all(paths)
    kept = {name: values.clone() for name, values in load_file(paths.reference).items()}
    assert {name: tuple(values.shape) for name, values in kept.items()} == {"train": (4, 2), "held_out": (1, 2)}
    paths.reference.write_bytes(b"damaged")
    train(recipe, again=paths)
    assert history_of(paths).failed is None
    again = load_file(paths.reference)
    assert all(torch.allclose(kept[name], again[name], rtol=1e-5) for name in kept)


def encoded(
    tiny: Path, rows: list[Preference], seq_len: int = 64, template: str = ""
) -> tuple[Sequence[Pair], Counter[str]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = template or tokenizer.chat_template
    left_out: Counter[str] = Counter()
    return encode_pairs(rows, tokenizer, Encoding(seq_len), warn=lambda message: None, left_out=left_out), left_out


def test_both_sides_begin_with_the_prompt_and_only_their_answers_have_labels(tiny: Path) -> None:
    """Earlier answers are part of the prompt."""
    turns = (Message("user", "a"), Message("assistant", "earlier"), Message("user", "b"))
    row = Preference(turns, (Message("assistant", "same start"),), (Message("assistant", "same end"),), 7)
    (pair,), left_out = encoded(tiny, [row], 200)
    assert not left_out
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompt = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns], add_generation_prompt=True
    )["input_ids"]
    for side, answer in zip(pair.sides, ("same start", "same end"), strict=True):
        assert side.input_ids[: len(prompt)].tolist() == prompt
        assert set(side.labels[: len(prompt)]) == {IGNORED}
        assert tokenizer.decode(side.labels[side.labels != IGNORED]) == f"{answer}<|im_end|>"


def test_a_cut_keeps_the_prompt_and_drops_pairs_of_which_an_answer_is_gone(tiny: Path) -> None:
    rows = [preference("q", "c" * 200, "r", 1), preference("q" * 200, "c", "r", 2)]
    (pair,), left_out = encoded(tiny, rows, 100)
    chosen, rejected = pair.sides
    assert len(chosen.input_ids) == 100
    assert chosen.labels[-1] == ord("c") - ord("!")
    assert len(rejected.input_ids) < 100
    assert left_out == {"side_left_out": 1}
    assert "chosen or the rejected" in left_out_in_words(left_out)


def test_sides_must_begin_with_one_prompt_in_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Encoder.sides

    def other_prompt(self: Encoder, rows: Any) -> Any:
        made, report = sides(self, rows)
        (chosen,), (rejected,) = made[0]
        ids = rejected.input_ids.copy()
        ids[3] += 1
        return [((chosen,), (Example(ids, rejected.labels),)), *made[1:]], report

    monkeypatch.setattr(Encoder, "sides", other_prompt)
    found, left_out = encoded(tiny, ROWS)
    assert len(found) == len(ROWS) - 1
    assert left_out == {"prompts_differ": 1}


@pytest.mark.slow
def test_the_adapter_is_merged_exported_and_measured_as_any(
    train: Train, pairs: Recipe, merge: Merge, tmp_path: Path
) -> None:
    paths = train(with_settings(pairs, {"train.steps": 5}))
    base = Path(pairs.model.base)
    merged = merge(paths.adapter, base, tmp_path / "merged")
    assert history_of(merged).failed is None, history_of(merged).failed
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    rows = rows_of_run(read_record(paths), "the run", Path(pairs.data.path), format="auto", wanted=9, seed=1)
    assert rows.held_out_rows == len(rows.rows) == 1
    assert any("the chosen one is measured, as a supervised row" in note for note in rows.notes)
    tokenizer = AutoTokenizer.from_pretrained(base)
    (example,), _ = encode_rows(rows.rows, tokenizer, seq_len=64, warn=print)
    row = rows.rows[0]
    assert isinstance(row, Preference)
    assert row.chosen[0].content in tokenizer.decode(example.labels[example.labels != IGNORED])


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter.dora": True},
        {"adapter.modules_to_save": ("lm_head", "embed_tokens")},
        {"adapter.targets": ("q_proj", "lm_head"), "train.loss": "full"},
        {"adapter.init": "gaussian", "adapter.dropout": 0.3, "train.recompute": "all"},
    ],
    ids=str,
)
def test_the_reference_is_the_base_whatever_is_trained(tiny: Path, recipe: Recipe, settings: dict[str, Any]) -> None:
    """And measuring it leaves no trace: what is trained stays so, and the loss is the same afterwards."""
    recipe = with_settings(recipe, {"train.objective": "dpo", **settings})
    pairs = encode_pairs(ROWS, AutoTokenizer.from_pretrained(tiny), Encoding(64), warn=print)
    plain, base = (AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2))
    model = attach_adapter(base, recipe.adapter, recompute=recipe.train.recompute)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    step_model = StepModel(model, recipe.train.loss, nullcontext, objective_of(recipe))
    batch = step_model.objective.batch(pairs, pad_id=0, device=CPU)
    before = step_model.metric(batch) if not recipe.adapter.dropout else None
    with evaluating(step_model):
        seen = step_model.reference(batch)
    with torch.no_grad():
        wanted = torch.tensor([[float(x) for x in Answers.of(plain.eval(), pair).sums] for pair in pairs])
    assert torch.allclose(seen, wanted, rtol=1e-5)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    if before is not None:
        assert torch.equal(step_model.metric(batch), before)
        assert not torch.allclose(batch["figures"][:, 2:4], wanted, rtol=1e-3)


@pytest.mark.slow
def test_four_bits_and_16_bit_arithmetic(train: Train, pairs: Recipe) -> None:
    """The base of the reference is the quantised one."""
    recipe = with_settings(pairs, {"method": "qlora", "model.dtype": "bf16", "train.steps": 12})
    paths = train(recipe.with_("train.micro_batch", 4))
    assert history_of(paths).failed is None, history_of(paths).failed
    steps = steps_of(paths)
    assert steps[0].loss == pytest.approx(math.log(2), abs=0.02)
    assert evaluations_of(paths)[0].margin == 0, "rounding in 16 bit is the same in the same batches"
    assert steps[-1].loss < 0.5


@pytest.mark.slow
def test_many_pairs_lie_on_disk_and_are_encoded_once(
    train: Train, pairs: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run, however its pairs are kept."""
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    recipe = with_settings(pairs, {"train.steps": 4, "train.micro_batch": 2, "train.group_by_length": True})
    told = [[step.loss for step in steps_of(train(recipe))]]
    monkeypatch.setattr(encode, "KEPT_BYTES", 1)
    sides = Encoder.sides
    calls: list[int] = []

    def counted(self: Encoder, rows: Any) -> Any:
        calls.append(len(rows))
        return sides(self, rows)

    monkeypatch.setattr(Encoder, "sides", counted)
    for encoded_rows in (5, 0):
        calls.clear()
        paths = train(recipe)
        assert history_of(paths).failed is None, history_of(paths).failed
        told.append([step.loss for step in steps_of(paths)])
        assert sum(calls) == encoded_rows
    assert told[0] == told[1] == told[2]
