"""Refuses rows with pictures, sound or films, which are not read here, and tells of columns that are not used.

To train such a row's text as if it stood alone would teach something else. The spellings of OpenAI, LLaVA,
LLaMA-Factory and Anthropic are known. A value that is null or empty is passed over.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from studio.core.text import plain
from studio.probe.data.findings import Findings, filled
from studio.probe.data.raw_row import RawRow

_MEDIA_LINKS = ("image_url", "video_url", "audio_url")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios", *_MEDIA_LINKS)
MEDIA_FIELDS = (*MEDIA_COLUMNS, "input_audio")
_MEDIA_NAMES = frozenset(MEDIA_COLUMNS)
PLACEHOLDER = "<image>"
PLACEHOLDERS = (PLACEHOLDER, "<video>", "<audio>", "<|image_pad|>", "<|video_pad|>", "<start_of_image>")
"""How rows for models that read pictures mark the place of one: LLaVA's words, then tokens of Qwen and Gemma."""

_MEDIA_PARTS = frozenset({"image", "video", "audio", "file", "document"})
_MEDIA = (
    "pictures, sound and films are not read here, whatever the model can read: a limit of this program. The row would "
    "be trained as if its text stood alone. Take the row out; where the text does stand alone, remove the"
)


def refuse_media(value: Mapping[str, Any], needed: Sequence[str], number: int, findings: Findings) -> bool:
    """Refuse a row for a column of pictures, sound or films; return whether that was done."""
    if _MEDIA_NAMES.isdisjoint(value):
        return False
    for column in MEDIA_COLUMNS:
        if column not in needed and filled(value.get(column)):
            findings.add("media", number, f"found the column {column}; {_MEDIA} column", field=column)
            return True
    return False


def check_media(turn: Mapping[str, Any], field: str, row: RawRow) -> None:
    """Refuse a turn for a field of pictures, sound or films.

    Raises:
        Unusable: It has one.
    """
    for name in MEDIA_FIELDS:
        if filled(turn.get(name)):
            row.refuse("media", f"{field}.{name}", f"found {name}; {_MEDIA} field")


def media_part(part: Mapping[str, Any], kind: str, field: str, row: RawRow) -> None:
    """Refuse a part of content that is a picture, sound or film.

    Args:
        part: The part.
        kind: Its type.
        field: Its place in the row.
        row: The row.

    Raises:
        Unusable: It is one.
    """
    if not _MEDIA_PARTS.isdisjoint(kind.split("_")):  # image, image_url, input_audio ...
        row.refuse("media", field, f"found a part of type {plain(kind, one_line=True, limit=40)}; {_MEDIA} part")
    if names := [name for name in MEDIA_FIELDS if filled(part.get(name))]:
        row.refuse("media", field, f"found {names[0]} in a part; {_MEDIA} part")


def check_placeholder(texts: Iterable[str], row: RawRow) -> None:
    """Refuse a text that begins or ends with the place of a picture, as LLaVA's and ShareGPT's rows do.

    One that only speaks of it within a sentence, or of an SVG's element, is kept, and said.

    Raises:
        Unusable: There is such a text.
    """
    mentioned = ""
    for text in texts:
        if "<" not in text:
            continue
        bare = text.strip()
        for place in (place for place in PLACEHOLDERS if place in bare):
            if bare.startswith(place) or bare.endswith(place):
                found = (
                    f"found {place} at the beginning or end of a text: the place of a picture, which is not in the row"
                )
                row.refuse("media", "", f"{found}; it would be trained as these characters. Leave such rows out")
            mentioned = mentioned or place
    if mentioned:
        found = f"found {mentioned} in the text, and no column of images; it is trained as these characters"
        row.note("media_placeholder", "", found)
