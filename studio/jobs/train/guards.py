"""Guards that stop a useless run: each turns a failure that nobody would notice into a `Failed` event."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from studio.core.errors import JobFailed
from studio.core.intervals import share_interval

MOVED_BY_STEP = 3
"""After this many optimizer steps every adapted module must have moved. B is zero at first, so that A gets its first
gradient in the second step; and a learning rate that is warmed up may be 0 in the first."""

MOST_SKIPPED = 10
"""Overflowing fp16 steps in a row that end a run. The loss scaler skips such a step and halves its scale: ten halvings
take it from 2**16 to 64."""


def check_loss(loss: float, step: int, steadier: str = "") -> None:
    """Stop on a loss that is not a number or exactly 0.

    Args:
        loss: Of the step.
        step: Its number.
        steadier: Advice that names a number format of wider range; empty where there is none.

    Raises:
        JobFailed: `nonfinite_loss` or `zero_loss`.
    """
    if not math.isfinite(loss):
        raise JobFailed(
            "nonfinite_loss",
            f"the loss is {loss} at step {step}; every later step would be worthless",
            f"{_lower(steadier)}; look at the rows of this step in the data",
        )
    if loss == 0.0:
        raise JobFailed(
            "zero_loss",
            f"the loss is exactly 0 at step {step}: nothing is being learnt",
            "check with `lora-studio data check` that the rows have answers within train.seq_len",
        )


def check_labels(loss_tokens: int, step: int) -> None:
    """Stop on a step of which no token has a label.

    Args:
        loss_tokens: Labelled tokens of the step.
        step: Its number.

    Raises:
        JobFailed: `all_labels_masked`.
    """
    if loss_tokens == 0:
        raise JobFailed(
            "all_labels_masked",
            f"no token of step {step} has a label: the answers are empty or were cut off",
            "raise train.seq_len, or check the rows with `lora-studio data check`",
        )


def check_gradient(grad_norm: float, step: int, skipped: int, *, scaled: bool, steadier: str = "") -> None:
    """Stop on a gradient that is not finite; with an fp16 scaler only after `MOST_SKIPPED` such steps in a row.

    Args:
        grad_norm: Of the step.
        step: Its number.
        skipped: How many steps in a row it was not finite, this one included.
        scaled: Whether a loss scaler is at work, which skips the step and lowers its scale.
        steadier: As for `check_loss`.

    Raises:
        JobFailed: `nonfinite_gradient`.
    """
    if math.isfinite(grad_norm) or (scaled and skipped < MOST_SKIPPED):
        return
    times = f", the {skipped}th overflow in a row" if scaled else ""
    raise JobFailed(
        "nonfinite_gradient",
        f"the gradient norm is {grad_norm} at step {step}{times}",
        _lower(steadier),
    )


def _lower(steadier: str) -> str:
    return "lower the learning rate" + (f", or {steadier}" if steadier else "")


COLLAPSE_NATS = 0.5
"""How far the log-probability of a token of held-out chosen answers may fall before it is said: each is then 0.6 times
as likely as before. That both answers grow unlikely while their margin grows is known of these losses (Pal et al. 2024,
arXiv 2402.13228; Razin et al. 2024, arXiv 2410.08847); where it is too much is this program's choice."""


def doubts_about_pairs(
    figures: Mapping[str, float], before: Mapping[str, float], *, pairs: int, tokens: float
) -> dict[str, str]:
    """Return what is wrong with what held-out pairs show, by topic: a sentence each.

    Args:
        figures: Of the last evaluation, by the names of `PAIR_FIGURES`.
        before: The same before the first step.
        pairs: How many pairs were measured.
        tokens: Tokens that a chosen log-probability is of, in the mean.
    """
    found = {}
    right = round(figures["accuracy"] * pairs)
    most = share_interval([place < right for place in range(pairs)]).high
    if most is not None and most < 0.5:  # of two answers, chance prefers each as often
        found["accuracy"] = (
            f"the chosen answer is preferred in {figures['accuracy']:.0%} of {pairs} held-out pairs, less than chance: "
            "what is learnt does not carry over, or chosen and rejected answers are the wrong way round in some rows"
        )
    fall = (before["chosen_logp"] - figures["chosen_logp"]) / max(1.0, tokens)
    if fall > COLLAPSE_NATS:
        found["chosen"] = (
            f"the chosen answers of held-out pairs have become unlikely, too: {math.exp(-fall):.2f} times as likely a "
            "token as before the first step (a known failure of such losses, Razin et al. 2024). Lower the learning "
            "rate or train for fewer steps; dpo: raise train.beta"
        )
    return found


class MovementGuard:
    """Names, once the first steps are taken, the adapted modules that training does not change.

    A module has moved where a gradient has reached it and, if its matrix B began at zero, that is zero no longer.
    Weights alone would not tell: AdamW's weight decay changes a matrix A that no gradient reaches. Kept are two flags a
    tensor, on the host.
    """

    def __init__(self, model: nn.Module, warn: Callable[[str], None]) -> None:
        """Begin to watch.

        Args:
            model: Its trainable parameters are watched.
            warn: Told which modules have not moved, where others of their kind have.
        """
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for _, parameter in trained]
        self._modules = [_module_of(name, model) for name, _ in trained]
        self._warn = warn
        self._began_at_zero = _nonzero(self._parameters).logical_not_()
        self._reached = torch.zeros(len(trained), dtype=torch.bool, device="cpu")
        self._steps = 0

    def see_gradients(self) -> None:
        """Note which tensors have a gradient. Called before each optimizer step that is not skipped."""
        if self._steps < MOVED_BY_STEP:
            self._reached |= _nonzero([parameter.grad for parameter in self._parameters])

    def after_step(self, step: int) -> None:
        """Count an optimizer step that was not skipped; at the third, look for modules that have not moved.

        Raises:
            JobFailed: `adapter_not_moving` where nothing has moved, `dead_modules` where no module of a kind has.
        """
        self._steps += 1
        if self._steps != MOVED_BY_STEP:
            return
        changed = (self._reached & (_nonzero(self._parameters) | ~self._began_at_zero)).tolist()
        moved = {name for name, change in zip(self._modules, changed, strict=True) if change}
        every = list(dict.fromkeys(self._modules))
        if every and not moved:
            raise JobFailed(
                "adapter_not_moving",
                f"no adapter weight has changed in {self._steps} steps (up to step {step}): no gradient reaches them",
                "check adapter.targets, and that the chosen layers take part in the forward pass",
            )
        still = [name for name in every if name not in moved]
        # Where other experts of the same layer have moved, this one was not chosen by any token yet: it is not dead.
        active = {_EXPERT.sub(".experts", name) for name in moved if _EXPERT.search(name)}
        waiting = [name for name in still if _EXPERT.sub(".experts", name) in active]
        dead = [name for name in still if name not in waiting]
        self._refuse_dead_kinds(every, dead)
        if waiting:
            self._warn(
                f"{len(waiting)} of {len(every)} adapted modules belong to experts that no token chose in the first "
                f"{self._steps} steps: {shortened(waiting)}"
            )
        if dead:
            self._warn(
                f"{len(dead)} of {len(every)} adapted modules have not moved in the first {self._steps} steps, as no "
                f"gradient reaches them; they would be saved without effect: {shortened(dead)}"
            )

    def _refuse_dead_kinds(self, every: Sequence[str], dead: Sequence[str]) -> None:
        of_kind, dead_of_kind = (Counter(map(_kind, names)) for names in (every, dead))
        lost = [kind for kind, count in dead_of_kind.items() if count == of_kind[kind]]
        if not lost:
            return
        names = [name for name in dead if _kind(name) in lost]
        alive = sorted(of_kind.keys() - set(lost))
        raise JobFailed(
            "dead_modules",
            f"none of the adapted {' and '.join(lost)} modules has moved in {self._steps} steps: no gradient reaches "
            f"them, as the model does not call them or does not use what they return ({shortened(names)})",
            f"train without them: adapter.targets = [{', '.join(alive)}]",
        )


_EXPERT = re.compile(r"\.experts\.\d+(?=\.|$)")
_IN_PEFT = re.compile(r"^(?:model\.)?base_model\.model\.")
_ADDED = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+)\..*$")
_MOST_PATHS = 5


def _module_of(parameter: str, model: nn.Module) -> str:
    """Return the name in the base of the module, or of the bare parameter, that a trained tensor belongs to."""
    path = _ADDED.sub("", parameter)
    name = _IN_PEFT.sub("", path).replace(".base_layer", "")
    # peft wraps a module once for each of its bare parameters, such as a stack of experts, that is adapted.
    bare = getattr(model.get_submodule(path), "parameter_name", "") if path != parameter else ""
    return f"{name}.{bare}" if bare else name


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _nonzero(tensors: Sequence[Tensor | None]) -> Tensor:
    """Return which tensors have an entry that is not zero, bool `[tensors]` on the host; a missing one has none."""
    every = torch.zeros(len(tensors), dtype=torch.bool, device="cpu")
    places = [place for place, tensor in enumerate(tensors) if tensor is not None]
    there = [tensor.detach() for tensor in tensors if tensor is not None]
    if there:
        every[places] = (torch.stack([torch.linalg.vector_norm(tensor, math.inf) for tensor in there]) > 0).cpu()
    return every


def shortened(names: Sequence[str]) -> str:
    """Return module names in a line: those that differ in the layer only are one, such as `layers.{0-3,7}.mlp.up`."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        place = (name[: layer.start()], name[layer.end() :]) if layer else (name, "")
        layers.setdefault(place, []).extend([int(layer[0])] if layer else [])
    paths = []
    for (before, after), numbers in layers.items():
        span = _ranges(sorted(numbers))
        paths.append(before + (f"{{{span}}}" if len(numbers) > 1 else span) + after)
    more = f" and {len(paths) - _MOST_PATHS} more" if len(paths) > _MOST_PATHS else ""
    return ", ".join(paths[:_MOST_PATHS]) + more


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def check_adapter(weights: dict[str, Tensor]) -> None:
    """Refuse an adapter that holds a non-finite number, or whose B matrices are all zero and which thus does nothing.

    Raises:
        JobFailed: `adapter_nonfinite` or `adapter_zero`.
    """
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise JobFailed(
            "adapter_nonfinite",
            f"{len(broken)} of {len(weights)} adapter tensors hold NaN or infinity, the first is {broken[0]}",
            "resume from an earlier checkpoint with a lower learning rate",
        )
    second = [weight for name, weight in weights.items() if "lora_B" in name or "lora_embedding_B" in name]
    if second and not any(bool(weight.any()) for weight in second):
        raise JobFailed(
            "adapter_zero",
            "every B matrix of the adapter is zero: it would change nothing",
            "train for more steps, or check that gradients reach the adapter",
        )
