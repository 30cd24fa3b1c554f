"""Refuses rows with parts that cannot be learnt yet: to train them without these parts would teach something else.

Each refusal says what was found, what would be trained wrongly, and what to do. The spellings of OpenAI, TRL, axolotl,
LLaMA-Factory, ms-swift, LLaVA and Anthropic are known. A value that is null or empty is passed over.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from studio.core.text import plain
from studio.probe.data.findings import Findings, json_kind

PAIR_COLUMNS = ("chosen", "rejected")
LABEL_COLUMNS = ("label", "kto_tag")
_MEDIA_LINKS = ("image_url", "video_url", "audio_url")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios", *_MEDIA_LINKS)
PLACEHOLDER = "<image>"
PLACEHOLDERS = (PLACEHOLDER, "<video>", "<audio>", "<|image_pad|>", "<|video_pad|>", "<start_of_image>")
"""How rows for models that read pictures mark the place of one: LLaVA's words, then tokens of Qwen and Gemma."""

CONTEXT_COLUMNS = ("history", "context", "contexts", "documents", "tools", "functions", "chat_template_kwargs")
"""Columns that most files fill with a part of what the answers were given to."""

_LABEL_WORDS = ("true", "false", "desirable", "undesirable")
"""Labels that mark an answer as wanted or not. Any other text is a class, an author or a topic, and is not used."""
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_CALL_FIELDS = ("tool_calls", "tool_call", "function_call")
_WEIGHT_FIELDS = ("weight", "train", "training")
"""Fields that weigh a message. The values 1 and true ask for what is done anyway."""
_SHARE_FIELDS = ("train_detail", "training_detail")
_MEDIA_FIELDS = (*MEDIA_COLUMNS, "input_audio")
UNDERSTOOD_FIELDS = frozenset({*_REASONING_FIELDS, *_CALL_FIELDS, *_WEIGHT_FIELDS, *_SHARE_FIELDS, *_MEDIA_FIELDS})
"""Fields of messages that are refused here, unless they are empty."""

_MEDIA_PARTS = frozenset({"image", "video", "audio", "file", "document"})
_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning")
_CALL_PARTS = ("tool_use", "tool_result", "tool_call", "tool_calls", "function_call")
CALL_ROLES = _CALL_PARTS
"""Roles of turns that are calls of tools, in ShareGPT's format."""

_CALLS = (
    "calls of tools are not learnt yet: the answer would be trained without its call. Take the row out, or write the "
    "call into the text of the answer"
)
_REASONING = (
    "reasoning beside the text is not learnt yet: the answer would be trained without it. Write it into the text where "
    "the model is to say it, in the form of its chat template; else remove the"
)
_MEDIA = (
    "pictures, sound and films are not read here, whatever the model can read: a limit of this program. The row would "
    "be trained as if its text stood alone. Take the row out; where the text does stand alone, remove the"
)
_WEIGHT = (
    "answers cannot be weighted one by one yet: this one would be trained in full. End the row before it or take the "
    "row out; where it is to be learnt, remove the field"
)
_UNTRAINED_PROMPT = (
    "with data.answers_only = false this message would be trained all the same. Set data.answers_only to true, or "
    "remove the field"
)


def refuse_pair(value: Mapping[str, Any], number: int, findings: Findings) -> bool:
    """Refuse a row of two answers, of which one is preferred (DPO, ORPO, reward models); return whether it is one."""
    if not all(filled(value.get(column)) for column in PAIR_COLUMNS):
        return False
    findings.add(
        "preference_pair",
        number,
        "found a preferred and a rejected answer; preferences are not learnt yet: the row would be trained without "
        "either. To learn the preferred answers alone, write prompt and chosen as prompt and completion",
        field="chosen, rejected",
    )
    return True


def refuse_columns(
    value: Mapping[str, Any], needed: Sequence[str], number: int, findings: Findings, *, answered: bool
) -> bool:
    """Refuse a row for a column beside its texts; return whether that was done.

    `label` means "desirable or not" (KTO) where it is true or false beside an answer. A number or any other text is
    taken for a class, and so is every label of a plain text.
    """
    for column in LABEL_COLUMNS if answered else ():
        label = value.get(column)
        if isinstance(label, bool) or (isinstance(label, str) and label.strip().lower() in _LABEL_WORDS):
            findings.add(
                "desirable_label",
                number,
                f"found {_shown(label)} beside an answer; which answers are desirable (KTO) is not learnt yet: "
                "undesired ones would be trained like the others. Keep the rows with desirable answers and remove the "
                "column; where it means something else, rename it",
                field=column,
            )
            return True
    return refuse_media(value, needed, number, findings)


def refuse_media(value: Mapping[str, Any], needed: Sequence[str], number: int, findings: Findings) -> bool:
    """Refuse a row for a column of pictures, sound or films; return whether that was done."""
    for column in MEDIA_COLUMNS:
        if column not in needed and filled(value.get(column)):
            findings.add("media", number, f"found the column {column}; {_MEDIA} column", field=column)
            return True
    return False


def refuse_message(
    turn: Mapping[str, Any], role: str, field: str, number: int, findings: Findings, *, answers_only: bool
) -> bool:
    """Refuse a message for a field beside its text; return whether that was done.

    Args:
        turn: The message as it stands in the file.
        role: Its role, in our words.
        field: Its place in the row.
        number: The row.
        findings: Gets the refusal.
        answers_only: Whether only answers are trained: then a prompt that is marked as untrained is no contradiction.
    """
    for name in _CALL_FIELDS:
        if filled(turn.get(name)):
            findings.add("tool_calls", number, f"found {name}; {_CALLS}", field=f"{field}.{name}")
            return True
    for name in _REASONING_FIELDS:
        if filled(turn.get(name)):
            findings.add("reasoning", number, f"found {name}; {_REASONING} field", field=f"{field}.{name}")
            return True
    for name in _MEDIA_FIELDS:
        if filled(turn.get(name)):
            findings.add("media", number, f"found {name}; {_MEDIA} field", field=f"{field}.{name}")
            return True
    if role != "assistant" and answers_only:
        return False
    if mark := _mark_against(turn):
        what = _WEIGHT if role == "assistant" else _UNTRAINED_PROMPT
        findings.add("untrained_message", number, f"found {_shown(turn[mark])}; {what}", field=f"{field}.{mark}")
        return True
    return False


def refuse_parts(parts: Iterable[object], field: str, number: int, findings: Findings) -> bool:
    """Refuse content in parts of which one is no text; return whether that was done."""
    for place, part in enumerate(parts):
        if not isinstance(part, dict):
            continue
        where = f"{field}[{place}]"
        kind = part["type"] if isinstance(part.get("type"), str) else ""
        shown = f"found a part of type {plain(kind, one_line=True, limit=40)}"
        if kind in _CALL_PARTS:
            findings.add("tool_calls", number, f"{shown}; {_CALLS}", field=where)
        elif kind in _REASONING_PARTS:
            findings.add("reasoning", number, f"{shown}; {_REASONING} part", field=where)
        elif not _MEDIA_PARTS.isdisjoint(kind.split("_")):  # image, image_url, input_audio ...
            findings.add("media", number, f"{shown}; {_MEDIA} part", field=where)
        elif names := [name for name in _MEDIA_FIELDS if filled(part.get(name))]:
            findings.add("media", number, f"found {names[0]} in a part; {_MEDIA} part", field=where)
        else:
            continue
        return True
    return False


def refuse_call(field: str, number: int, findings: Findings) -> None:
    """Refuse a turn that is a call by its role."""
    findings.add("tool_calls", number, f"found a turn that is a call; {_CALLS}", field=field)


def check_context(value: Mapping[str, Any], used: Sequence[str], number: int, findings: Findings) -> None:
    """Say that a row has unused columns that its answer may rest on."""
    if held := [column for column in CONTEXT_COLUMNS if column not in used and filled(value.get(column))]:
        found = f"found {', '.join(held)}, not used; what the answer owes to it is learnt without"
        findings.add("unused_context", number, found, field=held[0], fatal=False)


def check_placeholder(texts: Iterable[str], number: int, findings: Findings) -> None:
    """Refuse a text that begins or ends with the place of a picture, as LLaVA's and ShareGPT's rows do.

    One that only speaks of it within a sentence, or of an SVG's element, is kept, and said.
    """
    mentioned = ""
    for text in (text.strip() for text in texts):
        for place in (place for place in PLACEHOLDERS if place in text):
            if text.startswith(place) or text.endswith(place):
                found = (
                    f"found {place} at the beginning or end of a text: the place of a picture, which is not in the row"
                )
                findings.add("media", number, f"{found}; it would be trained as these characters. Leave such rows out")
                return
            mentioned = mentioned or place
    if mentioned:
        found = f"found {mentioned} in the text, and no column of images; it is trained as these characters"
        findings.add("media_placeholder", number, found, fatal=False)


def filled(value: object, depth: int = 8) -> bool:
    """Return whether a value says anything: null, blank texts, and lists and objects of nothing else do not.

    Args:
        value: As JSON has it.
        depth: What is nested deeper says something, whatever it is.
    """
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return any(not depth or filled(one, depth - 1) for one in inner)
    return bool(value)


def _mark_against(turn: Mapping[str, Any]) -> str | None:
    """Return the field of a message that asks for other training than in full."""
    marks = (
        *(name for name in _WEIGHT_FIELDS if turn.get(name) not in (None, 1)),
        *(name for name in _SHARE_FIELDS if filled(turn.get(name))),
        *(["loss"] if turn.get("loss") is False else []),
    )
    return marks[0] if marks else None


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return plain(str(value), one_line=True, limit=40) if isinstance(value, int | float | str) else json_kind(value)
