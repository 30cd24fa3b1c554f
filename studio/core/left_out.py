"""Why rows are left out of a training, in words: the one list for checks, set-up, runs and their reports."""

from collections.abc import Mapping

LEFT_OUT = {
    "no_answer": "without an answer",
    "empty_answer": "with an empty answer",
    "empty_text": "with an empty text",
    "refused_by_template": "that the chat template refuses, or that are not found in what it writes",
    "nothing_to_learn": "without a token to learn within train.seq_len",
}
"""Words for each reason. The first three are found in the file, the others when a row becomes tokens."""


def left_out_in_words(counts: Mapping[str, object]) -> str:
    """Return how many rows are left out, and how many for each reason; empty where none is.

    Args:
        counts: Rows for each reason, by the names in `LEFT_OUT`, as a log has them: a reason of another version is
            named as it is, and what is no number is passed over.
    """
    known = {reason: count for reason, count in counts.items() if type(count) is int and count > 0}
    reasons = ", ".join(f"{count:,} {LEFT_OUT.get(reason, reason)}" for reason, count in known.items())
    return f"{sum(known.values()):,} left out ({reasons})" if known else ""
