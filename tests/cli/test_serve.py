"""The studio in a browser: who is let in, also as another user of this machine, and a real browser on a real server."""

import asyncio
import errno
import http.client
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import psutil
import pytest

from studio.cli import main
from studio.commands.serve import Door, _first_free_port, is_ours, listen, why_refused
from studio.core.errors import BadInput
from tests.fakes.browser import CHROMIUM, browser
from tests.fakes.runs import wait_for

NOBODY = 65534
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
ROUTES = ("/", "/ws", "/static/", "/static/js/textual.js", "/download/0123", "/nowhere")
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)


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


def test_browsers_leave_out_the_port_of_plain_http() -> None:
    assert is_ours("127.0.0.1", "http://127.0.0.1", 80)
    assert is_ours("localhost:80", None, 80)
    assert not is_ours("127.0.0.1", None, 8765)


def test_each_secret_opens_its_own_place_alone() -> None:
    door, other = Door(1), Door(1)
    inner = f"{door.page}/ws"
    assert door.admits("/", door.token, "")
    assert door.admits(inner, "", door.key)
    assert door.admits("/download/0", "", door.download_key)
    for path in ("/", inner, f"{door.page}/", "/download/0", "/nowhere", door.page):
        for brought in ("", "x", "é\udce9", other.token, other.key, door.page, f"{door.token} "):
            assert not door.admits(path, brought, brought), (path, brought)
    assert not door.admits("/", "", door.key)
    assert not door.admits(inner, door.token, "")
    assert not door.admits(inner, "", door.token)
    assert not door.admits(inner, "", door.download_key)
    assert not door.admits("/download/0", door.token, door.key)
    assert not any(secret in repr(door) for secret in (door.token, door.page, door.key, door.download_key))


@pytest.mark.parametrize("word", ["", "-1", "65536", "http", "8 0"])
def test_what_is_no_port_is_refused(word: str) -> None:
    with pytest.raises(BadInput, match="0 to 65535"):
        listen(word)


def test_a_taken_port_is_refused_with_who_has_it_and_zero_finds_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadInput, match=rf"is in use by .+ \(process {os.getpid()}, user .+\)\. Choose another"):
            listen(str(taken.getsockname()[1]))
    with listen("0") as listening:
        assert listening.getsockname()[1] > 0


def test_a_port_that_is_not_for_users_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("studio.commands.serve._first_free_port", lambda: 1024)
    assert why_refused(denied, 80) == "is only for root: ports below 1024 are"
    assert why_refused(denied, 8080) == "is not allowed to you on this machine"
    assert why_refused(OSError(errno.ENOBUFS, "No buffer space"), 8080) == "cannot be had: No buffer space"


def as_nobody(attack: Callable[[], Any]) -> Any:
    """Return what a function returns in a process of another user, who may be root no more.

    A fork, as that user may not so much as start this interpreter where it lies in a home folder.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = {"uid": os.getuid(), "returned": attack()}
        except BaseException:
            answer = {"raised": traceback.format_exc()}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert answer.get("uid") == NOBODY, answer
    return answer["returned"]


@needs_root
def test_another_user_is_told_that_a_port_is_for_root() -> None:
    if _first_free_port() <= 1:
        pytest.skip("this machine gives every port to every user")

    def refused() -> str:
        try:
            listen("1")
        except BadInput as error:
            return str(error)
        return "it was given"

    assert f"is only for root: ports below {_first_free_port()} are" in as_nobody(refused)


@needs_root
def test_another_user_is_told_whose_server_has_the_port() -> None:
    with listen("0") as listening:
        port = str(listening.getsockname()[1])

        def refused() -> str:
            listening.close()  # the fork's copy
            try:
                listen(port)
            except BadInput as error:
                return str(error)
            return "it was given"

        assert "is in use by a process of user root. Choose another" in as_nobody(refused)


def test_without_textual_serve_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "textual_serve.server", None)
    assert main(["serve", "--port", "0"]) == 1
    assert "pip install 'lora-studio[serve]'" in capsys.readouterr().err


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    @property
    def port(self) -> int:
        found = re.search(r":(\d+)/", self.address)
        assert found is not None
        return int(found[1])

    def ask(self, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Ask for a path, with the headers of a browser's page where none are given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(connection):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, b"" if answer.status == 101 else answer.read()

    def status(self, path: str, **headers: str) -> int:
        return self.ask(path, **headers)[0]

    @property
    def token_path(self) -> str:
        return self.address.removeprefix(f"http://127.0.0.1:{self.port}")

    def enter(self) -> tuple[str, dict[str, str]]:
        """Return where the token leads, and the cookie for each path, as a browser keeps them."""
        status, headers, _ = self.ask(self.token_path)
        assert status == 303
        morsels = [SimpleCookie(line) for line in headers.get_all("Set-Cookie") or ()]
        kept = {crumb["path"]: f"{crumb.key}={crumb.value}" for jar in morsels for crumb in jar.values()}
        return headers["Location"], kept


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A server whose user was never here before."""
    environment = {**os.environ, "LORA_STUDIO_HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "studio", "serve", "--port", "0"],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
    try:
        wait_for(lambda: "ctrl+c" in log.read_text())
        address = re.search(r"http://127\.0\.0\.1:\d+/\S+", log.read_text())
        assert address is not None
        server = Served(process, address[0], log)
        wait_for(lambda: answers(server))
        yield server
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as server:
        yield server


def answers(server: Served) -> bool:
    try:
        return server.status("/") == 403
    except OSError:
        return False


def test_the_token_becomes_a_cookie_for_a_path_that_nobody_guesses(served: Served) -> None:
    status, headers, body = served.ask(served.token_path)
    assert (status, headers["Referrer-Policy"], headers["Cache-Control"]) == (303, "no-referrer", "no-store")
    cookies = headers.get_all("Set-Cookie") or []
    assert len(cookies) == 2
    assert all("HttpOnly" in cookie and "SameSite=Strict" in cookie for cookie in cookies)
    page, kept = served.enter()
    assert set(kept) == {page, "/download/"}
    assert len(page) > 40
    token = served.address.partition("token=")[2]
    for shown in (headers["Location"], *cookies, body.decode()):
        assert token not in shown
    status, headers, body = served.ask(page, Cookie=kept[page])
    assert (status, headers["Referrer-Policy"]) == (200, "no-referrer")
    assert token not in body.decode()
    assert f"ws://127.0.0.1:{served.port}{page}ws" in body.decode()
    assert served.status(f"{page}static/js/textual.js", Cookie=kept[page]) == 200
    assert served.status("/download/0123", Cookie=kept["/download/"]) == 404
    assert served.status(f"{page}ws", Cookie=kept[page], **UPGRADE) == 101


def test_a_page_opened_as_localhost_goes_on_by_the_name_that_its_socket_has(served: Served) -> None:
    status, headers, _ = served.ask(served.token_path, Host=f"localhost:{served.port}")
    assert (status, headers["Location"], headers["Set-Cookie"]) == (303, served.address, None)


def test_with_token_and_cookie_another_sites_requests_are_refused_all_the_same(served: Served) -> None:
    page, kept = served.enter()
    assert served.status(served.token_path, Host="evil.example") == 403
    assert served.status(page, Host=f"evil.example:{served.port}", Cookie=kept[page]) == 403
    for origin in ("http://evil.example", f"http://127.0.0.1:{served.port + 1}", "null"):
        assert served.status(f"{page}ws", Origin=origin, Cookie=kept[page], **UPGRADE) == 403
        assert served.status(served.token_path, Origin=origin) == 403


@needs_root
def test_another_user_of_this_machine_gets_nothing(served: Served) -> None:
    page, kept = served.enter()
    foreign = Door(served.port)  # what another server of this machine would hand out
    guesses = [foreign.token, served.address.partition("token=")[2][:-1], "", "*", "%00"]
    cookies = ["", f"{foreign.cookie}={foreign.key}", f"{foreign.cookie}=", f"{foreign.cookie}={foreign.download_key}"]

    def attack() -> dict[str, Any]:
        found = {}
        for route in ROUTES:
            for prefix in ("", foreign.page):
                for guess in guesses:
                    for cookie in cookies:
                        asked = f"{prefix}{route}?token={guess}"
                        headers = UPGRADE if route == "/ws" else {}
                        found[f"{asked} {cookie}"] = served.status(asked, Cookie=cookie, **headers)
        # Who has learnt the page's path alone, from a screen, has nothing.
        for route in ("", "ws", "static/", "download/0"):
            found[f"page {route}"] = served.status(f"{page}{route}", Cookie=cookies[1])
        found["unread"] = []
        for process in psutil.process_iter():
            try:
                text = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if any(secret.encode() in text for secret in (served.address.partition("token=")[2], *kept.values())):
                found["unread"].append(process.pid)
        return found

    found = as_nobody(attack)
    assert found.pop("unread") == []
    assert len(found) > 200
    assert set(found.values()) == {403}
    # The same routes are there for their owner: what was refused above is no dead end.
    assert served.status(page, Cookie=kept[page]) == 200


def test_no_process_and_no_log_holds_a_secret(served: Served) -> None:
    page, kept = served.enter()
    token = served.address.partition("token=")[2]
    secrets = [token, page.strip("/"), *(cookie.partition("=")[2] for cookie in kept.values())]
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as line:
        lines = [f"GET {page}ws HTTP/1.1", f"Host: 127.0.0.1:{served.port}", f"Cookie: {kept[page]}"]
        lines += [f"{name}: {value}" for name, value in UPGRADE.items()]
        line.sendall("\r\n".join([*lines, "", ""]).encode())
        heard = b""
        while b"\x1b[" not in heard:  # the studio draws
            heard += (got := line.recv(65536))
            assert got, heard
        family = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
        assert any("studio" in " ".join(process.cmdline()) for process in family[1:])
        for process in family:
            told = " ".join((*process.cmdline(), *process.environ().values()))
            assert not any(secret in told for secret in secrets)
    served.ask("/%ff?token=%zz", **{"X-Odd": "\x01" * 10})
    log = served.log.read_text()
    assert log.count(token) == 1
    assert not any(secret in log for secret in secrets[1:])
    assert len(log.splitlines()) == 2


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_browser_shows_the_studio_and_takes_keys(tmp_path: Path) -> None:
    async def story(served: Served) -> None:
        async with browser(served.address, tmp_path / "profile") as page:
            await page.until(lambda: "What will it train on?" in page.heard)
            await page.until(lambda: "Memory" in page.heard)
            assert page.sockets[0].startswith(f"ws://127.0.0.1:{served.port}/")
            await page.click(640, 500)
            page.heard = ""
            await page.press("?")
            await page.until(lambda: "esc closes" in page.heard)
            if kept := os.environ.get("KEEP_PICTURES"):
                await asyncio.sleep(1)
                await page.picture(Path(kept) / "browser.png")

    with serving(tmp_path) as served:
        asyncio.run(story(served))


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_browser_keeps_the_secrets_from_scripts_and_from_other_ports(served: Served, tmp_path: Path) -> None:
    heard: list[str] = []

    class Other(http.server.BaseHTTPRequestHandler):
        """Another user's server, on another port of this machine."""

        def do_GET(self) -> None:
            heard.append(f"{self.path} {self.headers.get('Cookie')} {self.headers.get('Referer')}")
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    async def story(other: str) -> None:
        async with browser(served.address, tmp_path / "profile") as page:

            async def value(script: str) -> Any:
                found = await page.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
                return found["result"]["value"]

            await page.until(lambda: "Memory" in page.heard)
            assert await value("document.cookie") == ""
            assert "token" not in await value("location.href")
            assert await value("fetch('/download/0123').then(answer => answer.status)") == 404
            assert await value("fetch('/ws').then(answer => answer.status)") == 403
            await page.call("Runtime.evaluate", expression=f"location.href = '{other}/'")
            while not heard:
                await asyncio.sleep(0.1)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        asyncio.run(story(f"http://127.0.0.1:{server.server_port}"))
    finally:
        server.shutdown()
        server.server_close()
    assert heard[0] == "/ None None"
