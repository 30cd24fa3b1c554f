"""Looks at a model as a fine-tune would meet it: class, what trains, precision, adapters, template, ways out.

Reads configs, headers and the lists of installed libraries; no weight, and nothing of torch. What only a loaded model
would show is said to be not known. Everything for which a training would be refused before it starts is a problem.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

from studio.core.checkpoint_tensors import checkpoint_tensors
from studio.core.direct_weights import not_adapted
from studio.core.errors import BadInput, StudioError
from studio.core.experts import EXPERTS
from studio.core.export_formats import FORMATS
from studio.core.recipe import EMBEDDED, Method, Recipe
from studio.core.shape import ModelShape
from studio.core.text import plain
from studio.core.trainable import HEAD, adapted, target_names
from studio.core.value_kinds import ALL_LINEAR
from studio.core.vram.frozen import base_bytes, frozen_form, held_of
from studio.core.vram.setup import as_it_lies, setup_of
from studio.probe.architecture import ClassFound, class_of
from studio.probe.chat_template import FoundTemplate, find_template, template_traits
from studio.probe.embedded_model import EmbeddedMissing, embedded_header, find_embedded
from studio.probe.export import EXPERTS_IN_GGUF
from studio.probe.hub import HubRefusal, hub_headers
from studio.probe.known_models import config_instead
from studio.probe.llama_tools import converts
from studio.probe.model_folder import CONFIG, read_config, weight_headers
from studio.probe.models import BaseFound, find_base, refuse_untrainable
from studio.probe.safetensors_file import SafetensorsHeader
from studio.probe.shape import find_shape

_MULTIMODAL = ("vision_config", "audio_config", "speech_config")
_WHEN_ASKED = f'adapted where adapter.targets names "{EXPERTS}"'
_ROUTER = "it chooses or weighs experts, and is not adapted: training it on few rows may unbalance it"
_GATE = "shared_expert_gate"
_NOT_USUAL = "left out by default; adapter.targets may name it"


@dataclass(slots=True)
class _Looked:
    """What is there of a model.

    Attributes:
        kind: `folder`, `config`, `hub` or `embedded`.
        config: Its config.json.
        folder: Where its files lie; None where they are not here.
        headers: Of its weights; None where they are not known.
        problems: Why it cannot be trained on as it lies.
        unknown: What could not be found out.
    """

    kind: str
    config: Mapping[str, Any]
    folder: Path | None = None
    headers: list[SafetensorsHeader] | None = None
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a checkpoint's files hold.

    Attributes:
        own_bytes: Of the language model.
        beside: Bytes of each part beside it, as the files name them.
    """

    own_bytes: int
    beside: Mapping[str, int]


def check_model(word: str) -> dict[str, Any]:
    """Return what is known of a model: a folder, a config.json, a hub id, or `embedded`.

    Returns:
        `model`, `kind`; `class`, `class_used`, `class_known`, `transformers`; `trains` with the parts that are left
        out; `precision` of either method in bytes, and of QLoRA also `kept_16bit_bytes` and `four_bit_share`;
        `adapters` by module; `template`; `exports` by way; `refused` by method; `problems`, for which no method trains;
        `unknown`, what could not be found out. What is not known is None.

    Raises:
        BadInput: There is no such model, or nothing of it can be read.
    """
    if not word.strip():
        raise BadInput("The name of the model is empty; wanted a folder, a config.json, a hub id, or 'embedded'.")
    looked = _look(word)
    found = class_of(looked.config)
    if found.known is None:
        looked.unknown.append("whether transformers knows the model: its lists cannot be read here")
    elif own_code := _own_code(looked.config, found):
        looked.problems.append(own_code)
    base = BaseFound("folder", word, looked.folder, dict(looked.config), 0)
    refused = {method: _refusal(base, method) for method in get_args(Method)}
    if all(refused.values()):
        looked.problems.append(refused["qlora"])
    shape = _shape(word, looked)
    parts = _parts(looked, shape)
    precision = {name: _precision(shape, name) if shape and not refused[name] else None for name in get_args(Method)}
    held = precision["qlora"] or {}
    return {
        "model": word,
        "kind": looked.kind,
        "class": found.named or found.used or None,
        "class_used": found.used or None,
        "class_known": found.known,
        "transformers": found.version or None,
        "trains": _trains(looked, shape, parts),
        "adapters": _adapters(shape) if shape else None,
        "precision": precision,
        "kept_16bit_bytes": held.get("kept_16bit_bytes"),
        "four_bit_share": held.get("four_bit_share"),
        "template": template_traits(_template(looked)),
        "exports": _exports(looked.config, base, parts, shape),
        "refused": refused,
        "problems": looked.problems,
        "unknown": [*looked.unknown, *(shape.doubts if shape else ())],
    }


def _look(word: str) -> _Looked:
    """Return what is there of a model.

    Raises:
        BadInput: There is no such model, or its config cannot be read.
    """
    try:
        path = Path(word).expanduser() if word != EMBEDDED and "\0" not in word else None
        if path is not None and path.is_file() and path.suffix == ".json":
            looked = _Looked("config", read_config(path))
            looked.unknown.append("whether weights and tokenizer are whole: this is a config alone")
            return looked
        if path is not None and (path / CONFIG).is_file():
            return _in_folder(word, path.absolute())
    except OSError as error:
        shown = plain(word, one_line=True, limit=200)
        raise BadInput(f"The model {shown} cannot be read: {error.strerror or error}.") from None
    except RuntimeError:
        raise BadInput(f"There is no home folder for {plain(word, one_line=True, limit=200)}.") from None
    try:
        base = find_base(word)
    except (HubRefusal, EmbeddedMissing) as refusal:
        config, origin = config_instead(word, "", refusal)
        return _Looked("embedded" if word == EMBEDDED else "hub", config, problems=[str(refusal)], unknown=[origin])
    if base.path is not None:
        return replace(_in_folder(word, base.path), kind=base.kind)
    if base.config is None:
        raise BadInput(f"Nothing is known of {plain(word, one_line=True, limit=200)}: it has no config.json yet.")
    looked = _Looked(base.kind, base.config)
    try:
        looked.headers = hub_headers(word, "") if base.kind == "hub" else None
    except BadInput as error:
        looked.problems.append(str(error))
    return looked


def _in_folder(word: str, folder: Path) -> _Looked:
    looked = _Looked("folder", read_config(folder / CONFIG), folder)
    try:
        find_base(word)
    except BadInput as error:
        looked.problems.append(str(error))
    try:
        looked.headers = weight_headers(folder) or None
    except BadInput as error:
        looked.unknown.append(f"what the weights hold: {error}")
    return looked


def _refusal(base: BaseFound, method: Method) -> str:
    try:
        refuse_untrainable(base, method)
    except BadInput as error:
        return str(error)
    return ""


def _own_code(config: Mapping[str, Any], found: ClassFound) -> str:
    if found.known or "auto_map" not in config:
        return ""
    return (
        f"transformers {found.version} does not know this architecture, and the model brings Python code of its own, "
        "run only where model.trust_remote_code is true. Set it only for code that you have read."
    )


def _shape(word: str, looked: _Looked) -> ModelShape | None:
    try:
        return find_shape(word)
    except StudioError as error:
        looked.unknown.append(f"its sizes, adapters and precision: {error}")
        return None


def _trains(looked: _Looked, shape: ModelShape | None, parts: _Parts | None) -> dict[str, Any]:
    """Return what is trained of a checkpoint, and which parts of its files are left out, in bytes on disk."""
    names = [key.partition("_")[0] for key in _MULTIMODAL if isinstance(looked.config.get(key), Mapping)]
    sizes: Mapping[str, int | None] = parts.beside if parts else dict.fromkeys(names)
    if names and not parts:
        looked.unknown.append(
            "how large the parts beside the language model are: no tensors of theirs can be read here"
        )
    return {
        "what": "the language model inside" if _is_inside(looked.config) else "the whole model",
        "family": shape.family if shape else None,
        "layers": shape.layers if shape else None,
        "parameters": shape.parameters if shape else None,
        "bytes": parts.own_bytes if parts else None,
        "left_out": [{"name": plain(name, one_line=True, limit=100), "bytes": size} for name, size in sizes.items()],
    }


def _parts(looked: _Looked, shape: ModelShape | None) -> _Parts | None:
    """Return what lies in a checkpoint; None where its tensors are not known."""
    tensors = {name: entry for header in looked.headers or () for name, entry in header.tensors.items()}
    if shape is None or not tensors:
        return None
    shapes = {name: entry.shape for name, entry in tensors.items()}
    found = checkpoint_tensors(shapes, shape.layers, multimodal=_is_inside(looked.config))
    own_bytes, beside = 0, dict[str, int]()
    for name, entry in tensors.items():
        if found.speaks(name):
            own_bytes += entry.size_bytes
        else:
            place = _place(name.split("."), found.decoder.split(".")[:-1])
            beside[place] = beside.get(place, 0) + entry.size_bytes
    return _Parts(own_bytes, beside)


def _is_inside(config: Mapping[str, Any]) -> bool:
    """Return whether a config holds a language model among others."""
    return any(isinstance(config.get(key), Mapping) for key in (*_MULTIMODAL, "text_config"))


def _place(path: list[str], decoder: list[str]) -> str:
    """Return the part beside the language model that a tensor belongs to: its name as far as no decoder lies in it."""
    own = len(_common(path, decoder))
    numbered = own == len(decoder) and len(path) > own + 2 and path[own + 1].isdecimal()  # a layer too many
    return ".".join(path[: own + 1 + numbered])


def _common(one: list[str], other: list[str]) -> list[str]:
    """Return the beginning that two paths share."""
    pairs = zip(one, other, strict=False)
    return [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _precision(shape: ModelShape, method: Method) -> dict[str, Any]:
    """Return how the frozen weights lie under a method, with the recipe's other defaults."""
    setup = replace(as_it_lies(setup_of(Recipe().with_("method", method)), shape.quantised), device="cpu")
    form = frozen_form(setup)
    whole, held = base_bytes(shape, form), held_of(shape, form)
    return {"base_bytes": whole, "fewer_bits_bytes": whole - held.kept_16bit_bytes, **asdict(held)}


def _adapters(shape: ModelShape) -> list[dict[str, Any]]:
    """Return every linear map that can get an adapter or cannot, with how many there are and their inputs and outputs.

    `default` says whether all-linear adapts it, `why` why not.
    """
    dead, usual = not_adapted(shape.family), target_names(shape, ALL_LINEAR)
    counts: dict[tuple[str, int, int], int] = {}
    asked = target_names(shape, EXPERTS) if shape.expert_parameters else frozenset[str]()
    for count, linear in (*shape.all_linears(), *adapted(shape, asked)):
        key = linear.name, linear.inputs, linear.outputs
        counts[key] = counts.get(key, 0) + count * linear.copies
    made: list[dict[str, Any]] = []
    for (name, inputs, outputs), count in counts.items():
        why = "" if name in usual else dead.get(name) or (_WHEN_ASKED if name in asked else _NOT_USUAL)
        made.append(_adapter(name, count, inputs, outputs, why))
    mixtures = [(group.count, group.layer.experts) for group in shape.groups if group.layer.experts]
    routers = [_adapter("router", count, shape.hidden, experts.count, _ROUTER) for count, experts in mixtures]
    gates = [_adapter(_GATE, count, shape.hidden, 1, _ROUTER) for count, experts in mixtures if experts.shared_gate]
    return [*made, *routers, *gates, _adapter(HEAD, 1, shape.hidden, shape.vocabulary, _NOT_USUAL)]


def _adapter(name: str, count: int, inputs: int, outputs: int, why: str) -> dict[str, Any]:
    return {"name": name, "count": count, "inputs": inputs, "outputs": outputs, "default": not why, "why": why}


def _template(looked: _Looked) -> FoundTemplate:
    if looked.folder is not None:
        return find_template(looked.folder)
    if looked.kind == "embedded" and not looked.problems:
        header = embedded_header(find_embedded())
        return FoundTemplate(str(header.metadata.get("tokenizer.chat_template", "")), "the model's GGUF file")
    return FoundTemplate(trouble="not known: the tokenizer's files are not here")


def _exports(
    config: Mapping[str, Any], base: BaseFound, parts: _Parts | None, shape: ModelShape | None
) -> dict[str, dict[str, Any]]:
    """Return each way out of a training, with whether it is there (None where that is not known) and what to know."""
    mixture = shape is not None and shape.expert_parameters > 0 and config.get("model_type") not in EXPERTS_IN_GGUF
    whole = ", with its parts beside the language model" if parts and parts.beside else ""
    why = f"a checkpoint in 16 bit{whole}"
    if base.quantised is not None:
        why += ": onto the original 16-bit model (--base), or with --onto dequantized"
    ways: dict[str, dict[str, Any]] = {"merged": {"possible": True, "why": why}}
    known, converted = converts(config)
    for name, form in FORMATS.items():
        possible, why = (known, converted) if form.gguf else (True, form.words)
        if mixture and form.gguf and form.of_adapter and known is not False:
            why += "; with an adapter on experts, merge and export the merged model"
        ways[name] = {"possible": possible, "why": why}
    return ways
