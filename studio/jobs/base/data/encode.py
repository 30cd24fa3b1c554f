"""Encodes rows, all at once: by all cores, and once only for each combination of rows, model and settings.

Tokens of many rows are kept in the data cache (`studio.runs.data_cache`). An entry is found by everything that decides
about ids and labels: the rows, tokenizer, chat template and its date, the settings, and the source of this package.
"""

import inspect
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from studio.core.left_out import LEFT_OUT
from studio.jobs.base.data.bounded import told_template, written_date
from studio.jobs.base.data.encode_pool import Method, encoded_chunks
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.rows import Encoder, Encoding, Example
from studio.jobs.base.data.stored_examples import ExampleWriter, StoredExamples
from studio.jobs.base.data.template import Warn
from studio.probe.data import Row
from studio.probe.data.row_cache import code_sum
from studio.probe.data.stored_rows import StoredRows
from studio.probe.data.views import Chain, Drawn, lines_of
from studio.runs.data_cache import find_entry, keep_entry, scratch_entry, sum_of_bytes

KEPT_BYTES = 4 * 2**20
"""Fewer bytes of rows are encoded anew each time, in some seconds, and stay in memory."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    warn: Warn,
    progress: Callable[[float], None] | None = None,
    **how: Any,
) -> tuple[Sequence[Example], RowReport]:
    """Return the rows as examples of at most `seq_len` tokens, and a report of what happened to them.

    The tokenizer must have a chat template where the rows are conversations (see `template.ensure_template`).

    Args:
        rows: Conversations that end with an answer, or plain texts.
        tokenizer: A fast tokenizer.
        warn: Told what the user should know, each thing once.
        progress: Told the fraction done, 0 to 1; may raise to end it.
        how: The fields of `Encoding`.

    Raises:
        JobFailed: No row is left with anything to learn, or the tokenizer cannot say where its tokens stand.
    """
    encoder = Encoder(tokenizer, Encoding(**how))
    examples, report, _ = _encoded(rows, encoder, "encode", progress)
    report.say(encoder.how.seq_len, tokenizer.eos_token or "", warn)
    if rows and not examples:
        raise report.nothing_left(encoder.how.seq_len)
    return examples, report


def encode_sides(
    rows: Sequence[Row],
    tokenizer: Any,
    how: Encoding,
    *,
    warn: Warn,
    progress: Callable[[float], None] | None = None,
) -> tuple[Sequence[Example], Counter[str]]:
    """Return both sides of pairs of answers (chosen, rejected, chosen, and so on), and why others are left out.

    Args:
        rows: They are `Preference`s.
        tokenizer: As for `encode_rows`.
        how: How each side is encoded.
        warn: As for `encode_rows`.
        progress: As for `encode_rows`.

    Raises:
        JobFailed: No pair is left with anything to learn.
    """
    encoder = Encoder(tokenizer, how)
    sides, report, left_out = _encoded(rows, encoder, "sides", progress)
    report.say(how.seq_len, tokenizer.eos_token or "", warn)
    if left_out:
        reasons = ", ".join(f"{count} {LEFT_OUT[reason]}" for reason, count in left_out.items())
        warn(f"{left_out.total()} of {len(rows)} pairs are left out: {reasons}.")
    if rows and not sides:
        raise report.nothing_left(how.seq_len)
    return sides, left_out


Encoded = tuple[Sequence[Example], RowReport, Counter[str]]
"""Examples, what happened to the rows, and how many pairs are left out for which reason."""


def _encoded(
    rows: Sequence[Row], encoder: Encoder, method: Method, progress: Callable[[float], None] | None
) -> Encoded:
    size_bytes = _bytes_of(rows)
    chunks = partial(encoded_chunks, rows, size_bytes, encoder, method, progress)
    report, left_out = RowReport(), Counter[str]()
    if size_bytes < KEPT_BYTES:
        examples = list[Example]()
        for chunk in chunks():
            examples += chunk.packed.examples()
            report.add(chunk.report)
            left_out.update(chunk.left_out)
        return examples, report, left_out
    key = f"tokens-{sum_of_bytes(repr((_sum_of_rows(rows), _sum_of_encoder(encoder), method)).encode())}"
    if entry := find_entry(key, (lambda done, total: progress(0.0)) if progress else None):
        facts = entry.facts
        with suppress(OSError):  # removed just now
            kept = StoredExamples.opened(entry.folder, largest=facts["largest"], recalled=True)
            return kept, RowReport.of(facts["report"]), Counter(facts["left_out"])
    writer = ExampleWriter(lambda: scratch_entry(key, size_bytes))
    try:
        for chunk in chunks():
            writer.add(chunk.packed)
            report.add(chunk.report)
            left_out.update(chunk.left_out)
        facts = {"report": asdict(report), "largest": writer.largest, "left_out": dict(left_out)}
        return writer.done(lambda folder: keep_entry(key, folder, facts).folder), report, left_out
    finally:
        writer.drop()


def _bytes_of(rows: Sequence[Row]) -> int:
    """Return about how many bytes of text rows have."""
    if isinstance(rows, StoredRows):
        return rows.size_bytes
    if isinstance(rows, Chain):
        return sum(map(_bytes_of, rows.parts))
    if isinstance(rows, Drawn):
        return _bytes_of(rows.rows) * len(rows) // max(1, len(rows.rows))
    return sum(len(turn.words) for row in rows for turn in row.turns)


def _sum_of_rows(rows: Sequence[Row]) -> str:
    """Return a checksum of rows in their order; that of kept rows follows from the entry that they are in."""
    if isinstance(rows, StoredRows) and rows.store.name:
        return sum_of_bytes(rows.store.name.encode() + array("Q", rows.places).tobytes())
    if isinstance(rows, Drawn):
        return sum_of_bytes(_sum_of_rows(rows.rows).encode() + array("Q", rows.places).tobytes())
    if isinstance(rows, Chain):
        return sum_of_bytes(repr([(len(part), _sum_of_rows(part)) for part in rows.parts]).encode())
    import xxhash  # noqa: PLC0415  as in `studio.runs.data_cache`

    found = xxhash.xxh3_128()
    for line in lines_of(rows):
        found.update(line)
    return found.hexdigest()


def _sum_of_encoder(encoder: Encoder) -> str:
    """Return a checksum of all that decides how a row is encoded."""
    tokenizer = encoder.tokenizer
    kind = type(tokenizer)
    parts = (
        repr(encoder.how),
        tokenizer.backend_tokenizer.to_str(),
        repr(tokenizer.chat_template),
        repr(sorted(map(str, tokenizer.special_tokens_map.items()))),
        repr(written_date(tokenizer)),
        repr(sorted(told_template(tokenizer)["variables"].items())),
        # Code that comes with a model may change without a version.
        inspect.getsource(kind) if kind.__module__.startswith("transformers_modules") else kind.__qualname__,
        repr([version(name) for name in _LIBRARIES]),
        code_sum(),
        _code_sum(),
    )
    return sum_of_bytes("\0".join(parts).encode("utf-8", "surrogatepass"))


@cache
def _code_sum() -> str:
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), here.parent / "tokenizer.py"])
    return sum_of_bytes(b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in files))
