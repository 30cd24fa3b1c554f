"""A recipe's data made into examples: read, split, recorded, encoded and compared with the model.

The user is warned of whatever is unusual in it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from peft import PeftModel

from studio.core.errors import BadInput, JobFailed
from studio.core.events import Warned
from studio.core.named_templates import NAMED, NamedTemplate
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.data.bounded import freeze_date, set_variables, writes_date
from studio.jobs.base.data.chosen_template import untrained_tokens, use_template
from studio.jobs.base.data.rows import Prompt, sample_prompts
from studio.jobs.base.data.stored_examples import StoredExamples
from studio.jobs.base.data.template import ensure_template, say_variables
from studio.jobs.base.progress import PhaseTeller, heed
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.train.objectives import Encoded, Objective
from studio.jobs.train.objectives.pairs import Pairs
from studio.probe.data import Row
from studio.probe.data.mixture import data_of, eval_data_of, fetch_data
from studio.probe.held_out import hold_out
from studio.probe.named_template import template_of
from studio.runs.atomic import write_whole
from studio.runs.held_out import HeldOutRecord, keep_record, read_record
from studio.runs.identity import Identity
from studio.runs.system_prompt import commonest, keep_system_prompt
from studio.runs.worker import Worker

_MOST_LOOKED_AT = 1000


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded rows to train on and held-out ones, and prompts that the model answers for the user to see.

    `left_out` counts the rows that are in neither, by reason (`studio.core.left_out`).
    """

    train: Sequence[Encoded]
    held_out: Sequence[Encoded]
    prompts: Sequence[Prompt]
    left_out: Mapping[str, int] = field(default_factory=dict)


def read_rows(
    worker: Worker,
    tell: PhaseTeller,
    recipe: Recipe,
    tokenizer: Any,
    *,
    objective: Objective,
    identify: Callable[[Sequence[Row], Sequence[Row]], None],
) -> Rows:
    """Read, split and encode the rows, record which are held out, and warn of what was cut or dropped.

    Args:
        worker: Gets the warnings; its run keeps the record.
        tell: Told the progress.
        recipe: Names the data.
        tokenizer: Of the base.
        objective: Encodes the rows.
        identify: Called with the rows to train on and those held out, before they are encoded; may refuse them.

    Raises:
        BadInput: A file changed since it was checked and cannot be used any more.
        JobFailed: No row, or no held-out row, is left with anything to learn.
        Cancelled: The user asked for a stop.
    """

    def read(fraction: float) -> None:
        tell("reading the data", fraction)
        heed(worker, "stopped while the data were read")

    def file_read(done: int, total: int) -> None:
        read(done / max(1, total))

    def tokenised(fraction: float) -> None:
        tell("tokenising the rows", fraction)
        heed(worker, "stopped while the rows were tokenised")

    def compared(done: int, total: int) -> None:
        tell("comparing the rows", done / max(1, total))
        heed(worker, "stopped while the data were read")

    def warn(message: str) -> None:
        worker.emit(Warned, topic="data", message=message)

    def downloaded(done: int, total: int) -> None:
        tell("downloading the data", done / max(1, total), f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
        heed(worker, "stopped while the data were downloaded; what is there is kept")

    left_out: Counter[str] = Counter()
    chosen = _template(worker, recipe)
    fetch_data(recipe, progress=downloaded)
    tell("reading the data")
    data = data_of(recipe, progress=file_read)
    tell("reading the data", detail=data.described())
    eval_data = eval_data_of(recipe, progress=file_read)
    for found in filter(None, (data, eval_data)):
        for note in found.notes():
            warn(note)
        left_out.update(found.left_out)
    parts = hold_out(recipe, data, eval_data, _kept(worker), progress=compared)
    train_rows, held = parts.train, parts.held_out
    for note in parts.notes:
        warn(note)
    identify(train_rows, held)
    _keep(worker, parts.record)
    if not worker.paths.system_prompt.exists():
        keep_system_prompt(worker.paths, commonest(_system_prompts(train_rows)))
    if data.format != "text":
        use_template(tokenizer, chosen, warn)
        ensure_template(tokenizer, data.format, warn)
        say_variables(tokenizer, warn)

    def encoded(rows: Sequence[Row]) -> Sequence[Encoded]:
        examples = objective.encode(rows, tokenizer, recipe, warn=warn, left_out=left_out, progress=tokenised)
        made = examples.sides if isinstance(examples, Pairs) else examples
        if isinstance(made, StoredExamples) and made.recalled:
            tell("tokenising the rows", 1.0, "the tokens that an earlier run made of these rows are used")
        return examples

    prompts = sample_prompts(held, tokenizer, recipe.eval.samples, seq_len=recipe.train.seq_len)
    examples = encoded(train_rows)
    try:
        return Rows(examples, encoded(held) if held else [], prompts, +left_out)
    except JobFailed as error:
        raise JobFailed(error.kind, f"Of the rows that are held out: {error}", error.advice) from error


def _system_prompts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what each of at most a thousand rows, spread over all, has as its system prompt; empty for none."""
    looked_at = min(len(rows), _MOST_LOOKED_AT)
    for place in range(looked_at):
        turns = rows[place * len(rows) // looked_at].turns
        yield turns[0].content if turns and turns[0].role == "system" else ""


def _template(worker: Worker, recipe: Recipe) -> NamedTemplate | None:
    """Return the chat template that the recipe names, as it was when the run began; None for the model's own.

    Raises:
        BadInput: It cannot be read.
    """
    word, path = recipe.data.template, worker.paths.template
    if not word:
        return None
    if path.is_file():
        return replace(NAMED.get(word, NamedTemplate(word, "")), text=path.read_text("utf-8"))
    chosen = template_of(word)
    write_whole(path, chosen.text if chosen else "")
    return chosen


def _keep(worker: Worker, record: HeldOutRecord) -> None:
    """Write the record of held-out rows; keep the rows' losses from the first start where the rows are the same."""
    kept = _kept(worker)
    if kept and kept.held_out == record.held_out:  # their file may have been moved
        record = replace(record, before=kept.before)
    if kept != record:
        keep_record(worker.paths, record)


def _kept(worker: Worker) -> HeldOutRecord | None:
    """Return the record from the run's first start, if there is a sound one."""
    with suppress(BadInput):
        return read_record(worker.paths)
    return None


def tell_what_was_lost(worker: Worker, first: Identity) -> None:
    """Warn at a resume of lost files that say what the run began with, once its rows were compared with the log.

    Args:
        worker: Of the run; neither file has been written anew.
        first: What the run was made from.
    """
    found = {worker.paths.identity: first.whole, worker.paths.held_out: _kept(worker) is not None}
    lost = " and ".join(path.name for path, whole in found.items() if not whole)
    if lost and first.base is not None:
        message = f"lost or damaged, and written anew: {lost}. By the log, base and rows are those of its start"
        worker.emit(Warned, topic="resume", message=message)


def tokenizer_of(worker: Worker, recipe: Recipe, folder: Path, date: datetime) -> Any:
    """Return the base's tokenizer, whose chat template is told the date of the run's first start."""
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
    freeze_date(tokenizer, date)
    set_variables(tokenizer, dict(recipe.data.template_kwargs))
    if writes_date(tokenizer):
        message = f"the chat template writes the date: this run keeps that of its first start, {date:%d %b %Y}"
        worker.emit(Warned, topic="data", message=message)
    return tokenizer


def check_fit(worker: Worker, recipe: Recipe, model: PeftModel, rows: Rows, tokenizer: Any) -> None:
    """Refuse token ids for which the model has no embedding; warn of rows longer, and tokens other, than it has seen.

    Raises:
        JobFailed: The tokenizer makes ids beyond the model's embeddings.
    """
    causal = model.get_base_model()
    known = causal.get_input_embeddings().weight.shape[0]
    parts = [part for part in (rows.train, rows.held_out) if part]
    largest = max(map(_largest_id, parts))
    if largest >= known:
        raise JobFailed(
            "tokenizer_mismatch",
            f"the tokenizer makes token {largest}, but the model has embeddings for {known} tokens only",
            "use the tokenizer that belongs to this model",
        )
    limit = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(_most_tokens, parts))
    if isinstance(limit, int) and longest > limit:
        message = f"the longest row has {longest} tokens; the model was made for {limit} (max_position_embeddings)"
        worker.emit(Warned, topic="data", message=message)
    if recipe.data.template:
        _warn_of_untrained(worker, recipe, model, tokenizer)


def _warn_of_untrained(worker: Worker, recipe: Recipe, model: PeftModel, tokenizer: Any) -> None:
    """Warn where the base has never seen the special tokens of the chat template that the recipe names."""
    whole = {name.rpartition(".")[2] for name in recipe.adapter.modules_to_save}
    embeddings = model.get_base_model().get_input_embeddings()
    unseen = untrained_tokens(tokenizer, tokenizer.chat_template, embeddings.weight.detach())
    if unseen and "embed_tokens" not in whole:
        named = ", ".join(plain(token, one_line=True) for token in unseen)
        message = (
            f"the base has never seen {named}: their embeddings are zero. Train embeddings and head whole "
            '(adapter.modules_to_save = ["embed_tokens", "lm_head"]), or choose a template without special tokens'
        )
        worker.emit(Warned, topic="data", message=message)


def _largest_id(examples: Sequence[Encoded]) -> int:
    if isinstance(examples, Pairs):
        return _largest_id(examples.sides)
    if isinstance(examples, StoredExamples):
        return examples.largest
    return max(int(example.input_ids.max()) for example in examples)


def _most_tokens(examples: Sequence[Encoded]) -> int:
    if isinstance(examples, StoredExamples | Pairs):
        return int(examples.lengths.max())
    return max(len(example.input_ids) for example in examples)
