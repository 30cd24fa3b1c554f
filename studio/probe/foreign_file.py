"""Another tool's configuration, from its file: axolotl's, LLaMA-Factory's and TRL's YAML or JSON, scripts, notebooks.

Nothing is run: YAML is read as plain values, and of a script its text is read (`studio.core.foreign.python_calls`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from studio.core.errors import BadInput
from studio.core.foreign.axolotl import carry_axolotl
from studio.core.foreign.carry import Carrier, each_setting
from studio.core.foreign.llama_factory import carry_llama_factory
from studio.core.foreign.script import carry_script
from studio.core.foreign.trl import OF_MODEL_CONFIG, OF_PAIRS, OF_TRL, carry_trl
from studio.core.recipe import FIELDS, Recipe
from studio.core.recipe_parse import apply_settings
from studio.core.text import plain
from studio.runs.recipe_file import resolve_paths

AXOLOTL, LLAMA_FACTORY, TRL = "axolotl", "LLaMA-Factory", "TRL"
_MOST_BYTES = 4 * 2**20
_MOST_ALIASES = 20
"""Aliases of aliases of aliases make a small file a large one."""
_INFO = "dataset_info.json"
_OF_LLAMA_FACTORY = {"stage", "finetuning_type", "template", "dataset", "cutoff_len", "dataset_dir", "quantization_bit"}
_OF_TRL = {
    "dataset_name",
    "dataset_mixture",
    "dataset_mixer",
    "use_peft",
    "lora_r",
    "load_in_4bit",
    "max_length",
    "max_seq_length",
}
_NEEDED = (("model.base", "--model"), ("data.path", "--data"))
_OF_THE_DATA = ("data.path", "data.sources", "data.config", "data.split", "data.revision", "data.columns")
_NAME_THEM = ("model", "model_name_or_path", "load_dataset", "dataset_name")
_KNOWN = "an axolotl YAML, a LLaMA-Factory YAML or JSON, a TRL YAML, or a script or notebook that calls TRL or Unsloth"


def read_foreign(path: Path) -> Carrier:
    """Return what of a file was carried over, and what was not.

    Raises:
        BadInput: The file cannot be read, or is none of the configurations that are known.
        StudioError: It trains what this program does not.
    """
    shown = plain(path.name, one_line=True)
    text = _text(path, shown)
    if path.suffix == ".py":
        return _rested(carry_script(text, shown))
    if path.suffix == ".ipynb":
        return _rested(carry_script(_code_of(text, shown), shown))
    table, lines = _table(text, shown, as_json=path.suffix == ".json")
    settings = dict(each_setting(table, lines))
    if "base_model" in table:
        carrier = Carrier(AXOLOTL, settings)
        carry_axolotl(carrier)
    elif "model_name_or_path" in table and _OF_LLAMA_FACTORY & set(table):
        carrier = Carrier(LLAMA_FACTORY, settings)
        infos, folder = _dataset_infos(path, table.get("dataset_dir"))
        carry_llama_factory(carrier, infos, folder)
    elif "model_name_or_path" in table and _OF_TRL & set(table):
        carrier = Carrier(TRL, settings)
        pairs = "beta" in table
        carry_trl(carrier, {**(OF_PAIRS if pairs else OF_TRL), **OF_MODEL_CONFIG})
    else:
        keys = plain(", ".join(map(str, list(table)[:5])), one_line=True, limit=80) or "nothing"
        raise BadInput(f"{shown} holds {keys}; wanted {_KNOWN}.")
    return _rested(carrier)


def lacks(carrier: Carrier) -> list[tuple[str, str]]:
    """Return the fields that a recipe must have and a file does not name, each with the flag that gives it."""
    there = {*carrier.carried, *(["data.path"] if "data.sources" in carrier.carried else [])}
    return [(field, flag) for field, flag in _NEEDED if field not in there]


def recipe_of(
    carrier: Carrier, path: Path, *, base: str | None = None, data: str | None = None, settings: Sequence[str] = ()
) -> Recipe:
    """Return the recipe of a file that was read, with paths from here or from the file's folder.

    Args:
        carrier: What was carried over; what `data` takes the place of is taken out of it.
        path: The file.
        base: The base, in place of the file's.
        data: The data, in place of the file's.
        settings: Fields with their values, as after `--set`.

    Raises:
        BadInput: No base or no data is named, or a setting is wrong.
    """
    if data:
        carrier.carried = {field: one for field, one in carrier.carried.items() if field not in _OF_THE_DATA}
    given = {"model.base": base, "data.path": data}
    for field, flag in lacks(carrier):
        if not given[field]:
            why = next(
                (f" ({one.setting.words}: {one.why})" for one in carrier.left if one.setting.key in _NAME_THEM), ""
            )
            name = plain(path.name, one_line=True)
            raise BadInput(f"{name} names no {field.rpartition('.')[2]} that can be read{why}: give {flag}.")
    folders = (Path.cwd(), path.absolute().parent)
    recipe = resolve_paths(carrier.recipe(path.stem), folders)
    words = [*(f"{field}={word}" for field, word in given.items() if word), *settings]
    if words and not recipe.problems():
        return resolve_paths(apply_settings(recipe, words), folders)
    for word in words:
        field, _, value = word.partition("=")
        recipe = recipe.with_(field, FIELDS[field].kind.read(value)) if field in FIELDS else recipe
    return recipe


def _rested(carrier: Carrier) -> Carrier:
    carrier.leave_rest()
    return carrier


def _text(path: Path, shown: str) -> str:
    try:
        if path.is_dir():
            raise BadInput(f"{shown} is a folder; wanted {_KNOWN}.")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {plain(str(path), one_line=True)}.") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{shown} cannot be read: {error}.") from error
    if len(content) > _MOST_BYTES:
        raise BadInput(f"{shown} is larger than 4 MiB; wanted {_KNOWN}.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{shown} is not UTF-8 text; wanted {_KNOWN}.") from error


def _table(text: str, shown: str, *, as_json: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the table of a YAML or JSON file, and the line of each key."""
    try:
        if as_json:
            table, lines = json.loads(text), {}
        else:
            aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))
            if aliases > _MOST_ALIASES:
                raise BadInput(f"{shown} has {aliases} YAML aliases; {_MOST_ALIASES} at most are read.")
            table = yaml.safe_load(text)
            lines = _lines(yaml.compose(text, yaml.SafeLoader))
    except (ValueError, yaml.YAMLError) as error:
        raise BadInput(
            f"{shown} cannot be read: {plain(' '.join(str(error).split()), one_line=True, limit=200)}."
        ) from error
    except RecursionError as error:
        raise BadInput(f"{shown} is nested too deeply to be read.") from error
    if not isinstance(table, dict):
        raise BadInput(f"{shown} holds no table of settings; wanted {_KNOWN}.")
    return {str(key): value for key, value in table.items()}, lines


def _lines(node: yaml.Node | None) -> dict[str, int]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {str(key.value): key.start_mark.line + 1 for key, _ in pairs}


def _code_of(text: str, shown: str) -> str:
    """Return the code of a notebook's cells, without the lines that are commands of the notebook."""
    try:
        cells = json.loads(text)["cells"]
        sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        texts = ["".join(source) if isinstance(source, list) else str(source) for source in sources]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{shown} is no notebook.") from error
    # A cell that begins with %% is in another language, a line that begins with ! or % is a command.
    code = (cell for cell in texts if not cell.lstrip().startswith("%%"))
    return "\n".join("\n".join("pass" if _is_command(line) else line for line in cell.splitlines()) for cell in code)


def _is_command(line: str) -> bool:
    return line.startswith(("!", "%", "?"))


def _dataset_infos(path: Path, word: Any) -> tuple[Mapping[str, Any] | None, str]:
    """Return what `dataset_info.json` says, and its folder: looked for from here, then from the file's on."""
    name = word if isinstance(word, str) and word else "data"
    if name == "ONLINE":
        return None, ""
    for folder in _folders(path, name):
        try:
            found = json.loads((folder / _INFO).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found, str(folder)
    return None, name


def _folders(path: Path, name: str) -> Iterable[Path]:
    here = path.absolute().parent
    return [Path(name).expanduser().absolute(), *(folder / name for folder in (here, *list(here.parents)[:3])), here]
