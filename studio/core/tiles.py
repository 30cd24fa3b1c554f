"""How many tokens an MLP, and heads an attention, take at once where rows are long: shared by loop and estimate."""

TILE_TOKENS = 4096
"""A choice: products of so many rows keep a card as busy as larger ones do."""

GROUPED_FROM_TOKENS = 16_384
"""Tokens of a row beyond which a few heads alone keep a card busy; a choice, not a measured optimum."""

_MOST_GROUPS = 8


def tile_tokens(tokens: int) -> int:
    """Return the tokens per tile of a micro-batch; 0 where it is taken whole.

    Args:
        tokens: All tokens of the micro-batch, batch x length.
    """
    return TILE_TOKENS if tokens > TILE_TOKENS else 0


def groups_heads(length: int) -> bool:
    """Return whether attention takes its heads in groups in rows of so many tokens."""
    return length > GROUPED_FROM_TOKENS


def head_groups(keys: int) -> int:
    """Return how many groups there are of so many key-value heads; query heads that share one stay together."""
    return next(groups for groups in range(_MOST_GROUPS, 0, -1) if keys % groups == 0)
