"""Which files of a folder are which split of a data set, by its card and by their names.

The rules are those of `datasets` (its `data_files.py`), so that a folder of the hub means here what it means there:
the `configs` at the head of README.md come first, then numbered parts in a folder `data`, then the names of folders and
files. Other than there, files on this computer whose names say no split are train, even beside others.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.opened import PACKED_SUFFIXES, plain_suffix

TRAIN, VALIDATION, TEST, ALL = "train", "validation", "test", "all"
CARD = "README.md"
DEFAULT = "default"
KINDS = {
    "Parquet": (".parquet",),
    "Arrow": (".arrow", ".feather"),
    "JSON": (".jsonl", ".ndjson", ".json"),
    "CSV": (".csv", ".tsv", ".tab"),
    "text": (".txt", ".md", ".markdown"),
}
"""Kinds of files by their suffixes, the most telling first."""
_KEYWORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "dev", "val"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
_BESIDES = re.compile(
    r"(readme|license|licence|notice|changelog|contributing|citation|code_of_conduct|requirements)(\..*)?"
    r"|(dataset_infos?|dataset_dict|state|config|croissant|metadata|package)\.json|\..*|__.*",
    re.IGNORECASE,
)
"""Files that lie beside data and are none."""
_SHARD = re.compile(r"(?P<before>.+?)[-_.](?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>\D.*)?")
_MOST_CARD_BYTES = 2**20
_MOST_WILDCARDS = 8
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files that are read.

    Attributes:
        names: The files, in order.
        notes: What the user should know of the choice.
        config: The configuration, where there are several, or the folder.
        split: The split, where there are several.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    config: str = ""
    split: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which part of a data set is asked for.

    Attributes:
        config: Its configuration, also called subset, or, where it has none, a folder in it; empty for the one that it
            has, or its default.
        split: Its split; `all` for all of them; empty for the first of `prefer` that is there.
        prefer: Splits in the order in which they are taken unasked.
    """

    config: str = ""
    split: str = ""
    prefer: tuple[str, ...] = (TRAIN,)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which files are what, where it is said.

    Attributes:
        configs: By configuration and split, patterns of files; empty where nothing is said.
        default: The configuration that is read unasked; empty for none.
    """

    configs: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    default: str = ""


NOTHING_SAID = Layout()


def choose(names: Iterable[str], layout: Layout, wanted: Wanted, shown: str, *, strict: bool) -> Chosen:
    """Return which of a data set's files are read.

    Args:
        names: All its files, as paths within it with slashes.
        layout: What is said of them.
        wanted: Which part of it is asked for.
        shown: The data set for messages, harmless to print.
        strict: Whether files of several kinds are refused; else the kind with the most files is read.

    Raises:
        BadInput: There is no file of rows, no such configuration or split, it must be said which one is meant, files
            are of several kinds, or one of numbered parts is missing.
    """
    names = sorted(names, key=_natural)
    said = layout.configs
    notes: list[str] = []
    config = ""
    if said:
        config = _config(layout, wanted.config, shown)
        splits = {split: _matching(patterns, names) for split, patterns in said[config].items()}
        splits = {split: found for split, found in splits.items() if found}
        if len(said) > 1:
            notes.append(f"of the configurations {_listed(said)} {config} is read")
        if not splits:
            raise BadInput(f"{shown}: the files that it names for {config} are not there.")
    else:
        if wanted.config and wanted.config != DEFAULT:
            config = wanted.config
            names = [name for name in names if name.startswith(f"{config}/")]
            if not names:
                word = plain(config, one_line=True, limit=60)
                raise BadInput(f"{shown} has no configurations, and no folder {word}; leave data.config empty.")
        # What `datasets` has uploaded lies in `data`; other files beside it, such as the makers' own, are not read.
        shards = [name for name in names if name.startswith("data/") and _SHARD.fullmatch(name.removeprefix("data/"))]
        if shards and len(shards) < sum(bool(kind_of_name(name)) and not is_beside(name) for name in names):
            notes.append("only the numbered parts in its folder data are read")
            names = shards
        splits = _splits_by_name(_of_one_kind(names, shown, notes, strict=strict), notes, strict=strict)
    split = _split(splits, wanted, shown)
    if len(splits) > 1:
        read = "all are read" if split == ALL else f"{split} is read"
        notes.append(f"of the splits {_listed(splits)} {read}")
    chosen = [name for found in splits.values() for name in found] if split == ALL else splits[split]
    if said:
        chosen = _of_one_kind(chosen, shown, notes, strict=True)
    _require_whole(chosen, shown)
    return Chosen(tuple(chosen), tuple(notes), config if len(said) != 1 else "", split if len(splits) > 1 else "")


def kind_of_name(name: str) -> str:
    """Return the kind of file that a name stands for, by `KINDS`; empty where it is no file of rows or text."""
    base = name.rpartition("/")[2]
    suffix = plain_suffix(base)
    return next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), "")


def is_beside(name: str) -> bool:
    """Return whether a file lies beside data and is none, such as a licence."""
    return bool(_BESIDES.fullmatch(name.rpartition("/")[2]))


def holds_rows(name: str) -> bool:
    """Return whether a file, by its name, is made to hold rows; any other may hold them too."""
    return kind_of_name(name) not in ("", "text") and plain_suffix(name) != ".json" and not is_beside(name)


def _of_one_kind(names: Sequence[str], shown: str, notes: list[str], *, strict: bool) -> list[str]:
    """Return the files of rows among all; what is passed over is noted."""
    kinds: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    texts_beside: list[str] = []
    for name in names:
        kind = kind_of_name(name)
        if is_beside(name):
            if kind == "text":
                texts_beside.append(name)
        elif kind:
            kinds.setdefault(kind, []).append(name)
        else:
            others[_suffix(name)] += 1
    if not kinds and texts_beside and strict:  # a folder of Markdown files here; on the hub it is the card
        kinds["text"] = texts_beside
    if not kinds:
        found = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(_LISTED))
        raise BadInput(
            f"{shown} holds no file of rows or text ({f'found {found}' if found else 'found no file'}); wanted .jsonl, "
            ".json, .csv, .tsv, .parquet, .arrow, .txt or .md, each also with .gz, .bz2, .xz or .zst."
        )
    if len(kinds) > 1 and strict:
        found = "; ".join(
            f"{len(files)} {kind} ({', '.join(plain(name, one_line=True, limit=60) for name in files[:3])}"
            f"{', ...' if len(files) > 3 else ''})"
            for kind, files in kinds.items()
        )
        raise BadInput(
            f"{shown} holds files of several kinds: {found}. They are read as one only where they are of one kind: "
            "name the file that is meant, or put the others elsewhere."
        )
    order = list(KINDS)
    kind = max(kinds, key=lambda kind: (len(kinds[kind]), -order.index(kind)))
    others.update(_suffix(name) for other, files in kinds.items() if other != kind for name in files)
    if others:
        listed = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(_LISTED))
        notes.append(f"files that are not read: {listed}")
    return kinds[kind]


def _splits_by_name(names: Sequence[str], notes: list[str], *, strict: bool) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of_name(name), []).append(name)
    if unnamed := splits.pop("", None):
        if strict or not splits:
            splits[TRAIN] = sorted([*splits.get(TRAIN, ()), *unnamed], key=_natural)
        else:
            notes.append(f"files whose names say no split are not read: {_listed(unnamed)}")
    order = [TRAIN, VALIDATION, TEST]
    return dict(sorted(splits.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _split_of_name(name: str) -> str:
    *folders, file = name.split("/")
    # A document is named after what it is about: only a folder for a whole split counts.
    if kind_of_name(name) == "text":
        return next((split for folder in folders[:1] for split, words in _KEYWORDS.items() if folder in words), "")
    stem = file.partition(".")[0]
    if (shard := _SHARD.fullmatch(file)) and folders[-1:] == ["data"] and re.fullmatch(r"\w+", shard["before"]):
        return shard["before"]
    for part in (*folders, shard["before"] if shard else stem):
        for split, words in _KEYWORDS.items():
            if re.search(rf"(^|[-._ 0-9])({'|'.join(words)})([-._ 0-9]|$)", part, re.IGNORECASE):
                return split
    return ""


def _split(splits: Mapping[str, Sequence[str]], wanted: Wanted, shown: str) -> str:
    asked = wanted.split
    if asked:
        meant = next((split for split, words in _KEYWORDS.items() if asked in words), asked)
        found = asked if asked in (*splits, ALL) else meant if meant in splits else ""
        if not found:
            hint = " Parts of a split such as train[:10%] are not read." if "[" in asked else ""
            raise BadInput(
                f"{shown} has no split {plain(asked, one_line=True, limit=60)}; it has {_listed(splits)}.{hint}"
            )
        return found
    if len(splits) == 1:
        return next(iter(splits))
    for one in wanted.prefer:
        if one in splits:
            return one
        words = _KEYWORDS.get(one, (one,))
        alike = [split for split in splits if re.match(rf"({'|'.join(words)})([-._ 0-9]|$)", split)]
        if len(alike) == 1:
            return alike[0]
    raise BadInput(
        f"{shown} has the splits {_listed(splits)}: say which one is meant, with data.split = "
        f'"{plain(next(iter(splits)), one_line=True, limit=60)}", or "all".'
    )


def _config(layout: Layout, asked: str, shown: str) -> str:
    said = layout.configs
    if asked:
        if asked not in said:
            name = plain(asked, one_line=True, limit=60)
            raise BadInput(f"{shown} has no configuration {name}; it has {_listed(said)}.")
        return asked
    if len(said) == 1 or layout.default:
        return layout.default or next(iter(said))
    first = plain(next(iter(said)), one_line=True, limit=60)
    raise BadInput(
        f'{shown} has the configurations {_listed(said)}: say which one is meant, with data.config = "{first}".'
    )


def layout_of_card(card: str) -> Layout:
    """Return what the text of a README.md says of the files beside it."""
    found: dict[str, dict[str, list[str]]] = {}
    default = ""
    for entry in _configs_entry(card):
        if not isinstance(entry, dict):
            continue
        name, files = str(entry.get("config_name") or DEFAULT), entry.get("data_files")
        folder = str(entry.get("data_dir") or "").strip("/")
        splits = _patterns_by_split(files) if files is not None else {TRAIN: ["**"]} if folder else {}
        if folder:
            splits = {split: [f"{folder}/{one}" for one in patterns] for split, patterns in splits.items()}
        if splits:
            found[name] = splits
            if name == DEFAULT or entry.get("default") is True:
                default = name
    return Layout(found, default)


def _patterns_by_split(files: Any) -> dict[str, list[str]]:
    """Return a card's `data_files`: a pattern, patterns, or patterns by split."""
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    if not isinstance(files, list):
        files = [files]
    splits: dict[str, list[str]] = {}
    for one in files:
        split, path = (str(one.get("split") or TRAIN), one.get("path")) if isinstance(one, dict) else (TRAIN, one)
        patterns = [path] if isinstance(path, str) else path if isinstance(path, list) else []
        splits.setdefault(split, []).extend(str(pattern) for pattern in patterns)
    return splits


def _configs_entry(card: str) -> list[Any]:
    """Return the list under `configs` in the YAML at the head of a card; nothing else of it is parsed."""
    if not card.startswith("---"):
        return []
    head = card[:_MOST_CARD_BYTES].split("\n---", 1)[0]
    found = re.search(r"^configs:[^\n]*\n(?:[ \t-][^\n]*\n?|\n)*", head.replace("\r", ""), re.MULTILINE)
    if not found:
        return []
    import yaml  # noqa: PLC0415  comes with huggingface_hub; 15 ms that only folders with a card pay

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Without aliases, which let a kilobyte stand for gigabytes."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    try:
        entries = yaml.load(found[0], Loader).get("configs")  # noqa: S506  a safe loader
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError):
        return []
    return entries if isinstance(entries, list) else []


def _matching(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the files that patterns such as `data/train-*` name: `*` within a folder, `**` also across folders."""
    wanted = [_pattern(pattern.removeprefix("./").lstrip("/")) for pattern in patterns]
    return [name for name in names if any(one.fullmatch(name) for one in wanted)]


@lru_cache(maxsize=256)
def _pattern(pattern: str) -> re.Pattern[str]:
    if pattern.count("*") + pattern.count("?") > _MOST_WILDCARDS:
        return re.compile(re.escape(pattern))
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern)
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = "".join(
        words.get(part) or (part if part.startswith("[") and part.endswith("]") else re.escape(part)) for part in parts
    )
    try:
        return re.compile(text)
    except re.error:
        return re.compile(re.escape(pattern))


def _require_whole(names: Sequence[str], shown: str) -> None:
    """Refuse numbered parts of which one is missing, as after a download that broke off.

    Raises:
        BadInput: One is missing.
    """
    parts: dict[tuple[str, str], set[int]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if shard := _SHARD.fullmatch(file):
            key = (f"{folder}/{shard['before']}", f"{shard['count']}{shard['after'] or ''}")
            parts.setdefault(key, set()).add(int(shard["number"]))
    for (before, after), there in parts.items():
        many = int(after[:5])
        first = 0 if 0 in there or many not in there else 1
        missing = next((number for number in range(first, first + min(many, 99_999)) if number not in there), None)
        if missing is not None:
            name = plain(f"{before.lstrip('/')}-{missing:05}-of-{after}", one_line=True, limit=120)
            raise BadInput(f"{shown}: {name} is missing; {len(there)} of its {many} parts are there. Fetch it again.")


def _suffix(name: str) -> str:
    suffix = plain_suffix(name.rpartition("/")[2])
    if not suffix and name.lower().endswith(PACKED_SUFFIXES):
        suffix = name[name.rindex(".") :].lower()
    return plain(suffix, one_line=True, limit=20) or "without a suffix"


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return the key by which part-2 comes before part-10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part[:18]), part) if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]


def _listed(names: Iterable[str]) -> str:
    names = [plain(str(name), one_line=True, limit=60) for name in names]
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
