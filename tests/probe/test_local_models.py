"""Models that can be had: folders that hold one, and what a hub answers to a search."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from studio.core.errors import BadInput
from studio.probe import local_models as module
from studio.probe.local_models import listed, model_folders, search_hub
from tests.fakes.model import CONFIG, model_folder


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_place_and_one_level_below_it_are_looked_in(tmp_path: Path) -> None:
    near, own = model_in(tmp_path / "models" / "near"), model_in(tmp_path / "own")
    model_in(tmp_path / "models" / "deep" / "deeper")
    (tmp_path / "models" / "no-model").mkdir()
    assert model_folders([tmp_path / "models", own, tmp_path / "missing"]) == [near, own]


def test_a_model_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    found = listed(str(model_in(tmp_path / "empty")), "folder")
    assert found.size_bytes is None
    assert found.problem


def test_a_model_that_is_quantised_already_says_so(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    assert listed(str(folder), "folder").problem == ""
    for said, found in (({"quant_method": "awq", "bits": 4}, "(awq, 4 bit)"), ({"load_in_4bit": True}, "")):
        (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": said}))
        problem = listed(str(folder), "folder").problem
        assert found in problem
        assert bool(problem) == bool(found), "QLoRA trains on 4 bits of bitsandbytes"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, list[str]]]]:
    """A hub of this machine; yields the queries that it was asked."""
    from huggingface_hub import constants

    asked: list[dict[str, list[str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(parse_qs(urlsplit(self.path).query))
            words = asked[-1].get("search", [""])[0]
            hits = {"qwen": [{"id": "Qwen/Qwen2.5-0.5B"}, {"id": "evil/\x1b[31mname"}], "odd": {"error": "no"}}
            body = json.dumps(hits.get(words, [])).encode()
            self.send_response(500 if words == "down" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield asked
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once_and_its_names_come_harmless(endpoint: list[dict[str, list[str]]]) -> None:
    assert search_hub(" qwen ") == ["Qwen/Qwen2.5-0.5B", r"evil/\x1b[31mname"]
    assert search_hub("nothing like it") == []
    assert [query["search"] for query in endpoint] == [["qwen"], ["nothing like it"]]


@pytest.mark.parametrize("words", ["down", "odd"])
def test_a_hub_that_fails_is_told(endpoint: list[dict[str, list[str]]], words: str) -> None:
    with pytest.raises(BadInput, match="cannot be asked"):
        search_hub(words)


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="offline mode"):
        module.search_hub("qwen")
