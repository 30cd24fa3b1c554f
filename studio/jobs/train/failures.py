"""Names and advice for what torch and its friends raise."""

import errno

import torch
from safetensors import SafetensorError

from studio.core.errors import JobFailed

_LOST = ("device-side assert", "GPU is lost", "unspecified launch failure", "uncorrectable ECC", "device unavailable")


def explain(error: BaseException) -> JobFailed | None:
    """Return our failure for an exception of the libraries, or None for one that we have nothing to say about."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return JobFailed(
            "out_of_memory",
            f"the device's memory is full: {text.splitlines()[0] if text else type(error).__name__}",
            "cheapest first: halve train.micro_batch and double train.accumulation (same result); turn on "
            "train.grad_checkpointing; shorten train.seq_len; use an 8-bit optimizer; use method qlora",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return JobFailed(
            "disk_full", f"the disk is full: {text}", "free disk space, then `lora-studio runs resume RUN`"
        )
    if isinstance(error, SafetensorError):
        return JobFailed("bad_weights", f"the weights cannot be read: {text}", "download or copy the model again")
    if isinstance(error, RuntimeError) and any(word.lower() in text.lower() for word in _LOST):
        return JobFailed(
            "gpu_lost",
            f"the GPU stopped answering: {text.splitlines()[0]}",
            "look at `nvidia-smi` and the kernel log for Xid errors; then `lora-studio runs resume RUN`",
        )
    return None
