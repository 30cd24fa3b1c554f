"""Writes an adapter as a PEFT folder, with a card that says what it is and how to use it."""

import shutil
from pathlib import Path
from typing import Any

from studio.jobs.export.model_card import CARD, adapter_card, training_of
from studio.jobs.export.work import Work
from studio.probe.adapter_folder import find_adapter


def write_peft_folder(work: Work, made: Path) -> dict[str, Any]:
    """Copy an adapter's files byte by byte and write its card.

    Args:
        work: The export.
        made: A new folder.

    Returns:
        An empty table: the report needs nothing more.

    Raises:
        BadInput: The source is no adapter.
        OSError: The disk is full or not writable.
    """
    adapter = work.adapter or find_adapter(work.source)
    made.mkdir()
    for path in sorted(adapter.folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != CARD:
            shutil.copyfile(path, made / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, made / path.name)
    card = adapter_card(adapter, Path(work.request.out).name, training_of(work.request.run))
    (made / CARD).write_text(card, encoding="utf-8")
    return {}
