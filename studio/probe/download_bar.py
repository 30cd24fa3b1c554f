"""The hub client reports a download to a progress bar of the caller's choice: ours draws nothing and counts bytes."""

from collections.abc import Callable
from typing import Any


def byte_counter(told: Callable[[int], None]) -> type[Any]:
    """Return a bar class for `snapshot_download(tqdm_class=...)` that tells the bytes on disk so far.

    The client opens several bars: files, bytes received, bytes written (which counts what an earlier download left).
    Files are left out; of the others the furthest is told.
    """
    from tqdm import tqdm  # noqa: PLC0415  comes with huggingface_hub, which only hub models import

    furthest = 0

    class ByteCounter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options | {"disable": False, "delay": 0})

        def display(self, *_: Any, **__: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest
            updated: bool | None = super().update(n)
            if self.unit == "B" and self.n > furthest:
                furthest = int(self.n)
                told(furthest)
            return updated

    return ByteCounter
