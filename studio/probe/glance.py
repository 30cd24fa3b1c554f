"""Whether a recipe's data may be looked at without being asked: rows and tokenizer are here, and not many."""

from pathlib import Path

from studio.core.errors import StudioError
from studio.core.recipe import EMBEDDED, Recipe
from studio.probe.data.mixture import words_of
from studio.probe.embedded_model import find_embedded
from studio.probe.hub import find_in_cache, is_hub_id
from studio.probe.model_folder import CONFIG

_MOST_BYTES = 64 * 2**20
"""Some 100 000 short chats, for which a process needs half a minute of one core."""


def can_glance(recipe: Recipe) -> bool:
    """Return whether data and tokenizer of a recipe lie on this machine, and the data are small."""
    try:
        files = [word for _, word, _ in words_of(recipe) if word != EMBEDDED]
        if any(not Path(path).is_file() for path in files):
            return False
        small = sum(Path(path).stat().st_size for path in files) <= _MOST_BYTES
        return small and _has_tokenizer(recipe.model.base, recipe.model.revision)
    except (OSError, RuntimeError, ValueError, StudioError):
        return False


def _has_tokenizer(base: str, revision: str) -> bool:
    if base == EMBEDDED:
        return (find_embedded().folder / CONFIG).is_file()
    if Path(base).expanduser().is_dir():
        return True
    return is_hub_id(base) and not isinstance(find_in_cache(base, revision), str)
