"""The lanes of a race on the same held-out rows: each adapter on the base that it was trained on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.events import Phase, Warned
from studio.jobs.audit.adapter_variants import AdapterForms
from studio.jobs.audit.base_audit import check_cost, known_tokens
from studio.jobs.audit.base_variants import stored_variant
from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.lanes import Lane
from studio.jobs.audit.rows import check_ids, read_audit_rows
from studio.jobs.audit.stopped import Stopped
from studio.jobs.audit.sweep import Variant
from studio.jobs.audit.walk import Ground, Measured, measure, prove
from studio.jobs.audit.weights import FolderWeights
from studio.jobs.base.load import base_folder, four_bit_of, load_tokenizer
from studio.jobs.base.reading import read_fingerprint
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.probe.adapter_folder import find_adapter
from studio.probe.audit import audit_of_run
from studio.probe.fingerprint import short_fingerprint
from studio.probe.models import find_base
from studio.runs.audit_request import AuditRequest
from studio.runs.worker import Worker


def measure_lanes(
    worker: Worker, request: AuditRequest, lanes: Sequence[Lane], *, share: tuple[float, float]
) -> tuple[Measured, dict[str, int], Path]:
    """Return the figures of the lanes, compared with the first one, how many rows they rest on, and the base's folder.

    Raises:
        BadInput: A lane's base, data or adapter cannot be used.
        JobFailed: The model cannot be run block by block, or a number is not finite.
        Stopped: The user asked for it.
    """
    first = lanes[0]
    base = find_base(first.recipe.model.base, first.recipe.model.revision)
    folder = base_folder(base, lambda name, fraction: worker.emit(Phase, name=name, fraction=fraction))
    rows = read_audit_rows(
        replace(audit_of_run(first.paths), text=request.text),
        load_tokenizer(first.paths.adapter),
        lambda text: worker.emit(Warned, topic="data", message=text),
        eval_path=first.recipe.data.eval_path,
        answers_only=first.recipe.data.answers_only,
    )
    weights = FolderWeights(folder)
    found = short_fingerprint(read_fingerprint(worker, folder, Stopped))
    about = json.dumps([asdict(request), found, [str(lane.paths.root) for lane in lanes]], sort_keys=True)
    ground = Ground(worker, weights, parts_of(weights.clean), rows, about)
    check_ids(rows, known_tokens(weights))
    variants = [_variant(weights, folder, lane) for lane in lanes]
    check_cost(ground, variants, alone=False)
    prove(ground, stored_variant(weights))
    counts = {"task": len(rows.task), "neutral": len(rows.neutral)}
    return measure(ground, variants, kept_as="lanes", share=share), counts, folder


def _variant(weights: FolderWeights, folder: Path, lane: Lane) -> Variant:
    quant = four_bit_of(lane.recipe.model)
    skeleton = build_skeleton(folder, find_adapter(lane.paths.adapter))
    if skeleton.vocabulary is not None:
        raise BadInput(f"the lane {lane.name} brings an embedding of its own, which a race cannot compare yet.")
    forms = AdapterForms(weights, skeleton, quant, kept=quant.skip)
    (trained, *_) = forms.all(trained_in_4_bits=lane.recipe.method == "qlora")
    variant = trained.variant
    own_key = f"{lane.name}:{variant.head.key}" if variant.head.key else ""
    return replace(variant, name=lane.name, head=replace(variant.head, key=own_key))
