"""What the tests of an adapter's audit share: runs to audit, and every form of the table made the plainest way."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from studio.core.recipe import Recipe
from studio.probe.audit import audit_of_run
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from tests.fakes.tiny_model import tiny_tokenizer
from tests.jobs.audit_cases import changed, rounded, whole_model
from tests.jobs.conftest import QUESTIONS

FOUR = "nf4+dq"


def write_chats(path: Path) -> Path:
    """Forty-two short chats."""
    turns = [(f"{question} {n}", f"{reply} {n}") for n in range(7) for question, reply in QUESTIONS]
    table = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path.write_text("\n".join(json.dumps(row) for row in table))
    return path


def asked(run: RunPaths, **more: Any) -> AuditRequest:
    """The audit of a run without speeds, for which models are loaded whole."""
    return audit_of_run(run, **{"speed": False, **more})


def tuned(recipe: Recipe, base: Path) -> Recipe:
    return recipe.with_("model.base", str(base)).with_("train.steps", 20).with_("eval.rows", 10)


def adapted(base: nn.Module, run: RunPaths) -> nn.Module:
    return PeftModel.from_pretrained(base, str(run.adapter)).eval()


def merged(base: nn.Module, run: RunPaths) -> nn.Module:
    return adapted(base, run).merge_and_unload()  # type: ignore[operator]


def cast(model: nn.Module) -> nn.Module:
    """All weights as a bf16 file would hold them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def rounded_again(model: nn.Module) -> nn.Module:
    return changed(model, rounded(FOUR))


def plain_forms(base: Path, run: RunPaths) -> dict[str, nn.Module]:
    """Every form of the table made the plainest way: whole, in fp32, by peft and bitsandbytes alone."""
    whole, rounded_once = whole_model(base), whole_model(base, rounded(FOUR))  # rounding takes most of the time

    def stored() -> nn.Module:
        return deepcopy(whole)

    def four() -> nn.Module:
        return deepcopy(rounded_once)

    return {
        "trained": adapted(four(), run),
        "base alone": four(),
        "on 16-bit": adapted(stored(), run),
        "merged 16-bit": cast(merged(stored(), run)),
        f"merged 16-bit, {FOUR}": rounded_again(cast(merged(stored(), run))),
        "merged dequantized": cast(merged(four(), run)),
        f"merged dequantized, {FOUR}": rounded_again(cast(merged(four(), run))),
        "merged 4-bit": rounded_again(merged(four(), run)),
    }


def save_merged(model: nn.Module, folder: Path, noise: float = 0.0) -> None:
    if noise:
        for parameter in model.parameters():
            parameter.data *= 1 + noise * torch.randn_like(parameter)
    else:
        model = model.bfloat16()
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
