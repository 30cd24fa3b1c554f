"""Measures one trained adapter on every base that it can be put on or merged into, with the same held-out rows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from studio.core.audit import advise_run, beat_its_base, forgetting_of
from studio.core.errors import BadInput, StudioError
from studio.core.events import Phase, Warned
from studio.core.text import plain
from studio.jobs.audit.answer_models import AnswerModels
from studio.jobs.audit.answers import audit_answers
from studio.jobs.audit.blocks import Parts, parts_of
from studio.jobs.audit.figures import Measured, check_cost, ground_of, measure, prove
from studio.jobs.audit.gguf import NONE_EXPORTED, GgufForms, gguf_files
from studio.jobs.audit.kept import KeptPart, stamp_of
from studio.jobs.audit.lm_eval import audit_tasks
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.audit.serving import NOT_ASKED, Speed, measured_speeds, prompt_of, serving, unmeasured
from studio.jobs.audit.variants import ALONE, TRAINED, AdapterForms, Named, held_bytes, stored_variant
from studio.jobs.audit.walk import Variant
from studio.jobs.base.device import job_device
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.load import base_folder, four_bit_of
from studio.jobs.base.precision import half_dtype
from studio.jobs.base.progress import read_fingerprint
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.probe.adapter_folder import find_adapter
from studio.probe.audit import audited_recipe
from studio.probe.exported import GgufFile
from studio.probe.fingerprint import refuse_another_base, short_fingerprint
from studio.probe.models import find_base
from studio.runs.layout import ADAPTER_WEIGHTS, RunPaths
from studio.runs.requests import AuditRequest
from studio.runs.summary import tries_of
from studio.runs.watch import read_history
from studio.runs.worker import Worker

_MERGED_OTHER = "given: "


def audit_adapter(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Measure and return the report; the training run gets it as `audit.json`.

    Losses come first. If answers or tasks of lm-eval follow, the losses are kept on disk, because the rest may be
    stopped. If answers or tasks fail, the report says why and everything else stays.

    Raises:
        BadInput: The run, its base or its data cannot be used, or there is not enough memory.
        JobFailed: The model cannot be run block by block, or a number is not finite.
        Cancelled: The user asked for a stop.
    """
    if not request.answers and not request.lm_eval:
        return audit_forms(worker, request)
    kept = KeptPart(worker, request, "measured")
    report: dict[str, Any] = kept.load() or audit_forms(worker, request)
    kept.keep(report)
    for part, asked, audit in (("answers", request.answers, audit_answers), ("lm_eval", request.lm_eval, audit_tasks)):
        if not asked:
            continue
        try:
            report[part] = audit(worker, request)
        except Cancelled:
            raise
        except StudioError as error:
            report[part] = {"why_not": str(error)}
            worker.emit(Warned, topic="audit", message=f"{part.replace('_', '-')} left out: {error}")
    return report


def audit_forms(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Return the report on losses, sizes and speeds of every form.

    Raises:
        BadInput: The run, its base or its data cannot be used, or there is no memory for it.
        JobFailed: The model cannot be run block by block, or a number is not finite.
        Cancelled: The user asked for it.
    """
    began = time.perf_counter()
    trained = RunPaths(Path(request.run))
    recipe = audited_recipe(trained)
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
        recipe=recipe,
    )
    skeleton = build_skeleton(folder, adapter)
    weights = FolderWeights.of(folder, skeleton.vocabulary)
    about = [short_fingerprint(base_seen), stamp_of(request)]
    ground = ground_of(worker, request, weights, parts_of(weights.clean), rows, *about)
    gguf = GgufForms(ground, gguf_files(trained, request.gguf))
    quant = four_bit_of(recipe.model)
    forms = AdapterForms(weights, skeleton, quant)
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
    beat = beat_its_base(found.task[ALONE], rows.answers)
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
        "next": [one.told() for one in tries_of(trained, read_history(trained), beat)],
        "proof_gap": gap,
        "cost": cost.told(began),
    }


def _not_from_here(variants: Sequence[Variant]) -> list[str]:
    return [variant.name for variant in variants if variant.name.startswith(_MERGED_OTHER)]


def _given(folders: Sequence[str]) -> list[Named]:
    """Return variants for the merged model folders that the user wants compared with the other forms."""
    made = []
    for folder in map(Path, folders):
        base = find_base(str(folder))
        if base.quantization:
            raise BadInput(f"{plain(folder.name, one_line=True)} is quantised: only 16-bit folders are measured here.")
        variant = replace(stored_variant(FolderWeights.of(folder)), name=f"{_MERGED_OTHER}{folder.name}")
        variant = replace(variant, head=replace(variant.head, key=variant.name))
        made.append(Named(variant, f"the model in {plain(str(folder), one_line=True)}", "16-bit", usable=False))
    return made


@dataclass(frozen=True, slots=True)
class RunReport:
    """Makes the report's rows, one for each form.

    Attributes:
        weights: The base in 16 bit.
        forms: The adapter's forms.
        adapter: The adapter's folder.
        found: The measured figures.
    """

    weights: FolderWeights
    forms: AdapterForms
    adapter: Path
    found: Measured

    def walked(self, one: Named, speeds: Mapping[tuple[str, bool], Speed]) -> dict[str, Any]:
        """Return the row of a form that was walked."""
        size, name = self._form_bytes(one), one.variant.name
        speed = speeds.get((one.form, one.has_adapter), unmeasured(NOT_ASKED))
        row = self._row(name, one.title, size, speed, usable=one.usable)
        return row | {"form": one.form, "disk": "estimated", "why": ""}

    def gguf(self, name: str, file: GgufFile, gguf: GgufForms, speed: Speed) -> dict[str, Any]:
        """Return the row of a GGUF file."""
        title = f"{'GGUF ' + file.form if file.form else 'GGUF'}, {file.source}"
        why = gguf.whys.get(name, "")
        row = self._row(name, title, file.path.stat().st_size, speed, usable=bool(file.form) and not why)
        return row | {"form": file.form or "gguf", "disk": "measured", "why": why}

    def _row(self, name: str, title: str, size: int, speed: Speed, *, usable: bool) -> dict[str, Any]:
        return {
            "name": name,
            "title": title,
            "usable": usable,
            "task": asdict(self.found.task[name]) if name in self.found.task else None,
            "neutral": asdict(self.found.neutral[name]) if name in self.found.neutral else None,
            "disk_bytes": size,
            "serving": {**asdict(serving(self.weights.clean.config, size)), "how": "estimated"},
            "speed": asdict(speed),
        }

    def _form_bytes(self, one: Named) -> int:
        """Return the bytes of a form on disk, which is about what its weights take when it is served."""
        inside = 0 if one.form == "16-bit" else self.forms.rounded_weights
        base = held_bytes(self.weights, inside, self.forms.form.bits)
        return int(base + ((self.adapter / ADAPTER_WEIGHTS).stat().st_size if one.has_adapter else 0))


def handiest(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the forms that can be recommended, the smallest on disk first."""
    usable = [row for row in rows if row["usable"] and row["task"]]
    return [row["name"] for row in sorted(usable, key=lambda row: row["disk_bytes"])]


@torch.no_grad()
def block_deltas(parts: Parts, forms: AdapterForms, worker: Worker) -> list[dict[str, Any]]:
    """Return for each block the Frobenius norms of rounding error and adapter delta, relative to that of the weights.

    Only linear layers that are both quantised and adapted are compared.
    """
    merged = forms.merged(forms.stored)
    rows = []
    for place, (name, _) in enumerate(parts.blocks):
        worker.emit(Phase, name="comparing adapter and rounding", fraction=0.9 + 0.05 * place / len(parts.blocks))
        errors, deltas, wholes = list[float](), list[float](), list[float]()
        for weight in sorted(forms.both(f"{name}.")):
            stored = forms.stored(weight).float()
            deltas.append(_squared(merged(weight) - stored))
            errors.append(_squared(forms.dequantized(weight).float() - stored))
            wholes.append(_squared(stored))
        whole = sum(wholes)
        if whole:
            rows.append(
                {
                    "name": name,
                    "rounding": _root(errors, whole),
                    "adapter": _root(deltas, whole),
                    "ratio": (sum(errors) / sum(deltas)) ** 0.5 if sum(deltas) else None,
                }
            )
    return rows


def _squared(tensor: torch.Tensor) -> float:
    return float(tensor.square().sum())


def _root(parts: Sequence[float], whole: float) -> float:
    return float((sum(parts) / whole) ** 0.5)
