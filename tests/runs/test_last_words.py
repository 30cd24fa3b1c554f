"""A process that ended without an event: what it printed last says why, to whoever looks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio.core.events import Phase, Started
from studio.runs.failure import Doing
from studio.runs.last_words import crash_of, reason_in
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.store import run_info
from studio.runs.summary import summary_of
from studio.runs.supervise import resume
from studio.runs.watch import read_history
from tests.fakes.runs import MODULE, fake_environment, launch_fake, make_run, write_log

OPS_CU = "Error out of memory at line 228 in file /src/csrc/ops.cu"
TRAINING = Doing("train", "training")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path)


def failure_of(paths: RunPaths) -> dict[str, str]:
    status = run_status(paths, now=time.time() + 3600)
    assert status is Status.crashed
    failure: dict[str, str] = summary_of(paths, read_history(paths), status)["failure"]
    return failure


def test_a_library_that_ends_the_process_by_itself_is_told_with_its_reason(paths: RunPaths) -> None:
    launch_fake(paths, native_exit_at=3, last=OPS_CU).process.wait(60)
    failure = failure_of(paths)
    assert failure["kind"] == "out_of_memory"
    assert OPS_CU in failure["message"] and "card's memory" in failure["message"]
    assert "train.micro_batch" in failure["advice"]
    assert failure["step"] == 2
    assert run_info(paths).failure == "out_of_memory"


def test_whoever_looks_is_told_also_where_it_is_not_the_parent(paths: RunPaths) -> None:
    last = "Error no kernel image is available for execution on the device at line 9 in file /src/csrc/ops.cu"
    launch_fake(paths, native_exit_at=3, last=last).process.wait(60)
    said = {}
    for verb in (["show", str(paths.root)], ["list", "--runs-dir", str(paths.root.parent)]):
        done = subprocess.run(
            [sys.executable, "-m", "studio", "runs", *verb, "--json"],
            capture_output=True, text=True, check=True, env={**os.environ, **fake_environment()},
        )  # fmt: skip
        said[verb[0]] = json.loads(done.stdout)
    assert said["show"]["status"] == "crashed"
    assert said["show"]["failure"]["kind"] == "gpu_not_supported"
    assert "pytorch.org" in said["show"]["failure"]["advice"]
    (listed,) = said["list"] if isinstance(said["list"], list) else said["list"]["runs"]
    assert listed["failure"] == "gpu_not_supported"


def test_what_an_earlier_process_printed_is_no_reason(paths: RunPaths) -> None:
    launch_fake(paths, native_exit_at=3, last=OPS_CU).process.wait(60)
    resume(paths, module=MODULE, environment=fake_environment(die_at=2)).process.wait(60)
    assert failure_of(paths)["kind"] == "crashed"
    assert run_info(paths).failure == "crashed"


def test_a_fault_in_native_code_is_told_with_what_called_it(paths: RunPaths) -> None:
    launch_fake(paths, segfault=1).process.wait(60)
    failure = failure_of(paths)
    assert failure["kind"] == "native_crash"
    assert "Segmentation fault, called from" in failure["message"]
    assert "ctypes/__init__.py line" in failure["message"]


FATAL = [
    "Fatal Python error: Aborted",
    "",
    "Thread 0x00007f0000000001 (most recent call first):",
    *[f'  File "/usr/lib/python3.11/threading.py", line {n} in wait' for n in range(300)],
    "",
    "Current thread 0x00007f0000000000 (most recent call first):",
    '  File "/venv/lib/python3.11/site-packages/torch/autograd/graph.py", line 824 in _engine_run_backward',
]


@pytest.mark.parametrize(
    ("lines", "kind", "words"),
    [
        ([OPS_CU], "out_of_memory", "card's memory"),
        (["CUBLAS ERROR: Status 3"], "out_of_memory", "card's memory"),
        (["terminate called after throwing an instance of 'std::bad_alloc'", "  what():  std::bad_alloc", *FATAL],
         "out_of_memory", "computer's memory"),
        (["CUBLAS ERROR: Status 13"], "gpu_library", "Status 13"),
        (["Error misaligned address at line 71 in file /src/csrc/ops.cu"], "gpu_fault", "touched"),
        (["Error invalid argument at line 240 in file /src/csrc/common.h"], "gpu_error", "invalid argument"),
        (["terminate called after throwing an instance of 'c10::Error'",
          "  what():  CUDA error: device-side assert triggered", *FATAL], "device_assert", "token"),
        (FATAL, "native_crash", "Aborted, called from torch/autograd/graph.py line 824"),
        (["Fatal Python error: Bus error", "", *FATAL[-2:]], "native_crash", "Bus error"),
        (["Killed"], "out_of_memory", "computer's memory"),
        (["Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "    import torch",
          "ImportError: libcudart.so.13: cannot open shared object file"], "crashed", "libcudart.so.13"),
        (["Traceback (most recent call last):", "RuntimeError: The NVIDIA driver on your system is too old"],
         "gpu_driver", "older"),
    ],
)  # fmt: skip
def test_the_last_lines_are_understood(lines: list[str], kind: str, words: str) -> None:
    found = reason_in(["Loading weights: 100%", *lines], TRAINING)
    assert found is not None and found.kind == kind, found
    assert words in str(found)
    assert found.advice and "{" not in found.advice


@pytest.mark.parametrize("lines", [[], ["epoch 1", "all is well"], [OPS_CU, *["a line about nothing"] * 20]])
def test_what_says_nothing_or_was_survived_is_no_reason(lines: list[str]) -> None:
    assert reason_in(lines, TRAINING) is None


def test_output_is_read_in_bounds_and_shown_harmless(paths: RunPaths) -> None:
    write_log(paths, Started(at=1.0, job="train"), Phase(at=2.0, name="training"))
    with paths.output.open("wb") as file:
        file.truncate(10**9)  # a sparse gigabyte
        file.seek(0, 2)
        file.write(b"\nError \x1b[2J\xff\xe2\x80\xaeout of memory at line 1 in file /src/" + b"x" * 5000 + b".cu\n")
    began = time.process_time()
    found = crash_of(paths, read_history(paths))
    assert time.process_time() - began < 1.0
    assert found is not None and found.kind == "out_of_memory"
    assert str(found).isprintable() and len(str(found)) < 600
    paths.output.write_bytes(b"")
    paths.output.unlink()
    assert crash_of(paths, read_history(paths)) is None


def test_advice_names_the_run(paths: RunPaths) -> None:
    write_log(paths, Started(at=1.0, job="train"), Phase(at=2.0, name="saving a checkpoint"))
    for line in ("CUDA error: GPU is lost", "CUDA out of memory"):
        paths.output.write_text(f"{line}\n")
        found = crash_of(paths, read_history(paths))
        assert found is not None
        assert f"runs resume {paths.name}" in found.advice
        assert "RUN" not in found.advice
