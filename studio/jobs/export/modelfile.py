"""Writes Ollama's Modelfile: the training's chat template in Ollama's language and its system prompt, stops, sampling.

Ollama cannot read Jinja, so the template is taken apart into what it writes before and after each turn. The parts are
found by rendering words that occur nowhere else. They are used only if putting them together again gives the template's
own text: a template that cuts, counts or reorders is not taken apart. A template that trims messages (Gemma's, Llama
3's) is taken apart, although white space at the ends of a message, which few people send, is then not trimmed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.jobs.base.data.template import render, starts_with_bos
from studio.probe.data import Message
from studio.runs.atomic import read_object
from studio.runs.system_prompt import SystemPrompt

MODELFILE = "Modelfile"
_GENERATION = "generation_config.json"
_CONTEXT = ("max_position_embeddings", "n_positions")
_SYSTEM, _USER, _ANSWER, _AGAIN = "SYSTEMWORDS", "USERWORDS", "ANSWERWORDS", "AGAINWORDS"
_LONG = (
    ("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second."), ("user", "Three?"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatForm:
    """What a chat template writes around the words of a conversation.

    Attributes:
        start: Written before everything: the start token, or nothing.
        system: Written before and after a system prompt; None where the template refuses one.
        default_system: The system prompt that the template writes if a conversation has none; empty for none.
        user: Written before and after a user's message.
        answer: Written before and after an answer.
        ask: The generation prompt, which opens an answer.
    """

    start: str
    system: tuple[str, str] | None
    default_system: str
    user: tuple[str, str]
    answer: tuple[str, str]
    ask: str

    def write(self, turns: Sequence[tuple[str, str]], *, ask: bool) -> str:
        """Return a conversation, given as roles and words, as the template would write it."""
        parts = {"user": self.user, "assistant": self.answer, "system": self.system or ("", "")}
        if self.default_system and self.system and turns[0][0] != "system":
            turns = [("system", self.default_system), *turns]
        body = "".join(f"{parts[role][0]}{words}{parts[role][1]}" for role, words in turns)
        return f"{self.start}{body}{self.ask if ask else ''}"


def chat_form(tokenizer: Any) -> ChatForm | None:
    """Return the parts of a tokenizer's chat template; None if it has no template or that cannot be taken apart."""
    if not tokenizer.chat_template:
        return None
    # If the start token also opens every turn (SmolLM), it belongs to the turns, and `start` is empty.
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


def stop_words(tokenizer: Any) -> list[str]:
    """Return the texts at which an answer ends: the end token, and what the template writes after an answer."""
    form = chat_form(tokenizer)
    after = form.answer[1].strip() if form else ""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = [tokenizer.eos_token or "", *(word for word in sorted(special) if after.startswith(word))]
    return list(dict.fromkeys(word for word in words if word))


def context_of(config: dict[str, Any]) -> int:
    """Return how many tokens a model can read, from its config; 0 where the config does not say."""
    text = config.get("text_config")
    table = {**config, **(text if isinstance(text, dict) else {})}
    return next((table[name] for name in _CONTEXT if isinstance(table.get(name), int)), 0)


def generation_of(folder: Path) -> dict[str, Any]:
    """Return a model's `generation_config.json`; empty where there is none that can be read."""
    return read_object(folder / _GENERATION)


_QUOTES = '"""'
_LEAST_CONTEXT, _MOST_CONTEXT = 2048, 32768
_SAMPLING = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
"""Names in `generation_config.json` and in a Modelfile."""


def system_of(form: ChatForm | None, trained: SystemPrompt) -> tuple[str, str]:
    """Return the system prompt that a Modelfile carries, and whether it is from the `training` or the `template`.

    Both are empty where there is none, or none that a Modelfile can hold.

    Args:
        form: The chat template's parts; its own system prompt counts where most rows of the training had none.
        trained: What the rows of the training begin with.
    """
    if trained.usual:
        return (trained.usual, "training") if _quoted(trained.usual) else ("", "")
    default = form.default_system if form else ""
    return (default, "template") if _quoted(default) else ("", "")


def modelfile(
    source: str,
    form: ChatForm | None,
    *,
    stops: list[str],
    context: int,
    generation: dict[str, Any],
    adds_bos: bool,
    system: str = "",
    adapter: str = "",
) -> str:
    """Return the text of a Modelfile.

    Args:
        source: What FROM names: a file beside the Modelfile, or a model that Ollama has.
        form: The chat template's parts; None for the template that Ollama finds in the file.
        stops: Texts at which an answer ends.
        context: How many tokens the model can read.
        generation: The model's `generation_config.json`.
        adds_bos: Whether the start token is added when a text is read, so that the template must not write it.
        system: The system prompt of conversations that bring none: `system_of`.
        adapter: A file with a LoRA adapter beside the Modelfile; empty for none.
    """
    lines = [f"FROM {source}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    template = _quoted(_template(form, adds_bos)) if form else ""
    if template:
        lines += ["", f"TEMPLATE {template}"]
    else:
        lines += ["", "# The chat template cannot be written in Ollama's language: the one in the file is used."]
    if quoted := _quoted(system):
        lines += ["", f"SYSTEM {quoted}"]
    lines.append("")
    lines += [f"PARAMETER stop {word}" for word in map(_quoted, stops) if word]
    lines.append(f"PARAMETER num_ctx {min(_MOST_CONTEXT, max(_LEAST_CONTEXT, context))}")
    if generation.get("do_sample"):
        lines += [
            f"PARAMETER {theirs} {generation[ours]}"
            for ours, theirs in _SAMPLING.items()
            if isinstance(generation.get(ours), int | float) and not isinstance(generation.get(ours), bool)
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a text in quotes as a Modelfile needs it; empty where it cannot be written there.

    A Modelfile has no escapes: three quotes would end the text, and Ollama does not read unprintable characters.
    """
    if not text or _QUOTES in text or not all(letter.isprintable() or letter in "\n\r\t" for letter in text):
        return ""
    quotes = _QUOTES if any(letter in text for letter in '"\n\r') else '"'
    return f"{quotes}{text}{quotes}"


def _template(form: ChatForm, adds_bos: bool) -> str:
    """Return the template in Go's template language, without trimming: white space is part of what was trained."""
    user, answer = ((_go(a), _go(b)) for a, b in (form.user, form.answer))
    if form.system:
        system, folded = f"{_go(form.system[0])}{{{{ .Content }}}}{_go(form.system[1])}", ""
    else:  # as in training: the system prompt is put before the user's first words
        system, folded = "", "{{ if and (le $i 1) $.System }}{{ $.System }}\n\n{{ end }}"
    start = "" if adds_bos else _go(form.start)
    return (
        f"{start}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}"
        f'{{{{ if eq .Role "system" }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{user[0]}{folded}{{{{ .Content }}}}{user[1]}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer[0]}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{answer[1]}{{{{ end }}}}{{{{ end }}}}"
        f'{{{{ if and $last (ne .Role "assistant") }}}}{_go(form.ask)}{{{{ end }}}}{{{{ end }}}}'
    )


def _go(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
