"""A stand-in for the Hugging Face hub that takes uploads: keeps the files it was given, and who asked."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Taken:
    """What an upload brought: files by name, settings of the new repository, the tokens that were shown."""

    files: dict[str, bytes] = field(default_factory=dict)
    repository: dict[str, object] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


@contextmanager
def push_hub(*, status: int = 200) -> Iterator[tuple[str, Taken]]:
    """Serve until the end of the context; yields the endpoint and what was taken. Another status refuses everything."""
    taken = Taken()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            taken.tokens.add(self.headers.get("Authorization", ""))
            if self.path == "/api/repos/create":
                taken.repository.update(json.loads(body))
                self._send({"url": f"{endpoint}/me/tuned", "name": "me/tuned", "id": "1"})
            elif "/preupload/" in self.path:
                files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                self._send({"files": files})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        taken.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = "0123456789abcdef0123456789abcdef01234567"
                url = f"{endpoint}/me/tuned/commit/{commit}"
                self._send({"success": True, "commitOid": commit, "commitUrl": url})
            else:
                self._send({})

        def _send(self, table: dict[str, object]) -> None:
            content = json.dumps(table).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield endpoint, taken
    finally:
        server.shutdown()
        server.server_close()
