"""Compares a base model in 16 bit with its quantised forms on the user's rows, before any training."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from studio.core.audit import Plan, advise_base
from studio.core.errors import BadInput
from studio.core.events import Phase, Warned
from studio.core.intervals import ratio_interval
from studio.core.layer_precision import FOUR_BIT, INT8, SIXTEEN_BIT, Table, in_sixteen_bit, place_of, precision_at
from studio.core.placement.fidelity import Measured, Proposal, effects_of, proposals, steps_of
from studio.core.recipe import FIELDS
from studio.core.text import plain
from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.figures import Ground, check_cost, ground_of, measure, prove
from studio.jobs.audit.figures import Measured as MeasuredVariants
from studio.jobs.audit.forms import FORMS, UNROUNDED
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.audit.variants import (
    folder_variants,
    held_bytes,
    rounded_linears,
    rounded_stacks,
    sixteen_bit_bytes,
    stored_bytes_of,
)
from studio.jobs.audit.walk import BlockSeen
from studio.jobs.base.load import base_folder, check_names
from studio.jobs.base.progress import read_fingerprint
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.probe.fingerprint import short_fingerprint
from studio.probe.models import find_base
from studio.probe.quality import model_fingerprint
from studio.runs.quality import BaseResult, remember_base
from studio.runs.requests import AuditRequest
from studio.runs.worker import Worker

PREFERRED = "nf4+dq"
"""The 4-bit form that a recipe has by default."""


def audit_base(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Measure and return the report.

    Raises:
        BadInput: Model or data cannot be used, or there is not enough memory.
        JobFailed: The model cannot be run block by block, or a number is not finite.
        Cancelled: The user asked for a stop.
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
    names, quantised = forms_of(request.forms), _quantised_sizes(weights)
    asked = PREFERRED if PREFERRED in names else names[0]
    variants = folder_variants(weights, [UNROUNDED.name, *names])
    table = _table_of(request, weights, asked)
    if table:
        variants.append(replace(folder_variants(weights, [asked], precision=table)[0], name=f"{asked}, mixed"))
    cost = check_cost(ground, variants, alone=True)
    gap = prove(ground, variants[0])
    sizes = list(request.kept)
    middle = 0.75 if sizes else 1.0
    found = measure(ground, variants, kept_as="roundings", alone=asked, share=(0.0, middle))
    ranked = sorted(found.seen, key=lambda block: -(block.own or 0.0))
    plans: list[Plan] = []
    if sizes:
        plans = _mixed_plans(ground, found, ranked, sizes, asked=asked, quantised=quantised, share=(middle, 1.0))
    measured = _measured(ranked, names, asked)
    _remember(worker, folder, measured, asked, found.task[asked].tokens)
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
                "bits": FORMS[name].bits or 8.0 * stored_bytes_of(weights),
                "base_bytes": int(held_bytes(weights, _inside(weights, quantised, name), FORMS[name].bits)),
                "task": asdict(found.task[name]),
                "neutral": asdict(found.neutral[name]),
            }
            for name in (UNROUNDED.name, *names)
        ]
        + [
            {
                "name": variant.name,
                "bits": _mean_bits(weights, quantised, table, asked),
                "base_bytes": int(
                    held_bytes(weights, sum(quantised.values()), _mean_bits(weights, quantised, table, asked))
                ),
                "task": asdict(found.task[variant.name]),
                "neutral": asdict(found.neutral[variant.name]),
            }
            for variant in (variants[-1:] if table else ())
        ],
        "blocks": [
            _block_row(block, names, asked, _extra_bytes(weights, quantised, [block.name], asked)) for block in ranked
        ],
        "plans": [asdict(plan) for plan in plans],
        "proposals": [
            {"precision": dict(one.precision), "extra_bytes": one.extra_bytes, "buys": one.buys}
            for one in _proposals(weights, quantised, measured, asked)
        ],
        "recommendation": asdict(advice),
        "proof_gap": gap,
        "cost": cost.told(began),
    }


def _table_of(request: AuditRequest, weights: FolderWeights, asked: str) -> Table:
    """Return what the recipe holds in other bits than 4.

    Raises:
        BadInput: It is no such table, the model cannot be held so, or no 4-bit form is measured.
    """
    field = FIELDS["model.precision"]
    table: Table = field.kind.read(request.precision) if request.precision else ()
    if problem := next(field.problems(table), None):
        raise BadInput(f"precision: found {problem.found}; wanted {problem.allowed}.")
    if table and FORMS[asked].quant is None:
        raise BadInput("precision: it is measured beside a 4-bit form: name one with --forms.")
    check_names(weights.clean, table)
    return table


def _mean_bits(weights: FolderWeights, quantised: Mapping[str, int], table: Table, asked: str) -> float:
    """Return the bits of a weight of those that 4 bits would round, in the mean."""
    bits = {FOUR_BIT: FORMS[asked].bits, INT8: FORMS[INT8].bits, SIXTEEN_BIT: 8.0 * sixteen_bit_bytes(weights)}
    return sum(size * bits[precision_at(table, name)] for name, size in quantised.items()) / sum(quantised.values())


def forms_of(asked: Sequence[str]) -> list[str]:
    """Return the names of the quantised forms among those asked for, in their order.

    Raises:
        BadInput: A name is not known, or there is none.
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
    found: MeasuredVariants,
    ranked: Sequence[BlockSeen],
    sizes: Sequence[int],
    *,
    asked: str,
    quantised: Mapping[str, int],
    share: tuple[float, float],
) -> list[Plan]:
    """Measure what keeping the worst blocks in 16 bit wins, for several numbers of blocks."""
    weights = ground.weights
    sizes = sorted({min(size, len(ranked)) for size in sizes if size > 0})
    kept = [tuple(block.name for block in ranked[:size]) for size in sizes]
    (stored,) = folder_variants(weights, [UNROUNDED.name])
    mixed = [
        replace(
            folder_variants(weights, [asked], precision=in_sixteen_bit(names))[0], name=f"{asked}, {len(names)} kept"
        )
        for names in kept
    ]
    seen = measure(ground, [stored, *mixed], kept_as="plans", share=share)
    before = [sum(row) for row in found.task_rows[asked].kl]
    counts = [len(row) for row in found.task_rows[asked].kl]
    plans = []
    for names, variant in zip(kept, mixed, strict=True):
        after = [sum(row) for row in seen.task_rows[variant.name].kl]
        won = ratio_interval([one - other for one, other in zip(before, after, strict=True)], counts)
        extra = _extra_bytes(weights, quantised, names, asked)
        plans.append(Plan(names, extra, seen.task[variant.name], won))
    return plans


def _quantised_sizes(weights: FolderWeights) -> dict[str, int]:
    """Return the number of weights of each linear layer and stack of experts that is quantised in 4 bits.

    Raises:
        BadInput: No layer is.
    """
    shapes = weights.clean.state_dict()
    names = rounded_linears(weights)
    if not names:
        raise BadInput("no layer of this model would be quantised: bitsandbytes converts linear layers only.")
    linears = {name: shapes[f"{name}.weight"].numel() for name in names}
    return {**linears, **{name: shapes[name].numel() for name in rounded_stacks(weights)}}


def _inside(weights: FolderWeights, quantised: Mapping[str, int], form: str) -> int:
    """Return how many weights a form holds: 8 bits hold no experts."""
    left = set() if FORMS[form].quant else rounded_stacks(weights)
    return sum(size for name, size in quantised.items() if name not in left)


def _extra_bytes(weights: FolderWeights, quantised: Mapping[str, int], kept: Sequence[str], asked: str) -> int:
    """Return the bytes that some modules take in 16 bit beyond what they take in the form that was asked for."""
    table = in_sixteen_bit(kept)
    inside = sum(size for name, size in quantised.items() if precision_at(table, name) == SIXTEEN_BIT)
    return int(inside * (8.0 * sixteen_bit_bytes(weights) - FORMS[asked].bits) / 8)


def _measured(blocks: Sequence[BlockSeen], names: Sequence[str], asked: str) -> tuple[Measured, ...]:
    """Return what was measured of each block, as the planner reads it."""

    def error(block: BlockSeen, form: str) -> float:
        return _relative(list(block.roundings[form].values()))

    return tuple(
        (block.name, block.own or 0.0, error(block, asked), error(block, INT8) if INT8 in names else None)
        for block in blocks
    )


def _proposals(
    weights: FolderWeights, quantised: Mapping[str, int], measured: Sequence[Measured], asked: str
) -> tuple[Proposal, ...]:
    """Return which layers more bits buy the most for a byte in; none where the model is no stack of layers."""
    effects = effects_of(measured, "")
    if effects is None:
        return ()
    inside = {place_of(name)[0]: 0 for name in quantised}
    for name, size in quantised.items():
        inside[place_of(name)[0]] += size
    bits = {SIXTEEN_BIT: 8.0 * sixteen_bit_bytes(weights), INT8: FORMS[INT8].bits}
    # Stacks of experts have no form in 8 bits.
    steps = steps_of(
        effects,
        lambda number, word: int(inside.get(number, 0) * (bits[word] - FORMS[asked].bits) / 8),
        int8=not rounded_stacks(weights),
    )
    return proposals(steps)


def _remember(worker: Worker, folder: Path, measured: tuple[Measured, ...], asked: str, tokens: int) -> None:
    """Keep what was measured for the planner; if it cannot be written, warn, and report all the same."""
    try:
        remember_base(BaseResult(model_fingerprint(folder), worker.paths.name, asked, tokens, measured))
    except OSError as error:
        worker.emit(Warned, topic="audit", message=f"the effects are not kept for the planner: {error}")


def _block_row(block: BlockSeen, names: Sequence[str], asked: str, extra_bytes: int) -> dict[str, Any]:
    errors = {name: _relative(list(block.roundings[name].values())) for name in names}
    linears = sorted(
        ((name, _relative([one])) for name, one in block.roundings[asked].items()), key=lambda pair: -pair[1]
    )
    return {
        "name": block.name,
        "own_effect": block.own,
        "drift": block.drift,
        "weight_error": errors,
        "kept_extra_bytes": extra_bytes,
        "linears": [{"name": name, "weight_error": error} for name, error in linears],
    }


def _relative(roundings: Sequence[Any]) -> float:
    """Return the Frobenius norm of the rounding error of some linear layers together, relative to their weights'."""
    whole = sum(one.whole for one in roundings)
    return float((sum(one.changed for one in roundings) / whole) ** 0.5) if whole else 0.0
