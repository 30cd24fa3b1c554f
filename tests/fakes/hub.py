"""A stand-in for the Hugging Face hub: serves one repository from a folder over HTTP, as the client asks for it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(
    repo: str,
    folder: Path,
    *,
    status: int = 200,
    error_code: str = "",
    error_message: str = "",
    kind: str = "models",
    branches: Mapping[str, Path] | None = None,
    breaks_after: int = 0,
) -> Iterator[tuple[str, list[str]]]:
    """Serve the folder as a repository; yields the endpoint and the list of requests, which grows.

    With another status, every request is refused with it and with the hub's own error code header.

    Args:
        repo: Its name.
        folder: Its files.
        status: Of every answer.
        error_code: The hub's word for what is wrong.
        error_message: Its sentence on it.
        kind: `models` or `datasets`.
        branches: Other revisions, and the folder of each; their commits are made of their places here.
        breaks_after: Bytes of a file after which the connection is lost, once for each file; 0 for never.
    """
    asked: list[str] = []
    commits = {branch: f"{place:040x}" for place, branch in enumerate(branches or {}, 1)}
    folders = {COMMIT: folder, "main": folder}
    for branch, inside in (branches or {}).items():
        folders |= {branch: inside, commits[branch]: inside}
    broken: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._serve(body=False)

        def do_GET(self) -> None:
            self._serve(body=True)

        def _serve(self, *, body: bool) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            asked.append(f"{self.command} {self.path}{f' {wanted[0]}' if wanted else ''}")
            path = unquote(self.path.split("?")[0])
            if status != 200:
                return self._send(status, b"{}", {"X-Error-Code": error_code, "X-Error-Message": error_message}, body)
            api = f"/api/{kind}/{repo}"
            if path.startswith(f"{api}/tree/"):
                return self._send(200, json.dumps(self._tree(folder)).encode(), {}, body)
            if path == api or path.startswith(f"{api}/revision/"):
                revision = path.removeprefix(f"{api}/revision/") if path != api else "main"
                if revision not in folders:
                    return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                siblings = [{"rfilename": item["path"], "size": item["size"]} for item in self._tree(folders[revision])]
                info = {
                    "id": repo,
                    "modelId": repo,
                    "sha": commits.get(revision, revision if revision in commits.values() else COMMIT),
                    "siblings": siblings,
                    "private": False,
                    "gated": False,
                }
                return self._send(200, json.dumps(info).encode(), {}, body)
            marker = f"{'' if kind == 'models' else f'/{kind}'}/{repo}/resolve/"
            revision, _, name = path.removeprefix(marker).partition("/")
            file = folders.get(revision, folder) / name
            if path.startswith(marker) and file.is_file():
                content = file.read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": revision}
                begin, end = (int(wanted[1]), int(wanted[2] or len(content) - 1)) if wanted else (0, len(content) - 1)
                part = content[begin : end + 1]
                if wanted:
                    headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
                if body and breaks_after and name not in broken and len(part) > breaks_after:
                    broken.add(name)
                    self._send(206 if wanted else 200, part, headers, body=False)
                    self.wfile.write(part[:breaks_after])
                    return self.connection.close()
                return self._send(206 if wanted else 200, part, headers, body)
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

        def _tree(self, inside: Path) -> list[dict[str, object]]:
            return [
                {
                    "type": "file",
                    "path": file.relative_to(inside).as_posix(),
                    "size": file.stat().st_size,
                    "oid": "0" * 40,
                }
                for file in sorted(inside.rglob("*"))
                if file.is_file()
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
