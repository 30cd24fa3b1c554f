"""An export that only writes what an export leaves: `python -m tests.fakes.export_job RUN`."""

import sys
from pathlib import Path

from studio.core.events import Finished, Saved, Started
from studio.runs.job import GGUF_FORMATS, ExportRequest, read_job
from studio.runs.worker import Worker, run_job


def main(worker: Worker) -> None:
    request = read_job(worker.paths)
    assert isinstance(request, ExportRequest)
    worker.emit(Started, job="export", model=request.source)
    out = Path(request.out)
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    worker.emit(Saved, what="exported", path=str(out))
    loss = {"tokens": 282, "mean_kl": 0.0069, "same_top_token": 0.975}
    golden = {"conversations": 5, "tokens": 293, "ends_with_stop": True, "bos_doubled": False}
    found = {"loss": loss, "golden": golden} if request.format in GGUF_FORMATS else {}
    worker.emit(Finished, outcome="done", result={"format": request.format, **found})


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), main))
