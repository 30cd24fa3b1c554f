"""What the converter gets to see of a model folder: no Python code, nothing that asks for any.

llama.cpp's converter loads tokenizers with `trust_remote_code=True`: a model's own code would run without being asked
for. Here there is none, and no `auto_map` that would fetch some.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.text import plain

_WEIGHTS = ".safetensors"
_SMALL = (".json", ".jinja", ".model", ".txt")
_TABLES = ("config.json", "tokenizer_config.json")


def make_view(view: Path, folders: Sequence[Path], *, weights: bool) -> Path:
    """Fill a folder with config, tokenizer and, where wanted, links to the weights; return it.

    Args:
        view: A new folder.
        folders: Where the files come from; of files by one name the last folder's wins.
        weights: Link the last folder's weights, too.

    Raises:
        BadInput: A config is no JSON.
        OSError: A file cannot be read or written.
    """
    view.mkdir()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            small = path.suffix in _SMALL and not path.name.endswith((".index.json", "adapter_config.json"))
            if path.is_file() and small:
                shutil.copyfile(path, view / path.name)
    for name in _TABLES:
        _without_own_code(view / name)
    if weights:
        for path in sorted(folders[-1].iterdir()):
            if path.name.endswith((_WEIGHTS, ".index.json")):
                _link(path, view / path.name)
    return view


def _without_own_code(path: Path) -> None:
    if not path.is_file():
        return
    try:
        table = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise BadInput(f"{plain(path.name, one_line=True)} is not JSON: {plain(str(error), one_line=True)}.") from None
    if isinstance(table, dict) and table.pop("auto_map", None) is not None:
        path.write_text(json.dumps(table, indent=2, ensure_ascii=False), encoding="utf-8")


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.absolute())
    except OSError:  # Windows allows symbolic links to few users
        os.link(path, link)
