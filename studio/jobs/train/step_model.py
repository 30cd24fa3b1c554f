"""The model as the loop sees it: a module that takes a batch and returns the summed loss."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import masking_utils

from studio.core.recipe import Loss
from studio.jobs.base.swapped import swapped
from studio.jobs.train.head import SplitModel, TokenLoss, WholeModel, agrees, token_loss
from studio.jobs.train.objectives import Batch, Objective
from studio.jobs.train.objectives.preference import Preferences
from studio.jobs.train.objectives.supervised import SUPERVISED

_PROBE_TOKENS = 48


class StepModel(nn.Module):
    """Computes an objective's summed loss of a batch, without whole logits where that gives the model's own loss.

    peft casts every adapted layer's input to fp32, and autocast casts it back to 16 bits. peft's cast is switched off,
    so that both disappear.
    """

    def __init__(
        self,
        model: PeftModel,
        loss: Loss,
        autocast: Callable[[], AbstractContextManager[Any]],
        objective: Objective = SUPERVISED,
    ) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                # For good, not only during `forward`: a checkpointed layer is computed again in the backward pass,
                # after `forward` has ended, and in the same way (with dropout torch would refuse another one).
                module.cast_input_dtype_enabled = False
        self.objective = objective
        self._autocast = autocast
        self._tokens: TokenLoss = token_loss(self.causal, loss)

    @property
    def causal(self) -> nn.Module:
        """The causal language model inside the peft model, adapters included."""
        return cast(nn.Module, self.model.get_base_model())

    @property
    def loss_path(self) -> Loss:
        """The loss that is used: the one that was asked for where model and head allow it, else a simpler one."""
        return self._tokens.path

    def prove(self, batch: Batch) -> bool:
        """Compare the loss without whole logits with the model's own on a few tokens; use the latter if they differ.

        Args:
            batch: Its first row's first tokens are the ones; every token then has a label.

        Returns:
            Whether whole logits are avoided.
        """
        if isinstance(self._tokens, SplitModel):
            ids = batch["input_ids"][:1, :_PROBE_TOKENS]
            probe = {"input_ids": ids, "attention_mask": None, "labels": ids.cpu()}
            if not agrees(self._tokens, probe, self._autocast):
                self._tokens = WholeModel(self.causal)
        return self.loss_path != "full"

    def forward(self, batch: Batch) -> Tensor:
        """Return the objective's summed loss of a batch, fp32 scalar."""
        with self._autocast(), _known_masks():
            return self.objective.loss(self._tokens, batch)

    @torch.no_grad()
    def metric(self, batch: Batch) -> Tensor:
        """Return what the objective measures of each row of a batch, fp32 `[rows]`, without gradients."""
        with self._autocast(), _known_masks():
            return self.objective.metric(self._tokens, batch)

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor:
        """Return the log-probabilities of the answers of pairs with the adapter switched off, fp32 `[pairs, 2]`."""
        with self.model.disable_adapter(), self._autocast(), _known_masks():
            return cast(Preferences, self.objective).log_probabilities(self._tokens, batch)

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Let the model compute the loss of labelled tokens meanwhile, whatever is learnt."""
        learnt, self.objective = self.objective, SUPERVISED
        try:
            yield
        finally:
            self.objective = learnt


@contextmanager
def _known_masks() -> Iterator[None]:
    """Let transformers not look into masks and positions on the card, which would wait for it in every micro-batch.

    A batch has a mask only where it hides something, and what tells packed rows apart is our attention.
    """
    with ExitStack() as stack:
        for name, answer in (("fast_all", False), ("find_packed_sequence_indices", None)):
            if name in vars(masking_utils):  # other versions may look in other ways, and wait
                stack.enter_context(swapped(masking_utils, name, lambda *_, answer=answer: answer))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Put the model in evaluation mode without gradients, and restore its former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
