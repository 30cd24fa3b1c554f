"""What a training makes of a data file, shown row by row and added up: the values, and the process that makes them.

The process (`python -m studio.jobs.show`) loads a tokenizer and its chat template, but no model and no torch. It is
asked and answers over pipes, see `studio.runs.piped`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from studio.core.recipe import Recipe
from studio.runs.piped import Loading, NotAnswered, PipedProcess

MODULE = "studio.jobs.show"
MOST_TOKENS = 100_000
"""Tokens of one example that are shown; of a whole book the rest is counted only."""
Filter = Literal["all", "cut", "left out", "held out", "repeats"]
FILTERS: tuple[Filter, ...] = ("all", "cut", "left out", "held out", "repeats")


@dataclass(frozen=True, slots=True)
class ShowRequest:
    """What is shown.

    Attributes:
        recipe: Names model and data, and says how rows are read, split and encoded.
        run: The folder of the run that the recipe belongs to; its date and its held-out rows are taken. Empty for none.
        gentle: Whether everything else on the machine goes first.
        pairs: Whether a file of nothing but pairs of answers is shown as what DPO learns, whatever the recipe learns.
    """

    recipe: Recipe
    run: str = ""
    gentle: bool = False
    pairs: bool = False

    def table(self) -> dict[str, Any]:
        """Return it as the first line of the process."""
        asked = {"run": self.run, "gentle": self.gentle, "pairs": self.pairs}
        return {"load": {"recipe": self.recipe.to_dict(), **asked}}


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One example as the model sees it. A row has several where its template makes one of each answer.

    Attributes:
        part: Which one of its row: empty where there is one, else such as `2 of 3`, `chosen` or `rejected`.
        ids: Token ids, the first `MOST_TOKENS`.
        tokens: The text of each token; of several tokens that make up one character the last has it.
        trained: The ranges `[begin, end)` of tokens that are learnt, those behind the cut too.
        special: The places of special tokens.
        length: Tokens of the example before it is cut.
        kept: Tokens that are left of it at the row length.
    """

    part: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    trained: tuple[tuple[int, int], ...]
    special: tuple[int, ...]
    length: int
    kept: int

    @property
    def learnt(self) -> int:
        """Tokens that are learnt within the row length. The first token has none before it and is never predicted."""
        return sum(max(0, min(end, self.kept) - max(begin, 1)) for begin, end in self.trained)

    @property
    def text(self) -> str:
        """What the model reads."""
        return "".join(self.tokens)

    @property
    def trained_text(self) -> tuple[tuple[int, int], ...]:
        """The ranges `[begin, end)` of characters in `text` that are learnt."""
        places = [0]
        for token in self.tokens:
            places.append(places[-1] + len(token))
        last = len(self.tokens)
        return tuple((places[min(begin, last)], places[min(end, last)]) for begin, end in self.trained)


@dataclass(frozen=True, slots=True)
class Opened:
    """The rows are read and can be asked for.

    Attributes:
        path: The file.
        described: What it is, in words.
        format: The format that was recognised.
        rows: Usable rows, those of a held-out file too.
        held_out: How many of them are held out.
        left_out: Rows that the reading left out, by reason.
        findings: What was found in single rows: kind, row, field, message, fatal.
        finding_counts: How often each kind was found in all.
        notes: What the user should know of the file, the split and the template.
        template: `own`, `plain` where the model has none, or `none` for plain text.
    """

    path: str = ""
    described: str = ""
    format: str = ""
    rows: int = 0
    held_out: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    findings: tuple[Mapping[str, Any], ...] = ()
    finding_counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    template: str = "own"


@dataclass(frozen=True, slots=True)
class RowShown:
    """One row.

    Attributes:
        place: Its place among the usable rows, from 0.
        rows: How many usable rows there are.
        number: Its line in a JSONL file, else its place in the file from 1.
        held_out: Whether it is held out.
        examples: What is trained on; none where the row is left out.
        left_out: Why it is left out, a reason of `studio.core.left_out`; empty where it is not.
        why: The same in words.
        repeat_of: The number of the first row that says the same or nearly so; 0 for none that is known yet.
    """

    place: int
    rows: int
    number: int
    held_out: bool = False
    examples: tuple[ShownExample, ...] = ()
    left_out: str = ""
    why: str = ""
    repeat_of: int = 0

    def __post_init__(self) -> None:
        """Make examples of the tables that come over the pipe."""
        made = (ShownExample(**one) if isinstance(one, dict) else one for one in self.examples)
        object.__setattr__(self, "examples", tuple(made))


@dataclass(frozen=True, slots=True)
class NoRow:
    """There is no such row; `message` says why in words."""

    message: str
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """The rows that were encoded so far, added up at a row length.

    Attributes:
        done: Rows that are in it.
        rows: All of them.
        seq_len: The row length, in tokens.
        made: Examples that were made of the rows.
        examples: Those of them that are kept; `held_out_examples` of them are measured on only.
        held_out_examples: As said.
        lengths: Least, median, 95th percentile, most and sum of the examples' tokens before the cut.
        learnt: The same of the learnt tokens of the examples that are kept.
        edges: The edges of the histogram's bars in tokens, one more than bars.
        counts: The examples of each bar.
        cut: Examples that lose their end.
        cut_tokens: Tokens that are lost with it.
        cut_learnt: Those of them that would have been learnt.
        tokens: Tokens of the kept examples.
        loss_tokens: Those of them that are learnt.
        left_out: Rows that are left out by reason, those that the reading left out too.
        train_tokens: Tokens of an epoch.
        steps: Optimizer steps of an epoch.
        repeats: Rows that say exactly what an earlier one says.
        near: Further rows that say nearly the same as an earlier one.
        pairs: The first of both, as (row, earlier row, similarity 0 to 1).
        compared: Rows that were compared for it.
        said: What the encoding has to say of the rows, in sentences.
    """

    done: int = 0
    rows: int = 0
    seq_len: int = 0
    made: int = 0
    examples: int = 0
    held_out_examples: int = 0
    lengths: Mapping[str, float] | None = None
    learnt: Mapping[str, float] | None = None
    edges: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    cut: int = 0
    cut_tokens: int = 0
    cut_learnt: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    train_tokens: int = 0
    steps: int = 0
    repeats: int = 0
    near: int = 0
    pairs: tuple[tuple[int, int, float], ...] = ()
    compared: int = 0
    said: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all rows are in it."""
        return self.done >= self.rows

    @property
    def trained_share(self) -> float | None:
        """The share of the tokens that is learnt, 0 to 1; None without tokens."""
        return self.loss_tokens / self.tokens if self.tokens else None


ShowEvent = Loading | Opened | RowShown | NoRow | Summary | NotAnswered
EVENTS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Loading, Opened, RowShown, NoRow, Summary, NotAnswered)
}


class ShowProcess(PipedProcess[ShowEvent]):
    """The parent's end. Use as a context: leaving it ends the process.

    It tells `Loading` and then `Opened`, and after that adds up all rows by itself, telling a `Summary` now and then.
    Whatever is asked in between is answered at once.
    """

    def __init__(self, request: ShowRequest, *, module: str = MODULE) -> None:
        """Start the process; it reads the rows at once.

        Raises:
            StudioError: It cannot be started.
        """
        super().__init__(module, request.table(), name="look at the data", kinds=EVENTS, failed=NotAnswered, here=True)

    def ask_place(self, place: int) -> None:
        """Ask for the row at a place among the usable ones, from 0."""
        self._send({"place": place})

    def ask_number(self, number: int) -> None:
        """Ask for a row by its number in the file."""
        self._send({"number": number})

    def ask_next(self, place: int, step: int, only: Filter = "all", words: str = "", *, around: bool = False) -> None:
        """Ask for the next row of a kind.

        Args:
            place: Where the search begins; the row there is none of the answers.
            step: 1 for a later row, -1 for an earlier one.
            only: Which rows count.
            words: What the row must say, whatever its letter case; empty for anything.
            around: Whether to go on at the other end.
        """
        self._send({"next": {"place": place, "step": step, "only": only, "words": words, "around": around}})

    def cut_at(self, seq_len: int, rows_per_step: int) -> None:
        """Cut at another row length, and take other steps, from now on; a new summary follows."""
        self._send({"seq_len": seq_len, "rows_per_step": rows_per_step})

    def stop(self) -> None:
        """Add up no further rows."""
        self._send({"stop": True})
