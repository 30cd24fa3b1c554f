"""One field of a recipe: which values it may have, and what is said about it.

`studio.core.recipe` declares the fields. Form, flags, help, reference and checks come from what is declared there.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from studio.core.value_kinds import ValueKind

T = TypeVar("T")

Resume = Literal["same", "rounded", "free", "by content"]
"""What a resumed run may do with a field.

`same`: nothing, it must stay as it was. `rounded`: change it, since the same sums come in another order and
only round otherwise. `free`: change it at will, since it decides only what is seen and kept of the training, or where
it runs. `by content`: name another place of the same base or data, which are compared.
"""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe: the field's dotted path, what was found, what is allowed."""

    path: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}; wanted {self.allowed}"


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the recipe.

    Attributes:
        path: Its dotted path.
        default: Its value where nobody sets one.
        kind: Which values it may have.
        label: Its name on the screen.
        help: What it is, for a user.
        cost: What turning it up costs or buys; numbers, also of layers, alone have one.
        flag: Its command-line flag, without dashes; empty where only `--set` reaches it.
        heading: Under which heading screens and reference show it; empty for that of its table.
        resume: What a resumed run may do with it.
        four_bit: Whether it matters only with QLoRA, so that the form shows it only then.
        pairs: The same for objectives that learn from pairs.
    """

    path: str
    default: Any
    kind: ValueKind
    label: str
    help: str
    cost: str = ""
    flag: str = ""
    heading: str = ""
    resume: Resume = "same"
    four_bit: bool = False
    pairs: bool = False

    def problems(self, value: Any) -> Iterator[Problem]:
        """Yield everything that is wrong with a value of this field."""
        return (Problem(self.path, found, allowed) for found, allowed in self.kind.wrong(value))


def declared(
    default: T,
    kind: ValueKind,
    label: str,
    words: str,
    *,
    cost: str = "",
    flag: str = "",
    heading: str = "",
    resume: Resume = "same",
    four_bit: bool = False,
    pairs: bool = False,
) -> T:
    """Declare a field of a section, as `Field` describes it; typed as the value that the field has."""
    said = Field("", default, kind, label, words, cost, flag, heading, resume, four_bit, pairs)
    return dataclasses.field(default=default, metadata={Field: said})


def fields_in(recipe: Any, headings: Mapping[str, str]) -> dict[str, Field]:
    """Return every declared field of a recipe by its dotted path, in the order in which they are declared.

    Args:
        recipe: A recipe; its own fields are declared, or are sections whose fields are.
        headings: By section, the heading of fields that name none.
    """
    found: dict[str, Field] = {}
    for place in dataclasses.fields(recipe):
        own = Field in place.metadata
        for inner in (place,) if own else dataclasses.fields(getattr(recipe, place.name)):
            said: Field = inner.metadata[Field]
            section, path = ("", inner.name) if own else (place.name, f"{place.name}.{inner.name}")
            found[path] = dataclasses.replace(said, path=path, heading=said.heading or headings[section])
    return found
