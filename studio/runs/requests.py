"""What jobs other than a training are asked to do: a merge, an export, an audit, a measurement."""

from dataclasses import dataclass
from typing import ClassVar

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.text import plain

ONTO = ("original", "dequantized")
"""What an adapter can be merged into: the base's weights, or those after quantising to 4 bits and back."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """An adapter whose delta is added times a weight.

    Attributes:
        adapter: Absolute path of the PEFT folder.
        weight: A finite number.
    """

    adapter: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """A merge of an adapter into its base.

    Attributes:
        adapter: Absolute path of the PEFT folder.
        base: A model folder, a hub id or `embedded`; empty means the one that the adapter names.
        revision: Revision of a hub model; empty means the newest.
        out: Absolute path of the merged model's folder.
        dtype: Type of the merged weights; `auto` keeps that of the base.
        onto: `original`, the base's own weights; `dequantized`, those after quantising to 4 bits and back, which a
            QLoRA adapter was trained against.
        run: Absolute path of the training run that the adapter comes from; empty when there is none.
        checkpoint: Absolute path of a checkpoint of that run, whose weights take the place of the adapter's.
        weight: What the adapter's delta is multiplied by.
        more: Further adapters; their deltas are added one after another.
        then: Formats that the merged model is exported to afterwards, each as a run of its own, one after another.
    """

    kind: ClassVar[str] = "merge"
    adapter: str
    base: str
    out: str
    revision: str = ""
    dtype: str = "auto"
    onto: str = "original"
    run: str = ""
    checkpoint: str = ""
    weight: float = 1.0
    more: tuple[Weighted, ...] = ()
    then: tuple[str, ...] = ()

    @property
    def weighted(self) -> tuple[tuple[str, float], ...]:
        """Folder and weight of every adapter, in the order in which they are added."""
        return ((self.adapter, self.weight), *((one.adapter, one.weight) for one in self.more))


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """A model in another format, or an adapter with its card.

    Attributes:
        source: Absolute path of a merged model's folder, or of an adapter's, which is merged first if the format
            wants a whole model.
        out: Absolute path of the folder that it gets, or of the file where it ends in `.gguf`.
        format: A key of `studio.core.export_formats.FORMATS`.
        run: Absolute path of the training run of an adapter; empty when there is none.
        base: Base of an adapter: a model folder, a hub id or `embedded`; empty means the one that the adapter names.
        revision: Revision of a hub model; empty means the newest.
        onto: What an adapter is merged into, one of `ONTO`.
        push: Hub repository that the result is uploaded to as well; empty for none.
        then: Formats that the same model is exported to afterwards, as for a merge.
    """

    kind: ClassVar[str] = "export"
    source: str
    out: str
    format: str
    run: str = ""
    base: str = ""
    revision: str = ""
    onto: str = "original"
    push: str = ""
    then: tuple[str, ...] = ()


WHAT = ("base", "run", "race")
"""A base in several roundings; one adapter on everything it can be put on; trainings of one recipe that differ."""
LANES = ("lora", "qlora", "qlora+loftq", "qlora+mixed")
"""What can race: a method, and after the plus how its adapter begins or which of its blocks stay in 16 bit."""


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """A measurement of what 4 bits cost.

    Attributes:
        what: One of `WHAT`.
        model: A model folder, a hub id or `embedded`; for a run empty means the one that it was trained on.
        revision: Of a hub model; empty means the newest.
        data: Absolute path of the data file; for a run that of its held-out rows, or any other file.
        format: How the data are read, one of the recipe's.
        run: Absolute path of the training run; empty where none is audited.
        recipe: The recipe whose methods race; None where none do.
        merged: Absolute paths of merged model folders that are measured beside a run's other forms.
        text: Absolute path of the neutral text; empty means the built-in one.
        rows: Most rows of the data. Of a run only rows that it held out, or never saw, are measured, however many.
        seq_len: Longest row, tokens.
        seed: Chooses where there are more rows than are wanted.
        forms: Roundings of a base.
        precision: What a recipe holds in other bits than 4 (`model.precision`, on one line), to be measured as well.
        kept: How many of the worst blocks each mixed plan keeps in 16 bit; none measures none.
        lanes: Methods that race.
        answers: How many held-out prompts a run's forms answer; 0 for none.
        answer_tokens: Longest answer; 0 means from the held-out answers.
        check_regex: A regular expression that answers are checked with; empty for none.
        lm_eval: Tasks of lm-eval, or paths of task files.
        lm_eval_limit: Most documents of each such task; 0 for all.
        gguf: Absolute paths of GGUF files that are measured beside a run's other forms.
        speed: Whether the tokens a second of serving a run's forms are measured.
        device: Where a base or a run is measured, as in a recipe; `auto` takes the run's own card where it is visible.
    """

    kind: ClassVar[str] = "audit"
    what: str
    model: str = ""
    revision: str = ""
    data: str = ""
    format: str = "auto"
    run: str = ""
    recipe: Recipe | None = None
    merged: tuple[str, ...] = ()
    text: str = ""
    rows: int = 100
    seq_len: int = 1024
    seed: int = 17
    forms: tuple[str, ...] = ("nf4", "nf4+dq", "fp4", "int8")
    precision: str = ""
    kept: tuple[int, ...] = (1, 2, 4)
    lanes: tuple[str, ...] = ("lora", "qlora")
    answers: int = 0
    answer_tokens: int = 0
    check_regex: str = ""
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int = 0
    gguf: tuple[str, ...] = ()
    speed: bool = True
    device: str = "auto"

    def check_lanes(self) -> None:
        """Check the lanes of a race.

        Raises:
            BadInput: They are not two or more different ones of `LANES`.
        """
        if len(set(self.lanes)) < 2 or len(set(self.lanes)) != len(self.lanes) or not set(self.lanes) <= set(LANES):
            found = plain(",".join(self.lanes), one_line=True, limit=80) or "nothing"
            raise BadInput(f"lanes: found {found}; wanted two or more of {', '.join(LANES)}, each once.")


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """A training step whose memory is measured.

    Attributes:
        recipe: The recipe whose step it is.
        how: `auto` measures on the card where there is one; `trace` never needs one.
        device: `cuda` or `cpu`: what a trace is for.
        dtype: bf16, fp16 or fp32: what the recipe's `auto` means there.
        capability: Compute capability of the card: major and minor.
    """

    kind: ClassVar[str] = "measure"
    recipe: Recipe
    how: str = "auto"
    device: str = "cuda"
    dtype: str = "bf16"
    capability: tuple[int, int] = (8, 0)
