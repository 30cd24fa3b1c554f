"""`lora-studio models`: the base models that lie on this machine already, and what is known of one before it trains."""

import argparse
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from studio.commands.options import add_json
from studio.commands.terminal import DONE, NO, say, size, table, width_of_terminal, write_json
from studio.core.text import plain
from studio.probe.known_models import known_names
from studio.probe.local_models import local_models
from studio.probe.model_check import check_model

_LABEL = 11
_BILLION = 10**9
_ROLES = ("system", "user", "assistant", "tool")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("models", help="the base models on this machine, and what is known of one")
    parser.add_argument(
        "--known", action="store_true", help="list the models whose sizes are shipped: planned without a connection"
    )
    add_json(parser)
    verbs = parser.add_subparsers(dest="models_verb", metavar="check")
    check = verbs.add_parser(
        "check",
        help="look at a model before a training",
        description="Say of a model which class it is, what of it trains, what stays in which precision, where an "
        "adapter goes, what its chat template does and what it can be exported to. No weight is read. Exit 0: nothing "
        "was found for which a training would be refused; 1: it would be; 2: there is no such model.",
    )
    check.add_argument("model_word", metavar="MODEL", help="a folder, a config.json, a hub id, or: embedded")
    check.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """List the embedded model and those in the Hugging Face cache, or look at one model.

    Raises:
        BadInput: There is no such model.
    """
    if args.models_verb == "check":
        return _check(args)
    if args.known:
        return _list_known(as_json=args.json)
    found = local_models()
    if args.json:
        write_json([asdict(model) for model in found])
        return DONE
    rows = [[model.word, model.kind, size(model.size_bytes), model.problem or model.path or ""] for model in found]
    say(table([["model", "kind", "weights", "where"], *rows]))
    say("any folder with config.json and safetensors works as well; a hub id is downloaded when it is first used")
    say(f"{len(known_names())} models of the hub can be planned without a connection: lora-studio models --known")
    return DONE


def _list_known(*, as_json: bool) -> int:
    known = list(known_names().values())
    if as_json:
        write_json([{"model": one.repo, "parameters": one.parameters, "gated": one.gated} for one in known])
        return DONE
    rows = [[one.repo, _many(one.parameters), "gated" if one.gated else ""] for one in known]
    say(table([["model", "parameters", ""], *rows]))
    _wrapped("plan one with: lora-studio plan MODEL --gpu NAME; it needs no connection, no download and no token", "")
    _wrapped("gated: before a training the hub wants its terms accepted on the model's page, and a token", "")
    return DONE


def _check(args: argparse.Namespace) -> int:
    seen = check_model(args.model_word)
    if args.json:
        write_json(seen)
    else:
        _print(seen)
    return NO if seen["problems"] else DONE


def _print(seen: dict[str, Any]) -> None:
    _entry("model", f"{seen['model']} ({seen['kind']})")
    _entry("class", _class_text(seen))
    _entry("trains", _trained_text(seen["trains"]))
    if seen["trains"]["left_out"]:
        parts = (f"{part['name']} ({size(part['bytes'])})" for part in seen["trains"]["left_out"])
        _entry("left alone", f"{', '.join(parts)}: not trained; parts that text never goes through are not loaded")
    for method, held in seen["precision"].items():
        if held or (seen["refused"][method] and seen["refused"][method] not in seen["problems"]):
            _entry(method, _precision_text(held) if held else seen["refused"][method])
    if seen["adapters"]:
        say()
        _print_adapters(seen["adapters"])
    say()
    _entry("template", _template_text(seen["template"]))
    _print_exports(seen["exports"])
    say()
    for text in seen["unknown"]:
        _entry("not known", text)
    for text in seen["problems"]:
        _entry("problem", text)
    say(
        "a training would be refused" if seen["problems"] else "nothing was found for which a training would be refused"
    )


def _class_text(seen: dict[str, Any]) -> str:
    named, used, version = seen["class"] or "none is named", seen["class_used"], seen["transformers"]
    if seen["class_known"] is False:
        return str(named)  # that transformers does not know it is a problem, and said among the problems
    known = "knows it" if seen["class_known"] else "is not readable here"
    built = f"; it is built as {used}" if used and used != seen["class"] else ""
    return f"{named}; transformers {version or ''} {known}{built}".replace("  ", " ")


def _trained_text(trains: dict[str, Any]) -> str:
    if trains["family"] is None:
        return f"{trains['what']}; its sizes are not known"
    on_disk = f", {size(trains['bytes'])} on disk" if trains["bytes"] is not None else ""
    many = _many(trains["parameters"])
    return f"{trains['what']}: {trains['family']}, {trains['layers']} layers, {many} parameters{on_disk}"


def _many(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= _BILLION else f"{parameters / 1e6:.2f} M"


def _precision_text(held: dict[str, Any]) -> str:
    kept = f"{size(held['kept_16bit_bytes'])} in 16 bit"
    if not held["fewer_bits_bytes"]:
        return kept
    share = f"{held['four_bit_share']:.1%} of the weights of linear maps and expert stacks in the decoder"
    return f"{size(held['fewer_bits_bytes'])} in 4 bit ({share}), {kept}"


def _print_adapters(adapters: Iterable[dict[str, Any]]) -> None:
    rows = [["adapter on", "count", "in x out", "by default"]]
    reasons: dict[str, list[str]] = {}
    for one in adapters:
        widths = f"{one['inputs']} x {one['outputs']}"
        rows.append([one["name"], str(one["count"]), widths, "yes" if one["default"] else "no"])
        if one["why"]:
            reasons.setdefault(one["why"], []).append(one["name"])
    say(table(rows))
    for why, names in reasons.items():
        _wrapped(f"{', '.join(dict.fromkeys(names))}: {why}", "  ")


def _print_exports(exports: dict[str, dict[str, Any]]) -> None:
    """Print the ways out, those with the same answer together."""
    alike: dict[tuple[bool | None, str], list[str]] = {}
    for way, what in exports.items():
        alike.setdefault((what["possible"], what["why"]), []).append(way)
    for (possible, why), ways in alike.items():
        word = {True: "yes", False: "no", None: "not known"}[possible]
        _entry("export", f"{', '.join(ways)}: {word}; {why}")


def _template_text(traits: dict[str, Any]) -> str:
    if not traits["there"]:
        return traits["trouble"] or "none: a training on chats writes a plain one and saves it with the adapter"
    if traits["trouble"]:
        return f"in {traits['source']}; {traits['trouble']}"
    said = [f"in {traits['source']}", f"writes {', '.join(r for r in _ROLES if r in traits['roles']) or 'no role'}"]
    said += [f"refuses {role}: {why}" for role, why in traits["refused"].items()]
    said += [f"leaves out {role}" for role in _ROLES if role not in traits["roles"] and role not in traits["refused"]]
    said.append("writes tools" if traits["tools"] else "writes no tools")
    said.append("marks answers (generation block)" if traits["generation_block"] else "has no generation block")
    said.append({True: "writes today's date", False: "asks for no date", None: "its date is not known"}[traits["date"]])
    if traits["think"]:
        kept = {True: "keeps", False: "drops", None: "it is not known whether it keeps"}[traits["keeps_thinking"]]
        said.append(f"knows <think>, and {kept} the thinking of earlier answers")
    return "; ".join(said)


def _entry(label: str, text: str) -> None:
    _wrapped(f"{plain(label, one_line=True):<{_LABEL}}{plain(text, one_line=True)}", " " * _LABEL)


def _wrapped(text: str, indent: str) -> None:
    for line in textwrap.wrap(text, width_of_terminal(), subsequent_indent=indent, break_on_hyphens=False):
        say(line)
