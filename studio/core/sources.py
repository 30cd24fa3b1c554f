"""The sources of a mixture: several data files of one training, each with how much of it is drawn.

A source gives all its rows, or so many `rows`, or as many as its `weight` says. Weights share out among themselves what
the sources that have one can give without repeating a row (`drawn_rows`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from studio.core.columns import Columns, Pairs, escaped
from studio.core.text import plain
from studio.core.value_kinds import Choice, Number, Text, ValueKind, found_value

_WEIGHT = Number(float, 0.000_001, 1_000_000)
_ROWS = Number(int, 1, 1_000_000_000, "rows")
_PATH = Text(needed=True, place=True)
_COLUMNS = Columns()
_MOST = 100


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a mixture.

    Attributes:
        path: The file, or `embedded`.
        weight: Its share among the sources with a weight; 0 for none.
        rows: So many rows are drawn; more than it has repeats them. 0 for no number.
        format: How its rows are read; empty for `data.format`.
        columns: Our names of columns and what the file calls them; empty for `data.columns`.
        prompt: The line that writes its prompts; empty for `data.prompt`.
    """

    path: str
    weight: float = 0.0
    rows: int = 0
    format: str = ""
    columns: Pairs = ()
    prompt: str = ""

    def table(self) -> dict[str, Any]:
        """Return what is set, as TOML and JSON hold it."""
        table = {**asdict(self), "columns": dict(self.columns)}
        return {name: value for name, value in table.items() if value or name == "path"}


@dataclass(frozen=True, slots=True)
class Sources(ValueKind):
    """A list of sources.

    Attributes:
        formats: The formats that a source may name.
    """

    formats: tuple[str, ...]

    @property
    def allowed(self) -> str:
        """The list."""
        return (
            'a list of tables with path and at most one of weight and rows, such as [{ path = "a.jsonl", weight = 2 }, '
            '{ path = "b.jsonl", rows = 500 }]; on one line also: a.jsonl=2, b.jsonl=1'
        )

    def shaped(self, value: Any) -> Any:
        """Return tables as sources; what is none stays as it is."""
        return tuple(map(self._source, value)) if isinstance(value, (list, tuple)) else value

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no list, too many sources, and whatever is wrong with one of them."""
        if not isinstance(value, tuple):
            yield found_value(value), self.allowed
            return
        if len(value) > _MOST:
            yield f"{len(value)} sources", f"{_MOST} at most"
        for number, source in enumerate(value, 1):
            yield from ((f"source {number}: {found}", wanted) for found, wanted in self._wrong_source(source))

    def read(self, text: str) -> Any:
        """Read a list as TOML has it, or paths with commas between, each with `=weight` where it has one."""
        text = text.strip()
        if text.startswith("["):
            import tomllib  # noqa: PLC0415  3 ms that recipes without sources do not pay

            try:
                return self.shaped(tomllib.loads(f"sources = {text}")["sources"])
            except (ValueError, RecursionError):
                return text
        tables: list[dict[str, Any]] = []
        for part in filter(None, map(str.strip, text.split(","))):
            path, equals, number = part.rpartition("=")
            weight = _WEIGHT.read(number.strip()) if equals else number
            weighed = bool(path.strip()) and not isinstance(weight, str)
            tables.append({"path": path.strip(), "weight": weight} if weighed else {"path": part})
        return self.shaped(tables)

    def written(self, value: Any) -> str:
        """Write paths with their weights, or a list as TOML has it where there is more to say."""
        if not isinstance(value, tuple) or not all(isinstance(source, Source) for source in value):
            return found_value(value) if isinstance(value, (tuple, list)) else str(value)
        if all(source == Source(source.path, source.weight) and not set(source.path) & set(",=[") for source in value):
            return ", ".join(f"{one.path}={one.weight:g}" if one.weight else one.path for one in value)
        return f"[{', '.join(_inline(source) for source in value)}]"

    def stored(self, value: Any) -> Any:
        """Return the list of tables."""
        if not isinstance(value, tuple):
            return value
        return [source.table() if isinstance(source, Source) else source for source in value]

    def _source(self, value: Any) -> Any:
        if not isinstance(value, Mapping) or any(self._wrong_table(value)):
            return value
        weight, rows = _WEIGHT.shaped(value.get("weight", 0.0)), _ROWS.shaped(value.get("rows", 0))
        columns = _COLUMNS.shaped(value.get("columns", ()))
        return Source(value["path"], weight, rows, value.get("format", ""), columns, value.get("prompt", ""))

    def _wrong_source(self, source: Any) -> Iterator[tuple[str, str]]:
        if isinstance(source, Source):
            return
        if isinstance(source, Mapping):
            yield from self._wrong_table(source)
        else:
            yield found_value(source), 'a table such as { path = "a.jsonl", weight = 2 }'

    def _wrong_table(self, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        kinds: dict[str, ValueKind] = {
            "path": _PATH,
            "weight": _WEIGHT,
            "rows": _ROWS,
            "format": Choice(self.formats),
            "columns": _COLUMNS,
            "prompt": Text(),
        }
        for key in (key for key in table if key not in kinds):
            yield f"the key {plain(str(key), one_line=True, limit=40)}", f"one of {', '.join(kinds)}"
        for key, kind in kinds.items():
            if key in table or key == "path":
                for found, wanted in kind.wrong(kind.shaped(table.get(key, ""))):
                    yield f"{key} = {found}", wanted
        if "weight" in table and "rows" in table:
            yield "weight and rows", "one of them: a share of the mixture, or a number of rows"


def drawn_rows(sources: Sequence[Source], there: Sequence[int], sizes: Sequence[float] | None = None) -> list[int]:
    """Return how many rows are drawn of each source.

    Args:
        sources: What is wanted of each.
        there: How many rows each has.
        sizes: The mean size of each one's rows, where weights are shares of tokens; None where they are of rows.
    """
    sizes = sizes or [1.0] * len(sources)
    weights = [source.weight for source in sources]
    whole = sum(weights)
    amounts = (rows * size for rows, size in zip(there, sizes, strict=True))
    # The source that runs out first sets the size of what has weights, so that no row stands in it twice.
    most = min((amount / weight for amount, weight in zip(amounts, weights, strict=True) if weight), default=0.0)
    drawn = []
    for source, rows, size in zip(sources, there, sizes, strict=True):
        if source.weight and whole:
            # A little more, because the division may come out below the whole number that is meant.
            drawn.append(min(rows, max(1, math.floor(most * source.weight / size + 1e-6))))
        else:
            drawn.append((source.rows or rows) if rows else 0)
    return drawn


def _inline(source: Source) -> str:
    """Return a source as an inline table of TOML."""
    return _table(source.table())


def _table(table: Mapping[str, Any]) -> str:
    pairs = (f"{key} = {_table(value) if isinstance(value, dict) else _spelled(value)}" for key, value in table.items())
    return f"{{ {', '.join(pairs)} }}"


def _spelled(value: str | float) -> str:
    return f'"{escaped(value)}"' if isinstance(value, str) else repr(value)
