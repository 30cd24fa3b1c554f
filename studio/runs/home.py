"""Where runs and converted models lie on this machine. No function here creates a folder."""

import os
from pathlib import Path

import platformdirs

HOME_VARIABLE = "LORA_STUDIO_HOME"
SETUP_FILE = "setup.json"
"""The file of the answers to the guided set-up, in the home folder."""

_APP = "lora-studio"


def studio_home() -> Path:
    """Return the folder of everything that is kept: `$LORA_STUDIO_HOME`, else the platform's user data folder."""
    chosen = _chosen()
    return chosen if chosen else platformdirs.user_data_path(_APP, appauthor=False)


def runs_root() -> Path:
    """Return the folder that holds one folder per run."""
    return studio_home() / "runs"


def cache_root() -> Path:
    """Return the folder of what can be made again: `$LORA_STUDIO_HOME/cache`, else the platform's cache folder."""
    chosen = _chosen()
    return chosen / "cache" if chosen else platformdirs.user_cache_path(_APP, appauthor=False)


def is_first_visit(runs_root: Path, home: Path | None = None) -> bool:
    """Return whether nothing was ever set up or run here."""
    try:
        return not ((home or studio_home()) / SETUP_FILE).exists() and not any(runs_root.iterdir())
    except OSError:
        return True


def _chosen() -> Path | None:
    word = os.environ.get(HOME_VARIABLE, "").strip()
    return Path(word).expanduser().absolute() if word else None
