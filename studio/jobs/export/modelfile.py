"""Ollama's Modelfile for an exported file: the template, stop tokens and parameters that match the training."""

from typing import Any

from studio.jobs.export.chat_form import ChatForm

_QUOTES = '"""'
_LEAST_CONTEXT, _MOST_CONTEXT = 2048, 32768
_SAMPLING = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
"""Names in `generation_config.json` and in a Modelfile."""


def modelfile(
    source: str,
    form: ChatForm | None,
    *,
    stops: list[str],
    context: int,
    generation: dict[str, Any],
    adds_bos: bool,
    adapter: str = "",
) -> str:
    """Return the text of a Modelfile.

    Args:
        source: What stands after FROM: a file beside it, or a model that Ollama has.
        form: The chat template's parts; None leaves the template to what Ollama finds in the file.
        stops: Texts at which an answer ends.
        context: Tokens that the model can read.
        generation: The model's `generation_config.json`.
        adds_bos: Whether the start token is added when a text is read, so that the template must not write it.
        adapter: File of a LoRA adapter beside it; empty for none.
    """
    lines = [f"FROM {source}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    template = _quoted(_template(form, adds_bos)) if form else ""
    if template:
        lines += ["", f"TEMPLATE {template}"]
        if form and (system := _quoted(form.default_system)):
            lines += ["", f"SYSTEM {system}"]
    else:
        lines += ["", "# The chat template cannot be written in Ollama's language: the one in the file is used."]
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
    """Return a text as a Modelfile has it, which knows no escapes; nothing where it cannot be written there.

    Three quotes end a text of several lines, and characters that cannot be printed are not read.
    """
    if not text or _QUOTES in text or not all(letter.isprintable() or letter in "\n\r\t" for letter in text):
        return ""
    quotes = _QUOTES if any(letter in text for letter in '"\n\r') else '"'
    return f"{quotes}{text}{quotes}"


def _template(form: ChatForm, adds_bos: bool) -> str:
    """Return the conversation in Go's template language. Nothing may be trimmed: white space is part of the form."""
    user, answer = ((_go(a), _go(b)) for a, b in (form.user, form.answer))
    if form.system:
        system, folded = f"{_go(form.system[0])}{{{{ .Content }}}}{_go(form.system[1])}", ""
    else:  # as a training run does it: before the first words of the user
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
