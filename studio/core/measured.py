"""A measurement of a training step beside its estimate, as one document: a plan's fields, with measured values.

The job reports what was measured, the plan what was expected. What was not measured stays estimated.
"""

from collections.abc import Mapping
from typing import Any

COMPONENTS = ("base", "adapter", "gradients", "optimizer", "activations", "logits", "workspace")
ELSEWHERE = ("paged", "host")
"""Components that do not count as on the device: unified memory, which may be there or not, and main memory."""

UNKNOWN: dict[str, tuple[str, ...]] = {
    "trace": (
        "which kernels a card chooses at run time, and their workspaces beyond cuBLAS's own",
        "fragmentation: reserved and device are the trace and what the estimate adds for allocator and context",
        "peaks inside one operator, beyond those of the kernels that are known",
        "how weights are read: the stage load counts one 16-bit weight beside the 4-bit ones, not the reader's buffers",
        "shorter and masked rows: every row is traced full and learnt whole, which is the most that it can be",
        "compiled layers, liger's loss and packed attention: layers and loss are traced as written, rows side by side",
    ),
    "cpu": (
        "peaks inside one operator, such as those of matrix products and of logsumexp",
        "the resident set: libraries, and memory that the process keeps after tensors are gone",
        "shorter and masked rows: every row is traced full and learnt whole, which is the most that it can be",
    ),
    "cuda": (
        "what other runs of the same recipe see: fragmentation depends on the order of lengths",
        "the components inside a peak: weights, gradients and optimizer are known, the rest counts as activations",
    ),
}


def height(parts: Mapping[str, int]) -> int:
    """Return the bytes on the device of a stage's components."""
    return sum(size for name, size in parts.items() if name not in ELSEWHERE)


def measured_plan(plan: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of a measurement: a plan's fields, with what was measured in the place of estimates.

    Args:
        plan: The estimate, as `plan_to_dict` gives it, or `{"estimate": None, "why": ...}`.
        report: The job's report: `source` (`trace` or `cuda`), `peaks` by stage and component,
            `trainable_parameters`, and, if they were measured, `reserved_bytes` and `device_bytes`.
    """
    source, peaks = str(report["source"]), {stage: dict(parts) for stage, parts in report["peaks"].items()}
    stage = max(peaks, key=lambda name: height(peaks[name]))
    peak = height(peaks[stage])
    reserved = _seen_or_added(peak, plan, report, "reserved")
    device = _seen_or_added(peak, plan, report, "device")
    budget = plan.get("budget_bytes")
    highest = device["high"] if device else peak
    fits = None if budget is None or (device is None and peak <= budget) else highest <= budget
    context = plan["components"]["context"] if "components" in plan else 0
    return {
        **{key: value for key, value in plan.items() if key not in ("estimate", "why")},
        "source": source,
        "peak_bytes": peak,
        "reserved_bytes": reserved["expected"] if reserved else None,
        "device_bytes": device["expected"] if device else None,
        "low_bytes": peak,
        "high_bytes": highest,
        "ranges": {
            "allocated": dict.fromkeys(("low", "expected", "high"), peak),
            "reserved": reserved,
            "device": device,
        },
        "headroom_bytes": None if budget is None or device is None else budget - device["expected"],
        "fits": fits,
        "verdict": _verdict(fits, device, budget),
        "stage": stage,
        "stages": {name: height(parts) for name, parts in peaks.items()},
        "components": {**{name: peaks[stage].get(name, 0) for name in COMPONENTS}, "context": context},
        "trainable_parameters": report["trainable_parameters"],
        "components_by_stage": peaks,
        "unknown": list(UNKNOWN["cpu" if _on_cpu(plan) else source]),
        "estimate": _estimate_beside(plan, peak),
        "seconds": report.get("seconds"),
        "card": report.get("card"),
        "versions": report.get("versions", {}),
    }


def _on_cpu(plan: Mapping[str, Any]) -> bool:
    return bool(plan.get("setup", {}).get("device") == "cpu")


def _seen_or_added(peak: int, plan: Mapping[str, Any], report: Mapping[str, Any], name: str) -> dict[str, int] | None:
    """Return a range: what a card showed, else the measured peak plus what the estimate adds to its own peak."""
    seen = report.get(f"{name}_bytes")
    if isinstance(seen, int):
        return dict.fromkeys(("low", "expected", "high"), seen)
    ranges = plan.get("ranges")
    if not ranges:
        return None
    return {end: peak + ranges[name][end] - ranges["allocated"][end] for end in ("low", "expected", "high")}


def _verdict(fits: bool | None, device: Mapping[str, int] | None, budget: int | None) -> str | None:
    if fits is None or budget is None:
        return None
    if fits:
        return "fits"
    return "tight" if device and device["expected"] <= budget else "does not fit"


def _estimate_beside(plan: Mapping[str, Any], peak: int) -> dict[str, Any] | None:
    if "peak_bytes" not in plan:
        return None
    expected = plan["peak_bytes"]
    return {
        "peak_bytes": expected,
        "stage": plan["stage"],
        "stages": plan["stages"],
        "components": plan["components"],
        "difference": expected / peak - 1 if peak else None,
    }
