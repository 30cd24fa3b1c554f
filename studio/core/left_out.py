"""Why rows are left out of a training, in words: the one list for checks, set-up, runs and their reports."""

from collections.abc import Mapping

LEFT_OUT = {
    "no_answer": "without an answer",
    "empty_answer": "with an empty answer",
    "empty_text": "with an empty text",
    "nothing_learnt": "whose answers are all marked as not to be learnt",
    "same_answers": "whose preferred and rejected answers are the same",
    "refused_by_template": "that the chat template refuses, or that are not found in what it writes",
    "nothing_to_learn": "without a token to learn within train.seq_len",
    "side_left_out": "of which the chosen or the rejected answer is left out",
    "side_split": "whose answers the chat template renders one by one",
    "prompts_differ": "whose prompt the chat template does not write the same for both answers",
}
"""Words for each reason. The first five are found in the file, the others when a row becomes tokens."""

BAD_ROWS = {
    "bad_json": "that are not JSON",
    "bad_csv": "that are not CSV",
    "not_utf8": "that are not UTF-8",
    "too_long": "that are too long",
    "not_an_object": "that are no objects",
    "wrong_columns": "with columns that make no row",
    "mixed_formats": "of another format than the first",
    "wrong_type": "with a value of the wrong type",
    "not_text": "without text where text must be",
    "unknown_role": "with an unknown role",
    "lone_surrogate": "with half of a surrogate pair",
    "media": "with pictures, sound or films",
    "bad_call": "with a call of a tool that is none",
    "bad_tools": "with tools that are none",
    "result_without_call": "with a result that no call asked for",
    "bad_history": "with a history that is none",
    "bad_context": "with a context that is no text",
    "bad_documents": "with documents that are none",
    "bad_template_kwargs": "with variables for the chat template that are none",
    "reasoning": "with reasoning that cannot be learnt",
    "fractional_weight": "with another weight than 0 or 1",
    "bad_span": "with ranges to learn that do not fit the text",
    "untrained_message": "with a turn that must not be learnt, where every token is",
    "preference_pair": "with two answers, where one is learnt",
    "desirable_label": "with a label, where every answer is learnt alike",
    "no_pair": "without two answers",
    "no_prompt": "with two answers and no prompt",
    "no_label": "without a label",
    "message_tree": "that are one message of a tree",
    "bad_prompt": "that lack a column of data.prompt",
}
"""Words for rows that are wrong and left out by choice (`data.on_bad_row`); other kinds are named as they are."""


def reason(kind: str) -> str:
    """Return in words why rows are left out, such as `without an answer`; one without words is named as it is."""
    return LEFT_OUT.get(kind) or BAD_ROWS.get(kind, kind)


def left_out_in_words(counts: Mapping[str, object]) -> str:
    """Return how many rows are left out, and how many for each reason; empty where none is.

    Args:
        counts: Rows for each reason, by the names in `LEFT_OUT`, as a log has them: a reason of another version is
            named as it is, and what is no number is passed over.
    """
    known = {kind: count for kind, count in counts.items() if type(count) is int and count > 0}
    reasons = ", ".join(f"{count:,} {reason(kind)}" for kind, count in known.items())
    return f"{sum(known.values()):,} left out ({reasons})" if known else ""
