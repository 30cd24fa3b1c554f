"""Long plain texts: read as sections of bounded length, and held out as whole documents.

A section knows a little of the text before and after it, so that the tokenizer sees what it would see in the whole text
and its tokens are those of the whole. What is learnt follows on from section to section without a gap.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from studio.core.recipe import Recipe
from studio.probe.data.rows import PlainText, Row
from studio.probe.data.split import Split, split
from studio.probe.data.views import Chain, drawn

SECTION = 2**20
"""Most characters of a section: a few megabytes while they become tokens."""
CONTEXT = 4096
"""Characters that a section knows of the text on either side, for the tokenizer and for the first block's context."""
_CHARACTERS_PER_TOKEN = 4
"""About; it decides only how much is held out."""
_OF_ALL = 20
_LAST_PART = 10
"""One document alone holds out its last part, at most one in so many characters."""


def sections(row: PlainText, *, most: int = SECTION, context: int = CONTEXT) -> Iterator[PlainText]:
    """Yield a text as sections that follow one another, cut where a paragraph, line or word ends; a short one whole.

    Args:
        row: A whole text.
        most: Characters of a section at most.
        context: Characters that a section knows of the text on either side at most.
    """
    text, begin = row.text, 0
    while begin < len(text):
        stop = _cut(text, begin, begin + most)
        before, after = text[max(0, begin - context) : begin], text[stop : stop + context]
        whole = begin == 0 and stop == len(text)
        yield row if whole else replace(row, text=text[begin:stop], before=before, after=after)
        begin = stop


def streamed(pieces: Iterable[str], number: int, *, most: int = SECTION, context: int = CONTEXT) -> Iterator[PlainText]:
    """Yield the same sections of a text that comes in pieces, which is never held whole.

    Args:
        pieces: The text.
        number: Of its row.
        most: As above.
        context: As above.
    """
    before, held = "", ""
    for piece in pieces:
        held += piece
        while len(held) > most + context:
            section = _first_section(held, before, number, most, context)
            before, held = (before + section.text)[-context:], held[len(section.text) :]
            yield section
    while held:
        section = _first_section(held, before, number, most, context)
        before, held = (before + section.text)[-context:], held[len(section.text) :]
        yield section


def _first_section(text: str, before: str, number: int, most: int, context: int) -> PlainText:
    stop = _cut(text, 0, most)
    return PlainText(text[:stop], number, before, text[stop : stop + context])


def split_documents(rows: Sequence[Row], recipe: Recipe, *, cuts: bool = True) -> Split:
    """Return a split in which whole documents are held out: so many as make about `eval.rows` blocks.

    A document that is much larger than that, and more than a twentieth of all, is never held out. Where all are, one
    document alone as a rule, the last one is cut, and its last part held out.

    Args:
        rows: Plain texts, and perhaps other rows; the sections of a document follow one another.
        recipe: Says how many rows are held out, how long they are, and the seed.
        cuts: Whether a document may be cut.
    """
    starts, sizes = array("Q"), array("Q")  # of a million texts, lists would take ten times the room
    for place, row in enumerate(rows):
        if isinstance(row, PlainText) and row.before and sizes:
            sizes[-1] += len(row.text)
        else:
            starts.append(place)
            sizes.append(sum(len(turn.content) for turn in row.turns))
    wanted = recipe.eval.rows * recipe.train.seq_len * _CHARACTERS_PER_TOKEN
    if not wanted:
        return Split(rows, ())
    most = max(2 * wanted, sum(sizes) // _OF_ALL)
    able = array("Q", (document for document, size in enumerate(sizes) if size <= most) if len(starts) > 1 else ())
    if not able:
        return last_part(rows, min(sizes[-1] // _LAST_PART, wanted)) if cuts else Split(rows, ())
    mean = sum(sizes[document] for document in able) / len(able)
    documents = min(recipe.eval.rows, max(1, math.ceil(wanted / max(1.0, mean))))
    firsts = array("Q", (starts[document] for document in able))
    parts = split(rows if len(able) == len(rows) else drawn(rows, firsts), documents, recipe.train.seed)
    ends = starts[1:]
    ends.append(len(rows))
    chosen = [able[place] for place in parts.places]
    held = {place for document in chosen for place in range(starts[document], ends[document])}
    if len(able) == len(rows) and documents == recipe.eval.rows:
        return parts
    note = (
        f"{len(chosen)} of {len(starts)} documents are held out, whole: as near to eval.rows = "
        f"{recipe.eval.rows} blocks of {recipe.train.seq_len} tokens as whole documents come"
    )
    notes = parts.notes if documents == recipe.eval.rows else (*parts.notes, note)
    return _parted(rows, held, notes)


def _parted(rows: Sequence[Row], held: set[int], notes: tuple[str, ...]) -> Split:
    others = array("Q", (place for place in range(len(rows)) if place not in held))
    places = tuple(sorted(held))
    return Split(drawn(rows, others), drawn(rows, places), notes, places)


def last_part(rows: Sequence[Row], characters: int) -> Split:
    """Return one document without its last part, and that part; nothing is held out of a text of a few words.

    Args:
        rows: The sections of the document.
        characters: How long the last part is at least; it begins with a paragraph, line or word.
    """
    left, place = characters, len(rows) - 1
    while place > 0 and left >= len(rows[place].answer):
        left -= len(rows[place].answer)
        place -= 1
    row = rows[place]
    cut = _cut(row.answer, 0, len(row.answer) - left)
    if not isinstance(row, PlainText) or not characters or not cut:
        return Split(rows, ())
    head, tail = row.text[:cut], row.text[cut:]
    parts = (replace(row, text=head, after=tail[:CONTEXT]), replace(row, text=tail, before=head[-CONTEXT:]))
    train = Chain([drawn(rows, range(place)), [parts[0] if tail else row]])
    held = Chain([[parts[1]] if tail else [], drawn(rows, range(place + 1, len(rows)))])
    size = sum(len(part.answer) for part in held)
    documents = sum(not (isinstance(row, PlainText) and row.before) for row in rows)
    which = "there is one document: its" if documents == 1 else f"the {documents} documents are large: the last one's"
    note = f"{which} last part is held out, {size:,} characters"
    return Split(train, held, (note,), last=size)


def _cut(text: str, begin: int, most: int) -> int:
    """Return where to cut a text after `begin` and not after `most`: in the last tenth before white space, if any."""
    if most >= len(text) or text[most].isspace():
        return min(most, len(text))
    least = most - (most - begin) // 10
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, max(least, begin + 1), most)
        if place > begin:
            return place
    return most
