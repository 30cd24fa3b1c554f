"""What makes a recipe sound: types, limits, choices, rules between fields. Collects all problems, stops at none."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from studio.core.adapter_text import LAYERS_FORM, MODULES_FORM, PATTERN_FORM, layers_of, modules_of, pattern_of
from studio.core.knobs import KNOBS
from studio.core.recipe import ALL_LINEAR, PATHS, Problem, Recipe, choices_of, found_value

_NEEDED = ("name", "model.base", "data.path", "device.device")
_PATTERNS = {"adapter.rank_pattern": "adapter.rank", "adapter.alpha_pattern": "adapter.alpha"}
_LISTS: dict[str, tuple[Callable[[str], object], str]] = {
    "adapter.layers": (layers_of, LAYERS_FORM),
    "adapter.modules_to_save": (modules_of, MODULES_FORM),
    "model.skip_modules": (modules_of, MODULES_FORM),
}
DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
"""What `device.device` may say; `studio.probe.device` says what it means."""
DEVICE_FORM = "auto, cpu, cuda or cuda:N"


def check(recipe: Recipe) -> tuple[Problem, ...]:
    """Return every problem of the recipe in the order of its fields, then those between fields."""
    found = [problem for path in PATHS for problem in _field(path, recipe.get(path))]
    wrong = {problem.path for problem in found}
    return (*found, *(problem for problem in _between(recipe) if problem.path not in wrong))


def _field(path: str, value: Any) -> Iterator[Problem]:
    choices = choices_of(path)
    knob = KNOBS.get(path)
    if choices:
        if value not in choices:
            yield Problem(path, found_value(value), " or ".join(choices))
    elif path == "adapter.targets":
        yield from _targets(value)
    elif PATHS[path] is bool:
        if not isinstance(value, bool):
            yield Problem(path, found_value(value), "true or false")
    elif PATHS[path] is str:
        yield from _text(path, value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        yield Problem(path, found_value(value), knob.allowed if knob else "a number")
    elif (isinstance(value, float) and not math.isfinite(value)) or (PATHS[path] is int and not isinstance(value, int)):
        yield Problem(path, found_value(value), knob.allowed if knob else "a whole number")
    elif knob and not knob.low <= value <= knob.high:
        yield Problem(path, found_value(value), knob.allowed)


def _targets(value: Any) -> Iterator[Problem]:
    names = (value,) if isinstance(value, str) else value
    sound = isinstance(names, tuple) and names and all(isinstance(name, str) and name.strip() for name in names)
    if not sound or (ALL_LINEAR in names and len(names) > 1):
        yield Problem(
            "adapter.targets",
            found_value(value),
            f'"{ALL_LINEAR}" or a list of module names such as ["q_proj", "v_proj"]',
        )


def _text(path: str, value: Any) -> Iterator[Problem]:
    if not isinstance(value, str):
        yield Problem(path, found_value(value), "text in quotes")
    elif not value.strip() and path in _NEEDED:
        yield Problem(path, "nothing", "a name or path")
    elif "\0" in value or not _encodable(value):
        yield Problem(path, found_value(value), "text without NUL characters and lone surrogates")
    elif path == "device.device" and not DEVICE.fullmatch(value):
        yield Problem(path, found_value(value), DEVICE_FORM)
    elif path in _LISTS:
        read, form = _LISTS[path]
        try:
            read(value)
        except ValueError as error:
            yield Problem(path, found_value(str(error)), form)
    elif path in _PATTERNS:
        yield from _pattern(path, value)


def _pattern(path: str, text: str) -> Iterator[Problem]:
    try:
        numbers = pattern_of(text)
    except ValueError as error:
        yield Problem(path, found_value(str(error)), PATTERN_FORM)
        return
    knob = KNOBS[_PATTERNS[path]]
    for name, number in numbers.items():
        whole = PATHS[_PATTERNS[path]] is not int or number.is_integer()
        if not (knob.low <= number <= knob.high and whole):
            yield Problem(path, f"{name}={number:g}", knob.allowed)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _between(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    if train.steps == 0 and train.epochs == 0:
        yield Problem("train.steps", "0 steps and 0 epochs", "at least one of train.steps and train.epochs above 0")
    if recipe.eval.rows == 0 and recipe.eval.samples > 0 and not recipe.data.eval_path:
        yield Problem(
            "eval.samples", f"{recipe.eval.samples} with no held-out rows", "eval.rows above 0, or eval.samples 0"
        )
    if train.offload_checkpoints and not train.grad_checkpointing:
        yield Problem("train.offload_checkpoints", "true without checkpoints", "train.grad_checkpointing true")
    yield from _between_adapter(recipe)


def _between_adapter(recipe: Recipe) -> Iterator[Problem]:
    init = recipe.adapter.init
    if init == "loftq" and recipe.method != "qlora":
        yield Problem("adapter.init", "loftq with method lora", "method qlora: loftq repairs the loss of 4-bit weights")
    if init == "pissa" and recipe.method == "qlora":
        yield Problem(
            "adapter.init", "pissa with method qlora", "loftq, which is made for 4-bit weights, or method lora"
        )
    if init in ("loftq", "pissa") and recipe.adapter.dora:
        yield Problem("adapter.init", f"{init} with dora", "adapter.dora false, or init default or gaussian")
