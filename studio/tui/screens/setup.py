"""The guided set-up: machine, model, data, goal, recipe. Every step goes back, and no answer is lost on the way."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Static
from textual.worker import get_current_worker

from studio.core.columns import Pairs
from studio.core.errors import StudioError
from studio.probe.local_models import Listed
from studio.probe.setup import Answers, recipe_to_show
from studio.tui import setup_texts as texts
from studio.tui.asks import ShowData
from studio.tui.panels.data_text import readable_text
from studio.tui.panels.setup_step import SetupStep
from studio.tui.screens.cards import CardScreen
from studio.tui.screens.columns import ColumnsScreen
from studio.tui.screens.dialogs import ask
from studio.tui.services import Services
from studio.tui.setup_texts import HERE, OTHER, Lookup, Seen, SetupDone, Then
from studio.tui.told import Abandoned, ReadingTold
from widgets.key_footer import KeyFooter
from widgets.tab_row import TabRow

if TYPE_CHECKING:
    from studio.core.recommendation import Recommendation
    from studio.tui.model_fits import CardFits

STEPS = ("machine", "model", "data", "goal", "recipe")
_BUSY = "Working ..."
_MODEL, _FILE = "a folder, a hub id, or words to search the hub", "a file, a folder or owner/name of the hub"
_LOOK_AFTER_SECONDS = 0.15


class SetupScreen(Screen[SetupDone | None]):
    """Asks five questions. Closes with a recipe, or with None when it is left; the answers are kept either way."""

    HELP = "Five questions that end with a recipe: machine, model, data, goal, and what follows from them."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back"),
        Binding("tab", "list_or_text", "List/text", show=True),
        Binding("d", "show_data", "Rows"),
        Binding("ctrl+l", "leave", "Leave the set-up"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("q", "app.quit", "Quit"),
    ]

    DEFAULT_CSS = """
    SetupScreen {
        & #setup-head { height: 1; padding: 0 1; background: $panel; layout: horizontal; }
        & #setup-head > Static { width: auto; text-style: bold; padding: 0 2 0 0; }
        & #steps { height: 1fr; padding: 1 0 0 0; }
        & #steps > * { display: none; }
        & #steps > .-shown { display: block; }
    }
    """

    class Looked(Message):
        """A thread has looked at a model or a file."""

        def __init__(self, step: str, answers: Answers, seen: Seen) -> None:
            """Carry the step, the answers that were looked at, and what was seen."""
            super().__init__()
            self.step, self.answers, self.seen = step, answers, seen

    class Models(Message):
        """Models were found."""

        def __init__(self, models: list[Listed], words: Content | None = None) -> None:
            """Carry them, and what is to be said of the search."""
            super().__init__()
            self.models, self.words = models, words

    class Recommended(Message):
        """The recommendation is there."""

        def __init__(self, answers: Answers, recommendation: "Recommendation") -> None:
            """Carry it with the answers that it is for."""
            super().__init__()
            self.answers, self.recommendation = answers, recommendation

    def __init__(self, *, services: Services, runs_root: Path) -> None:
        """Ask from the first step, with the answers of the last visit."""
        super().__init__()
        self._services, self._runs_root = services, runs_root
        self._lookup = Lookup(services)
        self.answers = Answers()
        self.step = STEPS[0]
        self._reached = 0
        self._models: list[Listed] = []
        self._fits: CardFits | None = None
        self._machine_words = Content("")
        self._recommendation: Recommendation | None = None
        self._look_timer: Timer | None = None
        # The option on which the user pressed enter. The next look at it that ends goes on to the next step: it may be
        # one that followed the cursor, because a new look cancels the one that enter began.
        self._wanted: str | None = None

    def compose(self) -> ComposeResult:
        """Make the parts: head with the steps, the steps, keys."""
        with Container(id="setup-head"):
            yield Static("lora-studio  Set-up", markup=False)
            yield TabRow([(key, f"{number} {key.title()}") for number, key in enumerate(STEPS, start=1)], STEPS[0])
        with Container(id="steps"):
            yield SetupStep("machine", "What will it train on?", "The machine, and what it trains")
            yield SetupStep("model", "Which model is to learn?", "The model", placeholder=_MODEL)
            yield SetupStep("data", "What is it to learn from?", "The rows", placeholder=_FILE, hint=readable_text())
            yield SetupStep("goal", "What is it for?", "Is fine-tuning the tool for it?")
            yield SetupStep("recipe", "This is what we would do", "Every choice, and why")
        yield KeyFooter()

    def on_mount(self) -> None:
        """Recall the answers, look around, ask the first question."""
        self.answers = self._services.recall_answers()
        self._offer_cards()
        self._step("goal").offer(texts.goal_options(), self.answers.goal)
        self._look_at_machine()
        self._look_at_fits(self.answers.card)
        self._look_for_models()
        self._look_for_files(self.answers.data)
        # A set-up that was left early goes on at the step where it was left.
        at = self.answers.step if self.answers.step in STEPS and not self.answers.done else STEPS[0]
        self.show_step(at)

    def show_step(self, key: str) -> None:
        """Show a step and put the cursor into its options."""
        self.step, self._wanted = key, None
        self._reached = max(self._reached, STEPS.index(key))
        for other in STEPS:
            self._step(other).set_class(other == key, "-shown")
        self.query_one(TabRow).current = key
        self._step(key).focus_options()
        self.refresh_bindings()
        self._keep(replace(self.answers, step=key))
        if key == "recipe":
            self._recommendation = None
            self._step("recipe").tell(Content(_BUSY))
            self._recommend(self.answers)
        elif key == "goal":
            self._step("goal").offer(texts.goal_options(), self.answers.goal)
        elif key in ("model", "data"):
            if key == "model":
                self._look_at_fits(self.answers.card)
            self._look_soon(key, self._step(key).lit)

    def on_tab_row_wanted(self, message: TabRow.Wanted) -> None:
        """Go to the step whose name was clicked, if it was reached before."""
        if STEPS.index(message.key) <= self._reached:
            self.show_step(message.key)

    def on_setup_step_lit(self, message: SetupStep.Lit) -> None:
        """Show what is known of the option under the cursor."""
        if message.step == "machine" and message.value != OTHER:
            self._look_at_fits("" if message.value == HERE else message.value)
        elif message.step == "goal":
            self._step("goal").tell(texts.goal_text(texts.goal_of(message.value)))
        elif message.step in ("model", "data") and self.step == message.step:
            if self._wanted != message.value:  # enter was pressed on another option
                self._wanted = None
            self._look_soon(message.step, message.value)

    def on_setup_step_chosen(self, message: SetupStep.Chosen) -> None:
        """Take an option of the step that is shown."""
        # Of several enters in a burst, the last ones reach a step that was left already, or one below a dialog.
        if message.step != self.step or not self.is_active:
            return
        match message.step:
            case "machine" if message.value == OTHER:
                self._choose_card()
            case "machine":
                self._go_on(replace(self.answers, card="" if message.value == HERE else message.value))
            case "goal":
                self._go_on(replace(self.answers, goal=texts.goal_of(message.value)))
            case "recipe":
                self._finish(texts.end_of(message.value))
            case _:
                self._wanted = message.value
                self._look(message.step, self._answers_with(message.step, message.value))

    def on_setup_step_typed(self, message: SetupStep.Typed) -> None:
        """Take a line: a model, words to search the hub for, or a file."""
        if message.step == "model" and not texts.is_model(message.text):
            self._step("model").tell(Content("Asking the hub ..."))
            self._ask_hub(message.text)
            return
        self._step(message.step).offer_first(message.text)

    def on_setup_screen_looked(self, message: Looked) -> None:
        """Show what was seen, and go on where it can be used and the user wants to.

        What was seen is of no use once the cursor has moved on, or an answer of an earlier step has changed.
        """
        step = self._step(message.step)
        if self.step != message.step or message.answers != self._answers_with(message.step, step.lit):
            return
        step.tell(message.seen.words)
        wanted, self._wanted = self._wanted == step.lit, None
        if wanted and message.seen.answers is not None:
            self._go_on(message.seen.answers)
        elif wanted and message.seen.unknown:
            self._choose_columns(message.answers, message.seen.unknown)

    def on_setup_screen_models(self, message: Models) -> None:
        """Offer the models that were found; those of a search come first, with the cursor on the first of them."""
        known = {model.word for model in self._models}
        new = [model for model in message.models if model.word not in known]
        self._models = [*new, *self._models] if message.words is not None else [*self._models, *new]
        step = self._step("model")
        self._offer_models(new[0].word if new and message.words is not None else self.answers.base)
        if message.words is not None:
            step.tell(message.words)
            step.focus_options()

    def on_setup_screen_recommended(self, message: Recommended) -> None:
        """Show the recommendation, unless an answer has changed meanwhile."""
        if message.answers != self.answers:
            return
        self._recommendation = message.recommendation
        step = self._step("recipe")
        step.tell_found(texts.verdict_text(message.recommendation, self.answers.card))
        step.offer(texts.end_options(), texts.likely_end(message.recommendation, self.answers.card))
        self._tell_recommendation()

    def _take_fits(self, card: str, fits: "CardFits | None") -> None:
        """Show which models a card trains, and offer them where it is the card that is planned for."""
        if self.step == "machine":
            self._tell_machine(fits)
        if card == self.answers.card and fits != self._fits:
            self._fits = fits
            self._offer_models(self._step("model").lit or self.answers.base)

    def _tell_machine(self, fits: "CardFits | None") -> None:
        from studio.tui.model_fits import ladder_text  # noqa: PLC0415  with the estimator

        ladder = ladder_text(fits) if fits else Content("")
        self._step("machine").tell(Content.assemble(self._machine_words, "\n", ladder))

    def _offer_models(self, wanted: str) -> None:
        """Offer the models that were found, and below them the known ones by whether the card trains them."""
        found = [(model.word, partial(texts.model_line, model)) for model in self._models]
        from studio.tui.model_fits import known_options  # noqa: PLC0415  with the estimator

        known = known_options(self._fits, [word for word, _ in found]) if self._fits else []
        self._step("model").offer([*found, *known], wanted)

    def on_resize(self) -> None:
        """Wrap the reasons anew: their lines are made for the width."""
        self._tell_recommendation()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer to show rows only where a file is chosen, and to change to the text only where there is one."""
        where = {"show_data": ("data",), "list_or_text": ("model", "data", "recipe")}
        return self.step in where.get(action, STEPS)

    def action_list_or_text(self) -> None:
        """Change between the list and the line below it, or the reasons of a recipe."""
        self.focus_next()

    def action_show_data(self) -> None:
        """Show the rows of the file under the cursor as the chosen model reads them."""
        answers = self._answers_with("data", self._step("data").lit)
        self.post_message(ShowData(recipe_to_show(answers), pairs=True))  # it would recommend what learns from them

    def action_back(self) -> None:
        """Go one step back, from the first to the configure screen; nothing is forgotten."""
        place = STEPS.index(self.step)
        if place:
            self.show_step(STEPS[place - 1])
        else:
            self.action_leave()

    def action_leave(self) -> None:
        """Leave the set-up; the answers are kept."""
        self._keep(replace(self.answers, step=self.step))
        self.dismiss(None)

    def _go_on(self, answers: Answers) -> None:
        self.answers = answers
        self.show_step(STEPS[STEPS.index(self.step) + 1])

    def _answers_with(self, step: str, value: str) -> Answers:
        if step == "model":
            return replace(self.answers, base=value)
        same = self.answers.data in (value, str(Path(value).absolute()))
        return replace(self.answers, data=value, columns=self.answers.columns if same else ())

    def _look_soon(self, step: str, value: str) -> None:
        """Look at an option once the cursor has stood on it for a moment."""
        if self._look_timer is not None:
            self._look_timer.stop()
        self._step(step).tell(Content(_BUSY))
        look = partial(self._look, step, self._answers_with(step, value))
        self._look_timer = self.set_timer(_LOOK_AFTER_SECONDS, look)

    def _finish(self, then: Then) -> None:
        if self._recommendation is not None:
            self._keep(replace(self.answers, done=True, step=""))
            self.dismiss(SetupDone(self._recommendation.recipe, then, self.answers.card))

    def _tell_recommendation(self) -> None:
        if self._recommendation is not None and self.step == "recipe":
            step = self._step("recipe")
            step.tell(
                Content.assemble(
                    texts.goal_text(self.answers.goal),
                    "\n\n",
                    texts.recommendation_text(self._recommendation, step.room),
                )
            )

    def _choose_card(self) -> None:
        def take(name: str) -> None:
            self.answers = replace(self.answers, card=name)
            self._offer_cards()
            self._go_on(self.answers)

        ask(self.app, CardScreen(self.answers.card), take)

    def _choose_columns(self, answers: Answers, columns: tuple[tuple[str, str], ...]) -> None:
        def take(chosen: Pairs) -> None:
            if self.step == "data":
                self._keep(replace(answers, columns=chosen))
                self._wanted = answers.data
                self._look("data", self.answers)

        ask(self.app, ColumnsScreen(columns), take)

    def _offer_cards(self) -> None:
        self._step("machine").offer(texts.card_options(self.answers.card), self.answers.card or HERE)

    def _keep(self, answers: Answers) -> None:
        self.answers = answers
        try:
            self._services.keep_answers(answers)
        except OSError as error:
            told = f"The answers cannot be kept: {error.strerror or error}."
            self.app.notify(told, severity="warning", markup=False)

    @work(thread=True, group="machine")
    def _look_at_machine(self) -> None:
        self._machine_words = texts.machine_text(self._services.machine(self._runs_root), self._runs_root)
        self.app.call_from_thread(self._tell_machine, None)

    @work(thread=True, exclusive=True, group="fits")
    def _look_at_fits(self, card: str) -> None:
        with suppress(StudioError):
            self.app.call_from_thread(self._take_fits, card, self._services.known_fits(card))

    @work(thread=True, group="models")
    def _look_for_models(self) -> None:
        self.post_message(self.Models(self._services.models()))

    @work(thread=True, group="files")
    def _look_for_files(self, chosen: str) -> None:
        files = [str(path) for path in self._services.data_files()]
        options = texts.data_options(files, chosen)
        self.app.call_from_thread(self._step("data").offer, options, chosen)

    @work(thread=True, exclusive=True, group="hub")
    def _ask_hub(self, words: str) -> None:
        try:
            self.post_message(self.Models(*self._lookup.hub(words)))
        except StudioError as error:
            self.app.call_from_thread(self._step("model").tell, texts.refused_text(str(error)))

    @work(thread=True, exclusive=True, group="look")
    def _look(self, step: str, answers: Answers) -> None:
        worker, tell = get_current_worker(), self._step(step).tell
        told = ReadingTold(lambda words: self.app.call_from_thread(tell, Content(words)), lambda: worker.is_cancelled)
        with suppress(Abandoned):
            seen = self._lookup.model(answers) if step == "model" else self._lookup.data(answers, told)
            self.post_message(self.Looked(step, answers, seen))

    @work(thread=True, exclusive=True, group="recommendation")
    def _recommend(self, answers: Answers) -> None:
        try:
            self.post_message(self.Recommended(answers, self._lookup.recommendation(answers)))
        except StudioError as error:
            words = texts.refused_text(f"{error}\nescape goes back to the question.")
            self.app.call_from_thread(self._step("recipe").tell, words)

    def _step(self, key: str) -> SetupStep:
        return self.query_one(f"#step-{key}", SetupStep)
