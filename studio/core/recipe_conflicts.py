"""What does not go together in an objective and in an adapter, though each field may be sound by itself."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from studio.core.experts import is_of_experts
from studio.core.recipe_field import Problem

if TYPE_CHECKING:
    from studio.core.recipe import Recipe


def between_objective(recipe: "Recipe") -> Iterator[Problem]:
    """Yield what does not go together with an objective that learns from pairs."""
    train, init = recipe.train, recipe.adapter.init
    if train.objective == "sft":
        return
    with_it = f"with train.objective {train.objective}"
    if train.loss == "liger":
        # One gradient for all tokens is what the kernel makes while it computes the loss.
        yield Problem("train.loss", f"liger {with_it}", "chunked or full: liger's kernel weighs all tokens alike")
    if train.objective == "orpo" and train.label_smoothing:
        yield Problem("train.label_smoothing", f"{train.label_smoothing:g} {with_it}", "0, or train.objective dpo")
    if train.objective == "dpo" and init in ("pissa", "loftq"):
        yield Problem(
            "adapter.init", f"{init} {with_it}", "default or gaussian: with others the base alone is not the reference"
        )
    if train.objective == "dpo" and not recipe.data.answers_only:
        yield Problem("data.answers_only", f"false {with_it}", "true: what both sides share cancels out")


def between_adapter(recipe: "Recipe") -> Iterator[Problem]:
    """Yield what does not go together in an adapter: its start, method, targets, DoRA and dropout."""
    init, targets = recipe.adapter.init, recipe.adapter.targets
    names = targets if isinstance(targets, tuple) else (targets,)
    if any(isinstance(name, str) and is_of_experts(name) for name in names):
        # What peft refuses of pairs beside a parameter (tuners/lora/layer.py ParamWrapper), and what needs a matrix.
        asked = {
            "dropout": recipe.adapter.dropout > 0,
            "dora": recipe.adapter.dora,
            f"init {init}": init in ("loftq", "pissa"),
        }
        for name in (name for name, wanted in asked.items() if wanted):
            yield Problem("adapter.targets", f"experts with {name}", f"experts without it: peft has no {name} for them")
    if init == "loftq" and recipe.method != "qlora":
        yield Problem("adapter.init", "loftq with method lora", "method qlora: loftq repairs the loss of 4-bit weights")
    if init == "pissa" and recipe.method == "qlora":
        yield Problem(
            "adapter.init", "pissa with method qlora", "loftq, which is made for 4-bit weights, or method lora"
        )
    if init in ("loftq", "pissa") and recipe.adapter.dora:
        yield Problem("adapter.init", f"{init} with dora", "adapter.dora false, or init default or gaussian")
