"""A chat template taken apart into what stands before and after each turn, for programs that cannot read Jinja.

The parts are found by rendering words that occur nowhere else, and count only where putting them together again gives
what the template itself gives: a template that cuts, counts or reorders is not taken apart. One that trims what is said
(Gemma's, Llama 3's) is: white space at the ends of a message, which few send, is read then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from studio.jobs.base.data.template import render, starts_with_bos
from studio.probe.data import Message

_SYSTEM, _USER, _ANSWER, _AGAIN = "SYSTEMWORDS", "USERWORDS", "ANSWERWORDS", "AGAINWORDS"
_LONG = (
    ("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second."), ("user", "Three?"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatForm:
    """What is written around the words of a conversation.

    Attributes:
        start: Before everything: the start token, or nothing.
        system: Before and after a system prompt; None where the template refuses one.
        default_system: The system prompt that the template writes where there is none; empty for none.
        user: Before and after what the user says.
        answer: Before and after an answer.
        ask: What opens an answer that is to be written.
    """

    start: str
    system: tuple[str, str] | None
    default_system: str
    user: tuple[str, str]
    answer: tuple[str, str]
    ask: str

    def write(self, turns: Sequence[tuple[str, str]], *, ask: bool) -> str:
        """Return a conversation of roles and words as the template would write it."""
        parts = {"user": self.user, "assistant": self.answer, "system": self.system or ("", "")}
        if self.default_system and self.system and turns[0][0] != "system":
            turns = [("system", self.default_system), *turns]
        body = "".join(f"{parts[role][0]}{words}{parts[role][1]}" for role, words in turns)
        return f"{self.start}{body}{self.ask if ask else ''}"


def chat_form(tokenizer: Any) -> ChatForm | None:
    """Return the parts of a tokenizer's chat template; None where it has none or cannot be taken apart."""
    if not tokenizer.chat_template:
        return None
    # Where the start token also opens every turn (SmolLM), it is a part of the turns.
    starts = ("", tokenizer.bos_token or "")
    for start in reversed(starts) if starts_with_bos(tokenizer) else starts:
        try:
            form = _take_apart(tokenizer, start)
        except (ValueError, IndexError):
            continue
        if _is_right(form, tokenizer):
            return form
    return None


def _take_apart(tokenizer: Any, start: str) -> ChatForm:
    one = _text(tokenizer, [("user", _USER)])
    asked = _text(tokenizer, [("user", _USER)], ask=True)
    several = _text(tokenizer, [("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN)])
    answered = _text(tokenizer, [("user", _USER), ("assistant", _ANSWER)])
    head, after_user = one.split(_USER)
    opening = several.split(_USER)[1].split(_ANSWER)[0]
    before_answer = _after(opening, after_user)
    after_answer = answered.split(_ANSWER)[1]
    before_user = _after(several.split(_ANSWER)[1].split(_AGAIN)[0], after_answer)
    lead = _after(_before(head, before_user), start)
    system, default = _system(tokenizer, start, before_user, lead)
    return ChatForm(
        start, system, default, (before_user, after_user), (before_answer, after_answer), _after(asked, one)
    )


def _system(tokenizer: Any, start: str, before_user: str, lead: str) -> tuple[tuple[str, str] | None, str]:
    try:
        text = _text(tokenizer, [("system", _SYSTEM), ("user", _USER)])
        opened, rest = text.split(_SYSTEM)
        parts = (_after(opened, start), _before(rest.split(_USER)[0], before_user))
    except (ValueError, IndexError):
        if lead:
            raise
        return None, ""
    if not lead:
        return parts, ""
    return parts, _before(_after(lead, parts[0]), parts[1])


def _is_right(form: ChatForm, tokenizer: Any) -> bool:
    cases = [[*_LONG], [("user", "One?")], [("user", "One?"), ("assistant", "First.")]]
    if form.system:
        cases.append([("system", "Be brief."), *_LONG])
    return all(
        form.write(case, ask=case[-1][0] == "user") == _text(tokenizer, case, ask=case[-1][0] == "user")
        for case in cases
    )


def _text(tokenizer: Any, turns: Sequence[tuple[str, str]], *, ask: bool = False) -> str:
    made = render(tokenizer, [[Message(role, words) for role, words in turns]], ask=ask)[0]
    if made is None:
        raise ValueError("refused by the template")
    return made


def _after(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise ValueError("not a plain sequence of turns")
    return text[len(beginning) :]


def _before(text: str, ending: str) -> str:
    if not text.endswith(ending):
        raise ValueError("not a plain sequence of turns")
    return text[: len(text) - len(ending)]
