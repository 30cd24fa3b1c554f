"""How a family turns its head's output into logits."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadForm:
    """How a family turns the head's output x into logits: `softcap * tanh(scale * x / softcap)`, or `scale * x`.

    Sources: Gemma 2 `final_logit_softcapping`, Granite `logits_scaling` (divides), Cohere `logit_scale` and Falcon-H1
    `lm_head_multiplier` (multiply).
    """

    softcap: float | None = None
    scale: float = 1.0


def head_form_of(config: Any) -> HeadForm:
    """Return the form that a model's config names. A family may do more to its logits: the caller must compare."""
    text = config.get_text_config()
    divided, *multiplied = (
        float(getattr(text, name, 1.0) or 1.0) for name in ("logits_scaling", "logit_scale", "lm_head_multiplier")
    )
    softcap = getattr(text, "final_logit_softcapping", None)
    return HeadForm(float(softcap) if softcap else None, math.prod(multiplied) / divided)


def formed(logits: Tensor, form: HeadForm) -> Tensor:
    """Return the logits that a head's output means in this family; the output is changed in place."""
    if form.scale != 1.0:
        logits *= form.scale
    if form.softcap:
        logits = torch.tanh_(logits.div_(form.softcap)).mul_(form.softcap)
    return logits
