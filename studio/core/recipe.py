"""The recipe: everything a run is made from, frozen, one TOML file that a person can read and diff.

A recipe says what is wanted. It does not know the machine, the model's shape or the length of the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from studio.core.text import plain

Method = Literal["lora", "qlora"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
QuantType = Literal["nf4", "fp4"]
DataFormat = Literal["auto", "chat", "prompt_completion", "alpaca", "text"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Loss = Literal["chunked", "full", "liger"]
Packing = Literal["auto", "on", "off"]
AdapterInit = Literal["default", "gaussian", "pissa", "loftq"]

ALL_LINEAR = "all-linear"
EMBEDDED = "embedded"
_LONGEST_FOUND, _MOST_LISTED = 100, 20
_LONGEST_IN_TABLE = 40
_MOST_WHOLE = 10**300
"""Larger whole numbers, which TOML and JSON allow, are no float; the checks refuse them."""


@dataclass(frozen=True, slots=True)
class ModelSection:
    """The base model: which one, and how its frozen weights are held.

    `skip_modules` are modules that stay in 16 bit under QLoRA, a text read by `studio.core.adapter_text`.
    """

    base: str = EMBEDDED
    revision: str = ""
    dtype: Dtype = "auto"
    quant_type: QuantType = "nf4"
    double_quant: bool = True
    skip_modules: str = ""
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class AdapterSection:
    """The trainable part: low-rank pairs beside the chosen linear layers.

    `lora_plus_ratio` is B's learning rate over A's (LoRA+). The patterns, `layers` and `modules_to_save` (modules that
    are trained whole) are texts, read by `studio.core.adapter_text`.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: AdapterInit = "default"
    lora_plus_ratio: float = 1.0
    rank_pattern: str = ""
    alpha_pattern: str = ""
    layers: str = ""
    modules_to_save: str = ""


@dataclass(frozen=True, slots=True)
class DataSection:
    """The rows: where they are, how they are read, how many are held out."""

    path: str = EMBEDDED
    format: DataFormat = "auto"
    eval_path: str = ""
    answers_only: bool = True


@dataclass(frozen=True, slots=True)
class TrainSection:
    """The loop. `steps` are optimizer steps; 0 means that `epochs` decides. Lengths are tokens."""

    micro_batch: int = 1
    accumulation: int = 8
    seq_len: int = 1024
    steps: int = 0
    epochs: float = 1.0
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Optimizer = "adamw_torch"
    grad_checkpointing: bool = True
    offload_checkpoints: bool = False
    attention: Attention = "sdpa"
    loss: Loss = "chunked"
    packing: Packing = "auto"
    group_by_length: bool = True
    compile: bool = False
    seed: int = 17
    checkpoint_every: int = 100
    keep_checkpoints: int = 2


@dataclass(frozen=True, slots=True)
class EvalSection:
    """Held-out evaluation. `every` counts optimizer steps; 0 evaluates only before the first and after the last."""

    rows: int = 100
    every: int = 50
    samples: int = 3
    sample_tokens: int = 64


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """Where it runs. `auto` takes a CUDA card, else the CPU. A budget of 0 GiB means the whole card."""

    device: str = "auto"
    budget_gib: float = 0.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """One fine-tune, completely described."""

    name: str = "untitled"
    method: Method = "qlora"
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    device: DeviceSection = field(default_factory=DeviceSection)

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step sees on one device (the effective batch)."""
        return self.train.micro_batch * self.train.accumulation

    def get(self, path: str) -> Any:
        """Return the value at a dotted path such as `train.learning_rate`.

        Raises:
            KeyError: No field has this path.
        """
        value: Any = self
        for part in path.split("."):
            if not is_dataclass(value) or part not in {f.name for f in fields(value)}:
                raise KeyError(path)
            value = getattr(value, part)
        if is_dataclass(value):
            raise KeyError(path)
        return value

    def with_(self, path: str, value: Any) -> "Recipe":
        """Return a copy with the value at a dotted path replaced, in the field's own type where it means the same.

        So 4.0 is 4 in a field of whole numbers, and the list `["all-linear"]` is that word. What means nothing there is
        kept as it is, for `problems` to tell.

        Raises:
            KeyError: No field has this path.
        """
        self.get(path)
        value = _shaped(path, value)
        section, _, name = path.rpartition(".")
        if not section:
            return replace(self, **{name: value})
        return replace(self, **{section: replace(getattr(self, section), **{name: value})})

    def to_dict(self) -> dict[str, Any]:
        """Return plain tables and values in the order of the fields, ready for TOML or JSON (tuples become lists)."""
        table: dict[str, Any] = {}
        for path in PATHS:
            section, _, name = path.rpartition(".")
            value = self.get(path)
            target = table.setdefault(section, {}) if section else table
            target[name] = list(value) if isinstance(value, tuple) else value
        return table

    def problems(self) -> "tuple[Problem, ...]":
        """Return everything that is wrong with this recipe, in the order of its fields; empty when it is sound."""
        from studio.core.recipe_check import check  # noqa: PLC0415  the checks know the recipe, not the reverse

        return check(self)


def _shaped(path: str, value: Any) -> Any:
    kind = PATHS[path]
    if path == "adapter.targets" and isinstance(value, (list, tuple)):
        return ALL_LINEAR if list(value) == [ALL_LINEAR] else tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < _MOST_WHOLE else value
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe: the field's dotted path, what was found, what is allowed."""

    path: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}; wanted {self.allowed}"


def found_value(value: Any) -> str:
    """Return a value for a message: written as in a recipe, short enough for a line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return plain(f"[{', '.join(map(found_value, value[:_MOST_LISTED]))}]", limit=_LONGEST_FOUND)
    if isinstance(value, dict):
        return "a table"
    # Dates are written in TOML as Python prints them; texts need their quotes.
    return plain(repr(value) if isinstance(value, str | int | float) else str(value), limit=_LONGEST_FOUND)


def _paths() -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for name, kind in get_type_hints(Recipe).items():
        if is_dataclass(kind):
            hints.update({f"{name}.{inner}": hint for inner, hint in get_type_hints(kind).items()})
        else:
            hints[name] = kind
    return hints


PATHS: dict[str, Any] = _paths()
"""Every dotted path of a recipe and its declared type, in file order (scalars first, then tables)."""


def choices_of(path: str) -> tuple[str, ...]:
    """Return the words that a field allows, or nothing where it is not a choice."""
    return get_args(PATHS[path]) if str(PATHS[path]).startswith("typing.Literal") else ()


def differing_fields(recipes: "Sequence[Recipe | None]") -> dict[str, list[Any]]:
    """Return the fields in which recipes differ, each with its values in order; the name is no difference.

    Where a recipe is missing (another kind of job, or an unreadable file) its values are None, and are no difference.
    """
    values = {path: [None if recipe is None else recipe.get(path) for recipe in recipes] for path in PATHS}
    known = [place for place, recipe in enumerate(recipes) if recipe is not None]
    return {
        path: found
        for path, found in values.items()
        if path != "name" and any(found[place] != found[known[0]] for place in known)
    }


def field_text(value: Any) -> str:
    """Return a field's value for a table: yes and no as on and off, lists joined, nothing as such."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return plain(text or "(empty)", one_line=True, limit=_LONGEST_IN_TABLE)
