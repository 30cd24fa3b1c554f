"""The base with its adapter on it, started as the recipe says: at the first start and again at every resume."""

from pathlib import Path

import torch
from peft import PeftModel

from studio.core.errors import JobFailed
from studio.core.events import Warned
from studio.core.recipe import Recipe
from studio.jobs.base.load import base_folder, four_bit_of, load_base
from studio.jobs.base.precision import Precision
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.checkpoint import load_start
from studio.jobs.train.offload import PinnedCopies, offload_checkpoints
from studio.jobs.train.start import Pair, start_loftq, start_pissa, take_out
from studio.probe.models import BaseFound
from studio.runs.worker import Worker

_LOFTQ_NOTE = (
    "the adapter also carries a repair of the base's 4-bit rounding: use it on the 4-bit base; "
    "on the 16-bit base it would repair what is not broken"
)
_EAGER_NOTE = (
    "this model's attention scores cannot be made by torch's fused attention: it runs eagerly, with matrices of "
    "length x length per head. flash_attention_2, where it is installed, needs none"
)


def trainable_model(
    recipe: Recipe,
    base: BaseFound,
    device: torch.device,
    precision: Precision,
    *,
    worker: Worker,
    tell: PhaseTeller,
    checkpoint: Path | None,
) -> tuple[PeftModel, Pair]:
    """Load the base, attach the adapter and give it its first values; a checkpoint's values are not put back here.

    Returns:
        The model, and the adapter tensors that its base was changed by (PiSSA), empty where it is the ordinary one.

    Raises:
        JobFailed: A name in the recipe is not in the model, or the start needs weights that are not there.
        BadInput: The base cannot be loaded.
    """
    frozen = load_base(
        base,
        method=recipe.method,
        dtype=precision.dtype,
        quant=four_bit_of(recipe.model),
        attention=recipe.train.attention,
        device=device,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    if frozen.config._attn_implementation != recipe.train.attention:
        worker.emit(Warned, topic="attention", message=_EAGER_NOTE)
    model = attach_adapter(frozen, recipe.adapter, grad_checkpointing=recipe.train.grad_checkpointing)
    if recipe.train.offload_checkpoints:
        _offload(model, device, worker)
    if recipe.adapter.init == "pissa":
        tell("starting the adapter", detail="pissa")
        return model, _pissa(model, checkpoint)
    if recipe.adapter.init == "loftq":
        worker.emit(Warned, topic="adapter", message=_LOFTQ_NOTE)
        if checkpoint is None:
            tell("starting the adapter", detail="loftq")
            _loftq(model, base)
    return model, {}


def _offload(model: PeftModel, device: torch.device, worker: Worker) -> None:
    if device.type != "cuda":
        why = f"on a {device.type} they are in main memory anyway"
    elif offload_checkpoints(model, PinnedCopies(device)) == 0:
        why = "this model has a way of its own to checkpoint its layers"
    else:
        return
    worker.emit(Warned, topic="offload", message=f"train.offload_checkpoints moves no checkpoint: {why}")


def _pissa(model: PeftModel, checkpoint: Path | None) -> Pair:
    if checkpoint is None:
        return start_pissa(model)
    start = load_start(checkpoint)
    if not start:
        raise JobFailed(
            "checkpoint_mismatch",
            f"checkpoint {checkpoint.name} was not made with adapter.init pissa, which the recipe now asks for",
            "put the recipe back as it was, or start a new run",
        )
    take_out(model, start)
    return start


def _loftq(model: PeftModel, base: BaseFound) -> None:
    if base.quantization:
        raise JobFailed(
            "weights_not_found",
            "adapter.init loftq needs the base's 16-bit weights, and this base has only 4-bit ones",
            "use the original 16-bit model as model.base, or adapter.init default",
        )
    start_loftq(model, base_folder(base))
