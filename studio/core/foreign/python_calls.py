"""The calls of a Python script with their arguments, read from its text: nothing of it is ever run or imported.

A value is known where it is written there: a constant, a name or a `config["lr"]` that was given one, arithmetic on
them, the default of an argument (`argparse`, a dataclass, `os.environ.get`). Everything else is an `Unread`.
"""

import ast
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.core.errors import BadInput
from studio.core.foreign.carry import Unread

_DEEPEST = 20
_LONGEST_TEXT = 4000
_LARGEST = 10**15
_MOST_VALUES = 20_000
"""Lists of lists of names grow without end in a few lines; a script that trains has some hundred values."""
_LONGEST_SOURCE = 60
_SUMS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
}


@dataclass(frozen=True, slots=True)
class Call:
    """A call.

    Attributes:
        name: The dotted name of what is called: `FastLanguageModel.from_pretrained`.
        positional: Its arguments without a name.
        named: Those with one.
        line: Where it stands.
    """

    name: str
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    line: int

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def argument(self, place: int, *names: str) -> Any:
        """Return an argument by its place or one of its names; None where it is not given."""
        for name in names:
            if name in self.named:
                return self.named[name]
        return self.positional[place] if place < len(self.positional) else None


def calls_of(text: str, wanted: Container[str], shown: str) -> list[Call]:
    """Return the calls of a script in the order in which they stand there.

    Args:
        text: The script.
        wanted: The last parts of the names of what is called.
        shown: Its name, for messages.

    Raises:
        BadInput: It is no Python.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise BadInput(f"{shown} is not valid Python: line {error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadInput(f"{shown} cannot be read as Python: {error or 'it is nested too deeply'}.") from error
    try:
        names = _Names(tree)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _last(node) in wanted]
        return [names.call(node) for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset))]
    except RecursionError as error:
        raise BadInput(f"{shown} is nested too deeply to be read.") from error


class _Names:
    """What the names of a script stand for."""

    def __init__(self, tree: ast.Module) -> None:
        self._left = _MOST_VALUES
        self._given: dict[str, list[tuple[int, ast.expr]]] = {}
        self._defaults: dict[str, ast.expr] = {}
        for node in ast.walk(tree):
            self._note(node)
        for places in self._given.values():
            places.sort(key=lambda place: place[0])

    def call(self, node: ast.Call) -> Call:
        """Return a call with what is known of its arguments."""
        named: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.value(keyword.value, node.lineno)
            if keyword.arg is not None:
                named[keyword.arg] = value
            elif isinstance(value, dict):
                named |= {str(key): inner for key, inner in value.items()}
        positional = tuple(self.value(part, node.lineno) for part in node.args)
        return Call(dotted(node.func), positional, named, node.lineno)

    def value(self, node: ast.expr, line: int, depth: int = 0) -> Any:  # noqa: PLR0911  a kind of expression each
        """Return what an expression stands for at a line; `Unread` where it is not written in the script."""
        self._left -= 1
        if depth > _DEEPEST or self._left < 0:
            return Unread("")
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str | int | float | bool | None) else _unread(node)
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return [self.value(part, line, depth + 1) for part in node.elts]
        if isinstance(node, ast.Dict):
            return self._table(node, line, depth)
        if isinstance(node, ast.Name):
            return self._named(node, node.id, line, depth)
        if isinstance(node, ast.Attribute):
            found = self._defaults.get(node.attr)
            return _unread(node) if found is None else self.value(found, line, depth + 1)
        if isinstance(node, ast.Subscript):
            whole, key = self.value(node.value, line, depth + 1), self.value(node.slice, line, depth + 1)
            known = isinstance(whole, dict) and isinstance(key, str | int) and key in whole
            return whole[key] if known else _unread(node)
        if isinstance(node, ast.Call):
            return self._called(node, line, depth)
        return self._computed(node, line, depth)

    def _note(self, node: ast.AST) -> None:
        """Keep what gives a name a value: assignments, defaults of functions, fields and arguments."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assigned(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assigned(node.target, node.value)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                field = inner.targets[0] if isinstance(inner, ast.Assign) else getattr(inner, "target", None)
                value = getattr(inner, "value", None)
                if isinstance(field, ast.Name) and isinstance(value, ast.expr):
                    self._defaults.setdefault(field.id, _default_of(value) or value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            both = [*node.args.posonlyargs, *node.args.args]
            pairs = list(zip(both[len(both) - len(node.args.defaults) :], node.args.defaults, strict=True))
            pairs += [
                (one, value) for one, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value
            ]
            for one, value in pairs:
                self._given.setdefault(one.arg, []).append((node.lineno, value))
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("add_argument"):
            words = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            default = next((one.value for one in node.keywords if one.arg == "default"), None)
            if default is not None:
                for word in words:
                    self._defaults[word.lstrip("-").replace("-", "_")] = default

    def _assigned(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._given.setdefault(target.id, []).append((value.lineno, value))
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
            for inner, part in zip(target.elts, value.elts, strict=False):
                self._assigned(inner, part)

    def _named(self, node: ast.expr, name: str, line: int, depth: int) -> Any:
        places = self._given.get(name, [])
        before = [value for place, value in places if place <= line and value is not node]
        chosen = before[-1] if before else places[0][1] if places else None
        if chosen is None or chosen is node:
            return _unread(node)
        # The value is looked up as of its own line: `lr = lr / 2` means the one before.
        return self.value(chosen, chosen.lineno - 1 if _mentions(chosen, name) else line, depth + 1)

    def _table(self, node: ast.Dict, line: int, depth: int) -> Any:
        table: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            inner = self.value(value, line, depth + 1)
            if key is None:
                table |= inner if isinstance(inner, dict) else {}
                continue
            name = self.value(key, line, depth + 1)
            if isinstance(name, str | int):
                table[name] = inner
        return table

    def _called(self, node: ast.Call, line: int, depth: int) -> Any:  # noqa: PLR0911  a kind of expression each
        name = dotted(node.func)
        parts = [self.value(part, line, depth + 1) for part in node.args]
        if name == "dict":
            return {one.arg: self.value(one.value, line, depth + 1) for one in node.keywords if one.arg}
        if name.endswith(("environ.get", "getenv")) and len(parts) == 2:
            return parts[1]
        if name in ("int", "float", "str") and len(parts) == 1 and isinstance(parts[0], str | int | float):
            try:
                return {"int": int, "float": float, "str": str}[name](parts[0])
            except (ValueError, OverflowError):
                return _unread(node)
        if name in ("list", "tuple") and len(parts) == 1 and isinstance(parts[0], list):
            return parts[0]
        if name in ("Path", "pathlib.Path") and len(parts) == 1:
            return parts[0]
        default = _default_of(node)
        return _unread(node) if default is None else self.value(default, line, depth + 1)

    def _computed(self, node: ast.expr, line: int, depth: int) -> Any:  # noqa: PLR0911  a kind of expression each
        if isinstance(node, ast.UnaryOp):
            value = self.value(node.operand, line, depth + 1)
            if isinstance(node.op, ast.USub) and isinstance(value, int | float):
                return -value
            if isinstance(node.op, ast.Not) and isinstance(value, bool):
                return not value
        elif isinstance(node, ast.BinOp) and type(node.op) in _SUMS:
            pair = [self.value(side, line, depth + 1) for side in (node.left, node.right)]
            return _sum(node, pair)
        elif isinstance(node, ast.JoinedStr):
            inner = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
            parts = [self.value(part, line, depth + 1) for part in inner]
            text = "".join(map(str, parts))
            if not any(isinstance(part, Unread) for part in parts) and len(text) <= _LONGEST_TEXT:
                return text
        elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):  # `os.environ.get("MODEL") or "a/b"`
            values = [self.value(part, line, depth + 1) for part in node.values]
            known = [value for value in values if not isinstance(value, Unread) and value]
            if known:
                return known[0]
        elif isinstance(node, ast.IfExp) and isinstance(which := self.value(node.test, line, depth + 1), bool):
            return self.value(node.body if which else node.orelse, line, depth + 1)
        return _unread(node)


def dotted(node: ast.expr) -> str:
    """Return the dotted name of what is called; the parts behind a call or an index where it is of one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value) if isinstance(node.value, ast.Name | ast.Attribute) else ""
        return f"{before}.{node.attr}"
    return ""


def _last(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _default_of(node: ast.expr) -> ast.expr | None:
    """Return the default of a dataclass field that is declared as `field(default=...)`."""
    if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("field", "Field"):
        named: Sequence[ast.keyword] = node.keywords
        for one in named:
            if one.arg == "default":
                return one.value
            if one.arg == "default_factory" and isinstance(one.value, ast.Lambda):
                return one.value.body
        return node.args[0] if node.args else None
    return None


def _sum(node: ast.BinOp, pair: list[Any]) -> Any:
    left, right = pair
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < _LARGEST for one in pair)
    texts = isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str)
    lists = isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list)
    if not (numbers or lists or (texts and len(left) + len(right) <= _LONGEST_TEXT)):
        return _unread(node)
    try:
        return _SUMS[type(node.op)](left, right)
    except ZeroDivisionError:
        return _unread(node)


def _mentions(node: ast.expr, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))


def _unread(node: ast.expr) -> Unread:
    text = " ".join(ast.unparse(node).split())
    return Unread(text if len(text) <= _LONGEST_SOURCE else f"{text[: _LONGEST_SOURCE - 1]}…")
