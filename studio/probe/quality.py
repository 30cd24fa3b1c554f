"""What audits measured on a recipe's model and data, found again by fingerprints of both."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.core.errors import StudioError
from studio.core.placement.fidelity import Effects, effects_of
from studio.core.recipe import EMBEDDED, Recipe
from studio.core.text import plain
from studio.runs.quality import LaneResult, read_bases, read_results


def audited(recipe: Recipe) -> dict[str, LaneResult]:
    """Return the newest result of each lane for this model and data; empty where none was measured.

    Takes milliseconds, and longer the first time for large data: call it from a thread. A base whose weights nobody has
    read yet is one that nothing was measured of: they are not read for it.
    """
    known = read_results()
    if not known:
        return {}
    from studio.probe.fingerprint import known_fingerprint  # noqa: PLC0415  40 ms that only a machine with races pays
    from studio.probe.models import find_base  # noqa: PLC0415  as above

    try:
        base = find_base(recipe.model.base, recipe.model.revision)
        if base.path is None:
            return {}
        model = _short(known_fingerprint(base.path))
        data = data_fingerprint(recipe)
    except (StudioError, OSError, ValueError, RuntimeError):
        return {}
    return {one.lane: one for one in known if (one.model, one.data) == (model, data)}


def layer_effects(recipe: Recipe) -> Effects | None:
    """Return what an audit of a recipe's base has measured of each layer; None where none was made.

    Takes milliseconds, as `audited` does.
    """
    known = read_bases()
    if not known:
        return None
    from studio.probe.fingerprint import known_fingerprint  # noqa: PLC0415  as above
    from studio.probe.models import find_base  # noqa: PLC0415  as above

    try:
        base = find_base(recipe.model.base, recipe.model.revision)
        model = None if base.path is None else _short(known_fingerprint(base.path))
    except (StudioError, OSError, ValueError, RuntimeError):
        return None
    found = next((one for one in known if one.model == model), None)
    if found is None:
        return None
    return effects_of(found.blocks, f"{plain(found.run, one_line=True)}, {found.tokens:,} tokens")


def model_fingerprint(folder: Path) -> str:
    """Return a short fingerprint of a base.

    Raises:
        BadInput: A file of it is damaged.
        OSError: A file cannot be read.
    """
    from studio.probe.fingerprint import fingerprint  # noqa: PLC0415  as above

    return _short(fingerprint(folder))


def data_fingerprint(recipe: Recipe) -> str:
    """Return what tells a recipe's data from others.

    Raises:
        BadInput: They are not here.
        OSError: A file cannot be read.
    """
    from studio.probe.data.mixture import words_of  # noqa: PLC0415  as above
    from studio.probe.data.places import find_files  # noqa: PLC0415  as above

    found = []
    for field, word, how in words_of(recipe):
        if field == "data.eval_path":
            continue
        place = find_files(Path(word) if word == EMBEDDED else Path(word).expanduser(), how, ask=False)
        sums = []
        for path in place.files:
            seen = path.stat()
            sums.append(_data(path, seen.st_size, seen.st_mtime_ns))
        found.append(sums[0] if len(sums) == 1 else " ".join(sums))
    if len(found) == 1 and " " not in found[0]:
        return found[0]
    import hashlib  # noqa: PLC0415  as below

    drawn = [(one.weight, one.rows, one.format) for one in recipe.data.sources]
    return hashlib.sha256(repr((found, drawn, recipe.data.weigh_by)).encode()).hexdigest()[:32]


def _short(found: Mapping[str, Any]) -> str:
    """Return the fingerprint as a word, made of config and weights: another tokenizer file makes no other model."""
    return f"{found['config'][:12]}-{(found['weights'] or '')[:20]}"


@lru_cache(maxsize=512)
def _data(path: Path, size_bytes: int, changed_at: int) -> str:
    import hashlib  # noqa: PLC0415  OpenSSL: 3 ms and 5 MiB that a plan has no use for

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
