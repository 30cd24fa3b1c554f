"""What is known here of models that are not: configs of an earlier look at the hub, and those that ship.

For planning alone, also where the hub wants its terms accepted first: what the hub says wins wherever it can be had.
The configs of the models that the recipes name ship with the program, the embedded one's with them. Each entry of the
file holds the published number of parameters, which a test compares with what its config comes to, and where its sizes
were read.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.probe.embedded_model import HUB_ID, EmbeddedMissing
from studio.probe.hub import HubRefusal, cached_config

_FILE = Path(__file__).with_suffix(".json")


@lru_cache(maxsize=1)
def known_models() -> dict[str, dict[str, Any]]:
    """Return what ships, by hub id: `config`, `parameters`, and `sources` with the commit that was read."""
    found: dict[str, dict[str, Any]] = json.loads(_FILE.read_text("utf-8"))
    return found


def config_instead(repo: str, revision: str, refusal: HubRefusal | EmbeddedMissing) -> tuple[dict[str, Any], str]:
    """Return a config that lies here of a model that does not, and in words which one it is.

    Args:
        repo: The hub id, or `embedded`.
        revision: Branch, tag or commit; empty for the newest. No other than the newest ships.
        refusal: Why the hub does not say it, or that the embedded model is not here.

    Raises:
        HubRefusal: None lies here.
        BadInput: The one in the cache is damaged.
    """
    if isinstance(refusal, EmbeddedMissing):
        return known_models()[HUB_ID]["config"], "the config is this program's own copy: the model is not here yet"
    config = cached_config(repo, revision)
    which = "the hub's of an earlier look"
    if config is None and not revision and repo in known_models():
        config, which = known_models()[repo]["config"], "this program's own copy"
    if config is None:
        raise refusal
    return config, f"the config is {which}, not asked of the hub now: {refusal.why}"
