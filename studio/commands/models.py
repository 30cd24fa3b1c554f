"""`lora-studio models`: the base models that lie on this machine already."""

import argparse
from dataclasses import asdict, dataclass

from studio.commands.options import add_json
from studio.commands.terminal import DONE, say, size, table, write_json
from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED
from studio.probe.models import find_base


@dataclass(frozen=True, slots=True)
class _Listed:
    """One model: the word for `model.base`, where it comes from, its size; `problem` says why it cannot be used."""

    word: str
    kind: str
    size_bytes: int | None
    path: str | None
    problem: str = ""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("models", help="the base models that lie on this machine")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """List the embedded model and those in the Hugging Face cache."""
    found = [_checked(EMBEDDED), *(_checked(word) for word in cached_models())]
    if args.json:
        write_json([asdict(model) for model in found])
        return DONE
    rows = [[model.word, model.kind, size(model.size_bytes), model.problem or model.path or ""] for model in found]
    say(table([["model", "kind", "weights", "where"], *rows]))
    say("any folder with config.json and safetensors works as well; a hub id is downloaded when it is first used")
    return DONE


def cached_models() -> list[str]:
    """Return the ids of the models in the Hugging Face cache, by name."""
    from huggingface_hub import scan_cache_dir  # noqa: PLC0415  0.15 s that no other verb should pay
    from huggingface_hub.errors import CacheNotFound  # noqa: PLC0415

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    return sorted(repo.repo_id for repo in repos if repo.repo_type == "model")


def _checked(word: str) -> _Listed:
    try:
        base = find_base(word)
    except BadInput as error:
        return _Listed(word, EMBEDDED if word == EMBEDDED else "hub", None, None, str(error))
    return _Listed(word, base.kind, base.size_bytes, str(base.path) if base.path else None)
