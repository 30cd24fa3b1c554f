"""An adapter on its own: the PEFT folder, with a card that says what it is and how to use it."""

import shutil
from pathlib import Path
from typing import Any

from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.probe.adapter_folder import AdapterFound
from studio.runs.history import History
from studio.runs.recipe_file import dump_recipe

_CARD = "README.md"


def write_peft_folder(
    adapter: AdapterFound, folder: Path, name: str, recipe: Recipe | None, history: History | None
) -> None:
    """Copy an adapter's files byte by byte and write its card.

    Args:
        adapter: What to export.
        folder: A new folder.
        name: What it will be called.
        recipe: Of its training run, where it is known.
        history: Of its training run, where it is known.

    Raises:
        OSError: The disk is full or not writable.
    """
    folder.mkdir(parents=True)
    for path in sorted(adapter.folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != _CARD:
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name)
    (folder / _CARD).write_text(card(adapter, name, recipe, history), encoding="utf-8")


def card(adapter: AdapterFound, name: str, recipe: Recipe | None, history: History | None) -> str:
    """Return the card as Markdown."""
    config, base = adapter.config, adapter.base or (recipe.model.base if recipe else "")
    rank = int(config.get("r") or 0)
    most = max([rank, *(int(value) for value in (config.get("rank_pattern") or {}).values())])
    lines = ["---", "library_name: peft"]
    # A path of this computer would be no model's name to anyone else.
    if base and not _is_place(base):
        lines.append(f"base_model: {plain(base, one_line=True)}")
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    shown = plain(Path(base).name if _is_place(base) else base, one_line=True) or "BASE_MODEL"
    lines += [
        "---",
        "",
        f"# {kind} adapter for {shown}",
        "",
        f"Rank {rank}, alpha {config.get('lora_alpha')}, on {_targets(config)}"
        f"{', trained on a 4-bit base (QLoRA)' if recipe and recipe.method == 'qlora' else ''}.",
        "",
        *_figures(history),
        *_use(shown, name, most, config),
    ]
    if recipe:
        lines += ["", "## Recipe", "", "```toml", dump_recipe(_without_places(recipe)).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _targets(config: dict[str, Any]) -> str:
    targets = config.get("target_modules")
    words = sorted(targets) if isinstance(targets, list) else [str(targets)]
    return plain(", ".join(str(word) for word in words), one_line=True)


def _figures(history: History | None) -> list[str]:
    if history is None or not history.last_step:
        return []
    rows = [f"- optimizer steps: {history.last_step}"]
    if history.planned:
        rows.append(f"- rows: {history.planned.rows} trained on, {history.planned.held_out_rows} held out")
    if len(history.train.losses):
        first, last = history.train.losses[0], history.train.losses[-1]
        rows.append(f"- training loss: {first:.3f} at the first step, {last:.3f} at the last")
    if history.evals:
        rows.append(f"- held-out loss: {history.evals[0].loss:.3f} first, {history.evals[-1].loss:.3f} last")
    return ["## Training", "", *rows, ""]


def _use(base: str, name: str, rank: int, config: dict[str, Any]) -> list[str]:
    lines = [
        "## Use",
        "",
        "With transformers and peft:",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}", dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        "With vLLM:",
        "",
        "```sh",
        f"vllm serve {base} --enable-lora --lora-modules tuned=./{name} --max-lora-rank {rank}",
        "```",
    ]
    if config.get("use_rslora"):
        # predibase/lorax 700, vllm 10798: alpha / r instead of alpha / sqrt(r) looks like no fine-tune at all.
        lines += [
            "",
            "The adapter is scaled by alpha / sqrt(rank) (rsLoRA). A server that does not know this weakens it.",
        ]
    return lines


def _without_places(recipe: Recipe) -> Recipe:
    """Leave the folders of this computer out: only the last part of a path is anyone's business."""
    for path in ("data.path", "data.eval_path", "model.base"):
        section, _, name = path.partition(".")
        value = str(getattr(getattr(recipe, section), name))
        if _is_place(value):
            recipe = recipe.with_(path, Path(value).name)
    return recipe


def _is_place(word: str) -> bool:
    return word.startswith((".", "/", "~")) or "\\" in word
