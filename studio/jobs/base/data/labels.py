"""The label of tokens that are not learnt."""

IGNORED = -100
"""Label of a token that the loss does not count; torch's cross-entropy and transformers use the same number."""
