"""An audit that only writes what an audit leaves: `python -m tests.fakes.audit_job RUN`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from studio.core.errors import JobFailed
from studio.core.events import Finished, Phase, Saved, Started
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.requests import AuditRequest
from studio.runs.worker import Worker


def interval(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def figures(loss: float, more: float, kl: float) -> dict[str, Any]:
    return {
        "rows": 4,
        "tokens": 40,
        "loss": interval(loss, 0.1),
        "perplexity": 8.2,
        "more": interval(more, 0.05 if more else 0.0),
        "kl": interval(kl, 0.01 if kl else 0.0),
        "kl_tail": interval(3 * kl, 0.0),
        "same_top": interval(1.0 - kl, 0.0),
    }


def base_report(model: str = "a model") -> dict[str, Any]:
    """What an audit of a base leaves, with round numbers."""
    forms = [("16-bit", 2.0, 0.0, 0.0, 1000), ("nf4+dq", 2.1, 0.1, 0.05, 400)]
    variants = [
        {"name": n, "bits": 4.0, "base_bytes": b * 2**20, "task": figures(loss, m, k), "neutral": figures(loss, m, k)}
        for n, loss, m, k, b in forms
    ]
    blocks = [
        {
            "name": f"model.layers.{place}",
            "own_effect": 0.1 * (place + 1),
            "drift": {"nf4+dq": 0.1},
            "weight_error": {"nf4+dq": 0.09},
            "kept_extra_bytes": 5 * 2**20,
            "linears": [{"name": f"model.layers.{place}.mlp.up_proj", "weight_error": 0.1}],
        }
        for place in (1, 0)
    ]
    plan = {"kept": ["model.layers.1"], "extra_bytes": 5 * 2**20, "figures": figures(2.05, 0.05, 0.03)}
    return {
        "schema": 1,
        "what": "base",
        "model": model,
        "data": "rows.jsonl",
        "reference": "16-bit",
        "asked": "nf4+dq",
        "rows": {"task": 4, "neutral": 4},
        "variants": variants,
        "blocks": blocks,
        "plans": [{**plan, "won": interval(0.02, 0.01)}],
        "recommendation": {"best": "nf4+dq", "sentence": "Do it.", "reason": "it is so", "certainty": "40 tokens"},
        "proof_gap": 0.0,
        "cost": {"seconds": 1.0},
    }


def answers_report(*names: str, text: str = "uno") -> dict[str, Any]:
    """Two prompts answered by some forms; the first, `base`, never ends by itself."""
    forms = names or ("base", "tuned, nf4+dq")
    given = {
        name: {"text": text, "tokens": 3, "stopped": name != "base", "scores": {"exact match": 0.0}} for name in forms
    }
    scores = {name: {"mean": interval(0.5, 0.2), "more": interval(0.0, 0.3)} for name in forms}
    scores["base"] = {"mean": interval(0.25, 0.1), "more": interval(-0.5, 0.2)}
    return {
        "prompts": 2,
        "reference": forms[-1],
        "trained": forms[-1],
        "new_tokens": 12,
        "dtype": "float32",
        "device": "cpu",
        "forms": [
            *({"name": name, "title": name, "why_not": ""} for name in forms),
            {"name": "merged, 16-bit", "title": "merged", "why_not": "needs about 30.0 GB of memory"},
        ],
        "rows": [{"prompt": f"say {n}", "expected": "dos", "answers": given} for n in (1, 2)],
        "checks": [{"name": "exact match", "how": "equal", "scores": scores}],
    }


def run_report(model: str = "a model") -> dict[str, Any]:
    """What an audit of a run leaves, one GGUF file not readable, answers beside it."""
    serving = {"low_bytes": 2**30, "expected_bytes": 2**30, "high_bytes": 2**31}
    forms = [("trained", 2.0, 0.0, 0.0), ("base alone", 3.0, 1.0, 0.9), ("merged 16-bit", 2.01, 0.001, 0.01)]
    speed = {
        "decode_tokens_per_second": 17.25,
        "how": "measured",
        "tokens": 32,
        "device": "cpu",
        "runtime": "llama.cpp",
    }
    variants: list[dict[str, Any]] = [
        {
            "name": name,
            "title": name,
            "form": "16-bit",
            "usable": name != "base alone",
            "task": figures(loss, more, kl),
            "neutral": figures(loss, more, kl),
            "disk_bytes": 2**28,
            "disk": "estimated",
            "serving": serving,
            "speed": speed if name == "trained" else None,
            "why": "",
        }
        for name, loss, more, kl in forms
    ]
    lost = {**variants[0], "name": "q4_k_m", "task": None, "neutral": None, "why": "llama.cpp is not installed"}
    return {
        "schema": 1,
        "what": "run",
        "run": "mine",
        "model": model,
        "data": "rows.jsonl",
        "method": "qlora",
        "reference": "trained",
        "rows": {"task": 4, "neutral": 4},
        "held_out_rows": 5,
        "rows_from": "4 of the 5 rows that the run mine held out of rows.jsonl, chosen by seed 17",
        "rows_notes": [],
        "unknown": ["given: \x1b[2Jother"],
        "variants": [*variants, {**lost, "disk": "measured", "form": "q4_k_m"}],
        "blocks": [{"name": "model.layers.0", "rounding": 0.09, "adapter": 0.01, "ratio": 9.0}],
        "forgetting": {"verdict": "No forgetting can be seen."},
        "recommendation": {"best": "merged 16-bit", "sentence": "Use it.", "reason": "so", "certainty": "40 tokens"},
        "answers": answers_report(),
        "cost": {"seconds": 1.0},
    }


def main(worker: Worker) -> None:
    request = read_job(worker.paths, AuditRequest)
    assert isinstance(request, AuditRequest)
    worker.emit(Started, job="audit", method=request.what, model=request.model)
    worker.emit(Phase, name="auditing", fraction=0.5, detail="model.layers.1")
    if os.environ.get("FAKE_AUDIT_FAILS"):
        raise JobFailed("not_block_by_block", "this family shares states", "report its name")
    report = run_report(request.model) if request.what == "run" else base_report(request.model)
    worker.paths.report.write_text(json.dumps(report))
    (worker.paths.root / "report.md").write_text("# Audit\n")
    worker.emit(Saved, what="report", path="report.md")
    worker.emit(Finished, outcome="done", seconds=0.5)


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), main))
