"""An audit that was killed outright goes on after its last kept block, to the same report."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio.core.events import Phase
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.requests import AuditRequest
from tests.fakes.runs import CHECKOUT
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.adapter_cases import write_chats
from tests.jobs.audit_cases import audit

KEEPS_ALWAYS_AND_HANGS = """
import sys, time
from pathlib import Path
from studio.jobs.audit import kept as state
from studio.jobs.audit.__main__ import _body
from studio.runs.job_process import run_job
state._EVERY_SECONDS = 0.0
keep = state.KeptWalk.keep
def keep_and_hang(self, carried, *, now=False):
    keep(self, carried, now=now)
    if len(carried.seen) == 2:
        Path(sys.argv[2]).touch()
        time.sleep(600)
state.KeptWalk.keep = keep_and_hang
run_job(Path(sys.argv[1]), _body)
"""


@pytest.mark.slow
def test_an_audit_that_was_killed_goes_on_after_its_last_kept_block(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=4)
    data = write_chats(tmp_path / "rows.jsonl")
    request = AuditRequest("base", model=str(model), data=str(data), rows=8, forms=("nf4", "int8"), kept=(1,))
    _, whole = audit(tmp_path / "whole", request)
    paths, hanging = RunPaths(tmp_path / "killed"), tmp_path / "hanging"
    paths.root.mkdir()
    paths.control.mkdir()
    write_job(paths, request)
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPS_ALWAYS_AND_HANGS, str(paths.root), str(hanging)], cwd=CHECKOUT
    )
    while not hanging.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not paths.report.exists()
    before = len(list(read_events(paths.events)))
    _, report = audit(paths.root, request)
    assert {**report, "cost": 0} == {**whole, "cost": 0}
    walked = [event.detail for event in list(read_events(paths.events))[before:] if isinstance(event, Phase)]
    assert [name for name in walked if name.startswith("model.layers.")][:2] == ["model.layers.2", "model.layers.3"]
    assert json.loads(paths.report.read_text())["what"] == "base"


def test_a_kept_state_that_lost_a_part_is_not_taken_up(tmp_path: Path) -> None:
    from studio.jobs.audit.kept import KeptWalk
    from studio.jobs.audit.walk import Walk
    from tests.jobs.audit_cases import CPU, examples, variants_of

    parts, variants = variants_of(make_tiny_model(tmp_path / "model"), ["16-bit", "nf4"])
    walk = Walk(parts, variants, examples(9, 4), device=CPU)
    assert not walk.run(lambda fraction, detail: None, lambda carried: True)
    kept = KeptWalk(tmp_path / "kept", "this")
    kept.keep(walk.carried, now=True)
    found = kept.load()
    assert found is not None and list(found.hidden) == ["16-bit", "nf4"]
    next((tmp_path / "kept").glob("001-*")).unlink()
    assert kept.load() is None
    assert not (tmp_path / "kept").exists()
