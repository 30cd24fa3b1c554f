"""A headless Chromium, driven over its debugging port: opens a page, presses keys, hears its web sockets."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
PATIENCE_SECONDS = 60.0


class Browser:
    """One page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.heard = ""
        self.sockets: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something and return its answer."""
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        await self.until(lambda: number in self._answers)
        return self._answers.pop(number)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Listen until something is true."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                message = json.loads((await self._socket.receive()).data)
                if "id" in message:
                    self._answers[message["id"]] = message.get("result", {})
                elif message["method"] == "Network.webSocketFrameReceived":
                    frame = message["params"]["response"]
                    data = frame["payloadData"]
                    self.heard += base64.b64decode(data).decode("utf-8", "replace") if frame["opcode"] == 2 else data
                elif message["method"] == "Network.webSocketCreated":
                    self.sockets.append(message["params"]["url"])

    async def press(self, key: str, code: str = "") -> None:
        """Press a key that types a character."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, **text)

    async def click(self, x: int, y: int) -> None:
        """Click, which also gives the page the keyboard."""
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def picture(self, path: Path) -> None:
        """Save what the page looks like."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def browser(url: str, profile: Path) -> AsyncIterator[Browser]:
    """Open a page in a browser of its own."""
    process = subprocess.Popen(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
            "--window-size=1280,860",
            f"--user-data-dir={profile}",
            "about:blank",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "DevTools listening" in line)
        port = int(re.search(r":(\d+)/", line)[1])  # type: ignore[index]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                page = next(item for item in await answer.json() if item["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                opened = Browser(socket)
                await opened.call("Network.enable")
                await opened.call("Page.enable")
                await opened.call("Page.navigate", url=url)
                yield opened
    finally:
        process.kill()
        process.wait()
