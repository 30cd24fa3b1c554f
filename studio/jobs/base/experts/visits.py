"""Which rows of tokens visit which experts, and in which groups of experts the products are made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring experts that are multiplied together.

    Attributes:
        first: Number of the first of them.
        begin: Its first row.
        ends: For each expert of the group, where its rows end, counted from `begin`.
    """

    first: int
    begin: int
    ends: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Number after the last expert."""
        return self.first + len(self.ends)

    @property
    def rows(self) -> slice:
        """Its rows among those sorted by expert."""
        return slice(self.begin, self.begin + self.ends[-1])


@dataclass(frozen=True, slots=True)
class Visits:
    """Which row of the input goes to which expert, sorted by expert.

    Attributes:
        source: For each visit, the row of the input, `[visits]`.
        place: For each visit, the row of the result, `[visits]`.
        results: Rows of the result. A row that no visit fills is zero.
        per_token: How many neighbouring rows of the result are added up.
        groups: The groups in which experts are multiplied.
    """

    source: Tensor
    place: Tensor
    results: int
    per_token: int
    groups: tuple[Group, ...]

    def blank(self, width: int, like: Tensor) -> Tensor:
        """Return a result `[results, width]` to be filled, in the format and on the device of another tensor."""
        filled = self.place.numel() == self.results
        return (like.new_empty if filled else like.new_zeros)((self.results, width))

    def summed(self, result: Tensor) -> Tensor:
        """Return the rows of a result, those of a token added up: always in the same order, and in fp32 inside."""
        return result if self.per_token == 1 else result.view(-1, self.per_token, result.shape[-1]).sum(dim=1)


def rows_by_expert(experts: Tensor, count: int) -> list[int]:
    """Return how many rows visit each expert. The host waits for the card here.

    Args:
        experts: Number of the expert of each row.
        count: Experts in the layer.
    """
    rows: list[int] = torch.bincount(experts, minlength=count).tolist()
    return rows


def routed(chosen: Tensor, count: int, per_group: int) -> Visits:
    """Return the visits of tokens that have chosen their experts.

    Args:
        chosen: `[tokens, per_token]`, numbers of experts.
        count: Experts in the layer.
        per_group: Most experts in a group; 0 for all in one.
    """
    per_token, flat = chosen.shape[-1], chosen.reshape(-1)
    in_order, place = torch.sort(flat, stable=True)
    groups = groups_of(rows_by_expert(in_order, count), per_group)
    return Visits(place // per_token, place, flat.numel(), per_token, groups)


def given(rows: Tensor, count: int, per_group: int) -> Visits:
    """Return the visits where every expert is given a copy of all tokens, zeros for those that did not choose it.

    Llama 4 does so. An expert without biases makes nothing of zeros, and gives them no gradient, so they are left out.

    Args:
        rows: `[experts * tokens, hidden]`.
        count: Experts in the layer.
        per_group: Most experts in a group; 0 for all in one.
    """
    place = visited(rows, count)
    groups = groups_of(rows_by_expert(place // (rows.shape[0] // count), count), per_group)
    return Visits(place, place, rows.shape[0], 1, groups)


def visited(rows: Tensor, count: int) -> Tensor:
    """Return the numbers of the rows that are not all zero. The host waits for the card here.

    Args:
        rows: `[experts * tokens, hidden]`.
        count: Experts in the layer.
    """
    return rows.any(dim=-1).nonzero().squeeze(-1)


def groups_of(rows: Sequence[int], per_group: int) -> tuple[Group, ...]:
    """Return the groups: neighbours that have rows, at most `per_group` of them; or all experts in one group.

    Args:
        rows: How many rows visit each expert.
        per_group: Most experts in a group; 0 for all in one, those without rows included.
    """
    groups: list[Group] = []
    first, begin, ends = 0, 0, list[int]()
    for number, visits in enumerate(rows):
        if ends and per_group and (not visits or len(ends) == per_group):
            groups.append(Group(first, begin, tuple(ends)))
            first, begin, ends = number, begin + ends[-1], []
        if visits or not per_group:
            first = first if ends else number
            ends.append((ends[-1] if ends else 0) + visits)
    if ends and ends[-1]:
        groups.append(Group(first, begin, tuple(ends)))
    return tuple(groups)
