"""Learning from pairs of answers to one prompt: direct preference optimisation (DPO) and odds ratios (ORPO).

DPO (Rafailov et al. 2023, equation 7) compares how much more likely than under a reference the model finds the chosen
and the rejected answer. The reference is the model with its adapter switched off: one base in memory. Its
log-probabilities never change, so they are computed once, before the first step (`jobs.train.reference`). With
`train.label_smoothing` it is robust DPO (Chowdhury et al. 2024). ORPO (Hong et al. 2024, equations 4 to 7) needs no
reference: it learns the chosen answer, and adds the odds ratio between both.

Sums and means are those of TRL 1.16: DPO sums the log-probabilities of an answer's tokens, ORPO takes their mean. Both
losses are means over pairs, however these are cut into micro-batches. In TRL's ORPO the chosen answers' own loss is a
mean over the tokens of a micro-batch; with one pair in it that is the same.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from studio.core.recipe import Recipe
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Encoding, Example
from studio.jobs.base.data.template import Warn
from studio.jobs.base.device import sent
from studio.jobs.train.head import TokenLoss
from studio.jobs.train.objectives import FIGURES, Batch, Objective
from studio.jobs.train.objectives.pairs import Pair, Pairs, encode_pairs
from studio.jobs.train.objectives.supervised import collate, pack
from studio.probe.data import Row

_COUNTS, _ANSWERS, _REFERENCE = "learnt_tokens", "answer_tokens", "reference"
"""What a batch of pairs holds besides the model's arguments: how many tokens of each sequence have a label; the places
of an answer's among the chosen sequences', where their prompts have labels, too; the reference's log-probabilities."""

_LN_2 = 0.6931471805599453
_CERTAIN = -torch.finfo(torch.float32).eps
"""Mean log-probabilities above it are rounding; at 0, which fp32 rounds those of certain answers to, the odds and their
slope have no end."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs of a chosen and a rejected answer, and the loss that they are learnt by.

    Attributes:
        odds: ORPO's loss; else DPO's.
        beta: DPO: how closely the model is held to the reference. ORPO: the weight of the odds ratio, its lambda.
        label_smoothing: Share of the pairs that are taken to be the wrong way round, below one half; DPO alone.
        answers_only: Whether ORPO learns the chosen answer, as in its paper, or its prompt as well, as TRL does.
    """

    odds: bool
    beta: float = 0.1
    label_smoothing: float = 0.0
    answers_only: bool = True
    packs: ClassVar[bool] = True

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        recipe: Recipe,
        *,
        warn: Warn,
        left_out: Counter[str] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Pairs:
        """Return the rows as pairs of sequences of at most `train.seq_len` tokens each; labels are on the answers."""
        return encode_pairs(rows, tokenizer, Encoding.of(recipe), warn=warn, left_out=left_out, progress=progress)

    def longest(self, seq_len: int, vocabulary: int) -> Pair:
        """Return a pair of sequences of `seq_len` tokens that all have a label."""
        ids = (np.arange(seq_len) % max(1, vocabulary)).astype(np.int32)
        side = Example(ids, ids.copy())
        return Pair.of(side, side)

    def batch(self, examples: Sequence[Pair], *, pad_id: int, device: torch.device, packed: bool = False) -> Batch:
        """Return the model's arguments for both sequences of each pair: chosen, rejected, chosen, and so on."""
        sides = [side for pair in examples for side in pair.sides]
        extra: Batch = {}
        if self.odds and not self.answers_only:
            places = (np.flatnonzero(side.labels[1:] != IGNORED) for side in sides[::2])
            extra[_ANSWERS] = [sent(torch.from_numpy(each), device) for each in places]
            sides[::2] = [Example(side.input_ids, side.input_ids) for side in sides[::2]]
        if not self.odds:
            reference = [pair.reference for pair in examples]
            extra[_REFERENCE] = sent(torch.tensor(reference, dtype=torch.float32), device)
        extra[_COUNTS] = [_learnt(side) for side in sides]
        return (pack(sides, device) if packed else collate(sides, pad_id, device)) | extra

    def loss(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the summed loss of the pairs, fp32 scalar."""
        return self.metric(tokens, batch).sum()

    def denominator(self, examples: Sequence[Pair]) -> int:
        """Return the number of pairs."""
        return len(examples)

    def metric(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the loss of each pair, fp32 `[pairs]`; the batch gets the pairs' figures."""
        if not self.odds:
            sums = self.log_probabilities(tokens, batch)
            gained = sums - batch[_REFERENCE]
            batch[FIGURES] = _figures(sums, self.beta * gained)
            return dpo_losses(gained, self.beta, self.label_smoothing)
        learnt = _by_sequence(tokens, batch)
        answers = list(learnt)
        if not self.answers_only:
            answers[::2] = [part[places] for part, places in zip(learnt[::2], batch[_ANSWERS], strict=True)]
        means = -torch.stack([part.mean() for part in answers]).view(-1, 2)
        batch[FIGURES] = _figures(means, self.beta * means)
        return torch.stack([part.mean() for part in learnt[::2]]) + self.beta * odds_losses(means)

    def log_probabilities(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the summed log-probabilities of the chosen and the rejected answers, fp32 `[pairs, 2]`, in nats."""
        return -torch.stack([part.sum() for part in _by_sequence(tokens, batch)]).view(-1, 2)


def needs_reference(objective: Objective) -> bool:
    """Return whether pairs must know their answers' log-probabilities under the reference."""
    return isinstance(objective, Preferences) and not objective.odds


def log_probability_tokens(objective: Objective, example: Any) -> int:
    """Return of how many tokens a chosen answer's log-probability is: all that it has, or one where it is a mean."""
    return _learnt(example.sides[0]) if needs_reference(objective) else 1


def dpo_losses(gained: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return DPO's loss of each pair `[pairs]`.

    Args:
        gained: Log-probabilities of the chosen and the rejected answers less those under the reference `[pairs, 2]`.
        beta: How closely the model is held to the reference.
        label_smoothing: Share of the pairs that are taken to be the wrong way round.
    """
    margin, flipped = beta * (gained[:, 0] - gained[:, 1]), label_smoothing
    if not flipped:
        return -logsigmoid(margin)
    return (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)


def odds_losses(means: Tensor) -> Tensor:
    """Return ORPO's odds ratio loss of each pair `[pairs]`, without its weight.

    Args:
        means: Mean log-probabilities of a token of the chosen and the rejected answers `[pairs, 2]`.
    """
    means = means.clamp(max=_CERTAIN)
    odds = means - _log1mexp(means)
    return -logsigmoid(odds[:, 0] - odds[:, 1])


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x below 0, exact near 0 and far from it (Maechler 2012)."""
    near = x > -_LN_2
    # Both branches go backward, so each gets a number that it can take where the other one counts.
    close, far = torch.where(near, x, -_LN_2), torch.where(near, -_LN_2, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def _by_sequence(tokens: TokenLoss, batch: Batch) -> Sequence[Tensor]:
    """Return the losses of the labelled tokens of each sequence, fp32 `[labelled]` each."""
    inputs = {name: value for name, value in batch.items() if name not in (_COUNTS, _ANSWERS, _REFERENCE, FIGURES)}
    # A trained head gives its losses under autocast's rules; sums of many tokens are taken in fp32.
    losses = tokens.token_losses(**inputs).float()
    return torch.split(losses, batch[_COUNTS])


def _learnt(side: Example) -> int:
    """Return how many labelled tokens are predicted: all but the first, which nothing precedes."""
    return int(np.count_nonzero(side.labels[1:] != IGNORED))


def _figures(log_probabilities: Tensor, rewards: Tensor) -> Tensor:
    """Return the figures of each pair `[pairs, figures]`, in the order of `studio.core.events.PAIR_FIGURES`."""
    said, reward = log_probabilities.detach(), rewards.detach()
    margin = reward[:, 0] - reward[:, 1]
    return torch.stack([margin, (margin > 0).float(), *said.unbind(1), *reward.unbind(1)], dim=1)
