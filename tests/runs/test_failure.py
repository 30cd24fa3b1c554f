"""What errors are called: real ones, made by the libraries themselves where that is possible."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from studio.core.errors import BadInput, JobFailed
from studio.core.events import Failed, Phase, Started
from studio.jobs.base.failures import explain
from studio.runs.disk import disk_failure, refuses
from studio.runs.failure import Doing, failure_of, memory_advice, ran_out_of_memory
from studio.runs.log import read_events
from studio.runs.worker import Worker
from tests.fakes.runs import make_run
from tests.fakes.small_disk import small_disk

_HUGE = 10**14


def _raised(call: object) -> BaseException:
    try:
        call()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.empty(_HUGE),
        lambda: torch.nn.Linear(10**7, 10**7),
        lambda: np.empty(_HUGE),
        lambda: bytearray(_HUGE),
    ],
)
def test_memory_that_is_really_refused_is_out_of_memory(call: object) -> None:
    error = _raised(call)
    assert ran_out_of_memory(error)
    failure = failure_of(error, explain, Doing("train", "training"))
    assert failure.kind == "out_of_memory"
    assert "train.micro_batch" in failure.advice
    assert "the computer's memory is full" in str(failure)


_LIMITED = """
import resource, sys, torch
from safetensors.torch import load_file
from studio.jobs.base.failures import explain
from studio.runs.failure import Doing, failure_of
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 40 * 2**20,) * 2)
try:
    load_file(sys.argv[1])
except BaseException as error:
    print(failure_of(error, explain, Doing("merge", "loading")).kind)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit of the address space here")
def test_a_file_that_does_not_fit_into_the_address_space_is_out_of_memory(tmp_path: Path) -> None:
    save_file({"weights": torch.zeros(30 * 2**20)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "model.safetensors")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    assert done.stdout == "out_of_memory\n", done.stderr


def test_a_cards_memory_is_told_from_the_computers() -> None:
    failure = failure_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), explain)
    assert str(failure).startswith("the card's memory is full")
    assert failure_of(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), explain).kind == "out_of_memory"


@pytest.mark.parametrize(
    ("job", "phase", "wanted", "never"),
    [
        ("train", "loading the base model", "qlora", "micro_batch"),
        ("train", "training", "train.micro_batch", "optimizer step"),
        ("train", "evaluating", "eval.samples", "qlora"),
        ("train", "saving a checkpoint", "runs resume RUN", "micro_batch"),
        ("merge", "merging", "--dtype bf16", "micro_batch"),
        ("export", "quantising", "export", "micro_batch"),
        ("audit", "auditing", "--rows", "micro_batch"),
        ("audit", "answering", "--answers 0", "micro_batch"),
        ("measure", "training three steps on the longest rows", "does not fit", "resume"),
        ("chat", "loading", "--device cpu", "micro_batch"),
        ("chat", "chatting", "new conversation", "micro_batch"),
    ],
)
def test_the_advice_fits_the_job_and_what_it_was_at(job: str, phase: str, wanted: str, never: str) -> None:
    failure = failure_of(MemoryError(), explain, Doing(job, phase))
    assert failure.kind == "out_of_memory"
    assert wanted in failure.advice
    assert never not in failure.advice


def test_every_knob_that_is_advised_exists() -> None:
    from studio.core.recipe import FIELDS

    words = {word.strip(".,;()") for stage in ("load", "work", "optimizer", "eval", "save")
             for word in memory_advice("train", stage).split()}  # type: ignore[arg-type]  # fmt: skip
    named = {
        word for word in words if "." in word and word.split(".")[0] in ("train", "adapter", "eval", "model", "data")
    }
    assert len(named) >= 8
    assert named <= set(FIELDS)


def test_the_optimizers_own_memory_is_told_from_the_steps(tmp_path: Path) -> None:
    """A parameter whose storage is one number: the optimizer's first step is what asks for its real size."""
    weight = torch.nn.Parameter(torch.zeros(1).expand(_HUGE))
    weight.grad = torch.zeros(1).expand(_HUGE)
    error = _raised(torch.optim.AdamW([weight], foreach=False).step)
    failure = failure_of(error, explain, Doing("train", "training"))
    assert failure.kind == "out_of_memory", error
    assert "8-bit or paged optimizer" in failure.advice
    assert "optimizer's step" in str(failure)


def test_a_worker_knows_what_it_was_at(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        worker.emit(Started, job="audit")
        worker.emit(Phase, name="answering")
        torch.empty(_HUGE)
    failed = read_events(paths.events)[-1]
    assert isinstance(failed, Failed)
    assert failed.failure == "out_of_memory"
    assert "--answers 0" in failed.advice


def test_a_full_disk_is_one_whichever_library_meets_it(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"word{number}": number for number in range(50_000)}, unk_token="word0"))
    with small_disk(tmp_path / "disk", "128k") as disk:
        errors = [
            _raised(lambda: (disk / "plain").write_bytes(bytes(10**6))),
            _raised(lambda: save_file({"a": torch.zeros(10**6)}, disk / "a.safetensors")),
            _raised(lambda: words.save(str(disk / "tokenizer.json"))),
        ]
    for error in errors:
        failure = failure_of(error, explain)
        assert failure.kind == "disk_full", error
        assert "full" in str(failure)
        assert "runs resume RUN" in failure.advice


@pytest.mark.parametrize(
    ("number", "kind", "word"),
    [
        (errno.ENOSPC, "disk_full", "full"),
        (errno.EDQUOT, "disk_full", "quota"),
        (errno.EFBIG, "disk_full", "ulimit"),
        (errno.EROFS, "read_only", "read-only"),
        (errno.EIO, "disk_error", "error"),
        (errno.EACCES, "no_permission", "permission"),
        (errno.ENAMETOOLONG, "name_too_long", "long"),
    ],
)
def test_a_disk_that_refuses_is_named(number: int, kind: str, word: str) -> None:
    failure = failure_of(OSError(number, os.strerror(number), "/runs/one/adapter"), explain)
    assert failure.kind == kind
    assert word in str(failure)
    assert "/runs/one" in str(failure) or kind == "disk_full"


def test_a_file_that_may_not_grow_is_said_so(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from studio.runs.disk import disk_failure\n"
        "try:\n    for _ in range(2):\n        open(sys.argv[1], 'ab', buffering=0).write(bytes(1000))\n"
        "except OSError as error:\n    print(disk_failure(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert "ulimit -f" in done.stdout, done.stderr


def test_what_a_disk_did_not_do_is_not_blamed_on_it(tmp_path: Path) -> None:
    for error in (ValueError("no"), FileNotFoundError(errno.ENOENT, "no such file"), BadInput("wrong"), KeyError("x")):
        assert disk_failure(error) is None
        assert not refuses(error)
    said = BadInput("the model cannot be loaded")
    said.__cause__ = PermissionError(errno.EACCES, "denied", "/model")
    assert failure_of(said, explain).kind == "bad_input"


def test_weights_that_cannot_be_read_are_no_full_disk(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    assert failure_of(_raised(lambda: load_file(tmp_path / "broken.safetensors")), explain).kind == "bad_weights"


def test_an_error_names_the_file_that_lies_elsewhere() -> None:
    elsewhere = OSError(errno.EIO, "Input/output error", "/models/base/weights")
    assert "/models/base" in str(disk_failure(elsewhere, place=Path("/out")))
    inside = OSError(errno.ENOSPC, "No space left on device", "/out/.merging-x/part")
    assert "disk of /out is full" in str(disk_failure(inside, place=Path("/out")))
    assert isinstance(disk_failure(inside), JobFailed)


@pytest.mark.parametrize(
    ("says", "kind", "word"),
    [
        ("CUDA error: device-side assert triggered\nCUDA kernel errors might", "device_assert", "data check"),
        ("CUDA error: no kernel image is available for execution on the device", "gpu_not_supported", "pytorch.org"),
        ("CUDA error: CUBLAS_STATUS_ARCH_MISMATCH when calling `cublasGemmEx`", "gpu_not_supported", "doctor"),
        ("Failed to initialize NVML: Driver/library version mismatch", "gpu_driver", "restart"),
        ("CUDA driver version is insufficient for CUDA runtime version", "gpu_driver", "update the driver"),
        ("The NVIDIA driver on your system is too old (found version 12020).", "gpu_driver", "older CUDA"),
        ("Found no NVIDIA driver on your system.", "gpu_driver", "nvidia-smi"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "gpu_busy", "lora-studio gpus"),
        ("CUDA error: uncorrectable ECC error encountered", "gpu_memory_fault", "replaced"),
        ("CUDA error: the launch timed out and was terminated", "gpu_timeout", "screen"),
        ("CUDA error: an illegal memory access was encountered", "gpu_fault", "train.attention"),
        ("CUDA error: misaligned address", "gpu_fault", "train.packing"),
        ("CUDA error: unspecified launch failure", "gpu_fault", "overclocking"),
        ("CUDA error: unknown error", "gpu_lost", "Xid"),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "gpu_library", "free memory"),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`", "gpu_not_supported", "fp16"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", "gpu_library", "CUDA_LAUNCH_BLOCKING"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", "gpu_library", "free memory"),
        ("NCCL error in: ProcessGroupNCCL.cpp:1970, ncclSystemError", "gpu_communication", "NCCL_DEBUG"),
        ("Configured CUDA binary not found at /x/libbitsandbytes_cuda132.so", "bitsandbytes", "doctor"),
        ("CUDA error: peer access is already enabled", "gpu_error", "Xid"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("job", ["train", "audit", "measure"])
def test_what_a_card_and_its_libraries_say_is_named_for_every_job(job: str, says: str, kind: str, word: str) -> None:
    failure = failure_of(RuntimeError(says), explain, Doing(job, "training"))
    assert failure.kind == kind
    assert says.splitlines()[0][:40] in str(failure)
    assert word in failure.advice
    assert "{" not in failure.advice


def test_an_accelerators_own_error_is_named_and_others_are_not() -> None:
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert failure_of(lost, explain).kind == "device_assert"
    for error in (
        RuntimeError("shape '[2]' is invalid for input of size 3"),
        ValueError("no such thing"),
        KeyError("x"),
    ):
        assert failure_of(error, explain).kind == "error"
