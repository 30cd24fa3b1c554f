"""An audit that only writes what an audit leaves: `python -m tests.fakes.audit_job RUN`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from studio.core.errors import JobFailed
from studio.core.events import Finished, Phase, Saved, Started
from studio.runs.audit_request import AuditRequest
from studio.runs.job import read_job
from studio.runs.worker import Worker, run_job


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


def main(worker: Worker) -> None:
    request = read_job(worker.paths)
    assert isinstance(request, AuditRequest)
    worker.emit(Started, job="audit", method=request.what, model=request.model)
    worker.emit(Phase, name="auditing", fraction=0.5, detail="model.layers.1")
    if os.environ.get("FAKE_AUDIT_FAILS"):
        raise JobFailed("not_block_by_block", "this family shares states", "report its name")
    worker.paths.report.write_text(json.dumps(base_report(request.model)))
    (worker.paths.root / "report.md").write_text("# Audit\n")
    worker.emit(Saved, what="report", path="report.md")
    worker.emit(Finished, outcome="done", seconds=0.5)


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), main))
