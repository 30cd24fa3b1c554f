"""Uploading an export: only the files, into a private repository, and the token is told to nobody but the hub."""

import subprocess
import sys
from pathlib import Path

import pytest

from studio.core.errors import JobFailed
from studio.jobs.export import job
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from tests.fakes.push_hub import push_hub
from tests.fakes.runs import CHECKOUT
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.conftest import history_of
from tests.jobs.merge_cases import ATTENTION, make_adapter

TOKEN = "hf_a_token_of_the_test"
PUSH = """
import sys
from pathlib import Path
from studio.core.errors import JobFailed
from studio.probe.hub_transfer import push_folder
try:
    print(push_folder(Path(sys.argv[1]), sys.argv[2]))
except JobFailed as failed:
    print(failed.kind, failed, failed.advice)
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("# Tuned\n")
    (folder / "tuned.gguf").write_bytes(b"GGUF")
    return folder


def _push(out: Path, endpoint: str, repository: str = "me/tuned") -> str:
    """Push in a process of its own: the hub's library reads its settings once. Returns all that it printed."""
    environment = {
        "PATH": "", "HOME": str(out.parent), "PYTHONPATH": str(CHECKOUT), "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN,
        "HF_HOME": str(out.parent / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    words = [sys.executable, "-c", PUSH, str(out), repository]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("one_file", [False, True])
def test_what_was_exported_is_uploaded_into_a_private_repository(out: Path, one_file: bool) -> None:
    with push_hub() as (endpoint, taken):
        assert _push(out / "tuned.gguf" if one_file else out, endpoint) == f"{endpoint}/me/tuned\n"
    assert taken.repository["visibility"] == "private"
    assert taken.tokens == {f"Bearer {TOKEN}"}
    wanted = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".gguf" or not one_file}
    assert taken.files == wanted


@pytest.mark.parametrize(
    ("repository", "status", "said"),
    [("me/tuned", 401, "HTTP 401"), ("me/tuned", 403, "HTTP 403"), ("no such/na me", 200, "OWNER/NAME")],
)
def test_a_refusal_is_said_with_what_to_do(out: Path, repository: str, status: int, said: str) -> None:
    with push_hub(status=status) as (endpoint, taken):
        words = _push(out, endpoint, repository)
    assert words.startswith("push_refused")
    assert said in words
    assert taken.files == {}


def test_a_hub_that_cannot_be_reached_is_said(out: Path) -> None:
    assert _push(out, "http://127.0.0.1:9").startswith("push_failed")


def test_a_refused_upload_leaves_the_export_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.jobs.export.__main__ import _body

    def refuse(out: Path, repository: str) -> str:
        assert (out / "adapter_model.safetensors").is_file()
        raise JobFailed("push_refused", f"no {repository}", "log in")

    monkeypatch.setattr(job, "push_folder", refuse)
    adapter = make_adapter(tmp_path / "adapter", make_tiny_model(tmp_path / "base"), target_modules=ATTENTION)
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    write_job(paths, ExportRequest(str(adapter), str(tmp_path / "out"), "peft", push="me/tuned"))
    run_job(paths.root, _body)
    history = history_of(paths)
    assert history.failed is not None
    assert history.failed.failure == "push_refused"
    assert [event.path for event in history.saved] == [str(tmp_path / "out")]
    assert (tmp_path / "out" / "README.md").is_file()
