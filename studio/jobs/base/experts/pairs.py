"""Low-rank pairs beside the stacks of fused experts, kept as peft keeps them, computed as our products compute.

peft's own `ParamWrapper` adds the whole product of A and B to the whole stack at every use, which a stack in 4 bits
does not allow, and which a stack in 16 bit pays with two more of its size. Here each group of experts gets its rows'
products with A and B. Names, shapes and config in the file are peft's own, so that plain peft loads them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from studio.core.experts import EXPERTS
from studio.core.shape import EXPERTS_DOWN, EXPERTS_UP
from studio.core.text import plain
from studio.jobs.base.experts.forms import experts_in, form_of, shape_of
from studio.jobs.base.experts.product import GroupedForward, Pair, take_over
from studio.jobs.base.swapped import swapped


class ExpertPairs(ParamWrapper):  # type: ignore[misc]
    """A and B of all experts of a stack."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the experts make of tokens, with the pairs' share where the adapter is switched on."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"experts take one adapter at a time, not {', '.join(active)}")
        experts = self.get_base_layer()
        form = form_of(experts)
        assert form is not None  # noqa: S101  only such modules get pairs
        with _lent(take_over(experts, form), self.parameter_name, self._pair(active[0], form.transposed)):
            return self.base_layer(x, *args, **kwargs)

    def _pair(self, name: str, transposed: bool) -> Pair:
        first, second, count = self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts
        into = first.reshape(count, -1, first.shape[-1])
        back = second.reshape(second.shape[0], -1, count).permute(2, 0, 1)
        if transposed == self._did_swap_in_out_features:
            # peft takes a stack for [experts, out, in] where the module does not say otherwise, as Llama 4's does not.
            into, back = back.transpose(1, 2), into.transpose(1, 2)
        return Pair(into, back, self.scaling[name])


@contextmanager
def _lent(forward: GroupedForward, stack: str, pair: Pair) -> Iterator[None]:
    forward.pairs[stack] = pair
    try:
        yield
    finally:
        del forward.pairs[stack]


def take_over_pairs(model: PeftModel) -> PeftModel:
    """Let the pairs that peft has put beside stacks of experts compute as ours; return the same model."""
    for module in model.modules():
        if isinstance(module, ParamWrapper) and form_of(module.get_base_layer()) is not None:
            # peft makes such a layer itself, and knows it again by the name of the class, so that none of its hooks for
            # classes of others will do.
            module.__class__ = ExpertPairs
    return model


def open_adapter(base: nn.Module, folder: str, device: str) -> PeftModel:
    """Return a base with a saved adapter on it.

    Args:
        base: The loaded model; its experts may be in 4 bits.
        folder: Holds a PEFT adapter.
        device: Where the adapter goes.

    Raises:
        ValueError, KeyError, RuntimeError, TypeError, AttributeError: The adapter does not fit, as peft raises it; or
            it lacks a tensor that its config asks for, of which peft only warns.
    """
    usual, missing = PeftModel.load_adapter, list[str]()

    def load(*given: Any, **named: Any) -> Any:
        # Its result counts what peft has renamed, such as the experts of an adapter from transformers 4.
        seen = usual(*given, **named)
        missing.extend(seen.missing_keys)
        return seen

    with swapped(PeftModel, "load_adapter", load):
        model = PeftModel.from_pretrained(base, folder, torch_device=device)
    if missing:
        first = plain(min(missing), one_line=True, limit=160)
        raise ValueError(f"{len(missing)} tensors are not in it, the first is {first}.")
    return take_over_pairs(model)


def stacks_named(base: nn.Module, targets: tuple[str, ...], layers: list[int] | None) -> list[str] | None:
    """Return peft's `target_parameters` for the stacks that a recipe's targets name; None where they name none.

    Args:
        base: The loaded model.
        targets: The recipe's targets: `experts` stands for both stacks of a layer, else one is named.
        layers: Numbers of the adapted layers, None for all. peft knows no layers here, so each stack's name says it.
    """
    wanted: list[str] = []
    for name, _, form in experts_in(base):
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layers is not None and number not in layers:
            continue
        for stack, word in zip(form.stacks, (EXPERTS_UP, EXPERTS_DOWN), strict=True):
            if not {EXPERTS, word, f"{EXPERTS}.{stack}"}.isdisjoint(targets):
                wanted.append(f"{name}.{stack}")
    if layers is None:
        wanted = sorted({".".join(name.split(".")[-2:]) for name in wanted})  # the same ends in every layer
    return wanted or None


def routers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that choose experts or weigh a shared one; none of them is adapted.

    They lie beside the experts and have one output for each, or a single one. Most families' routers are no linear
    layers, which peft's `all-linear` leaves alone anyway.
    """
    found: list[str] = []
    for name, module, form in experts_in(model):
        parent, count = name.rpartition(".")[0], shape_of(getattr(module, form.up))[0]
        for path, layer in model.get_submodule(parent).named_modules():
            chooses = isinstance(layer, nn.Linear) and layer.out_features in (1, count)
            # Qwen3-Next's shared expert is as wide as there are experts, so its `gate_proj` has one output for each.
            chooses = chooses and not path.endswith("gate_proj")
            if chooses and any(word in path for word in ("gate", "router")):
                found.append(f"{parent}.{path}" if parent else path)
    return found
