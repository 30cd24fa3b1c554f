"""Says before a run is made whether transformers has a class for an architecture that continues text.

The installed transformers is not imported (that takes seconds, and torch): its tables of classes are read as text.
Where they cannot be read nothing is refused here, and a training says it when it loads the model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio.core.text import plain

_TABLE = re.compile(r"^(?P<name>\w+_MAPPING_NAMES)\b[^=\n]*= OrderedDict\(\n(?P<rows>.*?)^\)", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r'\(\s*"(?P<key>[^"]+)",\s*(?P<classes>[^()]*|\([^()]*\))')
_NAME = re.compile(r"\w+")
_CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_WITH_IMAGES = ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
_CONTINUES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How transformers' classes end that continue text."""


@dataclass(frozen=True, slots=True)
class Architectures:
    """What the installed transformers knows.

    Attributes:
        kinds: Values of `model_type` that have a config.
        speaking: Those of them with a class that continues text, alone or after images and sound.
        masked: Those with a class that fills gaps.
        classes: Names of all classes in its tables.
        causal: Class that continues text, by `model_type`.
        multimodal: The same of those that also read images or sound.
    """

    kinds: frozenset[str]
    speaking: frozenset[str]
    masked: frozenset[str]
    classes: frozenset[str]
    causal: Mapping[str, str]
    multimodal: Mapping[str, str]


def untrainable_architecture(config: Mapping[str, Any]) -> str:
    """Return why no training can start on a model of this config, in words; empty where one can, or nothing is known.

    Args:
        config: The table of its config.json.
    """
    known, kind = installed_architectures(), config.get("model_type")
    if known is None or not isinstance(kind, str) or "auto_map" in config:
        return ""
    shown = plain(kind, one_line=True, limit=60)
    if kind not in known.kinds:
        return (
            f"of the architecture {shown}, which the installed transformers {_version()} does not know: update it "
            "(pip install -U transformers), or take a model of an architecture that it has"
        )
    return _silent(config, shown, known)


def _silent(config: Mapping[str, Any], shown: str, known: Architectures) -> str:
    """Return why a model of an architecture that transformers knows does not continue text; empty where it does.

    Args:
        config: The table of its config.json.
        shown: Its `model_type` as it may be printed.
        known: What transformers knows.
    """
    kind, named = config["model_type"], config.get("architectures")
    kinds = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    first = kinds[0] if kinds else ""
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    if text.get("use_bidirectional_attention") in (True, "all"):
        return f"a {shown} model whose tokens see what follows them (an embedding model), and so no language model"
    if config.get("is_encoder_decoder") is True:
        return f"a {shown} model, an encoder with a decoder behind it; what is trained here is a decoder alone"
    speaks = first in known.classes and first.endswith(_CONTINUES)
    if not speaks and kind not in known.speaking:
        return f"a {shown} model, for which transformers has no class that continues text"
    if kind in known.masked and kinds and not speaks:
        name = plain(first, one_line=True, limit=60)
        return f"a {shown} model (class {name}), an encoder that fills gaps and does not continue text"
    return ""


@dataclass(frozen=True, slots=True)
class ClassFound:
    """The class of a checkpoint.

    Attributes:
        named: What its config names in `architectures`; empty where it names none.
        used: What it is built as, code that it brings itself apart; empty where that is not known, or there is none.
        known: Whether the installed transformers knows its architecture; None where that cannot be read.
        version: The installed transformers; empty where there is none.
    """

    named: str
    used: str
    known: bool | None
    version: str


def class_of(config: Mapping[str, Any]) -> ClassFound:
    """Return the class that a config's checkpoint is built as, as `studio.jobs.base.model_class` picks it in a job.

    Args:
        config: The table of its config.json.
    """
    names, kind, known = config.get("architectures"), config.get("model_type"), installed_architectures()
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    named = plain(first, one_line=True, limit=100)
    if known is None or not isinstance(kind, str):
        return ClassFound(named, "", None, _version())
    if kind not in known.kinds or config.get("is_encoder_decoder") is True:
        return ClassFound(named, "", kind in known.kinds, _version())
    if first in known.classes and first.endswith(_CONTINUES):
        return ClassFound(named, first, True, _version())
    # A multimodal config's own class before the class of the text model inside it.
    tables = (known.multimodal, known.causal) if "text_config" in config else (known.causal, known.multimodal)
    return ClassFound(named, tables[0].get(kind) or tables[1].get(kind, ""), True, _version())


@lru_cache(maxsize=1)
def installed_architectures() -> Architectures | None:
    """Return what the installed transformers knows; None where it is not installed, or its tables have another form."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "models" / "auto"
    try:
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    except (OSError, UnicodeDecodeError):
        return None
    tables: dict[str, dict[str, str]] = {}
    for text in texts:
        for found in _TABLE.finditer(text):
            rows = {row["key"]: row["classes"] for row in _ROW.finditer(found["rows"])}
            tables.setdefault(found["name"], {}).update(rows)
    kinds, causal = tables.get("CONFIG_MAPPING_NAMES", {}), tables.get(_CAUSAL, {})
    if not kinds or not causal:
        return None
    multimodal = {key: held for name in _WITH_IMAGES for key, held in tables.get(name, {}).items()}
    classes = {name for rows in tables.values() for held in rows.values() for name in _NAME.findall(held)}
    masked = frozenset(tables.get("MODEL_FOR_MASKED_LM_MAPPING_NAMES", {}))
    speaking = frozenset((*causal, *multimodal))
    firsts = ({key: _NAME.findall(held)[0] for key, held in rows.items()} for rows in (causal, multimodal))
    return Architectures(frozenset(kinds), speaking, masked, frozenset(classes), *firsts)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  10 ms that a plan does not pay

    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""
