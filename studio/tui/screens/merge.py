"""The choices of a merge: which checkpoint, into which base, and which formats to export the result to."""

from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Input, Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.probe.adapter_folder import Checkpoint, best_of
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ONTO, MergeRequest
from studio.tui.asks import OpenChat
from studio.tui.merging import (
    MERGED,
    MergeFacts,
    OutputEstimate,
    estimates_of,
    free_disk,
    merge_request,
    proposed_out,
    run_standing,
)
from studio.tui.panels.merge_lists import PickMany, PickOne
from studio.tui.panels.merge_text import (
    ONTO_WORDS,
    OUTPUTS_HEAD,
    checkpoint_line,
    is_short,
    output_line,
    totals_text,
)
from studio.tui.panels.outcome import has_adapter, no_adapter_words
from studio.tui.screens.merge_progress import MergeProgressScreen
from studio.tui.screens.offers import OfferingScreen, offered
from studio.tui.services import Services
from widgets.key_footer import KeyFooter
from widgets.text_field import TextLine


class MergeScreen(OfferingScreen[None]):
    """The choices of a merge. `r` starts it; nothing is written before."""

    HELP = "Adds a run's adapter to its base and writes the formats that are chosen."
    BINDINGS: ClassVar[list[BindingType]] = [
        *offered("r", "start", "Merge"),
        *offered("t", "try_it", "Try it"),
        Binding("tab", "app.focus_next", "Next list"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    MergeScreen {
        & #merge-head { height: 1; padding: 0 1; text-style: bold; background: $panel; }
        & .merge-label { height: 1; padding: 0 1; color: $text-muted; }
        & VerticalScroll { height: 1fr; }
        & #checkpoints { max-height: 5; }
        & #merge-out { margin: 0 1; }
        & #merge-totals, & #merge-refused { height: auto; padding: 0 1; }
        & #merge-refused { color: $text-error; display: none; }
        & #merge-refused.-said { display: block; }
    }
    """

    class Known(Message):
        """The run was looked at."""

        def __init__(self, facts: MergeFacts) -> None:
            """Carry what was found."""
            super().__init__()
            self.facts = facts

    class Refused(Message):
        """Something cannot be done."""

        def __init__(self, why: str) -> None:
            """Carry the reason."""
            super().__init__()
            self.why = why

    class Started(Message):
        """The merge runs."""

        def __init__(self, paths: RunPaths) -> None:
            """Carry its run."""
            super().__init__()
            self.paths = paths

    def __init__(self, paths: RunPaths, *, services: Services, poll_seconds: float) -> None:
        """Merge a training run's adapter.

        Args:
            paths: The run.
            services: What looks at the run and starts the merge.
            poll_seconds: Seconds between two looks at a started merge. The run, which may not have ended, is looked at
                a quarter as often.
        """
        super().__init__()
        self._paths, self._services, self._poll_seconds = paths, services, poll_seconds
        self._standing = run_standing(paths)
        self._facts: MergeFacts | None = None
        self._rows: list[OutputEstimate] = []
        self._starting = False

    def compose(self) -> ComposeResult:
        """Make the parts: head, checkpoint, base, outputs, folder, totals, keys."""
        yield Static(f"Merge  {plain(self._paths.name, one_line=True)}", id="merge-head", markup=False)
        with VerticalScroll():
            yield Static("Checkpoint", classes="merge-label")
            yield PickOne(id="checkpoints")
            yield Static("Merge into", classes="merge-label", id="merge-into")
            yield PickOne([ONTO_WORDS[onto] for onto in ONTO], id="onto")
            yield Static(OUTPUTS_HEAD, classes="merge-label", markup=False)
            yield PickMany(id="outputs")
            yield Static("Folder of the merged model; the others lie beside it", classes="merge-label")
            yield TextLine(str(proposed_out(self._paths)), id="merge-out")
        yield Static("Looking at the run ...", id="merge-totals", markup=False)
        yield Static("", id="merge-refused", markup=False)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Look at the run, and again whenever it has changed: its training may still go on."""
        self._look()
        self.set_interval(4 * self._poll_seconds, self._look_again)

    def _look_again(self) -> None:
        before, self._standing = self._standing, run_standing(self._paths)
        if self._standing != before:
            self._look()

    def on_merge_screen_known(self, message: Known) -> None:
        """Fill the lists; chosen is the user's checkpoint, else the best by held-out loss, else the run's adapter."""
        before, facts = self._facts, message.facts
        checkpoints = self.query_one("#checkpoints", PickOne)
        # A choice that the user made is kept; the first choice moves on when training finds something better.
        own = before.checkpoints[checkpoints.chosen] if before and checkpoints.chosen != _first_choice(before) else None
        chosen = facts.checkpoints.index(own) if own in facts.checkpoints else _first_choice(facts)
        self._facts, best = facts, best_of(facts.checkpoints)
        checkpoints.fill([checkpoint_line(one, best) for one in facts.checkpoints], chosen)
        base = plain(facts.recipe.model.base, one_line=True, limit=60)
        # Only a QLoRA adapter was trained against the base as 4 bits left it.
        choice = facts.recipe.method == "qlora"
        whose = "" if choice else ": its own 16-bit weights, as they were trained against"
        self.query_one("#merge-into", Static).update(Content(f"Merge into {base} ({facts.recipe.method} run){whose}"))
        self.query_one("#onto", PickOne).display = choice
        if before is None or before.base_bytes != facts.base_bytes:
            self._rows = estimates_of(facts.base_bytes)
            self._outputs.fill({row.form: output_line(row) for row in self._rows})
        self._refuse(f"This run cannot be merged here: {facts.why_not}" if facts.why_not else "")
        self._show_totals()
        self.refresh_bindings()
        if before is None:
            checkpoints.focus()

    def on_merge_screen_refused(self, message: Refused) -> None:
        """Say why it cannot be done."""
        self._starting = False
        self._refuse(message.why)

    def on_merge_screen_started(self, message: Started) -> None:
        """Watch the merge that was started."""
        self._starting = False
        pace = self._poll_seconds
        self.app.switch_screen(MergeProgressScreen(message.paths, services=self._services, poll_seconds=pace))

    def on_pick_many_changed(self) -> None:
        """Say what the outputs take now."""
        self._show_totals()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show anew what is free: another folder may be on another disk."""
        event.stop()
        self._show_totals()

    def why_not(self, action: str) -> str:
        """Return why nothing is merged, or why there is nothing to chat with."""
        if action == "try_it":
            return "" if has_adapter(self._paths) else no_adapter_words(self._standing[0])
        if action != "start":
            return ""
        if self._facts is None or self._starting:
            return "It starts now." if self._starting else "The run is being looked at."
        return f"This run cannot be merged here: {self._facts.why_not}." if self._facts.why_not else ""

    def action_start(self) -> None:
        """Check and start."""
        if self._facts is None:
            return
        checkpoint = self._facts.checkpoints[self.query_one("#checkpoints", PickOne).chosen]
        if checkpoint.damage:
            self._refuse(f"The checkpoint of step {checkpoint.step} is damaged: {checkpoint.damage}.")
            return
        if is_short(self._chosen, free_disk(self._out)):
            self._refuse("The disk has no room for all of this: choose fewer outputs or another folder.")
            return
        self._starting = True
        self._refuse("Starting ...")
        onto = ONTO[self.query_one("#onto", PickOne).chosen]
        self._start(checkpoint, onto, self._out, [row.form for row in self._chosen if row.form != MERGED])

    def action_try_it(self) -> None:
        """Chat with the run before it is merged."""
        self.post_message(OpenChat(self._paths))

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss()

    @work(thread=True, exclusive=True, group="look")
    def _look(self) -> None:
        try:
            self.post_message(self.Known(self._services.merge_facts(self._paths)))
        except StudioError as error:
            self.post_message(self.Refused(str(error)))

    @work(thread=True, exclusive=True, group="start")
    def _start(self, checkpoint: Checkpoint, onto: str, out: Path, forms: list[str]) -> None:
        facts = self._facts
        if facts is None:
            return
        try:
            request = merge_request(facts, checkpoint, onto, out, forms)
            self.post_message(self.Started(self._services.start(request, self._paths.root.parent)))
        except StudioError as error:
            self.post_message(self.Refused(str(error)))

    @property
    def _out(self) -> Path:
        """The folder that was typed. A NUL is left out of it, because every look at such a path would raise."""
        return Path(self.query_one("#merge-out", TextLine).value.replace("\0", "") or ".").expanduser().absolute()

    @property
    def _chosen(self) -> list[OutputEstimate]:
        chosen = self._outputs.chosen
        return [row for row in self._rows if row.form in chosen]

    @property
    def _outputs(self) -> PickMany:
        return self.query_one("#outputs", PickMany)

    def _show_totals(self) -> None:
        if self._facts is not None:
            text = totals_text(self._chosen, self._facts.free_ram_bytes, free_disk(self._out))
            self.query_one("#merge-totals", Static).update(text)

    def _refuse(self, why: str) -> None:
        line = self.query_one("#merge-refused", Static)
        line.update(Content(plain(why)))
        line.set_class(bool(why), "-said")


def _first_choice(facts: MergeFacts) -> int:
    """Return the place of the best checkpoint by held-out loss; where none was measured, that of the adapter."""
    best = best_of(facts.checkpoints)
    return facts.checkpoints.index(best) if best else max(0, len(facts.checkpoints) - 1)


def merge_screen_for(paths: RunPaths, *, services: Services, poll_seconds: float) -> Screen[None]:
    """Return the screen that a run is merged on; for a merge, the one that shows how far it is and what came of it."""
    try:
        is_merge = read_job(paths, MergeRequest) is not None
    except StudioError:
        is_merge = False
    if is_merge:
        return MergeProgressScreen(paths, services=services, poll_seconds=poll_seconds)
    return MergeScreen(paths, services=services, poll_seconds=poll_seconds)
