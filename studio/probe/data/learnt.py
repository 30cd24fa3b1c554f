"""What of a turn is learnt, where its file says so: weight (OpenAI), train, train_detail (axolotl), loss (ms-swift)."""

from collections.abc import Mapping
from typing import Any

from studio.core.text import plain
from studio.probe.data.findings import filled, json_kind
from studio.probe.data.raw_row import RawRow

_WEIGHTS = ("weight", "train", "training")
"""Fields that weigh a turn: 1 and true ask for what is done anyway."""
_DETAILS = ("train_detail", "training_detail")
MARKS = (*_WEIGHTS, *_DETAILS, "loss")
_WHOLE = (
    "wanted 0 or 1 (false or true). A label is learnt or not: a share of its loss cannot be given to it. Write 1, or 0 "
    "for what is not to be learnt"
)
_UNTRAINED = (
    "with data.answers_only = false every token is learnt, this turn too. Set data.answers_only to true, or remove the "
    "field"
)
_DETAIL = "wanted an object with begin_offset, end_offset (the last character) and train"

Spans = tuple[tuple[int, int], ...]


def learnt_of(turn: Mapping[str, Any], role: str, content: str, field: str, row: RawRow) -> tuple[bool, Spans | None]:
    """Return whether a turn is learnt, and which ranges of its content are; None for all of it.

    Args:
        turn: As it stands in the file.
        role: Its role, in our words. Others than an assistant's are not learnt anyway, where only answers are.
        content: What it says.
        field: Its place in the row.
        row: The row.

    Raises:
        Unusable: It asks for what labels cannot do.
    """
    if MARKS_SET.isdisjoint(turn) or (role != "assistant" and row.how.answers_only):
        return True, None
    against = ""
    for name in _WEIGHTS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            found = f"{value:g}" if isinstance(value, int | float) else json_kind(value)
            row.refuse("fractional_weight", f"{field}.{name}", f"found {found}; {_WHOLE}")
        if not value:
            against = against or name
    if turn.get("loss") is False:  # any other value of it may be a loss that somebody measured
        against = against or "loss"
    spans = None
    for name in _DETAILS:
        if filled(turn.get(name)):
            spans = _spans(turn[name], content, f"{field}.{name}", row)
            against = against or (name if spans != ((0, len(content)),) else "")
            break
    if against and not row.how.answers_only:
        shown = plain(str(turn[against]).lower(), one_line=True, limit=40)
        row.refuse("untrained_message", f"{field}.{against}", f"found {shown}; {_UNTRAINED}")
    if spans is None or spans == ((0, len(content)),):
        return not against, None
    return bool(spans) and against in _DETAILS, spans or None


MARKS_SET = frozenset(MARKS)


def _spans(details: object, content: str, field: str, row: RawRow) -> Spans:
    """Return the ranges that are learnt, in order; what no detail names is not (axolotl)."""
    if not isinstance(details, list):
        row.refuse("bad_span", field, f"found {json_kind(details)}; wanted a list of ranges")
    spans: list[tuple[int, int]] = []
    taken = [False] * len(content)
    for place, detail in enumerate(details):
        where = f"{field}[{place}]"
        if not isinstance(detail, dict):
            row.refuse("bad_span", where, f"found {json_kind(detail)}; {_DETAIL}")
        begin, end, train = (detail.get(key) for key in ("begin_offset", "end_offset", "train"))
        if type(begin) is not int or type(end) is not int or not isinstance(train, bool):
            row.refuse("bad_span", where, f"found {json_kind(detail)}; {_DETAIL}")
        if not 0 <= begin <= end < len(content):
            found = f"found characters {begin} to {end} of a text of {len(content)}"
            row.refuse(
                "bad_span", where, f"{found}; wanted 0 to {max(0, len(content) - 1)}, the first not after the last"
            )
        if any(taken[begin : end + 1]):
            row.refuse("bad_span", where, "found characters that a range before it names too; wanted each once")
        taken[begin : end + 1] = [True] * (end + 1 - begin)
        if train:
            spans.append((begin, end + 1))
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return tuple(joined)
