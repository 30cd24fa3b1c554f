"""Data sets as other tools name them, as words and columns of a recipe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from studio.core.foreign.carry import Carrier, Setting, as_number, is_off
from studio.core.sources import Source

_USUAL = {
    "messages": ("messages", "conversations", "conversation"),
    "instruction": ("instruction",),
    "input": ("input",),
    "completion": ("completion", "output", "response", "answer"),
    "prompt": ("prompt", "question"),
    "system": ("system", "system_prompt"),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt"),
    "reasoning": ("reasoning", "reasoning_content", "thinking"),
}
"""Names that the reader of data knows by itself: naming them again would only make other files of a mixture fail."""


SHARE = "held-out rows are counted here: eval.rows"
"""Why a share of the rows is not carried where nobody can say how many rows there are."""


@dataclass(slots=True)
class Rows:
    """One data set.

    Attributes:
        path: A file, a folder, or a data set of the hub.
        config: Which configuration of it; empty for the default.
        split: Which split; empty for train.
        revision: Branch, tag or commit.
        format: How rows are read; empty to recognise it.
        columns: What the file calls our columns.
        weight: Its share of a mixture; 0 for all rows.
        rows: So many of its rows; 0 for all.
    """

    path: str
    config: str = ""
    split: str = ""
    revision: str = ""
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    weight: float = 0.0
    rows: int = 0

    @property
    def word(self) -> str:
        """The one word that means it: `owner/name#configuration@revision:split`."""
        parts = (("#", self.config), ("@", self.revision), (":", self.split))
        return self.path + "".join(f"{mark}{part}" for mark, part in parts if part)

    @property
    def unusual(self) -> dict[str, str]:
        """The columns that would not be recognised by their names."""
        usual = {ours: (ours, *_USUAL.get(ours, ())) for ours in self.columns}
        return {ours: name for ours, name in self.columns.items() if name not in usual[ours]}


def with_split(carrier: Carrier, rows: Rows, given: Setting | None) -> Rows:
    """Return a data set with the split that a word names: `test`, or `train[:500]` for its first 500 rows.

    Other parts of a split, and several splits in one, are told as not carried.
    """
    word = str(given.value) if given else ""
    name = re.split(r"[\[+]", word)[0]
    rows.split = "" if name == "train" else name
    if first := re.fullmatch(r"[\w.-]+\[:(\d{1,9})\]", word):
        rows.rows = int(first[1])
    elif name != word and given:
        carrier.leave(given, "whole splits are read, or a number of rows: data.sources")
    return rows


def carry_rows(carrier: Carrier, given: Setting, rows: Sequence[Rows]) -> None:
    """Carry data sets: one as `data.path`, several, or a part of one, as a mixture."""
    if len(rows) == 1 and not rows[0].rows:
        one = rows[0]
        carrier.put("data.path", one.path, given)
        for path, value in (
            ("data.config", one.config),
            ("data.split", one.split),
            ("data.revision", one.revision),
            ("data.format", one.format),
            ("data.columns", one.unusual),
        ):
            if value:
                carrier.put(path, value, given)
        return
    if rows:
        note = "so many rows are drawn by train.seed; there, the first" if any(one.rows for one in rows) else ""
        sources = (Source(one.word, one.weight, one.rows, one.format, tuple(one.unusual.items())) for one in rows)
        carrier.put("data.sources", tuple(sources), given, note)


def carry_held_out(carrier: Carrier, name: str) -> None:
    """Carry how many rows are held out: a number of them, or a share that only the data turns into a number."""
    given = carrier.take(name)
    number = as_number(given.value) if given else 0
    if "data.eval_path" in carrier.carried:
        return
    if given is None or is_off(number):
        note = "nothing is held out: neither the run nor an audit can tell whether it learnt; set eval.rows"
        carrier.put("eval.rows", 0, given, note)
        carrier.put("eval.samples", 0, given, "samples are answers to held-out rows")
    elif isinstance(number, int | float) and number < 1:
        carrier.leave(given, SHARE, matters=False)
    else:
        carrier.put("eval.rows", number, given)
