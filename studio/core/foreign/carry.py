"""What was carried from another tool's settings into a recipe, and what was not, with the reason."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from studio.core.foreign.reasons import Reason
from studio.core.recipe import FIELDS, Recipe
from studio.core.text import plain
from studio.core.value_kinds import Number, found_value

_LONGEST_VALUE = 44


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the other tool.

    Attributes:
        key: Its name, as the user wrote it.
        value: Its value.
        line: The line of the file; 0 where it is not known.
    """

    key: str
    value: Any
    line: int = 0

    @property
    def words(self) -> str:
        """Name and value on one line."""
        return plain(f"{self.key} = {found_value(self.value)}", one_line=True, limit=_LONGEST_VALUE)


@dataclass(frozen=True, slots=True)
class Unread:
    """A value that only running the script would tell.

    Attributes:
        source: The expression as it stands there.
    """

    source: str

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True, slots=True)
class Carried:
    """A field of the recipe that says what the other tool's setting, or its default, says.

    Attributes:
        path: The field.
        value: Its value.
        setting: Where it comes from; None for what the other tool does where nothing is said.
        note: What is not quite the same; empty where it is.
    """

    path: str
    value: Any
    setting: Setting | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Left:
    """A setting that has no place in the recipe.

    Attributes:
        setting: It.
        why: The reason, and what to do where something can be done.
        matters: Whether the training differs without it.
    """

    setting: Setting
    why: str
    matters: bool


@dataclass(slots=True)
class Carrier:
    """Settings on their way into a recipe.

    Attributes:
        tool: The other tool, for messages.
        open: Settings that nobody has looked at yet, by the name that this room knows them by.
        carried: What was carried.
        left: What was not.
        names: What the tool calls what this room calls otherwise.
    """

    tool: str
    open: dict[str, Setting]
    names: Mapping[str, str] = field(default_factory=dict)
    carried: dict[str, Carried] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)

    def take(self, name: str) -> Setting | None:
        """Return a setting and count it as looked at; None where it is not given, or given as nothing."""
        setting = self.open.pop(self.names.get(name, name), None)
        return None if setting is None or is_nothing(setting.value) else setting

    def value(self, name: str, default: Any = None) -> Any:
        """Return a setting's value, which is looked at by this."""
        setting = self.take(name)
        return default if setting is None else setting.value

    def put(self, path: str, value: Any, setting: Setting | None = None, note: str = "") -> None:
        """Set a field of the recipe; a value that the field does not take is told as left."""
        if isinstance(value, Unread):
            if setting is not None:
                self.leave(setting, "")
            return
        kind = FIELDS[path].kind
        shaped = kind.shaped(as_number(value) if isinstance(kind, Number) else value)
        wrong = next(kind.wrong(shaped), None)
        if wrong is None:
            self.carried[path] = Carried(path, shaped, setting, note)
        elif setting is not None:
            self.leave(setting, f"{path} takes {wrong[1]}")

    def move(self, name: str, path: str, note: str = "") -> None:
        """Carry a setting whose values mean the same in a field."""
        if setting := self.take(name):
            self.put(path, setting.value, setting, note)

    def otherwise(self, path: str, value: Any, note: str = "") -> None:
        """Set a field to what the other tool does where the file says nothing of it."""
        if path not in self.carried:
            self.put(path, value, note=note)

    def leave(self, setting: Setting, why: str, *, matters: bool = True) -> None:
        """Tell a setting as not carried."""
        if isinstance(setting.value, Unread):
            why = f"only running the script would tell it; {why}" if why else "only running the script would tell it"
        self.left.append(Left(setting, why, matters))

    def leave_known(self, reasons: Iterable[Reason]) -> None:
        """Tell the settings that have a reason as not carried; those that are switched off say nothing."""
        for name, setting in list(self.open.items()):
            reason = next((each for each in reasons if each.is_of(name)), None)
            if reason is not None:
                del self.open[name]
                if not is_off(setting.value):
                    self.leave(setting, reason.why, matters=reason.matters)

    def leave_rest(self) -> None:
        """Tell what nobody has looked at."""
        for setting in self.open.values():
            if not is_off(setting.value):
                self.leave(setting, f"not a setting of {self.tool} that this program knows")
        self.open.clear()

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of what was carried."""
        recipe = Recipe().with_("name", name)
        for path, one in self.carried.items():
            recipe = recipe.with_(path, one.value)
        return recipe


def is_nothing(value: Any) -> bool:
    """Whether a key stands there without a value."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def is_off(value: Any) -> bool:
    """Whether a value says that nothing of the kind is wanted."""
    return is_nothing(value) or value is False or (isinstance(value, int | float) and value == 0) or value == "none"


def as_number(value: Any) -> Any:
    """Return the number of a text such as `2e-4`, which YAML takes for a text; anything else as it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def as_switch(value: Any) -> Any:
    """Return true or false for what means it; anything else as it is."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def names_in(value: Any) -> list[str] | None:
    """Return the names of a list, or of a text with commas between; None where it is neither."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    return None


def each_setting(table: Mapping[str, Any], lines: Mapping[str, int]) -> Iterator[tuple[str, Setting]]:
    """Yield the settings of a table by name.

    Args:
        table: A parsed file.
        lines: The line of each key.
    """
    for key, value in table.items():
        yield str(key), Setting(str(key), value, lines.get(key, 0))
