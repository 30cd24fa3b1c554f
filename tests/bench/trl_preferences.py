"""DPO and ORPO beside TRL's own trainers, on the same tokens: losses, gradients of every adapter tensor, figures.

`python -m tests.bench.trl_preferences` in an environment that also has TRL (`pip install trl`); seen with TRL 1.16.0.
The results are in train_results.md.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio.core.recipe import Recipe
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Encoding, Example
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.objectives import FIGURES
from studio.jobs.train.objectives.of_recipe import objective_of
from studio.jobs.train.objectives.pairs import Pair, encode_pairs
from studio.jobs.train.step_model import StepModel, evaluating
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.test_preferences import ROWS

CPU, PAD = torch.device("cpu"), 258
RECIPE = Recipe().with_("adapter.rank", 4).with_("adapter.alpha", 8.0)
DPO = {
    "sigmoid": ({"loss_type": ["sigmoid"], "beta": 0.1}, {"train.beta": 0.1}),
    "robust": (
        {"loss_type": ["robust"], "beta": 0.5, "label_smoothing": 0.1},
        {"train.beta": 0.5, "train.label_smoothing": 0.1},
    ),
}
Gradients = dict[str, Tensor]


def main() -> None:
    """Print every comparison."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = make_tiny_model(Path(place) / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pairs = [Pair.of(*map(_cut, pair.sides)) for pair in encode_pairs(ROWS, tokenizer, Encoding(64), warn=print)]
        for name, (theirs, ours) in DPO.items():
            loss, gradients = _their_dpo(folder, tokenizer, pairs, theirs)
            _tell(f"dpo, {name}", loss, gradients, *_ours(folder, pairs, {"train.objective": "dpo", **ours}))
        settings = {"train.objective": "orpo", "train.beta": 0.3, "data.answers_only": False}
        one_by_one, gradients, together = _their_orpo(folder, tokenizer, pairs)
        _tell("orpo, one pair a micro-batch", one_by_one, gradients, *_ours(folder, pairs, settings))
        print(f"orpo, all pairs in one micro-batch: TRL {together:.6f}, whose own loss weighs pairs by their tokens")


def _cut(side: Example) -> Example:
    """Return a side up to its last label: TRL also counts what the template writes after an answer."""
    size = int(np.nonzero(side.labels != IGNORED)[0].max()) + 1
    return Example(side.input_ids[:size], side.labels[:size])


def _model(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(3)
    model = attach_adapter(base, RECIPE.adapter, recompute="none")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def _gradients(model: nn.Module) -> Gradients:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _ours(folder: Path, pairs: list[Pair], settings: dict[str, Any]) -> tuple[float, Gradients, list[float]]:
    recipe = RECIPE
    for path, value in settings.items():
        recipe = recipe.with_(path, value)
    model = _model(folder)
    step_model = StepModel(model, "chunked", nullcontext, objective_of(recipe))
    if recipe.train.objective == "dpo":
        with evaluating(step_model):
            known = step_model.reference(step_model.objective.batch(pairs, pad_id=PAD, device=CPU)).tolist()
        pairs = [replace(pair, reference=tuple(both)) for pair, both in zip(pairs, known, strict=True)]
    batch = step_model.objective.batch(pairs, pad_id=PAD, device=CPU)
    loss = step_model(batch) / len(pairs)
    loss.backward()
    return float(loss.detach()), _gradients(model), batch[FIGURES].mean(0).tolist()


def _arguments(folder: Path) -> dict[str, Any]:
    where = str(folder.parent / "out")
    return {"output_dir": where, "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}


def _rows() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)


def _their_dpo(folder: Path, tokenizer: Any, pairs: list[Pair], loss: dict[str, Any]) -> tuple[float, Gradients]:
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found, unused-ignore]
    from trl.trainer.dpo_trainer import DataCollatorForPreference  # type: ignore

    settings = DPOConfig(**_arguments(folder), **loss)
    trainer = DPOTrainer(model=_model(folder), args=settings, train_dataset=_rows(), processing_class=tokenizer)
    # TRL takes the adapter as it comes for the reference; without that copy it switches the adapter off, as we do.
    trainer.model.delete_adapter("ref")
    trainer.model.set_adapter("default")
    model = trainer.model.eval()
    value = trainer._compute_loss(model, DataCollatorForPreference(pad_token_id=PAD)(list(map(_parts, pairs))), False)
    value.backward()
    return float(value.detach()), _gradients(model)


def _parts(pair: Pair) -> dict[str, list[int]]:
    chosen, rejected = pair.sides
    begin = int(np.argmax(chosen.labels != IGNORED))
    return {
        "prompt_ids": chosen.input_ids[:begin].tolist(),
        "chosen_ids": chosen.input_ids[begin:].tolist(),
        "rejected_ids": rejected.input_ids[begin:].tolist(),
    }


def _their_orpo(folder: Path, tokenizer: Any, pairs: list[Pair]) -> tuple[float, Gradients, float]:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # type: ignore

    settings = ORPOConfig(**_arguments(folder), beta=0.3)
    trainer = ORPOTrainer(model=_model(folder), args=settings, train_dataset=_rows(), processing_class=tokenizer)
    model, total = trainer.model.eval(), 0.0
    for pair in pairs:  # as gradient accumulation averages micro-batches of one pair
        loss = trainer.get_batch_loss_metrics(model, _columns([pair]), "eval")[0] / len(pairs)
        loss.backward()
        total += float(loss.detach())
    gradients = _gradients(model)
    with torch.no_grad():
        together = float(trainer.get_batch_loss_metrics(model, _columns(pairs), "eval")[0])
    return total, gradients, together


def _columns(pairs: list[Pair]) -> dict[str, Tensor]:
    made = {}
    for place, name in enumerate(("chosen", "rejected")):
        sides = [pair.sides[place] for pair in pairs]
        for column, values, fill in (
            ("input_ids", [side.input_ids for side in sides], PAD),
            ("labels", [side.labels for side in sides], IGNORED),
            ("attention_mask", [np.ones(len(side.input_ids)) for side in sides], 0),
        ):
            rows = [torch.from_numpy(value.astype(np.int64)) for value in values]
            made[f"{name}_{column}"] = pad_sequence(rows, batch_first=True, padding_value=fill)
    return made


def _tell(what: str, theirs: float, expected: Gradients, ours: float, seen: Gradients, figures: list[float]) -> None:
    assert seen.keys() == expected.keys()
    worst = max(float((seen[name] - one).abs().max() / one.abs().max()) for name, one in expected.items())
    off = abs(ours - theirs) / abs(theirs)
    print(f"{what}: TRL {theirs:.6f}, ours {ours:.6f} ({off:.1e} off), gradients at most {worst:.1e} off, {figures}")


if __name__ == "__main__":
    main()
