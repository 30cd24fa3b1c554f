"""How much of a loaded model's weights is in 4 bits, counted as `studio.core.vram.static.held_of` counts it."""

from typing import Any

from torch import nn

from studio.core.vram.static import Held
from studio.jobs.base.experts.forms import experts_in
from studio.jobs.base.experts.pairs import routers
from studio.jobs.base.model_class import class_of, is_plain


def precision_held(model: Any) -> Held:
    """Return how much of a base is in 4 bits, and the bytes of the weights that are not.

    Args:
        model: The loaded base, without an adapter.
    """
    picked, head, aside = class_of(model), model.get_output_embeddings(), set(routers(model))
    weights: list[nn.Parameter] = []
    for name, module in model.named_modules():
        if is_plain(module) and module is not head and name not in aside and picked.speaks(name):
            weights.append(module.weight)
    for name, module, form in experts_in(model):
        if picked.speaks(name):
            weights += [getattr(module, stack) for stack in form.stacks]
    in_four_bits = [weight.quant_state.shape.numel() for weight in weights if hasattr(weight, "quant_state")]
    others = [weight.numel() for weight in weights if not hasattr(weight, "quant_state")]
    kept = sum(parameter.nbytes for parameter in model.parameters() if not hasattr(parameter, "quant_state"))
    return Held(kept, sum(in_four_bits) / max(1, sum(in_four_bits) + sum(others)))
