"""How many tokens the chunked loss takes through the head at once: one number shared by the loop and the estimate."""

LOGIT_BYTES = 10
"""Bytes alive per logit of a chunk, counted generously: the 16-bit output, its fp32 copy, one fp32 temporary."""

WORKSPACE_BYTES = 192 * 2**20
"""Most bytes of logits alive at once: a choice, not a measured optimum. 156 tokens at a vocabulary of 128 k."""

_LEAST_TOKENS = 64  # a choice as well: smaller chunks would trade speed for bytes that hardly count


def loss_chunk_tokens(vocabulary: int, tokens: int) -> int:
    """Return the tokens per chunk: as many as the workspace holds, at least 64, at most all of them.

    Args:
        vocabulary: Rows of the head.
        tokens: Labelled tokens of the micro-batch.
    """
    fitting = WORKSPACE_BYTES // (LOGIT_BYTES * vocabulary)
    return max(1, min(tokens, max(_LEAST_TOKENS, fitting)))
