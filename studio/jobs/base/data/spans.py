"""Finds where the answers stand in a rendered conversation, stop tokens included.

For each answer two texts are rendered: the turns before it with the generation prompt, which is what the model is
served with, and the turns up to it. Where the second begins with the first, the rest of it is the answer. Where it does
not, the template leaves out of a finished conversation what its prompt opens with, such as `<think>`: the answer is
then found in the second text and put behind the prompt.

An answer shares a text with those before it if its prompt begins with all of that text. It does not if the template
rewrites earlier turns: if it drops old reasoning, or writes another end after the last answer. Then it becomes an
example of its own, a conversation that ends with that answer, as the model will see it in use.

An answer has up to three parts, in this order: its reasoning with the tags around it, what it says, and the calls that
it makes. The stop token belongs to the last of them: whoever learns that part learns to stop after it.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from studio.jobs.base.data.spelling import Renderer, Spelling, Wanted
from studio.probe.data import Conversation, Message

Range = tuple[int, int]
_CLOSING = re.compile(r"\s*(?:</[^<>\s]+>|\[/[^\[\]\s]+\]|<\|[^<>|]*\|>|<[^<>|\s]+\|>)\s*")
"""What closes reasoning: `</think>`, `[/THINK]`, `<|end|>`, `<channel|>`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in a text.

    Attributes:
        begin: Its first character.
        end: The character behind its stop token, if it has one.
        learnt: The ranges of the text that are learnt.
        served: Whether the text before it is the prompt that the model is served with, to the letter.
    """

    begin: int
    end: int
    learnt: tuple[Range, ...]
    served: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and its answers."""

    text: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """Where the answers of one conversation were found.

    Attributes:
        rendered: One text, or several where the template rewrites earlier turns; empty where no answer is found.
        said: The answers by the places of their turns.
        moved: Whether an answer does not begin where the generation prompt ends.
        stop_added: Whether the template left a stop token out and it was added.
        ended_within: Answers that the template interrupts with the end token, where generation stops already.
        lost: Answers that are in no text though they are to be learnt: the template refuses or does not write them.
        mixed: Answers of which only some parts are to be learnt, and these cannot be told apart.
    """

    rendered: tuple[Rendered, ...]
    said: Mapping[int, str] = field(default_factory=dict)
    moved: bool = False
    stop_added: bool = False
    ended_within: int = 0
    lost: int = 0
    mixed: int = 0


@dataclass(frozen=True, slots=True)
class _Found:
    """An answer behind its prompt: `said` ends with the stop token, `tail` is what the template writes after it."""

    prompt: str
    said: str
    tail: str
    served: bool
    moved: bool
    added: bool


_LONGEST_TAG = 64
_UNCLOSED = re.compile(r"[<\[][^<>\[\]\s]*\Z")
_OPENS = re.compile(
    r"(<[^<>|/\s]+>|\[[A-Z_]+\]|<\|?(?!/|end)(?:(?!_end)[^<>|])*(?:think|thought|reason|inner|analysis)(?:(?!_end)[^<>])*>"
    r"|<\|[a-z]+\|?>(?:thought|analysis))\s*\Z",
    re.IGNORECASE,
)
"""What opens reasoning at the end of a prompt: `<think>`, `[THINK]`, `<|inner_prefix|>`, `<|channel>thought`."""
_CLOSED_ALIKE = re.compile(r"<[^<>|/\s]+>|\[[A-Z_]+\]")
"""What is closed by the same word with a stroke before it."""
_CLOSES = re.compile(r"\s*(</[^<>\s]+>|\[/[^\[\]\s]+\])")


class Locator:
    """Finds answers with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, learn: Sequence[str], *, last_only: bool = False) -> None:
        self.renderer = Renderer(tokenizer)
        self.learn = tuple(learn)
        self.last_only = last_only
        self.eos = tokenizer.eos_token or ""
        self.special = special_tokens(tokenizer)
        ends = [token for token in self.special if not _CLOSES.fullmatch(token) or token == self.eos]
        self._ends = tuple(ends)
        self._header, stop = self._header_and_stop()
        stops = filter(None, {self.eos, stop})
        self._stop = re.compile("|".join(map(re.escape, stops)) or r"(?!)")  # (?!) matches nothing

    def places(self, row: Conversation) -> list[int]:
        """Return the places of the turns that are to be learnt."""
        found = [place for place, turn in enumerate(row.messages) if turn.role == "assistant"]
        return [place for place in (found[-1:] if self.last_only else found) if row.messages[place].learnt]

    def locate(self, rows: Sequence[Conversation], spelling: Spelling | None = None) -> list[Located]:
        """Return where the answers of each conversation stand; each conversation must end with an assistant turn."""
        wanted: list[Wanted] = []
        for row in rows:
            wanted.append(Wanted(row, len(row.messages), ask=False))
            for place in self.places(row):
                wanted.append(Wanted(row, place, ask=True))
                if place + 1 < len(row.messages):
                    wanted.append(Wanted(row, place + 1, ask=False))
        texts = iter(self.renderer.texts(wanted, spelling))
        return [self._of_row(row, texts) for row in rows]

    def _of_row(self, row: Conversation, texts: Iterator[str | None]) -> Located:
        whole = next(texts)
        found: list[tuple[int, _Found | None]] = []
        for place in self.places(row):
            opened = next(texts)
            closed = next(texts) if place + 1 < len(row.messages) else whole
            found.append((place, self._answer(row, place, opened, closed)))
        if whole is None:
            return Located(())
        groups: list[tuple[str, str, list[Answer]]] = []
        mixed = 0
        for place, one in found:
            if one is None:
                continue
            ranges = learnt_ranges(row.messages[place], one.said, self.learn)
            mixed += ranges is None
            begin = len(one.prompt)
            learnt = tuple((begin + first, begin + last) for first, last in ranges or ())
            answer = Answer(begin, begin + len(one.said), learnt, one.served)
            before: list[Answer] = []
            if groups and one.prompt.startswith(groups[-1][0]):
                before = groups.pop()[2]
            groups.append((one.prompt + one.said, one.tail, [*before, answer]))
        there = [one for _, one in found if one]
        return Located(
            tuple(Rendered(text + tail, tuple(answers)) for text, tail, answers in groups),
            {place: one.said for place, one in found if one},
            moved=any(one.moved for one in there),
            stop_added=any(one.added for one in there),
            ended_within=sum(self._ended_within(row.messages[place], one.said) for place, one in found if one),
            lost=len(found) - len(there),
            mixed=mixed,
        )

    def _answer(self, row: Conversation, place: int, opened: str | None, text: str | None) -> _Found | None:
        if text is None or (place and opened is None):
            return None
        turn, moved, served, lead = row.messages[place], False, True, ""
        if opened and text.startswith(opened):
            prompt, begin = opened, len(opened)
        else:
            begin = self._beginning(row, place, opened or "", text)
            prompt, served = opened or text[:begin], bool(opened)
            opens = _OPENS.search(opened or "")
            if opens and not text[:begin].endswith(opens[0]) and not _CLOSES.match(text, begin):
                thought = reasoning_of(turn)[0].strip()
                if thought and thought not in text[begin:] and _CLOSED_ALIKE.fullmatch(opens[1]):
                    lead = _thought_behind(opens, turn, text[begin:])
                elif not thought or thought not in text[begin:]:
                    prompt, served, moved = text[:begin], False, True
        end, added = self._end(turn, text, begin)
        said = lead + text[begin:end]
        if not says_something(turn, said):
            return None
        return _Found(prompt, said + (self.eos if added else ""), text[end:], served, moved, added)

    def _beginning(self, row: Conversation, place: int, opened: str, text: str) -> int:
        """Return where an answer begins in a text that its prompt is no beginning of; the text's length: not found.

        That is behind the last header of an assistant's turn that has the answer's words behind it. Without a header
        it is where prompt and text part, or where the answer's words are found.
        """
        turn = row.messages[place]
        thought, words = (one.strip() for one in reasoning_of(turn))
        names = (call.name for call in turn.calls[:1])
        pieces = [piece for piece in (thought, words, *names) if piece and piece in text]
        shared = _before_tag(text, _shared(opened, text))
        at = text.rfind(self._header) if pieces and place and self._header else -1
        # A header before the place where both part is that of an earlier answer: the prompt holds it too.
        while at >= 0 and at + len(self._header) >= len(text[:shared].rstrip()):
            if text.find(pieces[0], at + len(self._header)) >= 0:
                return at + len(self._header)
            at = text.rfind(self._header, 0, at)
        if place and row.messages[place - 1].content.strip() not in text[:shared]:
            return len(text)
        if place and (_CLOSES.match(text, shared) or text[shared:].lstrip().startswith(tuple(pieces) or ("\0",))):
            return shared
        for one in (turn.content, turn.content.rstrip(), words):
            found = text.rfind(one, shared) if one else -1
            if found >= 0:
                return found
        return shared if place else len(text)

    def _end(self, turn: Message, text: str, begin: int) -> tuple[int, bool]:
        """Return where an answer ends, its stop token included, and whether it has none and one must be added."""
        at = begin
        for one in (part.strip() for part in reasoning_of(turn)):
            place = text.find(one, at) if one else -1
            at = place + len(one) if place >= 0 else at
        if stop := self._stop.search(text, at):
            return stop.end(), False
        end = begin + len(text[begin:].rstrip())
        if end > at and text.endswith(self._ends, begin, end):
            return end, False
        if not turn.calls and turn.content and end == at:  # white space at the end is the answer's own
            own = turn.content[len(turn.content.rstrip()) :]
            end += len(own) if text.startswith(own, end) else 0
        return end, end > begin

    def _ended_within(self, turn: Message, said: str) -> bool:
        """Return whether the end token stands in an answer before its end, where the data has none."""
        within = said.removesuffix(self.eos).count(self.eos) if self.eos else 0
        return within > 0 and within > turn.words.count(self.eos)

    def _header_and_stop(self) -> tuple[str, str]:
        """Return what opens an assistant's turn in a whole conversation, and the special token that ends the turn.

        That is the one which the template writes after an answer whether or not the user goes on.
        """
        turns = Message("user", "QUESTION"), Message("assistant", "ANSWER"), Message("user", "FURTHER")
        row = Conversation(turns)
        wanted = [Wanted(row, 1, ask=False), Wanted(row, 1, ask=True), *(Wanted(row, n, ask=False) for n in (2, 3))]
        asked, opened, whole, longer = (text or "" for text in self.renderer.texts(wanted))
        shared = opened[: _before_tag(opened, _shared(opened, whole))]
        header = shared[len(asked) :] if shared.startswith(asked) else shared.rpartition("QUESTION")[2]
        tail, further = whole.rpartition("ANSWER")[2], longer.rpartition("ANSWER")[2]
        either = tail[: _shared(tail, further)] if further else tail
        stop = next((token for token in self._ends if either.rstrip().endswith(token)), "")
        if self.eos and self.eos in either:
            stop = self.eos
        elif not tail.rstrip().endswith(stop or "\0"):
            stop = next(iter(re.findall("|".join(map(re.escape, self._ends)), either)), "") if self._ends else ""
        return header.removeprefix(self.eos) if "QUESTION" not in header else "", stop


def _thought_behind(opens: re.Match[str], turn: Message, rest: str) -> str:
    """Return reasoning as it follows what the prompt opens, closed as that is opened, up to what the answer says."""
    tag, space = opens[1], opens[0][len(opens[1]) :]
    close = f"{tag[0]}/{tag[1:]}"
    thought, said = reasoning_of(turn)
    if turn.reasoning:
        gap = "\n\n" if space else ""
        return f"{thought}{space}{close}" + ("" if rest[:1].isspace() else gap)
    gap = said[: len(said) - len(said.lstrip())]
    return f"{thought.lstrip() if space else thought}{close}" + ("" if rest[:1].isspace() else gap)


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the tokens that can open or end a turn: those marked special (`</think>` and similar ones are not)."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(filter(None, special | set(tokenizer.all_special_tokens))))


def _before_tag(text: str, end: int) -> int:
    """Return where a tag begins that is not closed before `end`; `end` where there is none."""
    found = _UNCLOSED.search(text[:end], max(0, end - _LONGEST_TAG))
    return found.start() if found else end


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def learnt_ranges(turn: Message, said: str, learn: Collection[str]) -> tuple[Range, ...] | None:
    """Return the character ranges of an answer that are learnt, in order.

    Args:
        turn: The answer in the data.
        said: The same as the template writes it, stop token included.
        learn: The parts that are learnt: `reasoning`, `answer`, `calls`.

    Returns:
        None where a choice is to be made and the parts cannot be told apart.
    """
    every = {"reasoning", "answer", "calls"} <= set(learn)
    if every and turn.spans is None:
        return ((0, len(said)),)
    parts = _parts(turn, said)
    if parts is None:
        return None
    found: list[Range] = []
    for kind, begin, end in parts:
        if kind == "answer" and turn.spans is not None:
            if kind in learn:
                chosen = _chosen(turn, said, begin, end)
                if chosen is None:
                    return None
                found += chosen
        elif kind in learn:
            found.append((begin, end))
    return tuple(_joined(found))


def reasoning_of(turn: Message) -> tuple[str, str]:
    """Return the reasoning of an answer, in a field of its own or between tags in its content, and the rest."""
    if turn.reasoning or "</think>" not in turn.content:
        return turn.reasoning, turn.content
    thought, _, rest = turn.content.partition("</think>")
    return thought.partition("<think>")[2] or thought, rest


def says_something(turn: Message, said: str) -> bool:
    """Return whether an answer as the template writes it holds anything of the answer in the data."""
    thought, words = (text.strip() for text in reasoning_of(turn))
    if words and words in said:
        return True
    bare = "".join(said.split())
    return any("".join(one.split()) in bare for one in (thought, words, *(call.name for call in turn.calls)) if one)


def _parts(turn: Message, said: str) -> list[tuple[str, int, int]] | None:
    """Return kind, begin and end of each part that the answer has, one behind the other; None if one is not found."""
    thought, words = (text.strip() for text in reasoning_of(turn))
    at, starts = 0, list[tuple[str, int]]()
    if thought:
        place = said.find(thought)
        if place >= 0:
            starts.append(("reasoning", 0))
            at = place + len(thought)
            closing = _CLOSING.match(said, at)
            at = closing.end() if closing else at
    if words:
        place = said.find(words, at)
        if place < 0:
            return None
        starts.append(("answer", at if at and starts else 0))
        at = place + len(words)
    if turn.calls:
        if said.find(turn.calls[0].name, at) < 0:
            return None
        starts.append(("calls", at if starts else 0))
    ends = [begin for _, begin in starts[1:]] + [len(said)]
    return [(kind, begin, end) for (kind, begin), end in zip(starts, ends, strict=True)]


def _chosen(turn: Message, said: str, begin: int, end: int) -> list[Range] | None:
    """Return the spans of a turn's content as ranges of what was written; with its end goes the stop token, if any."""
    content = turn.content.strip()
    place = said.find(content, begin, end)
    if place < 0:
        return None
    shift = place - (len(turn.content) - len(turn.content.lstrip()))
    found = []
    for first, last in turn.spans or ():
        low, high = max(begin, first + shift), min(last + shift, end)
        if last >= len(turn.content.rstrip()):
            high = end
        if low < high:
            found.append((low, high))
    return found


def _joined(ranges: list[Range]) -> Iterator[Range]:
    """Yield ranges in order, those that touch as one."""
    begin = end = -1
    for first, last in sorted(ranges):
        if first > end:
            if end > begin:
                yield begin, end
            begin, end = first, last
        end = max(end, last)
    if end > begin:
        yield begin, end
