"""The one family of errors that we raise on purpose.

Every message says what was found, what was wanted and what to do next.
"""


class StudioError(Exception):
    """Something that this program foresaw went wrong; the message is for the user."""


class BadInput(StudioError):
    """What the user gave us (recipe, data, model, flag) cannot be used. The command line exits with 2."""


class JobFailed(StudioError):
    """A job must stop. Becomes the `Failed` event of its run.

    Attributes:
        kind: Short stable name of the failure, such as `nonfinite_loss`.
        advice: What the user can do about it.
    """

    def __init__(self, kind: str, message: str, advice: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.advice = advice
