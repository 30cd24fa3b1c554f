"""`lora-studio models`: the base models that lie on this machine already."""

import argparse
from dataclasses import asdict

from studio.commands.options import add_json
from studio.commands.terminal import DONE, say, size, table, write_json
from studio.probe.local_models import local_models


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("models", help="the base models that lie on this machine")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """List the embedded model and those in the Hugging Face cache."""
    found = local_models()
    if args.json:
        write_json([asdict(model) for model in found])
        return DONE
    rows = [[model.word, model.kind, size(model.size_bytes), model.problem or model.path or ""] for model in found]
    say(table([["model", "kind", "weights", "where"], *rows]))
    say("any folder with config.json and safetensors works as well; a hub id is downloaded when it is first used")
    return DONE
