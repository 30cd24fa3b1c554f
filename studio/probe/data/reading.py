"""How a data file is to be read: what a recipe says of it, and checks without a recipe ask for."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from studio.core.columns import FIELD_NAMES, Pairs
from studio.core.preferences import takes_pairs
from studio.core.recipe import OnBadRow, Recipe
from studio.core.sources import Source

Wants = Literal["any", "answers", "measured", "pairs", "labels"]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a data file is read.

    Attributes:
        format: `auto`, or the format that the file must have.
        answers_only: Whether only the answers will be trained. If not, a message that is marked as untrained is
            refused.
        on_bad_row: `stop`: a wrong row keeps the file from being used; `skip`: it is left out, and counted.
        wants: What the rows must be. `answers`: conversations and texts to learn, so that two answers of which one is
            preferred are refused. `pairs`: such preferences and nothing else (DPO, ORPO). `labels`: answers that say
            whether they are desirable (KTO). `measured`: answers or pairs, for audits. `any`: whatever the file has,
            for a check without an objective.
        columns: Our names of columns and fields of messages, and what the file calls them.
        prompt: A jinja line that writes the prompt from the file's columns; empty for none.
        config: The configuration of a data set of the hub; empty for the one that it has, or its default.
        split: The split of a folder or a data set of the hub; `all` for all; empty for the first of `prefer` there.
        revision: Branch, tag or commit of a data set of the hub; empty for its newest.
        prefer: Splits in the order in which they are taken unasked.
    """

    format: str = "auto"
    answers_only: bool = True
    on_bad_row: OnBadRow = "stop"
    wants: Wants = "answers"
    columns: Pairs = ()
    prompt: str = ""
    config: str = ""
    split: str = ""
    revision: str = ""
    prefer: tuple[str, ...] = ("train",)

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Return how a recipe's data is read."""
        data = recipe.data
        wants: Wants = "pairs" if takes_pairs(recipe.train.objective) else "answers"
        return cls(
            data.format,
            data.answers_only,
            data.on_bad_row,
            wants,
            data.columns,
            data.prompt,
            config=data.config,
            split=data.split,
            revision=data.revision,
        )

    @classmethod
    def of_table(cls, table: Mapping[str, Any], **others: Any) -> Self:
        """Return how a file was read, from what `table` returned; what is unknown in it is passed over.

        Args:
            table: What was kept.
            **others: Values in place of those that were kept.
        """
        known = {name: table[name] for name in ("format", "prompt") if isinstance(table.get(name), str)}
        columns = table.get("columns")
        pairs = tuple((str(ours), str(column)) for ours, column in columns) if isinstance(columns, list) else ()
        return cls(**known | {"columns": pairs} | others)

    def table(self) -> dict[str, Any]:
        """Return what decides how the rows of a file are made, ready for JSON."""
        return {"format": self.format, "columns": [list(pair) for pair in self.columns], "prompt": self.prompt}

    def key(self, ours: str) -> str:
        """Return what the file calls a column, a field of messages or a role that we call by this name."""
        return next((column or ours for name, column in self.columns if name == ours), ours) if self.columns else ours

    def in_file(self, field: str) -> str:
        """Return the place of a finding in the file's own words."""
        if not self.columns:
            return field
        return re.sub(r"(?:^|(?<=, ))\w+", lambda word: self.key(word[0]), field)

    def displaced(self, value: Mapping[str, Any]) -> Iterable[str]:
        """Return the columns of a row that have one of our names by chance, and give way to what is mapped."""
        mapped = {column for _, column in self.columns}
        return (ours for ours, _ in self.columns if ours in value and ours not in mapped and ours not in FIELD_NAMES)

    def renamed(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return a row with our names for its columns; a column that has one of our names by chance gives way."""
        ours = {column: name for name, column in self.columns if name not in FIELD_NAMES and column in value}
        taken = {*ours.values(), *(name for name, column in self.columns if not column)}
        if taken.isdisjoint(value) and not ours:
            return value
        kept = {name: part for name, part in value.items() if name not in ours and name not in taken}
        return {name: value[column] for column, name in ours.items()} | kept

    def held_out(self, *, same_place: bool) -> Self:
        """Return how held-out data is read: of its splits one to measure on, where its word does not say another.

        Args:
            same_place: Whether it is the data set that is trained on, so that configuration and revision are its too.
        """
        own = self if same_place else replace(self, config="", revision="")
        return replace(own, split="", prefer=("validation", "test", "train"))

    def of_source(self, source: Source) -> Self:
        """Return how one source of a mixture is read, of which the word says configuration, split and revision."""
        return replace(
            self,
            format=source.format or self.format,
            columns=source.columns or self.columns,
            prompt=source.prompt or self.prompt,
            config="",
            split="",
            revision="",
        )


AS_IT_IS = Reading()
"""The format is recognised, and answers alone are trained."""
