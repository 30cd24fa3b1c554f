"""`lora-studio serve`: the studio in a browser of this machine, through textual-serve. Listens on 127.0.0.1 only.

Whoever reaches the page can start and delete runs in the name of the user who serves it, and on a shared machine every
local user reaches 127.0.0.1. So a request is answered only if it brings the random token of the printed address, or the
cookie that a browser gets for the token. The token stands in no log, argument list or environment. A request must also
be addressed to a name of this machine and, where the browser tells its origin, come from this very page.
"""

import argparse
import errno
import hmac
import logging
import secrets
import shlex
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.commands.options import add_runs_dir, root_of
from studio.commands.terminal import DONE, say
from studio.core.errors import BadInput, StudioError
from studio.core.text import plain

HOST = "127.0.0.1"
PORT = 8765
_NAMES = (HOST, "localhost")
_TOKEN_BYTES = 32
_BACKLOG = 128
_PATIENCE_SECONDS = 2.0  # for open pages at the end: each is a studio that quits
_HEADERS = {
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every answer. The page loads a font from another site, which must not learn the address of the page. No
other page may frame it or load from it: neither of another site nor of another port of this machine, which browsers
count as the same site where cookies are concerned."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "serve",
        help="the studio in a browser of this machine",
        description="Serve the studio on 127.0.0.1. From another machine: ssh -L PORT:127.0.0.1:PORT HOST. Each page "
        "is a studio of its own; closing it leaves runs alive. The address that is printed holds a random token, and "
        "only who has it is let in: it is as good as your password while this server runs, so keep it from other users "
        "of this machine, also where you redirect this output to a file. "
        "Needs the extra: pip install 'lora-studio[serve]'.",
    )
    parser.add_argument("--port", metavar="N", default=str(PORT), help=f"port to listen on (default {PORT}; 0: any)")
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        BadInput: The port is none, or cannot be had.
        StudioError: textual-serve is not installed.
    """
    with listen(args.port) as listening:
        door = Door(listening.getsockname()[1])
        server = _server(shlex.join([sys.executable, "-m", "studio", "--runs-dir", str(root_of(args))]), door)
        say(f"the studio is at {door.address}")
        say("for this machine only, and for those who have this address; ctrl+c ends it, runs go on")
        server.serve_on(listening)
    return DONE


def listen(word: str) -> socket.socket:
    """Return a socket that listens on the port that a word means; 0 finds a free port.

    The server uses this very socket. If the port were only tried and released, another user could take it meanwhile.

    Raises:
        BadInput: It is no port, or cannot be had; says why.
    """
    if not word.isascii() or not word.isdecimal() or int(word) > 65535:
        raise BadInput(f"--port is {word!r}; wanted a whole number from 0 to 65535.")
    listening = socket.socket()
    try:
        # Without this option a port stays taken for a minute after its server has ended. On Windows the option means
        # something else: it would let another program share the port.
        if sys.platform != "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, int(word)))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        why = why_refused(error, int(word))
        raise BadInput(f"port {word} of {HOST} {why}. Choose another --port; 0 finds a free one.") from error
    return listening


def why_refused(error: OSError, port: int) -> str:
    """Return in words why a port cannot be listened on."""
    if error.errno == errno.EADDRINUSE:
        return f"is in use{_by_whom(port)}"
    if error.errno in (errno.EACCES, errno.EPERM):
        first = _first_free_port()
        return f"is only for root: ports below {first} are" if port < first else "is not allowed to you on this machine"
    return f"cannot be had: {error.strerror or error}"


def is_ours(host: str, origin: str | None, port: int) -> bool:
    """Return whether a request names this machine and does not come from another site's page.

    Args:
        host: Its `Host` header: another name means that a foreign name was pointed at this machine.
        origin: Its `Origin` header, which browsers add to web sockets; None where there is none.
        port: The port that is listened on.
    """
    # Browsers leave out the port that a scheme has by itself.
    names = [shown for name in _NAMES for shown in ((f"{name}:{port}", name) if port == 80 else (f"{name}:{port}",))]
    return host in names and (origin is None or origin in [f"http://{name}" for name in names])


def _secret() -> str:
    return secrets.token_urlsafe(_TOKEN_BYTES)


@dataclass(frozen=True, slots=True)
class Door:
    """Decides which requests are answered.

    The token is exchanged for cookies, so that it stands in the browser's address line for one redirect only. A browser
    sends a cookie to every port of a machine, and another port may be another user's server. So each cookie is bound to
    a path, and the path of the page is one that nobody can guess.

    Attributes:
        port: The port that is listened on.
        token: Opens the first page.
        page: The path below which everything else lies.
        key: The value of the cookie for that path.
        download_key: The value of the cookie for downloads. The page of textual-serve looks for them at the root of
            the server; each download also has a random name.
    """

    port: int
    token: str = field(default_factory=_secret, repr=False)
    page: str = field(default_factory=lambda: f"/{_secret()}", repr=False)
    key: str = field(default_factory=_secret, repr=False)
    download_key: str = field(default_factory=_secret, repr=False)

    @property
    def address(self) -> str:
        """The address that the user opens."""
        return f"http://{HOST}:{self.port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """The cookies' name."""
        return f"lora-studio-{self.port}"

    @property
    def cookies(self) -> dict[str, str]:
        """The value of each cookie, by the path that the cookie is bound to."""
        return {f"{self.page}/": self.key, "/download/": self.download_key}

    def admits(self, path: str, token: str, cookie: str) -> bool:
        """Return whether a request comes from the user who serves.

        Args:
            path: What it asks for.
            token: The token that it brings; empty without one.
            cookie: The cookie that it brings; empty without one.
        """
        if path == "/":
            return _same(token, self.token)
        return any(_same(cookie, key) for place, key in self.cookies.items() if path.startswith(place))


def _same(brought: str, secret: str) -> bool:
    """Compare in a time that does not depend on how much of the guess is right."""
    return hmac.compare_digest(brought.encode("utf-8", "surrogatepass"), secret.encode())


def _server(command: str, door: Door) -> Any:
    """Return textual-serve's server behind a door: its pages under a path of their own, without its banner and logs.

    Raises:
        StudioError: It is not installed.
    """
    try:
        from aiohttp import web  # noqa: PLC0415  an optional extra
        from aiohttp.http_exceptions import HttpProcessingError  # noqa: PLC0415
        from textual_serve.server import Server  # noqa: PLC0415
    except ImportError as error:
        raise StudioError("serve needs textual-serve. Install it with: pip install 'lora-studio[serve]'") from error

    @web.middleware
    async def guard(request: Any, handler: Any) -> Any:
        if not is_ours(request.headers.get("Host", ""), request.headers.get("Origin"), door.port):
            raise web.HTTPForbidden(text="lora-studio serves this machine's own pages only.\n")
        if not door.admits(request.path, request.query.get("token", ""), request.cookies.get(door.cookie, "")):
            raise web.HTTPForbidden(text="Open the whole address that `lora-studio serve` printed, token included.\n")
        return await handler(request)

    async def change_token(request: Any) -> Any:
        # The page of textual-serve always connects to this name, so it must be opened by the same one.
        if request.headers["Host"].partition(":")[0] != HOST:
            raise web.HTTPSeeOther(door.address)
        response = web.HTTPSeeOther(f"{door.page}/")
        for path, value in door.cookies.items():
            # Both cookies have one name, and a response keeps one cookie for each name: so the header is written here.
            bound = f"{door.cookie}={value}; Path={path}; HttpOnly; SameSite=Strict"
            response.headers.add("Set-Cookie", bound)
        raise response

    def is_fault_of_ours(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))

    async def add_headers(_: Any, response: Any) -> None:
        response.headers.update(_HEADERS)

    class StudioServer(Server):  # type: ignore[misc]  # untyped
        async def _make_app(self) -> Any:
            app = web.Application(middlewares=[guard])
            app.on_response_prepare.append(add_headers)
            app.router.add_get("/", change_token)
            app.router.add_get("/download/{key}", self.handle_download)
            app.add_subapp(door.page, await super()._make_app())
            return app

        async def on_startup(self, app: Any) -> None:
            pass  # textual-serve prints a banner here, with the command and an address that lets nobody in

        def initialize_logging(self) -> None:
            # No access log, because it holds addresses, and no rich tracebacks, because they show variables. The line
            # on a request that is not HTTP is left out as well: it quotes the request, and so any local user could
            # write into this terminal.
            logging.basicConfig(level=logging.WARNING, format="%(message)s")
            logging.getLogger("aiohttp.server").addFilter(is_fault_of_ours)

        def serve_on(self, listening: socket.socket) -> None:
            """Serve until interrupted."""
            self.initialize_logging()
            app, patience = self._make_app(), _PATIENCE_SECONDS
            web.run_app(app, sock=listening, access_log=None, print=None, shutdown_timeout=patience)

    return StudioServer(command, host=HOST, port=door.port, title="lora-studio")


def _by_whom(port: int) -> str:
    """Return who listens on a port of this machine, as far as that can be seen: ` by NAME (process 1, user root)`."""
    import psutil  # noqa: PLC0415  15 ms that only a refusal pays

    with suppress(psutil.Error, OSError, RuntimeError):  # macOS shows other processes to root alone
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                name, user = (plain(word, one_line=True, limit=40) for word in (process.name(), process.username()))
                return f" by {name} (process {connection.pid}, user {user})"
    user = _user_listening(port)
    return f" by a process of user {user}" if user else ""


def _user_listening(port: int) -> str:
    """Return which user listens on a port, or an empty text. Linux tells the user of any socket, not the process."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            lines = table.read_text("utf-8").splitlines()[1:]
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            # sl, local_address, rem_address, st, tx:rx, tr:tm->when, retrnsmt, uid (Linux, tcp_ipv4.c)
            cells = line.split()
            if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:
                return _user_name(int(cells[7]))
    return ""


def _user_name(uid: int) -> str:
    try:
        import pwd  # noqa: PLC0415  Unix only

        return plain(pwd.getpwuid(uid).pw_name, one_line=True, limit=40)
    except (ImportError, KeyError):
        return str(uid)


def _first_free_port() -> int:
    """Return the lowest port that users may listen on."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text("utf-8"))
    except (OSError, ValueError):
        return 1024
