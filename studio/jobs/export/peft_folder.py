"""An adapter on its own: the PEFT folder, with a card that says what it is and how to use it."""

import shutil
from pathlib import Path

from studio.jobs.export.model_card import Training, adapter_card
from studio.probe.adapter_folder import AdapterFound

CARD = "README.md"


def write_peft_folder(adapter: AdapterFound, folder: Path, name: str, training: Training) -> None:
    """Copy an adapter's files byte by byte and write its card.

    Args:
        adapter: What to export.
        folder: A new folder.
        name: What it will be called.
        training: Its run, where it is known.

    Raises:
        OSError: The disk is full or not writable.
    """
    folder.mkdir(parents=True)
    for path in sorted(adapter.folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != CARD:
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name)
    (folder / CARD).write_text(adapter_card(adapter, name, training), encoding="utf-8")
