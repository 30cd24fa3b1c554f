"""The studio: one app, a stack of screens. `lora-studio` without a verb opens it.

The studio imports no training library and does no job in its own process. So every run goes on when the studio ends,
however it ends.
"""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.screen import Screen

from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe
from studio.tui.asks import OpenChat, OpenRun, ShowAudits, ShowData, ShowMerge
from studio.tui.copying import Copies, sent_words
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.help import HelpScreen, commands_of, keys_of
from studio.tui.services import Services
from studio.tui.themes import OURS, SIXTEEN
from widgets.output_filter import SafeOutput, drawable

if TYPE_CHECKING:
    from textual.notifications import SeverityLevel

    from studio.runs.last_recipe import RecipeSource
    from studio.tui.ends import EndNotices
    from studio.tui.setup_texts import SetupDone

_POLL_SECONDS = 0.5
_POLL_SECONDS_OVER_SSH = 1.0
_POLLS_PER_LOOK = 4
"""Runs are looked at for their end so many times less often than the one on the screen."""
_SETTLED_SECONDS = 1.0
_NOTE_SECONDS = 15.0
_LEAVE_SECONDS = 5.0
"""How long the studio may take to quit once its terminal is gone; after that the process is ended."""
_READ_PER_SECOND = 15.0
"""Characters per second of somebody who reads a message slowly, and for the first time."""
_ASCII_VARIABLE = "LORA_STUDIO_ASCII"


class StudioApp(App[None]):
    """Opens the screens that other screens ask for. Quitting it ends no run."""

    TITLE = "lora-studio"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+q", "quit", "Quit", show=False),
        Binding("question_mark,f1", "help", "Help", show=False),
        Binding("y", "copy", "Copy", show=False),
        Binding("T", "change_theme", "Theme", show=False),
    ]
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012  declared without ClassVar by Textual
        (0, "-narrow"),
        (100, "-wide"),
    ]
    VERTICAL_BREAKPOINTS = [  # noqa: RUF012  as above
        (0, "-short"),
        (32, "-tall"),
    ]

    def __init__(
        self,
        recipe: Recipe,
        *,
        runs_root: Path,
        open_run: Path | None = None,
        launch: bool = False,
        setup: bool = False,
        services: Services | None = None,
        poll_seconds: float = _POLL_SECONDS,
        theme: str = "",
        can_draw: Callable[[str], bool] | None = None,
        source: "RecipeSource | None" = None,
        note: str = "",
    ) -> None:
        """Open on a recipe.

        Args:
            recipe: What the configure screen shows.
            runs_root: Where runs live.
            open_run: A run to watch first.
            launch: Start the recipe at once.
            setup: Begin with the guided set-up.
            services: What starts runs and looks things up; None takes the real ones.
            poll_seconds: Seconds between two looks at a run; what a look finds is drawn at once.
            theme: The theme to begin with. Where it is empty or unknown, Textual's default is taken, or in a terminal
                of sixteen colours the theme that was made for it.
            can_draw: Whether the terminal can draw a character; None where it draws all.
            source: The user's file that the recipe came from.
            note: A message on the recipe to show at the start; empty for none.
        """
        super().__init__()
        self._output_filter = SafeOutput(can_draw)
        for ours in OURS:
            self.register_theme(ours)
        own = SIXTEEN.name if self.console.color_system == "standard" else self.theme
        self.theme = theme if theme in self.available_themes else own
        self._services = services or Services()
        self._runs_root, self._open_run, self._launch_at_once = runs_root, open_run, launch
        self._set_up_first = setup
        self._poll_seconds = poll_seconds
        self._configure = ConfigureScreen(recipe, runs_root=runs_root, services=self._services, source=source)
        self._note = note
        # Runs that were opened or found alive on this visit. Those still alive at the end are named on leaving.
        self._seen: dict[Path, RunPaths] = {}
        self._ends: EndNotices | None = None
        self._goes_to_live = open_run is None and not launch and not setup
        self._before_hangup: Any = None

    def get_default_screen(self) -> Screen[None]:
        """Return the configure screen, which is all that the first frame shows."""
        return self._configure

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Return the filters that every row of the screen passes before it is written to the terminal."""
        return [*super().get_line_filters(), self._output_filter]

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Offer in the palette every action of the screen, every other place, and what Textual offers besides."""
        own = {command.title: command for command in commands_of(screen)}
        besides = [command for command in super().get_system_commands(screen) if command.title != "Keys"]  # in Help
        besides += [
            SystemCommand("Help", "? or F1   What this screen is for, and its keys", self.action_help),
            SystemCommand("Copy", "y   What the screen is about, to the terminal's clipboard", self.action_copy),
            SystemCommand("Guided set-up", "Machine, model, data, goal, recipe", self.on_show_setup),
            SystemCommand("Data", "The rows token by token, and what they add up to", self._show_data),
            SystemCommand("Runs", "All runs, newest first; chat, merge and audit start there", self.on_show_runs),
            SystemCommand("Recipe", "Back to the recipe that is being made", self._show_recipe),
            SystemCommand("Open a recipe", "Files, runs and shipped recipes", self._open_recipe),
            SystemCommand("Audits", "What 4 bits cost", partial(self.on_show_audits, ShowAudits())),
        ]
        yield from own.values()
        yield from (command for command in besides if command.title not in own)

    def _show_recipe(self) -> None:
        while self.screen is not self._configure:
            self.pop_screen()

    def _open_recipe(self) -> None:
        self._show_recipe()
        self._configure.action_open()

    def _show_data(self) -> None:
        self.on_show_data(ShowData(self._configure.recipe))

    def watch_theme(self, theme: str) -> None:
        """Keep a theme that the user chose."""
        if self.is_running:  # the constructor sets a theme before that, which nobody chose
            self._keep_theme(theme)

    @work(thread=True, group="theme")
    def _keep_theme(self, theme: str) -> None:
        with contextlib.suppress(OSError):  # it is only for the next visit
            self._services.keep_theme(theme)

    def on_mount(self) -> None:
        """Open what was asked for, else what an earlier visit left alive; from now on look for runs that end."""
        if hasattr(signal, "SIGHUP"):  # Windows has no such signal
            leave = partial(self._leave_lost_terminal, asyncio.get_running_loop())
            self._before_hangup = signal.signal(signal.SIGHUP, leave)
        if self._note:
            self.notify(self._note, severity="warning", timeout=_NOTE_SECONDS, markup=False)
        if self._open_run is not None:
            self._open(RunPaths(self._open_run))
        elif self._launch_at_once:
            self.call_after_refresh(self._configure.action_launch)
        elif self._set_up_first:
            self.on_show_setup()
        self.call_after_refresh(self._follow_runs)

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: "SeverityLevel" = "information",
        timeout: float | None = None,
        markup: bool = True,
    ) -> None:
        """Show a message in the corner; without a `timeout`, in seconds, it stays as long as reading it takes."""
        seconds = max(self.NOTIFICATION_TIMEOUT, len(message) / _READ_PER_SECOND) if timeout is None else timeout
        super().notify(message, title=title, severity=severity, timeout=seconds, markup=markup)

    def on_unmount(self) -> None:
        """Give SIGHUP, the signal of a closed terminal, back to the handler that had it before."""
        if self._ends is not None:
            self._ends.close()
        if self._before_hangup is not None:
            signal.signal(signal.SIGHUP, self._before_hangup)

    def _leave_lost_terminal(self, loop: asyncio.AbstractEventLoop, number: int, _: object) -> None:
        """Quit when the terminal was closed or its line was lost; end the process where quitting takes too long.

        The kernel sends SIGCONT after SIGHUP. Textual would resume on it and start a new thread that writes to the
        terminal. That thread dies of its first write, because the terminal is gone, and everything that is written
        later waits for it for ever. So SIGCONT is ignored before anything else.
        """
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        end = threading.Timer(_LEAVE_SECONDS, os._exit, (128 + number,))
        end.daemon = True  # a timer that is no daemon would itself keep the process from ending in time
        end.start()
        loop.call_soon_threadsafe(self.exit)

    def on_open_run(self, message: OpenRun) -> None:
        """Watch a run."""
        self._open(message.paths)

    def on_open_chat(self, message: OpenChat) -> None:
        """Chat with what a run made."""
        from studio.tui.screens.chat import ChatScreen  # noqa: PLC0415  not needed for the first frame

        self.push_screen(ChatScreen(message.paths, services=self._services))

    def on_show_merge(self, message: ShowMerge) -> None:
        """Merge a run's adapter, or show a merge."""
        from studio.tui.screens.merge import merge_screen_for  # noqa: PLC0415  as above

        self.push_screen(merge_screen_for(message.paths, services=self._services, poll_seconds=self._poll_seconds))

    def on_show_runs(self) -> None:
        """List the runs."""
        from studio.tui.screens.runs import RunsScreen  # noqa: PLC0415  the table is not needed for the first frame

        self.push_screen(RunsScreen(self._runs_root, services=self._services, poll_seconds=self._poll_seconds))

    def on_show_audits(self, message: ShowAudits) -> None:
        """List the audits, or begin one of a run."""
        from studio.tui.screens.audit import AuditScreen  # noqa: PLC0415  as above

        screen = AuditScreen(
            self._configure.recipe,
            self._runs_root,
            services=self._services,
            poll_seconds=self._poll_seconds,
            run=message.run,
        )
        self.push_screen(screen)

    def on_show_data(self, message: ShowData) -> None:
        """Show the data of a recipe as the model reads it."""
        from studio.runs.show import ShowRequest  # noqa: PLC0415  as above
        from studio.tui.screens.data import DataScreen  # noqa: PLC0415  as above

        request = ShowRequest(message.recipe, str(message.run.root) if message.run else "", pairs=message.pairs)
        self.push_screen(DataScreen(request, services=self._services))

    def on_show_setup(self) -> None:
        """Ask the questions of the guided set-up."""
        from studio.tui.screens.setup import SetupScreen  # noqa: PLC0415  brings the estimator: 0.1 s

        self.push_screen(SetupScreen(services=self._services, runs_root=self._runs_root), self._after_setup)

    def _after_setup(self, done: "SetupDone | None") -> None:
        """Show the recommended recipe and do with it what the user asked for; None means that the user left early."""
        if done is None:
            self.notify("The answers are kept: S, or lora-studio setup, goes on with them.", markup=False)
            return
        self._configure.take_setup(done.recipe, done.card)
        if done.then == "launch":
            self._configure.action_launch()
        elif done.then == "save":
            self._configure.action_save()

    def _found_live(self, runs: list[RunPaths]) -> None:
        """Open the newest run that an earlier visit left alive. The recipe's screen begins unless a run is watched."""
        self._seen.update({paths.root: paths for paths in runs})
        goes = bool(runs) and self._goes_to_live and self.screen is self._configure
        # What that screen looks at takes 7 MiB.
        self._configure.begin(waits=goes or (self._open_run is not None and self.screen is not self._configure))
        if goes:
            self._open(runs[0])
            more = f" {len(runs)} runs are alive: o lists them." if len(runs) > 1 else ""
            self.notify(f"This run goes on from an earlier visit. Escape goes to the recipe.{more}", markup=False)

    async def action_quit(self) -> None:
        """Leave, and say which runs go on."""
        from studio.runs.status import run_status  # noqa: PLC0415

        live = [paths for paths in self._seen.values() if run_status(paths).live]
        self.exit(message=_farewell([paths.name for paths in live]) if live else None)

    def action_help(self) -> None:
        """Explain the keys of the screen; on the configure screen explain the fields of the recipe, too."""
        if not isinstance(screen := self.screen, HelpScreen):
            self.push_screen(HelpScreen(keys_of(screen), fields=screen is self._configure, about=screen.HELP or ""))

    def action_copy(self) -> None:
        """Copy the text that the mouse has marked, else what the screen is about, to the terminal's clipboard."""
        screen = self.screen
        if marked := screen.get_selected_text():
            self.copy_to_clipboard(marked)
        elif screen is self._configure:
            self.copy_to_clipboard(dump_recipe(self._configure.recipe), "the recipe, as TOML")
        elif isinstance(screen, Copies) and (copied := screen.to_copy()) is not None:
            self.copy_to_clipboard(copied.text, copied.name)
        else:
            self.notify("There is nothing to copy here; the mouse marks text, and ctrl+c copies it.", markup=False)

    def copy_to_clipboard(self, text: str, name: str = "") -> None:
        """Send a text to the terminal's clipboard (OSC 52) and say so, by a name or by the number of characters."""
        super().copy_to_clipboard(text)
        self.notify(sent_words(text, name), markup=False)

    def _follow_runs(self) -> None:
        from studio.tui.ends import EndNotices  # noqa: PLC0415  not needed for the first frame

        self._ends = EndNotices(self, self._runs_root, self._services)
        self._ends.begin(self._found_live)
        self.set_interval(_POLLS_PER_LOOK * self._poll_seconds, self._ends.look)

    def _open(self, paths: RunPaths) -> None:
        from studio.tui.screens.run import RunScreen  # noqa: PLC0415  plots and log are not needed for the first frame

        self._seen[paths.root] = paths
        self.push_screen(RunScreen(paths, services=self._services, poll_seconds=self._poll_seconds))


def run_studio(
    recipe: Recipe,
    *,
    runs_root: Path,
    open_run: Path | None = None,
    launch: bool = False,
    setup: bool = False,
    source: "RecipeSource | None" = None,
    note: str = "",
) -> int:
    """Show the studio until the user leaves it; return the exit code. The caller has made sure of a terminal.

    Args:
        recipe: What the configure screen shows.
        runs_root: Where runs live.
        open_run: A run to watch first.
        launch: Start the recipe at once.
        setup: Begin with the guided set-up.
        source: The user's file that the recipe came from.
        note: A message on the recipe to show at the start; empty for none.
    """
    services, remote = Services(), "SSH_CONNECTION" in os.environ
    app = StudioApp(
        recipe,
        runs_root=runs_root,
        open_run=open_run,
        launch=launch,
        setup=setup,
        poll_seconds=_POLL_SECONDS_OVER_SSH if remote else _POLL_SECONDS,  # each look draws, which goes over the line
        services=services,
        theme=services.recall_theme(),
        can_draw=_can_draw(),
        source=source,
        note=note,
    )
    if remote:
        app.animation_level = "none"
    return show(app)


def show(app: StudioApp) -> int:
    """Show the one app of this process until the user leaves it; return the exit code."""
    # A full garbage collection walks every object, and nearly all were made by imports and the first screens. No key is
    # answered meanwhile: for 70 to 200 ms, but only for 3 to 10 ms once those objects are frozen.
    app.call_later(app.set_timer, _SETTLED_SECONDS, gc.freeze)
    app.run()
    return app.return_code or 0


def _can_draw() -> Callable[[str], bool] | None:
    """Return the test for characters that the terminal can draw; None in a browser, which draws them all.

    The encoding of the terminal decides. The Linux console has UTF-8, but no braille.
    """
    if os.environ.get(_ASCII_VARIABLE):
        return drawable("ascii")
    if os.environ.get("TEXTUAL_DRIVER"):  # set by textual-serve, which shows the studio in a browser
        return None
    return drawable(getattr(sys.__stderr__, "encoding", None), braille=os.environ.get("TERM") != "linux")


def _farewell(names: list[str]) -> Text:
    """Return what is printed once the screen is gone. It is a Text, because Textual reads a string as markup."""
    lines = [f"The run {plain(name, one_line=True)} goes on without the studio." for name in names]
    again = f"lora-studio runs attach {plain(names[0], one_line=True)}"
    return Text("\n".join([*lines, f"See it again with: lora-studio, or {again}"]))
