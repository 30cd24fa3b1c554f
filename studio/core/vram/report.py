"""An estimate as the one document that `plan --json` prints and that a run keeps as `plan.json`."""

from dataclasses import asdict
from typing import Any

from studio.core.gpu_catalogue import Gpu
from studio.core.shape import ModelShape
from studio.core.vram.estimate import VramEstimate
from studio.core.vram.setup import Setup

SCHEMA = 1
_NOT_OURS = {
    "kbit_prepare": False,
    "head_cast_back": False,
    "outputs_kept": False,
    "transformers": "",
    "fused_kernels": "none",
}
"""What a document's `setup` says of other people's loops; ours has none of these habits."""


def plan_to_dict(
    estimate: VramEstimate, shape: ModelShape, setup: Setup, *, gpu: Gpu | None = None, budget_bytes: int | None = None
) -> dict[str, Any]:
    """Return the plan as plain values; every size is in bytes.

    `peak_bytes` is what live tensors hold at most (torch's allocated), `reserved_bytes` what the allocator takes,
    `device_bytes` what nvidia-smi shows for the process. `low_bytes` is the least the tensors alone can be,
    `high_bytes` the most the device may show; `fits` compares the latter with the budget and is null without one.

    Args:
        estimate: What was estimated.
        shape: The model.
        setup: How it is trained.
        gpu: The card, where one is meant.
        budget_bytes: What the run may use of it.
    """
    verdict = None if budget_bytes is None else estimate.verdict(budget_bytes)
    return {
        "schema": SCHEMA,
        "engine": setup.engine,
        "peak_bytes": estimate.allocated.expected,
        "reserved_bytes": estimate.reserved.expected,
        "device_bytes": estimate.device.expected,
        "low_bytes": estimate.allocated.low,
        "high_bytes": estimate.device.high,
        "ranges": {name: asdict(getattr(estimate, name)) for name in ("allocated", "reserved", "device")},
        "budget_bytes": budget_bytes,
        "headroom_bytes": None if budget_bytes is None else estimate.headroom_bytes(budget_bytes),
        "fits": None if verdict is None else verdict == "fits",
        "verdict": verdict,
        "stage": estimate.stage,
        "stages": dict(estimate.stages),
        "components": asdict(estimate.components),
        "trainable_parameters": estimate.trainable_parameters,
        "attention_kernel": estimate.kernel,
        "host_bytes": estimate.host,
        "model": {
            "family": shape.family,
            "parameters": shape.parameters,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "vocabulary": shape.vocabulary,
            "quantisation": None if shape.quantised is None else asdict(shape.quantised),
        },
        "setup": _setup_to_dict(setup),
        "gpu": None if gpu is None else {"name": gpu.name, "total_bytes": gpu.total_bytes},
        "notes": list(estimate.notes),
    }


def _setup_to_dict(setup: Setup) -> dict[str, Any]:
    said = {**_NOT_OURS, "engine": setup.engine, "autocast": setup.autocast, **asdict(setup)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
