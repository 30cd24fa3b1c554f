"""The studio in a browser: who is let in, and a real browser on a real server."""

import asyncio
import http.client
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.cli import main
from studio.commands.serve import free_port, is_ours
from studio.core.errors import BadInput
from tests.fakes.browser import CHROMIUM, browser
from tests.fakes.runs import wait_for


@pytest.mark.parametrize(
    ("host", "origin", "ours"),
    [
        ("127.0.0.1:8765", None, True),
        ("localhost:8765", "http://localhost:8765", True),
        ("127.0.0.1:8765", "http://127.0.0.1:8765", True),
        ("evil.example:8765", None, False),
        ("127.0.0.1:9999", None, False),
        ("127.0.0.1:8765", "http://evil.example", False),
        ("127.0.0.1:8765", "null", False),
        ("127.0.0.1:8765", "https://127.0.0.1:8765", False),
        ("", None, False),
    ],
)
def test_only_pages_of_this_server_are_let_in(host: str, origin: str | None, ours: bool) -> None:
    assert is_ours(host, origin, 8765) is ours


@pytest.mark.parametrize("word", ["", "-1", "65536", "http", "8 0"])
def test_what_is_no_port_is_refused(word: str) -> None:
    with pytest.raises(BadInput, match="0 to 65535"):
        free_port(word)


def test_a_taken_port_is_refused_and_zero_finds_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadInput, match="cannot be had"):
            free_port(str(taken.getsockname()[1]))
    assert free_port("0") > 0


def test_without_textual_serve_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "textual_serve.server", None)
    assert main(["serve", "--port", "0"]) == 1
    assert "pip install 'lora-studio[serve]'" in capsys.readouterr().err


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a server that runs."""
    environment = {**os.environ, "LORA_STUDIO_HOME": str(tmp_path / "home"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "studio", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert address is not None
        wait_for(lambda: answers(address[0]))
        yield address[0]
    finally:
        process.terminate()
        process.wait(10)


def status(address: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers=headers)
    return connection.getresponse().status


def answers(address: str) -> bool:
    try:
        return status(address, "/") == 200
    except OSError:
        return False


@pytest.mark.slow
def test_the_page_is_there_and_another_sites_requests_are_refused(served: str) -> None:
    assert status(served, "/") == 200
    assert status(served, "/", Host="evil.example") == 403
    assert status(served, "/ws", Origin="http://evil.example") == 403


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_browser_shows_the_studio_and_takes_keys(served: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with browser(served, tmp_path / "profile") as page:
            await page.until(lambda: "What will it train on?" in page.heard)
            await page.until(lambda: "Memory" in page.heard)
            assert page.sockets[0].startswith(served.replace("http", "ws"))
            await page.click(640, 500)
            page.heard = ""
            await page.press("?")
            await page.until(lambda: "esc closes" in page.heard)
            if kept := os.environ.get("KEEP_PICTURES"):
                await asyncio.sleep(1)
                await page.picture(Path(kept) / "browser.png")

    asyncio.run(story())
