"""A stand-in for the Hugging Face hub: serves one repository from a folder over HTTP, as the client asks for it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repo: str, folder: Path, *, status: int = 200, error_code: str = "") -> Iterator[tuple[str, list[str]]]:
    """Serve the folder as a repository; yields the endpoint and the list of requests, which grows.

    With another status, every request is refused with it and with the hub's own error code header.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._serve(body=False)

        def do_GET(self) -> None:
            self._serve(body=True)

        def _serve(self, *, body: bool) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            asked.append(f"{self.command} {self.path}{f' {wanted[0]}' if wanted else ''}")
            path = self.path.split("?")[0]
            if status != 200:
                return self._send(status, b"{}", {"X-Error-Code": error_code}, body)
            if path.startswith(f"/api/models/{repo}/tree/"):
                return self._send(200, json.dumps(self._tree()).encode(), {}, body)
            if path == f"/api/models/{repo}" or path.startswith(f"/api/models/{repo}/revision/"):
                siblings = [{"rfilename": item["path"], "size": item["size"]} for item in self._tree()]
                info = {
                    "id": repo,
                    "modelId": repo,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": False,
                    "gated": False,
                }
                return self._send(200, json.dumps(info).encode(), {}, body)
            marker = f"/{repo}/resolve/"
            file = folder / path.removeprefix(marker).partition("/")[2]
            if path.startswith(marker) and file.is_file():
                content = file.read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                if wanted:
                    return self._send(206, content[int(wanted[1]) : int(wanted[2]) + 1], {}, body)
                return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

        def _tree(self) -> list[dict[str, object]]:
            return [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in sorted(folder.iterdir())
            ]

        def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
