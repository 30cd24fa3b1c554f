"""Labels of tokens."""

IGNORED = -100
"""Label of a token that is not trained (transformers' and torch's convention)."""
