"""Writes model cards: what an artefact is, what it was trained on and how well, what was checked, and how to use it."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.chat_options import PARTS
from studio.core.errors import StudioError
from studio.core.preferences import takes_pairs
from studio.core.recipe import PLACES, Recipe
from studio.core.text import plain
from studio.jobs.base.closeness import Closeness
from studio.probe.adapter_folder import AdapterFound
from studio.probe.data.places import hub_word
from studio.runs.atomic import read_object
from studio.runs.history import History
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe
from studio.runs.summary import gain_of
from studio.runs.watch import read_history

CARD = "README.md"
_LONGEST_AUDIT = 8000
_CACHED = "models--"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Training:
    """The training run behind an artefact; what can no longer be read is None."""

    recipe: Recipe | None = None
    history: History | None = None
    audit: dict[str, Any] | None = None


def training_of(run: str) -> Training:
    """Return recipe, history and audit of a training run, as far as they can still be read."""
    if not run:
        return Training()
    paths = RunPaths(Path(run))
    try:
        recipe = read_job(paths, Recipe)
    except (StudioError, OSError):
        return Training()
    return Training(recipe, read_history(paths), read_object(paths.audit) or None)


def adapter_card(adapter: AdapterFound, name: str, training: Training) -> str:
    """Return the card of an adapter in transformers' format, as Markdown."""
    base, recipe = _base_of(adapter, training), training.recipe
    config, shown = adapter.config, _shown(base)
    quantised = ", trained on a 4-bit base (QLoRA)" if recipe and recipe.method == "qlora" else ""
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    head = f"Rank {_rank(config)}, alpha {config.get('lora_alpha')}, on {_targets(config)}{quantised}."
    lines = [*_front(base, "peft"), f"# {kind} adapter for {shown}", "", head, ""]
    served = "BASE_MODEL" if base == "embedded" or _is_place(base) else shown
    return _text([*lines, *_figures(training), *_use_adapter(served, name, config), *_recipe(recipe)])


def model_card(
    adapter: AdapterFound | None, title: str, training: Training, *, checked: list[str], use: list[str], tag: str
) -> str:
    """Return the card of a whole model, or of an adapter in another format, as Markdown.

    Args:
        adapter: The adapter that was merged or converted; None where it is not known.
        title: The card's heading.
        training: The run behind the model.
        checked: What the export checked, one line for each.
        use: Lines of Markdown on how to use the model.
        tag: The library that loads it.
    """
    base = _base_of(adapter, training)
    lines = [*_front(base, tag), f"# {title}", ""]
    if base:
        lines += [f"Fine-tuned from {_shown(base)} with lora-studio.", ""]
    if checked:
        lines += ["## Checked at the export", "", *(f"- {line}" for line in checked), ""]
    return _text([*lines, *_figures(training), "## Use", "", *use, *_recipe(training.recipe)])


def loss_line(loss: Closeness | None, against: str) -> str:
    """Return in words how close an export is to its source; `against` names that."""
    if loss is None:
        return "its answers could not be compared"
    return (
        f"KL to {against}: {loss.mean_kl:.2g} nats a token; same most likely token at {loss.same_top_token:.1%} of "
        f"{loss.tokens} tokens"
    )


def _front(base: str, tag: str) -> list[str]:
    lines = ["---", f"library_name: {tag}"]
    # A path of this computer would mean nothing to anyone else.
    if base and base != "embedded" and not _is_place(base):
        name = plain(base, one_line=True)
        lines.append(f"base_model: {name if _HUB_NAME.fullmatch(name) else json.dumps(name)}")
    return [*lines, "---", ""]


def _base_of(adapter: AdapterFound | None, training: Training) -> str:
    """Return the base's name on the hub if it is known, else the folder that run or adapter name; empty for neither."""
    said = [training.recipe.model.base if training.recipe else "", adapter.base if adapter else ""]
    words = [_hub_name(word) for word in said if word]
    return next((word for word in words if not _is_place(word)), words[0] if words else "")


def _hub_name(word: str) -> str:
    """Return `owner/name` for a folder in the hub's cache, and anything else as it is."""
    cached = next((part for part in Path(word).parts if part.startswith(_CACHED)), "")
    return "/".join(cached.removeprefix(_CACHED).split("--", 1)) or word


def _shown(base: str) -> str:
    if base == "embedded":
        return "SmolLM2-135M-Instruct, as lora-studio embeds it"
    return plain(Path(base).name if _is_place(base) else base, one_line=True) or "BASE_MODEL"


def _rank(config: dict[str, Any]) -> int:
    return int(config.get("r") or 0)


def _targets(config: dict[str, Any]) -> str:
    targets = config.get("target_modules")
    words = sorted(targets) if isinstance(targets, list) else [str(targets)]
    return plain(", ".join(str(word) for word in words), one_line=True)


def _figures(training: Training) -> list[str]:
    history, recipe = training.history, training.recipe
    if history is None or not history.last_step:
        return []
    rows = [f"- optimizer steps: {history.last_step}"]
    if recipe:
        data = recipe.data
        learnt = "answers only" if data.answers_only else "all words"
        if data.learn != PARTS:
            learnt = f"of answers only {' and '.join(data.learn)}"
        if data.last_answer_only:
            learnt += ", the last of each conversation"
        if takes_pairs(recipe.train.objective):
            learnt = f"preferences between two answers ({recipe.train.objective}, beta {recipe.train.beta:g})"
        names = ", ".join(word if hub_word(word) else Path(word).name for word in recipe.data.words)
        rows.append(f"- data: {plain(names, one_line=True)}, {learnt} learnt")
    if history.planned:
        rows.append(f"- rows: {history.planned.rows} trained on, {history.planned.held_out_rows} held out")
    if tokens := history.train.all_tokens:
        rows.append(f"- tokens seen: {tokens:,}")
    if len(history.train.losses):
        first, last = history.train.losses[0], history.train.losses[-1]
        rows.append(f"- training loss: {first:.3f} at the first step, {last:.3f} at the last")
    if history.evals:
        first_eval, last_eval = history.evals[0], history.evals[-1]
        rows.append(
            f"- held-out loss: {first_eval.loss:.3f} at step {first_eval.step}, {last_eval.loss:.3f} at step "
            f"{last_eval.step}, on {last_eval.loss_tokens:,} {'tokens' if last_eval.margin is None else 'pairs'}"
        )
        if gain := gain_of(history):
            rows.append(f"- {gain['words']}")
    return ["## Training", "", *rows, "", *_audit(training.audit)]


def _audit(audit: dict[str, Any] | None) -> list[str]:
    """Return lines that quote what an audit of the run found, from its `audit.json`."""
    advice, page = (audit or {}).get("recommendation"), (audit or {}).get("markdown")
    sentence = advice.get("sentence") if isinstance(advice, dict) else None
    words = [word for word in (sentence, page) if isinstance(word, str) and word]
    if len(words) > 1 and words[0] in words[1]:  # the page has the advice already
        del words[0]
    return (
        ["## Audit", "", *(line for word in words for line in (plain(word, limit=_LONGEST_AUDIT), ""))] if words else []
    )


def _loading(base: str, name: str, config: dict[str, Any]) -> list[str]:
    """Return the lines of Python that load base and adapter.

    The adapter of a multimodal checkpoint belongs on the checkpoint's own class, which its config names; peft's
    automatic class would load the base as the text class of the family, where not a single key of the adapter fits.
    """
    kind = (config.get("auto_mapping") or {}).get("base_model_class")
    if not (isinstance(kind, str) and kind.isidentifier()):
        return [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained({json.dumps(name)}, dtype="auto")',
        ]
    return [
        "from peft import PeftModel",
        f"from transformers import AutoTokenizer, {kind}",
        "",
        f'base = {kind}.from_pretrained({json.dumps(base)}, dtype="auto")',
        f"model = PeftModel.from_pretrained(base, {json.dumps(name)})",
    ]


def _use_adapter(base: str, name: str, config: dict[str, Any]) -> list[str]:
    most = max([_rank(config), *(int(value) for value in (config.get("rank_pattern") or {}).values())])
    lines = [
        "## Use",
        "",
        "With transformers and peft:",
        "",
        "```python",
        *_loading(base, name, config),
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
        "```",
        "",
        "With vLLM:",
        "",
        "```sh",
        f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules {shlex.quote(f'tuned=./{name}')} "
        f"--max-lora-rank {most}",
        "```",
    ]
    if config.get("use_rslora"):
        # predibase/lorax 700, vllm 10798: alpha / r instead of alpha / sqrt(r) looks like no fine-tune at all.
        lines += [
            "",
            "The adapter is scaled by alpha / sqrt(rank) (rsLoRA). A server that does not know this weakens it.",
        ]
    return lines


def _recipe(recipe: Recipe | None) -> list[str]:
    return ["", "## Recipe", "", "```toml", dump_recipe(_without_places(recipe)).rstrip(), "```"] if recipe else []


def _without_places(recipe: Recipe) -> Recipe:
    """Return the recipe with only the last part of each path: the rest would show folders of this computer."""
    for path in PLACES:
        value = str(recipe.get(path))
        if _is_place(value):
            recipe = recipe.with_(path, Path(value).name)
    return recipe


def _is_place(word: str) -> bool:
    return word.startswith((".", "/", "~")) or "\\" in word


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
