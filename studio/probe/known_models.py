"""Configs of models that are not on this machine: from an earlier look at the hub, or shipped with the program.

They are for planning only, also where the hub wants its terms accepted first; wherever the hub answers, its config is
taken. Shipped are the models that the recipes name, the embedded one, and others that people often fine-tune. Each
entry of the file says where its facts were read, and holds the parameters of the language model. Tests compare these
with the shape of the config, with the class that transformers builds of it and, towers included, with the published
checkpoint.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.core.text import plain
from studio.probe.embedded_model import HUB_ID, EmbeddedMissing
from studio.probe.hub import HubRefusal, cached_config, knows_token, way_through_the_gate

_FILE = Path(__file__).with_suffix(".json")
_ALIKE = 0.7
_MOST_ALIKE = 3


@dataclass(frozen=True, slots=True)
class Known:
    """A shipped entry, under one of its names.

    Attributes:
        repo: The hub id, as the hub spells it.
        parameters: Of the language model.
        gated: Whether the hub wanted its terms accepted when the entry was written.
        config: Its `config.json`, as far as a plan needs it.
    """

    repo: str
    parameters: int
    gated: bool
    config: dict[str, Any]


@lru_cache(maxsize=1)
def known_models() -> dict[str, dict[str, Any]]:
    """Return the shipped entries by hub id: `config`, `parameters`, and `sources` with the commit that was read.

    `also` names models of the same sizes. `gated` says where the hub was seen to want its terms accepted. `checkpoint`
    stands in those of which a source tells the parameters of the whole checkpoint, with that source; `beside` of them
    lie in the checkpoint and in no class of transformers, such as layers that predict further tokens.
    """
    found: dict[str, dict[str, Any]] = json.loads(_FILE.read_text("utf-8"))
    return found


@lru_cache(maxsize=1)
def known_names() -> dict[str, Known]:
    """Return every model that a shipped entry describes, by its hub id in lower case: the hub does not tell cases."""
    names = {}
    for repo, entry in known_models().items():
        for name in (repo, *entry.get("also", ())):
            # A model made of a gated one, by others, need not be gated.
            gated = "gated" in entry and name.split("/")[0] == repo.split("/")[0]
            names[name.lower()] = Known(name, entry["parameters"], gated, entry["config"])
    return names


def is_gated(repo: str) -> bool:
    """Return whether a shipped entry says of a model that the hub wants its terms accepted."""
    known = known_names().get(repo.lower())
    return known is not None and known.gated


def names_with(words: str) -> list[str]:
    """Return the hub ids in which every one of some words stands, letter case aside."""
    wanted = words.lower().split()
    return [known.repo for name, known in known_names().items() if wanted and all(word in name for word in wanted)]


def without_the_hub(repo: str) -> str:
    """Return what to say of a model besides that the hub does not give it: a plan of it, or names like its own."""
    if known := known_names().get(repo.lower()):
        return f" Without the hub it can be planned: lora-studio plan --model {known.repo} --gpu NAME."
    from difflib import get_close_matches  # noqa: PLC0415  2 ms that only a wrong name pays

    bare = {name.split("/")[1]: known.repo for name, known in known_names().items()}
    near = [known_names()[name].repo for name in get_close_matches(repo.lower(), known_names(), _MOST_ALIKE, _ALIKE)]
    near += [bare[name] for name in get_close_matches(repo.lower().split("/")[-1], bare, _MOST_ALIKE, _ALIKE)]
    alike = list(dict.fromkeys(near))[:_MOST_ALIKE]
    return f" Names like it that this program knows: {', '.join(alike)}." if alike else ""


def config_instead(repo: str, revision: str, refusal: HubRefusal | EmbeddedMissing) -> tuple[dict[str, Any], str]:
    """Return the config of a model that is not on this machine, and in words where the config comes from.

    Of a gated model the words also tell what a training wants first.

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
    known = known_names().get(repo.lower())
    config, which = cached_config(repo, revision), "the hub's of an earlier look"
    if config is None and not revision and known:
        config, which = known.config, "this program's own copy"
    if config is None:
        raise refusal
    origin = f"the config is {which}, not asked of the hub now: {refusal.why}"
    if refusal.gated or is_gated(repo):
        way = way_through_the_gate(plain(repo, one_line=True, limit=200), token=knows_token())
        origin += f". The model is gated: a plan does not mind, but before a training {way}"
    return config, origin
