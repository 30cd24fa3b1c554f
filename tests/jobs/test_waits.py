"""A training step waits for its card once."""

import traceback
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studio.core.recipe import Recipe
from studio.jobs.base.data.rows import Example
from studio.jobs.measure.step import run_steps
from studio.jobs.train.batches import Batcher
from studio.jobs.train.objectives import Objective
from studio.jobs.train.objectives.of_recipe import objective_of
from studio.jobs.train.optimizer import optimizer_of
from studio.jobs.train.packing import can_pack
from studio.jobs.train.step_model import StepModel
from tests.jobs.test_families import model_of

_LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "_unique2", "unique_dim"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
CPU = torch.device("cpu")


class Looks(TorchDispatchMode):
    """Notes where a step looks at numbers, which on a card would wait for them: whose code does, how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in _INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in _LOOKS or masks:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.found[f"{frames[-2].filename.rpartition('/')[2]} {frames[-2].name}"] += 1
        return func(*args, **(kwargs or {}))


class Silent:
    """A meter that measures nothing."""

    def stage(self, name: str) -> None: ...

    def claim(self, tensors: Any, component: str) -> None: ...


class Uneven(Batcher):
    """Makes every second row shorter, so that batches are padded."""

    def batch(self, rows: Any) -> Any:
        short = [Example(row.input_ids[:9], row.labels[:9]) if place % 2 else row for place, row in enumerate(rows)]
        return super().batch(short)


def looks(recipe: Recipe, *, uneven: bool = False, packed: bool = False) -> Counter[str]:
    """Return where two steps of two micro-batches and an evaluation look."""
    recipe = recipe.with_("train.seq_len", 24).with_("train.micro_batch", 2).with_("train.accumulation", 2)
    objective: Objective = objective_of(recipe)
    model = model_of("llama")
    stepped = StepModel(model, "chunked", nullcontext, objective)
    ids = objective.longest(12, 100)
    if packed:
        assert can_pack(stepped, [ids, ids], CPU)  # type: ignore[list-item]
    kind = Uneven if uneven else Batcher
    batcher = kind(2, 0, CPU, 60 if packed else 0, objective)
    optimizer = optimizer_of(recipe, model, CPU, warn=print)
    with Looks() as seen:
        run_steps(
            stepped, recipe, Silent(), optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False),
            batcher=batcher, steps=2, emit=lambda *given, **named: None,
        )  # fmt: skip
    return seen.found


@pytest.mark.parametrize("how", ["full rows", "padded rows", "packed rows", "pairs"])
def test_a_step_looks_at_its_numbers_once(how: str) -> None:
    recipe = Recipe().with_("train.objective", "orpo") if how == "pairs" else Recipe()
    found = looks(recipe, uneven=how == "padded rows", packed=how == "packed rows")
    # The places of labels are found on the host. AdamW's count of steps is there, too; on a card it is fused. The loop
    # reads loss and norm from a copy; an evaluation reads its loss.
    for known in ("head.py _places", "loop.py _take", "step.py run_steps"):
        found.pop(known, None)
    assert not found
