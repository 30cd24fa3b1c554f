"""What lies beside a GGUF file: Ollama's Modelfile and the card."""

import shlex
from pathlib import Path
from typing import Any

from studio.core.text import plain
from studio.jobs.base.data.template import starts_with_bos
from studio.jobs.base.load import load_tokenizer
from studio.jobs.export.chat_form import chat_form
from studio.jobs.export.gguf import GgufMade, generation_of
from studio.jobs.export.lora_gguf import LoraMade
from studio.jobs.export.model_card import Training, loss_line, model_card
from studio.jobs.export.modelfile import modelfile
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
