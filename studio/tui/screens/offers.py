"""Keys that are offered only where they do something, and say why they do nothing elsewhere."""

from textual.binding import Binding
from textual.screen import Screen, ScreenResultType


class OfferingScreen(Screen[ScreenResultType]):
    """A screen that knows of its keys' actions why they would do nothing now.

    Such a key is made by `offered`; below, it is shown only while there is no reason against it.
    """

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
    """Return what a key of an `OfferingScreen` does, and what it does where there is a reason against that."""
    return Binding(key, action, label), Binding(key, f"say_why_not('{action}')", show=False)
