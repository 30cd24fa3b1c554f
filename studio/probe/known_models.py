"""Configs of models that are not on this machine: from an earlier look at the hub, or shipped with the program.

They are for planning only, also where the hub wants its terms accepted first; wherever the hub answers, its config is
taken. The configs of the models that the recipes name are shipped, and that of the embedded model. Each entry of the
file says where its facts were read, and holds the parameters of the language model. Tests compare these with the shape
of the config, with the class that transformers builds of it and, towers included, with the published checkpoint.
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
    """Return the shipped entries by hub id: `config`, `parameters`, and `sources` with the commit that was read.

    `checkpoint` stands in those of which a source tells the parameters of the whole checkpoint, with that source.
    """
    found: dict[str, dict[str, Any]] = json.loads(_FILE.read_text("utf-8"))
    return found


def config_instead(repo: str, revision: str, refusal: HubRefusal | EmbeddedMissing) -> tuple[dict[str, Any], str]:
    """Return the config of a model that is not on this machine, and in words where the config comes from.

    Args:
        repo: The hub id, or `embedded`.
        revision: Branch, tag or commit; empty for the newest. Only configs of the newest are shipped.
        refusal: Why the hub does not give it, or that the embedded model is not here.

    Raises:
        HubRefusal: There is no such config.
        BadInput: The config in the cache is damaged.
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
