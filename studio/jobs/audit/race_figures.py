"""The lanes of a race on the same held-out rows: each adapter on the base that it was trained on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.core.audit_tables import joined
from studio.core.errors import BadInput
from studio.core.events import Phase, Warned
from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.figures import Measured, check_cost, ground_of, measure, prove
from studio.jobs.audit.lanes import Lane
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.audit.variants import AdapterForms, stored_variant
from studio.jobs.audit.walk import Variant
from studio.jobs.base.load import base_folder, four_bit_of, load_tokenizer
from studio.jobs.base.progress import read_fingerprint
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.probe.adapter_folder import find_adapter
from studio.probe.audit import audit_of_run
from studio.probe.fingerprint import short_fingerprint
from studio.probe.held_out import rows_of_run
from studio.probe.models import find_base
from studio.runs.audit_request import AuditRequest
from studio.runs.held_out import read_record, shared_record
from studio.runs.worker import Worker


def measure_lanes(
    worker: Worker, request: AuditRequest, lanes: Sequence[Lane], *, share: tuple[float, float]
) -> tuple[Measured, dict[str, Any], Path]:
    """Return the figures of the lanes, compared with the first one, what rows they rest on, and the base's folder.

    The rows are those that every lane held out and none was trained on, by the lanes' own records.

    Raises:
        BadInput: A lane's base, data or adapter cannot be used.
        JobFailed: The model cannot be run block by block, or a number is not finite.
        Cancelled: The user asked for it.
    """
    first = lanes[0]
    base = find_base(first.recipe.model.base, first.recipe.model.revision)
    folder = base_folder(base, lambda name, fraction: worker.emit(Phase, name=name, fraction=fraction))
    of_first = replace(audit_of_run(first.paths), text=request.text)
    rows = read_audit_rows(
        of_first,
        load_tokenizer(first.paths.adapter),
        lambda text: worker.emit(Warned, topic="data", message=text),
        found=rows_of_run(
            shared_record([read_record(lane.paths) for lane in lanes]),
            f"the runs {joined([lane.paths.name for lane in lanes])}",
            Path(of_first.data),
            format=of_first.format,
            wanted=int(of_first.rows),
            seed=int(of_first.seed),
        ),
        answers_only=first.recipe.data.answers_only,
    )
    weights = FolderWeights.of(folder)
    found = short_fingerprint(read_fingerprint(worker, folder))
    runs = [str(lane.paths.root) for lane in lanes]
    ground = ground_of(worker, request, weights, parts_of(weights.clean), rows, found, runs)
    variants = [_variant(weights, folder, lane) for lane in lanes]
    check_cost(ground, variants, alone=False)
    prove(ground, stored_variant(weights))
    return measure(ground, variants, kept_as="lanes", share=share), rows.told(), folder


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
