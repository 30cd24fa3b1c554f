"""Writes a merged 16-bit model in 4 or 8 bits with bitsandbytes, loads it again and compares the answers.

It always begins with 16 bits: a model merged into 4-bit weights would lose the adapter when it is quantised again
(measured: KL 1.99).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from studio.core.errors import BadInput, JobFailed
from studio.jobs.base.closeness import Closeness, rows_of
from studio.jobs.base.load import left_alone
from studio.jobs.base.model_class import class_in, empty_model
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.export.model_card import CARD, loss_line, model_card, training_of
from studio.jobs.export.work import TEXTS, Work, loss_of, merged_answers, tokens_for
from studio.probe.export import check_loading
from studio.probe.model_folder import check_folder
from studio.runs.failure import of_the_machine

_KEPT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md", ".py")
_WRITTEN_ANEW = ("config.json", "generation_config.json", "model.safetensors.index.json")


def write_quantised(work: Work, made: Path) -> dict[str, Any]:
    """Write a model folder that `from_pretrained` loads quantised, with its card.

    Args:
        work: The export.
        made: A new folder.

    Returns:
        For the report: what quantising cost, if the answers could be compared.

    Raises:
        BadInput: The model cannot be loaded, or the memory has no room for it.
        JobFailed: The quantised model's answers are not finite, or no layer could be quantised.
        OSError: The disk is full or not writable.
    """
    loss = _quantise(work, made)
    name, kind = Path(work.request.out).name, class_in(made).kind.__name__
    use = [
        "```python",
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f"model = {kind}.from_pretrained({json.dumps(name)})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
        "```",
    ]
    done = f"{work.request.format} through bitsandbytes, from the merged 16-bit model"
    checked = [done, loss_line(loss, "that model")]
    training = training_of(work.request.run)
    card = model_card(work.adapter, name, training, checked=checked, use=use, tag="transformers")
    (made / CARD).write_text(card, encoding="utf-8")
    return {"loss": asdict(loss) if loss else None}


def _quantise(work: Work, folder: Path) -> Closeness | None:
    merged, form = work.merged(), work.request.format
    size_bytes = check_folder(merged)[1]
    check_loading(form, size_bytes)
    rows = rows_of(TEXTS, load_tokenizer(merged), tokens_for(size_bytes))
    wanted = merged_answers(work, merged, rows)
    work.heed()
    work.say("quantising", detail=form)
    model = _load(merged, _bits(form, left_alone(empty_model(class_in(merged)), ())))
    _require_quantised(model, form)
    work.say("saving")
    model.save_pretrained(str(folder))
    for weights in folder.glob("*.safetensors"):
        # safetensors makes the file readable for its owner alone; it gets the permissions of the other files.
        shutil.copymode(folder / "config.json", weights)
    del model
    keep_files(merged, folder)
    work.heed()
    work.say("checking", detail="loading it again")
    return None if wanted is None else loss_of(_answers(_load(folder), rows), wanted)


def keep_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and the other files beside the weights, byte by byte."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _KEPT_SUFFIXES and path.name not in _WRITTEN_ANEW:
            shutil.copyfile(path, folder / path.name)


def _bits(form: str, kept: Sequence[str]) -> BitsAndBytesConfig:
    """Return how to quantise all linear layers but those inside of the modules in `kept`."""
    if form == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[*kept])  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*kept],
    )


def _load(folder: Path, bits: BitsAndBytesConfig | None = None) -> Any:
    """Return the model on the CPU. `bits` quantises it; a folder that is quantised already has that in its config."""
    options = {"quantization_config": bits} if bits else {}
    try:
        picked = class_in(folder)
        from_pretrained: Any = picked.kind.from_pretrained
        return from_pretrained(
            folder, config=picked.config, dtype="auto", device_map={"": "cpu"}, use_safetensors=True, **options
        ).eval()
    except (ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        if of_the_machine(error):
            raise
        raise BadInput(f"the model cannot be loaded: {type(error).__name__}: {error}") from error


def _require_quantised(model: Any, form: str) -> None:
    """Refuse a model in which bitsandbytes found nothing to quantise.

    Raises:
        JobFailed: No layer was quantised.
    """
    kind = "Linear8bitLt" if form == "int8" else "Linear4bit"
    if not any(type(module).__name__ == kind for module in model.modules()):
        raise JobFailed(
            "nothing_quantised",
            "no layer of this model could be quantised: bitsandbytes converts torch.nn.Linear only",
            "use the merged 16-bit model as it is",
        )


@torch.no_grad()
def _answers(model: Any, rows: list[list[int]]) -> Tensor:
    """Return a model's fp32 logits `[tokens, vocabulary]`, all rows one after another."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in rows])
