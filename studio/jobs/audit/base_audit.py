"""A base model in 16 bit against its roundings, on the user's rows: before any training."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import psutil

from studio.core.audit import Plan, advise_base
from studio.core.errors import BadInput
from studio.core.events import Phase, Warned
from studio.core.intervals import ratio_interval
from studio.core.text import plain
from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.figures import Ground, Measured, check_cost, ground_of, measure, prove, stored_bytes_of
from studio.jobs.audit.forms import FORMS, UNROUNDED
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.audit.variants import folder_variants, is_kept, rounded_linears
from studio.jobs.audit.walk import BlockSeen
from studio.jobs.base.load import base_folder, load_tokenizer
from studio.jobs.base.progress import read_fingerprint
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.probe.fingerprint import short_fingerprint
from studio.probe.models import find_base
from studio.runs.requests import AuditRequest
from studio.runs.worker import Worker

PREFERRED = "nf4+dq"
"""What a recipe asks for unless told otherwise."""


def audit_base(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Measure and return the report.

    Raises:
        BadInput: Model or data cannot be used, or there is no memory for it.
        JobFailed: The model cannot be run block by block, or a number is not finite.
        Cancelled: The user asked for it.
    """
    began = time.perf_counter()
    worker.emit(Phase, name="finding the base model")
    base = find_base(request.model, request.revision)
    if base.quantization:
        how = plain(base.quantization, one_line=True, limit=40)
        raise BadInput(f"{plain(base.word, one_line=True)} is quantised already ({how}): name the 16-bit original.")
    folder = base_folder(base, lambda name, fraction: worker.emit(Phase, name=name, fraction=fraction))
    worker.emit(Phase, name="reading the data")
    rows = read_audit_rows(
        request, load_tokenizer(folder), lambda text: worker.emit(Warned, topic="data", message=text)
    )
    weights = FolderWeights.of(folder)
    parts = parts_of(weights.clean)
    seen = short_fingerprint(read_fingerprint(worker, folder))
    ground = ground_of(worker, request, weights, parts, rows, seen)
    names = forms_of(request.forms)
    asked = PREFERRED if PREFERRED in names else names[0]
    variants = folder_variants(weights, [UNROUNDED.name, *names])
    cost = check_cost(ground, variants, alone=True)
    gap = prove(ground, variants[0])
    sizes = list(request.kept)
    middle = 0.75 if sizes else 1.0
    found = measure(ground, variants, kept_as="roundings", alone=asked, share=(0.0, middle))
    ranked = sorted(found.seen, key=lambda block: -(block.own or 0.0))
    plans: list[Plan] = []
    if sizes:
        plans = _mixed_plans(ground, found, ranked, sizes, asked=asked, share=(middle, 1.0))
    quantised, stored_bytes = _quantised_sizes(weights), stored_bytes_of(weights)
    advice = advise_base({name: found.task[name] for name in names}, asked, plans, rows.answers)
    return {
        "schema": 1,
        "what": "base",
        "model": base.word,
        "data": request.data,
        "reference": UNROUNDED.name,
        "asked": asked,
        **rows.told(),
        "variants": [
            {
                "name": name,
                "bits": FORMS[name].bits or 8.0 * stored_bytes,
                "base_bytes": _base_bytes(weights, quantised, FORMS[name].bits, stored_bytes),
                "task": asdict(found.task[name]),
                "neutral": asdict(found.neutral[name]),
            }
            for name in (UNROUNDED.name, *names)
        ],
        "blocks": [_block_row(block, names, asked, quantised, stored_bytes) for block in ranked],
        "plans": [asdict(plan) for plan in plans],
        "recommendation": asdict(advice),
        "proof_gap": gap,
        "cost": {**asdict(cost), "seconds": time.perf_counter() - began, "resident_bytes": _peak()},
    }


def forms_of(asked: Sequence[str]) -> list[str]:
    """Return the names of roundings.

    Raises:
        BadInput: One is not known.
    """
    names = [name for name in asked if name != UNROUNDED.name]
    unknown = [name for name in names if name not in FORMS]
    if unknown or not names:
        known = ", ".join(name for name in FORMS if name != UNROUNDED.name)
        found = plain(unknown[0], one_line=True, limit=40) if unknown else "none"
        raise BadInput(f"roundings: found {found}; wanted some of {known}.")
    return names


def _mixed_plans(
    ground: Ground,
    found: Measured,
    ranked: Sequence[BlockSeen],
    sizes: Sequence[int],
    *,
    asked: str,
    share: tuple[float, float],
) -> list[Plan]:
    """Measure what keeping the worst blocks in 16 bit wins."""
    weights = ground.weights
    sizes = sorted({min(size, len(ranked)) for size in sizes if size > 0})
    kept = [tuple(block.name for block in ranked[:size]) for size in sizes]
    (stored,) = folder_variants(weights, [UNROUNDED.name])
    mixed = [
        replace(folder_variants(weights, [asked], kept=names)[0], name=f"{asked}, {len(names)} kept") for names in kept
    ]
    seen = measure(ground, [stored, *mixed], kept_as="plans", share=share)
    before = [sum(row) for row in found.task_rows[asked].kl]
    counts = [len(row) for row in found.task_rows[asked].kl]
    plans = []
    for names, variant in zip(kept, mixed, strict=True):
        after = [sum(row) for row in seen.task_rows[variant.name].kl]
        won = ratio_interval([one - other for one, other in zip(before, after, strict=True)], counts)
        extra = sum(
            weight * (_stored_bits(weights) - FORMS[asked].bits) / 8
            for name, weight in _quantised_sizes(weights).items()
            if is_kept(name, names)
        )
        plans.append(Plan(names, int(extra), seen.task[variant.name], won))
    return plans


def _stored_bits(weights: FolderWeights) -> float:
    return 8.0 * min(2, stored_bytes_of(weights))


def _quantised_sizes(weights: FolderWeights) -> dict[str, int]:
    """Return the number of weights of each linear layer that is rounded."""
    shapes = weights.clean.state_dict()
    names = rounded_linears(weights)
    if not names:
        raise BadInput("no layer of this model would be quantised: bitsandbytes converts linear layers only.")
    return {name: shapes[f"{name}.weight"].numel() for name in names}


def _base_bytes(weights: FolderWeights, quantised: dict[str, int], bits: float, stored_bytes: int) -> int:
    """Return what the base takes in a form, rounded layers in that form and the rest in 16 bit."""
    whole = sum(parameter.numel() for parameter in weights.clean.parameters())
    inside = sum(quantised.values())
    kept_bytes = min(2, stored_bytes)
    return int((whole - inside) * kept_bytes + inside * (bits / 8 or kept_bytes))


def _block_row(
    block: BlockSeen, names: Sequence[str], asked: str, quantised: dict[str, int], stored_bytes: int
) -> dict[str, Any]:
    errors = {name: _relative(list(block.roundings[name].values())) for name in names}
    inside = sum(size for name, size in quantised.items() if is_kept(name, (block.name,)))
    extra = inside * (8.0 * min(2, stored_bytes) - FORMS[asked].bits) / 8
    linears = sorted(
        ((name, _relative([one])) for name, one in block.roundings[asked].items()), key=lambda pair: -pair[1]
    )
    return {
        "name": block.name,
        "own_effect": block.own,
        "drift": block.drift,
        "weight_error": errors,
        "kept_extra_bytes": int(extra),
        "linears": [{"name": name, "weight_error": error} for name, error in linears],
    }


def _relative(roundings: Sequence[Any]) -> float:
    """Return the relative Frobenius norm of the rounding error over some linear layers."""
    whole = sum(one.whole for one in roundings)
    return float((sum(one.changed for one in roundings) / whole) ** 0.5) if whole else 0.0


def _peak() -> int:
    return int(psutil.Process().memory_info().rss)
