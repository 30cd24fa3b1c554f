"""Makes the request for a chat's process from what the user named: a run, an adapter or a model."""

from dataclasses import replace
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.probe.adapter_folder import find_adapter
from studio.probe.device import place_of, recorded_card
from studio.probe.model_folder import CONFIG
from studio.probe.models import find_base, word_anywhere
from studio.runs.chat import ChatRequest
from studio.runs.job import read_job
from studio.runs.layout import ADAPTER_CONFIG, RunPaths
from studio.runs.requests import ExportRequest, MergeRequest
from studio.runs.store import find_run
from studio.runs.system_prompt import NO_SYSTEM_PROMPT, read_system_prompt


def chat_request(
    word: str, root: Path, *, base: str = "", base_only: bool = False, device: str = "auto"
) -> ChatRequest:
    """Return the chat that a word means: a PEFT folder, a model folder, `embedded`, a hub id, else a run.

    Args:
        word: What the user named.
        root: Where runs live.
        base: The base model, if it is not the one that the adapter or the merge names.
        base_only: Whether the base answers alone.
        device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes the run's own device, and of cards the run's own if it
            is visible.

    Raises:
        BadInput: No model answers to the word, or the device cannot be used.
    """
    folder = Path(word).expanduser().absolute() if "\0" not in word else Path()
    if (folder / ADAPTER_CONFIG).is_file():
        run = RunPaths(folder.parent)
        recipe = _recipe(run) if run.recipe.is_file() else None
        return _placed(_with_adapter(folder, recipe, base, base_only, device), run)
    if (folder / CONFIG).is_file() or word == "embedded":
        return _placed(_alone(word, device, beside=base))
    try:
        paths = find_run(root, word)
    except BadInput:
        if "/" in word and not word.startswith((".", "/", "~")):
            return _placed(_alone(word, device, beside=base))
        raise
    return request_of_run(paths, base=base, base_only=base_only, device=device)


def request_of_run(paths: RunPaths, *, base: str = "", base_only: bool = False, device: str = "auto") -> ChatRequest:
    """Return the chat with the model or adapter that a run made.

    Raises:
        BadInput: The run made neither, or its card cannot be used.
    """
    name = plain(paths.name, one_line=True)
    merge = read_job(paths, MergeRequest)
    if made := merge or read_job(paths, ExportRequest):
        if not (Path(made.out) / CONFIG).is_file():
            raise BadInput(f"the run {name} has left no model in {plain(made.out, one_line=True)}.")
        known, revision = (merge.base, merge.revision) if merge and not base else (base, "")
        trained = RunPaths(Path(made.run)) if made.run else None
        if base_only and known:
            return _placed(_alone(known, device, revision=revision), trained)
        return _placed(_alone(made.out, device, beside=known, beside_revision=revision), trained)
    recipe = read_job(paths, Recipe)
    if recipe is None:
        raise BadInput(f"the run {name} made no model to chat with.")
    if not (paths.adapter / ADAPTER_CONFIG).is_file() and not base_only:
        raise BadInput(
            f"the run {name} has no adapter yet: it must be trained or stopped first. --base-only asks its base alone."
        )
    return _placed(_with_adapter(paths.adapter, recipe, base, base_only, device), paths)


def _with_adapter(folder: Path, recipe: Recipe | None, base: str, base_only: bool, device: str) -> ChatRequest:
    found = None if base_only else find_adapter(folder)
    word = word_anywhere(base or (recipe.model.base if recipe else found.base if found else ""))
    if not word:
        raise BadInput(f"{plain(folder.name, one_line=True)} names no base model; say which one with --base.")
    find_base(word, recipe.model.revision if recipe and not base else "")
    adapter = "" if base_only else str(folder.absolute())
    if recipe is None:
        return ChatRequest(base=word, adapter=adapter, device=device)
    model = recipe.model
    if device == "auto" and recipe.device.device == "cpu":
        device = "cpu"
    return ChatRequest(
        base=word,
        adapter=adapter,
        revision="" if base else model.revision,
        method=recipe.method,
        dtype=model.dtype,
        quant_type=model.quant_type,
        double_quant=model.double_quant,
        precision=model.precision,
        streamed=model.stream if isinstance(model.stream, int) else 0,
        attention=recipe.train.attention,
        device=device,
        data_format=recipe.data.format if recipe.data.format != "auto" else "chat",
        trust_remote_code=model.trust_remote_code,
    )


def _placed(request: ChatRequest, run: RunPaths | None = None) -> ChatRequest:
    """Return the request with the run's system prompt, and the card that computes: for `auto` the run's, if visible.

    Raises:
        BadInput: The card cannot be used.
    """
    card = recorded_card(run) if request.device == "auto" else ""
    place = place_of(request.device, run_card=card, setting="--device").or_refuse()
    prompt = read_system_prompt(run) if run else NO_SYSTEM_PROMPT
    return replace(request, environment=place.environment, note=place.note, trained_with=prompt)


def _alone(word: str, device: str, *, revision: str = "", beside: str = "", beside_revision: str = "") -> ChatRequest:
    base = find_base(word, revision)
    return ChatRequest(
        base=word_anywhere(word),
        revision=revision,
        device=device,
        # A model that was exported in 4 or 8 bits says so itself, and is loaded as it is.
        method="qlora" if base.quantization == "bitsandbytes" else "lora",
        beside=word_anywhere(beside),
        beside_revision=beside_revision,
    )


def _recipe(run: RunPaths) -> Recipe | None:
    try:
        return read_job(run, Recipe)
    except BadInput:
        return None
