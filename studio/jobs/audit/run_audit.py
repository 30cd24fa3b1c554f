"""One trained adapter, through the same held-out rows on every base that it can be put on or merged into."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from studio.core.audit import advise_run, forgetting_of
from studio.core.errors import BadInput
from studio.core.events import Phase, Warned
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.audit.answer_models import AnswerModels
from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.figures import check_cost, ground_of, measure, prove
from studio.jobs.audit.gguf_variants import NONE_EXPORTED, GgufForms, gguf_files
from studio.jobs.audit.kept import stamp_of
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.audit.run_report import RunReport, block_deltas, handiest
from studio.jobs.audit.speed import Speed, measured_speeds, prompt_of
from studio.jobs.audit.variants import ALONE, TRAINED, AdapterForms, Named, stored_variant
from studio.jobs.audit.walk import Variant
from studio.jobs.base.device import job_device
from studio.jobs.base.load import base_folder, four_bit_of, load_tokenizer
from studio.jobs.base.precision import half_dtype
from studio.jobs.base.progress import read_fingerprint
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.probe.adapter_folder import find_adapter
from studio.probe.fingerprint import refuse_another_base, short_fingerprint
from studio.probe.models import find_base
from studio.runs.audit_request import AuditRequest
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker

_MERGED_OTHER = "given: "


def audit_adapter(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Measure and return the report; the training run gets it as `audit.json`.

    Raises:
        BadInput: The run, its base or its data cannot be used, or there is no memory for it.
        JobFailed: The model cannot be run block by block, or a number is not finite.
        Cancelled: The user asked for it.
    """
    began = time.perf_counter()
    trained = RunPaths(Path(request.run))
    recipe = recipe_of(trained)
    worker.emit(Phase, name="finding the base model")
    base = find_base(request.model or recipe.model.base, request.revision or recipe.model.revision)
    if base.quantization:
        how = plain(base.quantization, one_line=True, limit=40)
        raise BadInput(
            f"{plain(base.word, one_line=True)} is quantised already ({how}): name the 16-bit original with --base."
        )
    folder = base_folder(base, lambda name, fraction: worker.emit(Phase, name=name, fraction=fraction))
    base_seen = read_fingerprint(worker, folder)
    refuse_another_base(request.run, folder, lambda _: base_seen)
    adapter = find_adapter(trained.adapter)
    worker.emit(Phase, name="reading the data")
    rows = read_audit_rows(
        request,
        load_tokenizer(trained.adapter),
        lambda text: worker.emit(Warned, topic="data", message=text),
        answers_only=recipe.data.answers_only,
    )
    skeleton = build_skeleton(folder, adapter)
    weights = FolderWeights.of(folder, skeleton.vocabulary)
    about = [short_fingerprint(base_seen), stamp_of(request)]
    ground = ground_of(worker, request, weights, parts_of(weights.clean), rows, *about)
    gguf = GgufForms(ground, gguf_files(trained, request.gguf))
    quant = four_bit_of(recipe.model)
    forms = AdapterForms(weights, skeleton, quant, kept=quant.skip)
    named = [*forms.all(trained_in_4_bits=recipe.method == "qlora"), *_given(request.merged)]
    variants = [one.variant for one in named]
    cost = check_cost(ground, variants, alone=False)
    gap = prove(ground, stored_variant(weights, forms.stored))
    beside = partial(gguf.scores, variants[0].head) if gguf.files else None
    found = measure(ground, variants, kept_as="forms", beside=beside, share=(0.0, 0.9))
    worker.emit(Phase, name="comparing adapter and rounding", fraction=0.9)
    blocks = block_deltas(ground.parts, forms, worker)
    report = RunReport(weights, forms, adapter.folder, found)
    speeds: dict[tuple[str, bool], Speed] = {}
    prompt = prompt_of(rows) if request.speed else []
    if prompt:
        models = AnswerModels(base, adapter, recipe, dtype=half_dtype(job_device("auto")))
        speeds = measured_speeds(worker, models, prompt, forms.form.name)
    shown = [report.walked(one, speeds) for one in named]
    shown += [report.gguf(name, file, gguf, gguf.speed(name, prompt)) for name, file in gguf.files.items()]
    advice = advise_run(found.task, trained=TRAINED, without=ALONE, choices=handiest(shown), answers=rows.answers)
    return {
        "schema": 1,
        "what": "run",
        "run": trained.name,
        "run_path": str(trained.root.absolute()),
        "model": base.word,
        "data": request.data,
        "method": recipe.method,
        "reference": TRAINED,
        **rows.told(),
        "variants": shown,
        "unknown": [*_not_from_here(variants), *(name for name, file in gguf.files.items() if not file.form)],
        "gguf_note": "" if gguf.files else NONE_EXPORTED,
        "forgetting": asdict(forgetting_of(found.neutral[ALONE], found.neutral[TRAINED])),
        "blocks": blocks,
        "recommendation": asdict(advice),
        "proof_gap": gap,
        "cost": {
            **asdict(cost),
            "seconds": time.perf_counter() - began,
            "resident_bytes": int(psutil.Process().memory_info().rss),
        },
    }


def recipe_of(paths: RunPaths) -> Recipe:
    """Return the recipe of a training run that has an adapter.

    Raises:
        BadInput: It is none, or has none.
    """
    job = read_job(paths, Recipe)
    name = plain(paths.name, one_line=True)
    if job is None:
        raise BadInput(f"the run {name} is no training run: there is no adapter to audit.")
    if not paths.adapter.is_dir():
        raise BadInput(f"the run {name} has no adapter: it must be trained or stopped first.")
    return job


def _not_from_here(variants: Sequence[Variant]) -> list[str]:
    return [variant.name for variant in variants if variant.name.startswith(_MERGED_OTHER)]


def _given(folders: Sequence[str]) -> list[Named]:
    """Return merged model folders that the user wants to see beside the other forms."""
    made = []
    for folder in map(Path, folders):
        base = find_base(str(folder))
        if base.quantization:
            raise BadInput(f"{plain(folder.name, one_line=True)} is quantised: only 16-bit folders are measured here.")
        variant = replace(stored_variant(FolderWeights.of(folder)), name=f"{_MERGED_OTHER}{folder.name}")
        variant = replace(variant, head=replace(variant.head, key=variant.name))
        made.append(Named(variant, f"the model in {plain(str(folder), one_line=True)}", "16-bit", usable=False))
    return made
