"""Keys that are offered only where they do something; elsewhere they say why they do nothing."""

from collections.abc import Sequence

from textual.binding import Binding
from textual.screen import Screen, ScreenResultType

from studio.runs.layout import RunPaths


class OfferingScreen(Screen[ScreenResultType]):
    """A screen that can say why a key does nothing now.

    `offered` makes the bindings of such a key. The footer shows the key only while its action does something.
    """

    @property
    def watched(self) -> Sequence[RunPaths]:
        """The runs whose end this screen shows."""
        return ()

    def why_not(self, action: str) -> str:
        """Return why an action would do nothing now, as a sentence; empty where it does something."""
        return ""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Let a key act, or say why it does not."""
        if action == "say_why_not":
            return bool(self.why_not(str(parameters[0])))
        return not self.why_not(action)

    def action_say_why_not(self, action: str) -> None:
        """Say why an action does nothing now."""
        self.app.notify(self.why_not(action), markup=False)


def offered(key: str, action: str, label: str) -> tuple[Binding, Binding]:
    """Return two bindings of one key: its action, and to say why that does nothing now. One of the two applies."""
    return Binding(key, action, label), Binding(key, f"say_why_not('{action}')", show=False)
