"""What CUDA, its libraries and the driver say when they fail: which kind of failure it is, what it means, what to do.

A failure is recognised by its text alone: the same words come in a Python exception and, where native code ends the
process itself, as the last line of `output.log`. Full memory is told in `failure`.
"""

import re
from dataclasses import dataclass

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.runs.disk import RESUME

CARD_LOST = frozenset(["device_assert", "gpu_memory_fault", "gpu_lost", "gpu_timeout", "gpu_fault"])
"""Kinds after which a process cannot use the card any more (CUDA Runtime API, error handling: "sticky" errors)."""
_LONGEST = 300


@dataclass(frozen=True, slots=True)
class _Fault:
    """A kind of fault.

    Attributes:
        kind: Short stable name.
        says: Matches what is said of it, in upper or lower case.
        means: What has happened.
        advice: What to do about it; `{then}` in it is how to go on.
    """

    kind: str
    says: re.Pattern[str]
    means: str
    advice: str


def _fault(kind: str, says: str, means: str, advice: str) -> _Fault:
    return _Fault(kind, re.compile(says, re.IGNORECASE), means, advice)


# The words are those of cudaGetErrorString (CUDA Runtime API, error handling), of cublasGetStatusString, NVML's, NCCL's
# and torch's (torch/cuda/__init__.py, c10/cuda). The first fault that matches is taken, so causes stand before their
# consequences.
_FAULTS = (
    _fault(
        "device_assert",
        r"device-side assert",
        "an index on the card was out of range, most often a token that the model has no embedding for",
        "look at the rows with: lora-studio data check FILE --model MODEL. The same run with device.device = cpu, or "
        "with CUDA_LAUNCH_BLOCKING=1 in the environment, says where it happens. The card is not at fault",
    ),
    _fault(
        "gpu_not_supported",
        r"no kernel image|invalid device function|device kernel image is invalid|unsupported toolchain"
        r"|CUBLAS_STATUS_ARCH_MISMATCH|CUDNN_STATUS_ARCH_MISMATCH|not compatible with the current PyTorch",
        "the installed libraries hold no code for this card: it is too old or too new for their build",
        "see which it is with: lora-studio doctor. Then install the torch build that pytorch.org names for the card, "
        "and a bitsandbytes that knows it; or use device.device = cpu",
    ),
    _fault(
        "gpu_driver",
        r"driver/library version mismatch|API version mismatch|display driver / cuda driver combination",
        "the NVIDIA driver was updated while it was in use: its parts are of different versions",
        "restart the computer, {then}",
    ),
    _fault(
        "gpu_driver",
        r"driver version is insufficient|driver on your system is too old|forward compatibility was attempted",
        "the NVIDIA driver is older than the installed torch build wants",
        "update the driver, or install a torch build for an older CUDA (pytorch.org lists them); lora-studio doctor "
        "compares the two",
    ),
    _fault(
        "gpu_driver",
        r"found no NVIDIA driver|NVML_ERROR_DRIVER_NOT_LOADED|failed to initialize NVML|driver shutting down"
        r"|no CUDA-capable device|CUDA error: initialization error",
        "the NVIDIA driver does not answer, or shows no card to this process",
        "look at nvidia-smi; in a container, at whether the card is passed in; see also: lora-studio doctor",
    ),
    _fault(
        "gpu_busy",
        r"devices?\(?s?\)? (is/are|are|is) busy or unavailable|cudaErrorDevicesUnavailable|device unavailable",
        "the card is not free: another process holds it for itself, or the driver is just resetting it",
        "see who is on it with: lora-studio gpus. Wait for them, {then}",
    ),
    _fault(
        "gpu_memory_fault",
        r"uncorrectable (ECC|NVLink) error|\bECC error|hardware stack error",
        "the card's memory or its connection has an error that it could not correct",
        "look at nvidia-smi -q -d ECC,PAGE_RETIREMENT and at the kernel log for Xid errors; restart the computer; a "
        "card that does it again has to be replaced. Checkpoints from before are sound: {then}",
    ),
    _fault(
        "gpu_lost",
        r"GPU is lost|GPU_IS_LOST|fallen off the bus|CUDA error: unknown error",
        "the card stopped answering",
        "look at nvidia-smi and at the kernel log for Xid errors (heat, power, the riser or the slot); restart the "
        "computer if nvidia-smi does not show the card, {then}",
    ),
    _fault(
        "gpu_timeout",
        r"launch timed out|cudaErrorLaunchTimeout",
        "the system ended a computation on the card that took too long: it does so where the card also draws a screen",
        "make each one shorter: lower train.micro_batch or train.seq_len; or use a card without a screen; {then}",
    ),
    _fault(
        "gpu_fault",
        r"illegal memory access|misaligned address|illegal instruction was encountered|invalid program counter"
        r"|invalid (global|shared|local) address space|unspecified launch failure|cudaErrorIllegalAddress",
        "a computation on the card touched memory that is not its own: a fault of a library, or of the card",
        "begin again: {then}. If it comes back at the same step it is a library's: try train.packing off, "
        "train.attention eager, train.compile false or another train.optimizer, one at a time. If it comes at any "
        "step, look at heat, power and overclocking with nvidia-smi",
    ),
    _fault(
        "gpu_library",
        r"CUBLAS_STATUS_NOT_INITIALIZED|CUBLASLT_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_INITIALIZED",
        "a CUDA library could not begin, most often because the card has no memory left for its workspace",
        "free memory on the card (see lora-studio gpus), or lower train.micro_batch or train.seq_len; lora-studio "
        "doctor says whether driver and torch build fit; {then}",
    ),
    _fault(
        "gpu_not_supported",
        r"CUBLAS_STATUS_NOT_SUPPORTED|CUDNN_STATUS_NOT_SUPPORTED|CUBLAS ERROR: Status 15|API failed with status 15\b",
        "a CUDA library does not offer this product on this card or in this format",
        "on cards before compute capability 8.0 set model.dtype to fp16 or auto; otherwise update torch and the driver",
    ),
    _fault(
        "gpu_library",
        r"CUBLAS_STATUS_\w+|CUBLAS ERROR: Status \d+|cublas\S* API failed|BLAS Lt API failed|CUDNN_STATUS_\w+"
        r"|CUSPARSE_STATUS_\w+|CUSOLVER_STATUS_\w+",
        "a CUDA library failed in the middle of a computation",
        "CUDA_LAUNCH_BLOCKING=1 in the environment shows whether an earlier fault is behind it; free memory on the "
        "card (see lora-studio gpus), {then}",
    ),
    _fault(
        "gpu_communication",
        r"NCCL error|nccl(UnhandledCuda|System|Internal|Remote|InvalidUsage|InvalidArgument)Error",
        "the cards could not talk to each other",
        "NCCL_DEBUG=INFO in the environment says why (shared memory in /dev/shm, peer access, a network); {then}",
    ),
    _fault(
        "bitsandbytes",
        r"libbitsandbytes\w*\.(so|dll)|bitsandbytes library load error|CUDA binary not found|CUDA Setup failed",
        "bitsandbytes has no library for this CUDA, or cannot load the one that it has",
        "see what torch was built for with: lora-studio doctor. Update bitsandbytes; until then method lora with "
        "train.optimizer adamw_torch needs nothing of it",
    ),
    _fault(
        "gpu_error",
        r"CUDA error:|CUDA driver error:|Triton Error \[CUDA\]|^Error .+ at line \d+ in file .+\.(cu|cuh|h|cpp)\b",
        "CUDA refused",
        "look at nvidia-smi and at the kernel log for Xid errors; lora-studio doctor compares driver and torch build; "
        "{then}",
    ),
)


def native_failure(text: str, *, then: str = f"then continue with: {RESUME}") -> JobFailed | None:
    """Return the failure that a text of CUDA, its libraries or the driver means; None for any other text.

    Args:
        text: An exception's message, or one line of what a process printed.
        then: How to go on once the cause is mended.
    """
    for fault in _FAULTS:
        line = next((line for line in text.splitlines() if fault.says.search(line)), None)
        if line is not None:
            said = plain(line.strip(), one_line=True, limit=_LONGEST)
            return JobFailed(fault.kind, f"{fault.means}: {said}", fault.advice.format(then=then))
    return None
