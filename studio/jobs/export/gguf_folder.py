"""What lies beside a GGUF file: Ollama's Modelfile, which matches the training's template and stops, and the card."""

import shlex
from pathlib import Path
from typing import Any

from studio.core.text import plain
from studio.jobs.base.data.template import starts_with_bos
from studio.jobs.base.load import load_tokenizer
from studio.jobs.export.chat_form import ChatForm, chat_form
from studio.jobs.export.gguf import GgufMade, generation_of
from studio.jobs.export.lora_gguf import LoraMade
from studio.jobs.export.model_card import Training, loss_line, model_card
from studio.jobs.export.peft_folder import CARD
from studio.probe.adapter_folder import AdapterFound
from studio.probe.model_folder import CONFIG, read_config

MODELFILE = "Modelfile"
_CONTEXT = ("max_position_embeddings", "n_positions")


def write_model_files(made: GgufMade, form: str, adapter: AdapterFound | None, training: Training) -> None:
    """Write Modelfile and card beside the file of a whole model.

    Raises:
        OSError: The disk refuses.
    """
    name, folder = made.path.name, made.path.parent
    text = modelfile(
        f"./{name}",
        chat_form(made.tokenizer),
        stops=stop_words(made.tokenizer),
        context=_context(made.config),
        generation=made.generation,
        adds_bos=made.golden.adds_bos,
    )
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    golden = made.golden
    checked = [
        f"{form}, loaded in llama.cpp; {loss_line(made.loss, 'the merged 16-bit model')}",
        f"{golden.conversations} conversations give the same {golden.tokens} tokens in training, in the saved "
        "tokenizer and in llama.cpp",
        f"every answer ends with a stop token: {'yes' if golden.ends_with_stop else 'no'}",
    ]
    card = model_card(adapter, name.removesuffix(".gguf"), training, checked=checked, use=_use(name), tag="gguf")
    (folder / CARD).write_text(card, encoding="utf-8")


def write_lora_files(file: Path, adapter: AdapterFound, base: Path, training: Training, made: LoraMade) -> None:
    """Write Modelfile and card beside a LoRA file.

    Raises:
        BadInput: The tokenizer cannot be loaded.
        OSError: The disk refuses.
    """
    own = (adapter.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter.folder if own else base)
    text = modelfile(
        "BASE",
        chat_form(tokenizer),
        stops=stop_words(tokenizer),
        context=_context(read_config(base / CONFIG)),
        generation=generation_of(base),
        adds_bos=starts_with_bos(tokenizer),
        adapter=f"./{file.name}",
    )
    shown = plain(Path(adapter.base).name or "the base model", one_line=True)
    head = f"# Put the base model here: a GGUF file of {shown}, or its name in Ollama.\n"
    (file.parent / MODELFILE).write_text(head + text, encoding="utf-8")
    checked = [f"{made.tensors} tensors; on its base in llama.cpp, {loss_line(made.loss, 'base + adapter')}"]
    use = [
        "On a GGUF file of the base model:",
        "",
        "```sh",
        f"llama-cli -m BASE.gguf --lora {shlex.quote(file.name)}",
        "```",
        "",
        "With Ollama: name the base in the Modelfile, then `ollama create tuned -f Modelfile`.",
    ]
    card = model_card(adapter, file.stem, training, checked=checked, use=use, tag="gguf")
    (file.parent / CARD).write_text(card, encoding="utf-8")


def stop_words(tokenizer: Any) -> list[str]:
    """Return the texts at which an answer ends: the end token, and what the template writes after an answer."""
    form = chat_form(tokenizer)
    after = form.answer[1].strip() if form else ""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = [tokenizer.eos_token or "", *(word for word in sorted(special) if after.startswith(word))]
    return list(dict.fromkeys(word for word in words if word))


def _context(config: dict[str, Any]) -> int:
    text = config.get("text_config")
    table = {**config, **(text if isinstance(text, dict) else {})}
    return next((table[name] for name in _CONTEXT if isinstance(table.get(name), int)), 0)


def _use(name: str) -> list[str]:
    return [
        "With llama.cpp, which reads the chat template from the file:",
        "",
        "```sh",
        f"llama-cli -m {shlex.quote(name)}",
        f"llama-server -m {shlex.quote(name)}",
        "```",
        "",
        "With Ollama:",
        "",
        "```sh",
        "ollama create tuned -f Modelfile && ollama run tuned",
        "```",
        "",
        "LM Studio finds the file in its models folder.",
    ]


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
