"""`lora-studio serve`: the studio in a browser of this machine, through textual-serve. Listens on 127.0.0.1 only.

Whoever reaches the page can start and delete runs, so a request must come to a name of this machine and, where a
browser says so, from this very page: another web site that is open in the same browser is refused.
"""

import argparse
import shlex
import socket
import sys
from typing import Any

from studio.commands.options import add_runs_dir, root_of
from studio.commands.terminal import DONE, say
from studio.core.errors import BadInput, StudioError

HOST = "127.0.0.1"
PORT = 8765
_NAMES = (HOST, "localhost")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "serve",
        help="the studio in a browser of this machine",
        description="Serve the studio on 127.0.0.1. From another machine: ssh -L PORT:127.0.0.1:PORT HOST. Each page "
        "is a studio of its own; closing it leaves runs alive. Needs the extra: pip install 'lora-studio[serve]'.",
    )
    parser.add_argument("--port", metavar="N", default=str(PORT), help=f"port to listen on (default {PORT}; 0: any)")
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        BadInput: The port is none, or is taken.
        StudioError: textual-serve is not installed.
    """
    port = free_port(args.port)
    server = _server(shlex.join([sys.executable, "-m", "studio", "--runs-dir", str(root_of(args))]), port)
    say(f"the studio is at http://{HOST}:{port} (this machine only); ctrl+c ends it, runs go on")
    server.serve()
    return DONE


def free_port(word: str) -> int:
    """Return the port that a word means, known to be free a moment ago; 0 finds one.

    Raises:
        BadInput: It is no port, or not free.
    """
    if not word.isascii() or not word.isdecimal() or int(word) > 65535:
        raise BadInput(f"--port is {word!r}; wanted a whole number from 0 to 65535.")
    with socket.socket() as trial:
        try:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((HOST, int(word)))
        except OSError as error:
            raise BadInput(f"port {word} of {HOST} cannot be had: {error.strerror}. Choose another --port.") from error
        return int(trial.getsockname()[1])


def is_ours(host: str, origin: str | None, port: int) -> bool:
    """Return whether a request names this machine and does not come from another site's page.

    Args:
        host: Its `Host` header: another name means that a foreign name was pointed at this machine.
        origin: Its `Origin` header, which browsers add to web sockets; None where there is none.
        port: The port that is listened on.
    """
    names = [f"{name}:{port}" for name in _NAMES]
    return host in names and (origin is None or origin in [f"http://{name}" for name in names])


def _server(command: str, port: int) -> Any:
    """Return textual-serve's server with a guard before every request, and without its banner.

    Raises:
        StudioError: It is not installed.
    """
    try:
        from aiohttp import web  # noqa: PLC0415  an optional extra
        from textual_serve.server import Server  # noqa: PLC0415
    except ImportError as error:
        raise StudioError("serve needs textual-serve. Install it with: pip install 'lora-studio[serve]'") from error

    @web.middleware
    async def guard(request: Any, handler: Any) -> Any:
        if not is_ours(request.headers.get("Host", ""), request.headers.get("Origin"), port):
            raise web.HTTPForbidden(text="lora-studio serves this machine's own pages only.")
        return await handler(request)

    class StudioServer(Server):  # type: ignore[misc]  # untyped
        async def _make_app(self) -> Any:
            app = await super()._make_app()
            app.middlewares.append(guard)
            return app

        async def on_startup(self, app: Any) -> None:
            pass

    return StudioServer(command, host=HOST, port=port, title="lora-studio")
