"""Writes GGUF files for llama.cpp, Ollama and LM Studio: converts, quantises, loads again and compares.

The order matters. Before minutes of merging, llama.cpp is asked whether it knows the architecture, has a place for
every tensor, and reads five conversations as the same tokens as the training run. Config, tokenizer and the names of
tensors are enough for that. llama.cpp and the training run may differ in whether a SentencePiece vocabulary reads a
space before a text and after each special token; then the file is made to do as the run did.
"""

import re
import shlex
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from studio.core.errors import JobFailed
from studio.jobs.base.closeness import Closeness, rows_of
from studio.jobs.base.llama.llama_answers import llama_logits
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.export.gguf_view import make_view, strips_after_tokens
from studio.jobs.export.golden import Golden, check_golden, golden_texts
from studio.jobs.export.model_card import CARD, loss_line, model_card, training_of
from studio.jobs.export.modelfile import (
    MODELFILE,
    chat_form,
    context_of,
    generation_of,
    modelfile,
    stop_words,
    system_of,
)
from studio.jobs.export.work import TEXTS, Work, loss_of, merged_answers, tokens_for
from studio.probe.gguf_header import read_gguf_header
from studio.probe.model_folder import CONFIG, check_folder, read_config

_KIND = "tokenizer.ggml.model"
_PHI3 = ("phi-3", "phi3")
"""llama.cpp drops white space after special tokens where `general.name` has one of these (llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class TokenizerHints:
    """Fields written into a file so that llama.cpp reads texts as the training run did.

    Attributes:
        name: The value of `general.name`.
        space: Whether a space is read before a text: `true`, `false`, or `default` for what the converter writes.
    """

    name: str
    space: str = "default"


def ask_llama(tool: LlamaTool, view: Path, trained: Any, title: str, vocabulary: Path) -> TokenizerHints:
    """Return the fields with which llama.cpp reads texts as the training run did.

    Args:
        tool: Runs llama.cpp.
        view: A folder from `make_view`; if it has weights, the name of every tensor is looked up, too.
        trained: The tokenizer of the training run.
        title: The name of the file, without its ending.
        vocabulary: A new temporary file for the vocabulary.

    Raises:
        JobFailed: llama.cpp does not know the model, or reads the conversations as other tokens.
    """
    phi3 = read_config(view / CONFIG).get("model_type") == "phi3" and strips_after_tokens(view)
    name = f"{title} (Phi-3)" if phi3 and not any(word in title.lower() for word in _PHI3) else title
    tool.run("vocab", view, vocabulary, name)
    try:
        check_golden(tool, vocabulary, [trained])
    except JobFailed:
        # Only SentencePiece vocabularies, which GGUF calls "llama", have the choice of a space.
        if read_gguf_header(vocabulary).metadata.get(_KIND) != "llama":
            raise
        if space := _right_space(tool, vocabulary, trained):
            return TokenizerHints(name, space)
        raise
    return TokenizerHints(name)


def _right_space(tool: LlamaTool, vocabulary: Path, trained: Any) -> str:
    for space in ("false", "true"):
        try:
            check_golden(tool, vocabulary, [trained], space)
        except JobFailed:
            continue
        return space
    return ""


_FILE_TYPES = {"q6_k": 18, "q5_k_m": 17, "q4_k_m": 15}
"""Numbers of `enum llama_ftype` in llama.h, for the types that only llama.cpp's own quantiser writes."""
FAR = {"f16": 1e-3, "bf16": 1e-2, "q8_0": 7e-3, "q6_k": 0.027, "q5_k_m": 0.054, "q4_k_m": 0.156}
"""KL in nats per token above which the user is warned that a file is far from its model. For the quantised types it is
five times what llama.cpp measured for Llama 3 8B (tools/perplexity/README.md: .0014, .0055, .0108, .0313)."""
_BROKEN_KL = 0.05
"""KL in nats per token that rounding to 16 bits or q8_0 cannot cause: above it the conversion is wrong."""
_ROWS_BEFORE = 2
"""How many of the rows a 16-bit file is compared on before it is quantised."""
_FALLBACK = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback")


def write_gguf(work: Work, made: Path) -> dict[str, Any]:
    """Write a whole model as one GGUF file, with Modelfile and card beside it.

    Args:
        work: The export.
        made: A new folder.

    Returns:
        For the report: what the golden conversations showed, what the format cost, and which system prompt the
        Modelfile carries.

    Raises:
        BadInput: The model cannot be used.
        JobFailed: llama.cpp does not know the model, reads other tokens, or the file answers differently.
        OSError: The disk is full or not writable.
    """
    made.mkdir()
    out = made / work.file_name
    tool, source, form = work.llama(), work.source, work.request.format
    work.say("asking llama.cpp whether it knows this model")
    folders = [work.base(), source] if work.adapter else [source]
    trained = load_tokenizer(source if (source / "tokenizer_config.json").is_file() else folders[0])
    asked = make_view(work.folder / "asked", folders, weights=folders[0] if work.adapter else None)
    hints = ask_llama(tool, asked, trained, Path(work.request.out).stem, work.folder / "vocabulary.gguf")
    merged = work.merged()
    config, size_bytes = check_folder(merged)
    generation = generation_of(merged)  # read now, because a model that was merged for this is deleted after converting
    saved = load_tokenizer(merged)
    rows = rows_of([*golden_texts(saved), *TEXTS], saved, tokens_for(size_bytes))
    wanted = merged_answers(work, merged, rows)

    def loss_in(file: Path, rows: list[list[int]] = rows) -> Closeness | None:
        if wanted is None:
            return None
        work.say("checking", detail=f"answers in llama.cpp{'' if file == out else ', in 16 bits'}")
        return loss_of(llama_logits(tool, file, rows, work.folder), wanted[: sum(map(len, rows))])

    # The 16-bit file in between keeps bf16 weights as they are; others are written as fp16.
    sixteen = "bf16" if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else "f16"
    kind = _FILE_TYPES.get(form)
    first = work.folder / "between.gguf" if kind else out
    _convert(work, tool, sixteen if kind else form, merged, out=first, hints=hints)
    if kind:
        # A few tokens show a wrong conversion; after rounding to a few bits it could not be told from rounding.
        _require_right(loss_in(first, rows[:_ROWS_BEFORE]))
        _quantise(work, tool, form, first, out=out)
    work.say("checking", detail="tokens in llama.cpp")
    golden = check_golden(tool, out, [trained, saved])
    loss = loss_in(out)
    if not kind:
        _require_right(loss)
    _warn(work, golden, form, loss)
    system = _write_beside(work, out, golden, loss, (saved, config, generation))
    return {"golden": asdict(golden), "loss": asdict(loss) if loss else None, "system_prompt": system}


def _convert(work: Work, tool: LlamaTool, form: str, merged: Path, *, out: Path, hints: TokenizerHints) -> None:
    """Write a model in 16 bits or q8_0; a model that was merged only for this is deleted afterwards."""
    size_bytes = check_folder(merged)[1]
    view = make_view(work.folder / "view", [merged], weights=merged)
    expected = size_bytes * 8.5 / 16 if form == "q8_0" else size_bytes
    tell = partial(work.say, "converting")
    words = (view, out, form, hints.name, hints.space)
    tool.run("convert", *words, out=out, expected_bytes=int(expected), tell=tell)
    if merged == work.scratch.merged:
        shutil.rmtree(merged, ignore_errors=True)


def _quantise(work: Work, tool: LlamaTool, form: str, first: Path, *, out: Path) -> None:
    """Write a 16-bit file in fewer bits, and delete it."""
    work.say("quantising", detail=form)
    tool.run("quantize", first, out, str(_FILE_TYPES[form]))
    first.unlink()
    if said := _FALLBACK.findall(tool.log.read_text("utf-8", "replace")):
        few, all_of_them = said[-1]
        work.warn(
            f"{few} of {all_of_them} tensors were kept in more bits than {form}: their rows are no multiple of 256"
        )


def _require_right(loss: Closeness | None) -> None:
    """Refuse a file in 16 bits or q8_0 that does not answer as the merged model does.

    Raises:
        JobFailed: The file answers differently.
    """
    if loss and loss.mean_kl > _BROKEN_KL:
        raise JobFailed(
            "gguf_differs",
            f"the GGUF file answers otherwise than the merged model (KL {loss.mean_kl:.3f} nats a token): the "
            "conversion of this model is not right",
            "use the merged model with transformers or vLLM",
        )


def _warn(work: Work, golden: Golden, form: str, loss: Closeness | None) -> None:
    if loss and loss.mean_kl > FAR[form]:
        work.warn(
            f"{form} is {loss.mean_kl:.3f} nats a token from the merged model, more than is usual ({FAR[form]:g}): "
            "try a larger format"
        )
    if not golden.ends_with_stop:
        work.warn(
            "llama.cpp does not take the token that ends an answer for a stop token: name it as a stop word where the "
            "model is served (the Modelfile does)"
        )
    if golden.bos_doubled:
        work.warn(
            "the chat template writes the start token and the file asks for one, too: a program that renders the "
            "template itself must not add another (llama.cpp and the Modelfile do not)"
        )
    if golden.composes:
        work.warn(
            "the tokenizer composes letters and their accents (NFC), llama.cpp does not: text that has them apart, as "
            "macOS writes file names, is read as other tokens there"
        )


def _write_beside(
    work: Work, file: Path, golden: Golden, loss: Closeness | None, model: tuple[Any, dict[str, Any], dict[str, Any]]
) -> dict[str, Any]:
    """Write Modelfile and card beside a file and return which system prompt the Modelfile carries.

    `model` holds the model's tokenizer, config and generation config.
    """
    tokenizer, config, generation = model
    form = chat_form(tokenizer)
    system = system_of(form, work.trained_with)
    text = modelfile(
        f"./{file.name}",
        form,
        stops=stop_words(tokenizer),
        context=context_of(config),
        generation=generation,
        adds_bos=golden.adds_bos,
        system=system[0],
    )
    (file.parent / MODELFILE).write_text(text, encoding="utf-8")
    checked = [
        f"{work.request.format}, loaded in llama.cpp; {loss_line(loss, 'the merged 16-bit model')}",
        f"{golden.conversations} conversations give the same {golden.tokens} tokens in training, in the saved "
        "tokenizer and in llama.cpp",
        f"every answer ends with a stop token: {'yes' if golden.ends_with_stop else 'no'}",
    ]
    training = training_of(work.request.run)
    card = model_card(work.adapter, file.stem, training, checked=checked, use=_use(file.name), tag="gguf")
    (file.parent / CARD).write_text(card, encoding="utf-8")
    return work.tell_system(system)


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
