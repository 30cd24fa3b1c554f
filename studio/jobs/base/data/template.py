r"""Renders conversations as text, with the model's own chat template or with a plain one where the model has none.

There is a plain template for each data format. It is also written into the tokenizer, so that whoever loads that with
the adapter asks in the form that was trained. `{eos}` is the tokenizer's end token, written after each answer.

    chat                ### System:\n{text}\n\n### User:\n{text}\n\n### Assistant:\n{text}{eos}\n\n
    alpaca              {system}\n\n### Instruction:\n{text}\n\n### Response:\n{text}{eos}
    prompt_completion   {prompt}\n{completion}{eos}      (no new line where the prompt ends in white space itself)
"""

from collections.abc import Callable, Sequence
from typing import Any

from studio.core.text import plain
from studio.jobs.base.data.bounded import told_template, unknown_variables
from studio.jobs.base.data.spelling import Renderer, Turns, Wanted
from studio.probe.data import Conversation, Message

Warn = Callable[[str], None]

_LOOP = "{%- for message in messages %}{%- set text = message['content'] %}"
_PLAIN = {
    "chat": (
        "{%- if message['role'] == 'assistant' %}{{ '### Assistant:\n' + text + (eos_token or '') + '\n\n' }}"
        "{%- else %}{{ '### ' + message['role'].capitalize() + ':\n' + text + '\n\n' }}{% endif %}",
        "{{ '### Assistant:\n' }}",
    ),
    "alpaca": (
        "{%- if message['role'] == 'assistant' %}{{ '### Response:\n' + text + (eos_token or '') }}"
        "{%- elif message['role'] == 'system' %}{{ text + '\n\n' }}"
        "{%- else %}{{ '### Instruction:\n' + text + '\n\n' }}{% endif %}",
        "{{ '### Response:\n' }}",
    ),
    "prompt_completion": (
        "{%- if message['role'] == 'assistant' %}{{ text + (eos_token or '') }}"
        "{%- elif message['role'] == 'system' %}{{ text + '\n\n' }}"
        "{%- else %}{{ text }}{% if not text or not text[-1].isspace() %}{{ '\n' }}{% endif %}{% endif %}",
        "",
    ),
}


def ensure_template(tokenizer: Any, data_format: str, warn: Warn) -> None:
    """Give the tokenizer a plain chat template for this data format if it has none, and say so."""
    if tokenizer.chat_template or data_format not in _PLAIN:
        return
    turn, prompt = _PLAIN[data_format]
    start = "{{ bos_token }}" if starts_with_bos(tokenizer) else ""
    ask = "{%- if add_generation_prompt %}" + prompt + "{%- endif %}" if prompt else ""
    tokenizer.chat_template = f"{start}{_LOOP}{turn}{{%- endfor %}}{ask}"
    warn(
        "This model has no chat template (it is probably a base model). A plain one is used and saved with the "
        f"tokenizer: {_example(tokenizer)!r}. Whoever uses the adapter must ask in this form."
    )


def say_variables(tokenizer: Any, warn: Warn) -> None:
    """Say what the chat template is told by the recipe, and which of it the template does not know."""
    variables = told_template(tokenizer)["variables"]
    unknown = unknown_variables(tokenizer, variables)
    if known := {name: value for name, value in variables.items() if name not in unknown}:
        said = ", ".join(f"{name} = {plain(str(value), one_line=True, limit=60)}" for name, value in known.items())
        warn(f"the chat template is told {said}: tell it the same wherever the adapter is served")
    if unknown:
        warn(f"data.template_kwargs: the chat template does not know {', '.join(unknown)}")


def starts_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts its start token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def render(tokenizer: Any, turns: Sequence[Turns], *, ask: bool = False) -> list[str | None]:
    """Return each conversation as the template writes it, None where the template refuses it.

    Args:
        tokenizer: Has a chat template.
        turns: Conversations.
        ask: Whether to end with the generation prompt, which opens the assistant's turn.
    """
    return Renderer(tokenizer).texts([Wanted(Conversation(tuple(one)), len(one), ask) for one in turns])


def with_system_folded(messages: Turns) -> tuple[Message, ...]:
    """Return the turns with a leading system prompt put before the user's first words.

    Some templates refuse a system turn.
    """
    if len(messages) > 1 and messages[0].role == "system" and messages[1].role == "user":
        return (Message("user", f"{messages[0].content}\n\n{messages[1].content}"), *messages[2:])
    return tuple(messages)


def _example(tokenizer: Any) -> str:
    return render(tokenizer, [(Message("user", "QUESTION"), Message("assistant", "ANSWER"))])[0] or ""
