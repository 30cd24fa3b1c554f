"""Makes `stdlib_qa.jsonl`: questions about Python's standard library, answered with its own docstrings.

Every answer is the first sentence of a real docstring, unchanged except for white space. Run it with the interpreter
named in `NOTICE` to get the shipped file byte for byte; another version gives other rows, because docstrings change:

    python recipes/data/make_stdlib_qa.py recipes/data/stdlib_qa.jsonl

The rows are ordered by a hash of the answer, so that any head, tail or slice of the file is a mixture of modules.
"""

import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# Pure-Python or portable modules that exist, with the same documentation, on every platform.
MODULES = """
    abc ast base64 bisect builtins bz2 calendar cmath codecs collections colorsys configparser contextlib copy csv
    dataclasses datetime decimal difflib dis email.message email.utils enum filecmp fileinput fnmatch fractions
    functools gettext glob graphlib gzip hashlib heapq hmac html http.cookies http.client importlib.util inspect io
    ipaddress itertools json keyword linecache locale logging lzma mailbox math mimetypes numbers operator pathlib
    pickle pkgutil platform plistlib pprint queue quopri random re reprlib sched secrets shelve shlex shutil
    socketserver sqlite3 statistics string struct subprocess symtable sys tarfile tempfile textwrap threading time
    timeit tokenize tomllib trace traceback types typing unicodedata unittest unittest.mock urllib.parse
    urllib.request uuid warnings wave weakref xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils zipfile zlib
    zoneinfo
""".split()  # noqa: SIM905 - as a list literal this is a hundred lines
_UNWANTED = re.compile(r"Windows|macOS|Unix|dlopen|\b[Ff]ork|[Dd]eprecated|^Don't use")
ANSWER_CHARACTERS = range(30, 161)
ROWS_PER_MODULE = 7
RESEMBLANCE_ALLOWED = 0.6
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)\.(?=\s|$)")
_WORD = re.compile(r"\w+")
_SIGNATURE = re.compile(r"->|^\w+(\.\w+)*\(|^\S+ -- ")


def first_sentence(docstring: str | None) -> str | None:
    """Return the docstring's first sentence on one line, or None where it has none that can stand as an answer.

    Left out: signatures (`f(x) -> int`), text that does not start with a capital or end in a full stop, what is shorter
    or longer than `ANSWER_CHARACTERS`, and what speaks of one platform or only of being deprecated.
    """
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    end = _SENTENCE_END.search(paragraph)
    if end is None:
        return None
    sentence = paragraph[: end.end()]
    whole = sentence[0].isupper() and sentence.isascii() and len(sentence) in ANSWER_CHARACTERS
    return sentence if whole and not _SIGNATURE.search(sentence) and not _UNWANTED.search(sentence) else None


def question(kind: str, name: str) -> str:
    """Return what a person would ask about a thing of that kind (`module`, `class`, `function` or `method`)."""
    return {
        "module": f"What is the Python module {name} for?",
        "class": f"What is {name} in Python?",
        "function": f"What does {name} do in Python?",
        "method": f"What does {name} do in Python?",
    }[kind]


def documented(module_name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, dotted name, answer) for the module, its public classes and functions, and their public methods."""
    module = importlib.import_module(module_name)
    prefix = "" if module_name == "builtins" else f"{module_name}."
    if answer := first_sentence(module.__doc__):
        yield "module", module_name, answer
    homes = (module_name, f"_{module_name}")  # bisect.insort says that it lives in _bisect
    for name, thing in _members(module, lambda thing: getattr(thing, "__module__", module_name) in homes):
        kind = "class" if inspect.isclass(thing) else "function"
        if answer := first_sentence(_own_docstring(thing)):
            yield kind, f"{prefix}{name}", answer
        if kind == "class":
            for method_name, method in _members(thing, inspect.isroutine):
                if answer := first_sentence(_own_docstring(method)):
                    yield "method", f"{prefix}{name}.{method_name}", answer


def _own_docstring(thing: object) -> str | None:
    """Return the docstring written for this very thing, not the one that a class shows of its base."""
    docstring = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return docstring if isinstance(docstring, str) else None


def _members(owner: object, wanted: Callable[[object], bool]) -> list[tuple[str, object]]:
    """Return the public callables that the module or class itself defines, by name."""
    names = sorted(getattr(owner, "__all__", None) or vars(owner))
    things = [(name, getattr(owner, name, None)) for name in names if not name.startswith("_")]
    return [(name, thing) for name, thing in things if callable(thing) and wanted(thing)]


def rows(modules: Iterable[str]) -> list[dict[str, list[dict[str, str]]]]:
    """Return chat rows for the modules, at most `ROWS_PER_MODULE` of each, in hash order.

    Methods come last in the choice, since modules, classes and functions are what people ask about. An answer that says
    nearly what an earlier one says is left out: else the held-out rows would be known from training.
    """
    chosen: dict[str, tuple[str, str]] = {}
    for module_name in modules:
        room = ROWS_PER_MODULE
        for kind, name, answer in sorted(
            documented(module_name), key=lambda item: (item[0] == "method", _digest(item[2]))
        ):
            if room and not any(resemblance(answer, earlier) > RESEMBLANCE_ALLOWED for earlier in chosen):
                chosen[answer] = (kind, name)
                room -= 1
    return [
        {"messages": [{"role": "user", "content": question(*chosen[answer])}, {"role": "assistant", "content": answer}]}
        for answer in sorted(chosen, key=_digest)
    ]


def resemblance(one: str, other: str) -> float:
    """Return the share, 0 to 1, of the two texts' words that both have (Jaccard index)."""
    left, right = set(_WORD.findall(one.lower())), set(_WORD.findall(other.lower()))
    return len(left & right) / len(left | right) if left | right else 1.0


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Write the rows to the file named on the command line."""
    made = rows(MODULES)
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    print(f"{len(made)} rows from Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
