"""What a form takes to be served: an estimate from sizes alone."""

from dataclasses import dataclass
from typing import Any

from studio.core.vram.reserve import CONTEXT_BYTES, LEAST_CONTEXT_BYTES, MOST_CONTEXT_BYTES

CONTEXT_TOKENS = 2048
_KEY_BYTES = 2
_WORKSPACE_SHARE = 0.1
"""Activations and allocator on top of weights and cache at the high end: a choice, not a measurement."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Memory on a CUDA card for one conversation; an estimate.

    Attributes:
        context_tokens: Length of the conversation.
        cache_bytes: Keys and values of that length in 16 bit.
        low_bytes: Weights, cache and the smallest CUDA context seen.
        expected_bytes: With a usual context.
        high_bytes: With the largest context seen, and a tenth for activations and allocator.
        read_bytes_per_token: What must be read from memory for each new token: weights and, at full length, the cache.
            A card's bandwidth over it bounds the tokens per second of one conversation from above.
    """

    context_tokens: int
    cache_bytes: int
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    read_bytes_per_token: int


def serving(config: Any, weight_bytes: int) -> Serving:
    """Return the estimate for weights of a size.

    Args:
        config: Of the model.
        weight_bytes: Of all weights, in the form in which they are held.
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    cache = 2 * int(text.num_hidden_layers) * keys * width * _KEY_BYTES * CONTEXT_TOKENS
    held = weight_bytes + cache
    return Serving(
        CONTEXT_TOKENS,
        cache,
        held + LEAST_CONTEXT_BYTES,
        held + CONTEXT_BYTES,
        int(held * (1 + _WORKSPACE_SHARE)) + MOST_CONTEXT_BYTES,
        held,
    )
