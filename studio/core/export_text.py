"""What an export found out about its result, in words."""

from collections.abc import Mapping
from typing import Any


def export_checks(result: Mapping[str, Any]) -> list[str]:
    """Return what an export's own checks found, a line each.

    Args:
        result: Of the run, from its report.
    """
    golden, loss = result.get("golden"), result.get("loss")
    lines = []
    if isinstance(golden, dict):
        lines.append(
            f"tokens: {golden['conversations']} conversations read the same in training, in the saved tokenizer and in "
            f"llama.cpp; each ends with a stop token: {'yes' if golden['ends_with_stop'] else 'no'}"
        )
    if isinstance(loss, dict):
        lines.append(
            f"answers: KL {loss['mean_kl']:.2g} nats a token to what it was made from, same most likely token at "
            f"{loss['same_top_token']:.1%} of {loss['tokens']} tokens"
        )
    return lines
