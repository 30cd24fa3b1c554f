"""How many tokens an MLP takes at once where rows are long: one number shared by the loop and the estimate."""

TILE_TOKENS = 4096
"""A choice: products of so many rows keep a card as busy as larger ones do."""


def tile_tokens(tokens: int) -> int:
    """Return the tokens per tile of a micro-batch; 0 where it is taken whole.

    Args:
        tokens: All tokens of the micro-batch, batch x length.
    """
    return TILE_TOKENS if tokens > TILE_TOKENS else 0
