"""Mixtures of experts: the words by which a recipe names routed experts, and how many are dequantised at once."""

EXPERTS = "experts"
"""The target that stands for the routed experts of a mixture."""

EXPERT_GROUP_BYTES = 128 * 2**20
"""Most bytes of dequantised weights that are alive at once, where one expert does not take more by itself. A smaller
bound needs more launches: Qwen3-30B-A3B has 7 groups a layer with this one, and 13 with half of it."""


def experts_per_group(count: int, expert_bytes: int) -> int:
    """Return how many experts a group holds, the last one aside, so that groups are about equal.

    Args:
        count: Experts of the layer.
        expert_bytes: Bytes of one expert's wider matrix, dequantised.
    """
    most = max(1, EXPERT_GROUP_BYTES // expert_bytes)
    groups = -(-count // most)
    return -(-count // groups)


def is_of_experts(target: str) -> bool:
    """Whether a target names routed experts, all of them or one of their two stacks, and not linear layers."""
    return target == EXPERTS or target.startswith(f"{EXPERTS}.")
