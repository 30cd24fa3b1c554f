import os
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from studio.core.events import Finished, Started
from studio.runs.data_cache import find_entry, keep_entry, scratch_entry
from studio.runs.job import write_job
from studio.runs.layout import RunPaths, new_run
from studio.runs.requests import MergeRequest
from studio.runs.scratch import merge_scratch
from tests.cli.conftest import Cli
from tests.fakes.runs import make_run, write_log

_HOUR = 3600.0


@pytest.fixture
def holding(home: Path, tmp_path: Path) -> RunPaths:
    """A home with everything that can be in it; the run is one that was finished."""
    for name in ("models/embedded", "tools/llama", "hub"):
        (home / "cache" / name).mkdir(parents=True)
        (home / "cache" / name / "file").write_bytes(bytes(1000))
    for key in ("whole", "begun", "abandoned"):
        scratch = scratch_entry(key, 0)
        (scratch / "tokens").write_bytes(bytes(1000))
        if key == "whole":
            keep_entry(key, scratch, {})
        if key == "abandoned":
            for path in (scratch / "tokens", scratch):
                os.utime(path, (time.time() - 2 * _HOUR,) * 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    (home / "cache" / "linked").symlink_to(elsewhere, target_is_directory=True)
    (home / "calibration.json").write_text("{}")
    (home / "setup.json").write_text("{}")
    killed = new_run(home / "runs", "killed", 1.0)
    write_job(killed, MergeRequest("/adapter", "", str(tmp_path / "out" / "tuned")))
    write_log(killed, Started(at=1.0, job="merge"))
    left = merge_scratch(tmp_path / "out" / "tuned").folder
    left.mkdir(parents=True)
    (left / "shard").write_bytes(bytes(5000))
    (home / "runs" / ".gone.removed").mkdir()
    done = make_run(home, "done", now=1.0)
    write_log(done, Started(at=1.0, job="train"), Finished(at=2.0, outcome="done"))
    (done.adapter).mkdir()
    (done.adapter / "weights").write_bytes(bytes(1000))
    return done


def _by_what(document: Any) -> dict[str, Any]:
    return {item["what"].split(" of ")[0]: item for item in document["items"]}


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_what_is_held_is_shown_and_nothing_is_changed(cli: Cli, home: Path, tmp_path: Path, holding: RunPaths) -> None:
    before = _files(tmp_path)
    outcome = cli("clean")
    assert outcome.code == 0
    for word in ("rows and tokens", "half-made output of", "runs rm RUN", "calibrations", "lora-studio clean --delete"):
        assert word in outcome.out
    document = cli("clean", "--json").document
    items = _by_what(document)
    assert items["half-made output"]["size_bytes"] == 5000
    assert items["rows and tokens"]["size_bytes"] >= 2000
    assert (document["runs"], document["freed_bytes"]) == (2, 0)
    assert document["held_bytes"] == sum(item["size_bytes"] for item in document["items"])
    assert _files(tmp_path) == before


def test_what_comes_again_is_freed_unasked_and_the_rest_by_name(
    cli: Cli, home: Path, tmp_path: Path, holding: RunPaths
) -> None:
    outcome = cli("clean", "--delete", "--json")
    assert outcome.code == 0
    assert {item["kind"] for item in outcome.document["items"]} == {"caches", "leftovers"}
    assert outcome.document["freed_bytes"] > 10_000
    assert find_entry("whole") is None
    left = _files(home / "cache")
    assert [name for name in left if "begun" in name]  # somebody may be making it
    assert not [name for name in left if "abandoned" in name or name.startswith(("models", "tools", "hub"))]
    assert (tmp_path / "elsewhere" / "precious").read_text() == "kept"
    assert not merge_scratch(tmp_path / "out" / "tuned").folder.exists()
    assert sorted(path.name for path in (home / "runs").iterdir())[0] != ".gone.removed"
    assert (holding.adapter / "weights").is_file()
    assert (home / "calibration.json").is_file()
    assert cli("clean", "calibrations", holding.name, "--delete").code == 0
    assert not (home / "calibration.json").exists()
    assert not holding.root.exists()
    assert (home / "setup.json").is_file()
    again = cli("clean", "caches", "--delete")
    assert (again.code, again.out.splitlines()[-1]) == (0, "there is nothing to free")


def test_what_a_living_job_may_use_is_left(cli: Cli, home: Path, holding: RunPaths) -> None:
    live = make_run(home, "live", now=time.time())
    write_log(live, Started(at=time.time(), job="train"))
    before = _files(home / "cache")
    with FileLock(live.lock):
        outcome = cli("clean", "caches", "--delete")
        assert (outcome.code, _files(home / "cache")) == (1, before)
        assert "is live and may use it" in outcome.out
        refused = cli("clean", live.name, "--delete")
        assert refused.code == 1
        assert "is live" in refused.out
        assert live.root.exists()
        assert cli("clean", "leftovers", "--delete").code == 0
    wrong = cli("clean", "everything", "--delete")
    assert wrong.code == 2
    assert "Kinds are caches" in wrong.err
