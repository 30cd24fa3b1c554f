"""Names and advice for what torch and its friends raise, for every job.

Memory and disks are not here: `studio.runs.failure` and `studio.runs.disk` know them. By name and text, so that nothing
has to be imported to explain that an import failed.
"""

from studio.core.errors import JobFailed

_LOST = ("device-side assert", "GPU is lost", "unspecified launch failure", "uncorrectable ECC", "device unavailable")


def explain(error: BaseException) -> JobFailed | None:
    """Return our failure for an exception of the libraries, or None for one that we have nothing to say about."""
    text = str(error)
    if isinstance(error, RuntimeError) and any(word.lower() in text.lower() for word in _LOST):
        return JobFailed(
            "gpu_lost",
            f"the GPU stopped answering: {text.splitlines()[0]}",
            "look at `nvidia-smi` and the kernel log for Xid errors; then `lora-studio runs resume RUN`",
        )
    if type(error).__name__ == "SafetensorError":
        return JobFailed("bad_weights", f"the weights cannot be read: {text}", "download or copy the model again")
    return None
