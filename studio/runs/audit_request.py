"""What an audit was asked to measure."""

from dataclasses import dataclass
from typing import ClassVar

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.text import plain

WHAT = ("base", "run", "race")
"""A base in several roundings; one adapter on everything it can be put on; two trainings of one recipe."""


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
