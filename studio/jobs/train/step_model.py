"""The model as the loop sees it: a batch in, the summed loss out. One module, which several devices can wrap."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from studio.core.recipe import Loss
from studio.jobs.train.head import SplitModel, agrees, full_loss_sum, full_row_losses, rows_of, split

_PROBE_TOKENS = 48


class StepModel(nn.Module):
    """Summed loss of a batch, without whole logits where that is proven equal to the model's own.

    peft casts every adapted layer's input to fp32 and autocast casts it back; under autocast both casts are left out.
    """

    def __init__(self, model: PeftModel, loss: Loss, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                # For good, not around the forward: a checkpointed layer is computed again in the backward, outside of
                # it, and would be computed differently there (with dropout torch refuses such a recomputation).
                module.cast_input_dtype_enabled = False
        self._autocast = autocast
        self._parts: SplitModel | None = split(self.causal, loss) if loss != "full" else None

    @property
    def causal(self) -> nn.Module:
        """The causal language model inside the peft model, adapters included."""
        return cast(nn.Module, self.model.get_base_model())

    @property
    def loss_path(self) -> Loss:
        """Which loss is used: the one that was asked for, where model and head allow it."""
        return self._parts.path if self._parts else "full"

    def prove(self, batch: dict[str, Tensor]) -> bool:
        """Compare both loss paths on the first tokens of a batch; keep the model's own where they differ.

        Returns:
            Whether whole logits are avoided.
        """
        if self._parts is None:
            return False
        short = {name: tensor[:1, :_PROBE_TOKENS] for name, tensor in batch.items()}
        short["labels"] = short["input_ids"].clone()
        if not agrees(self._parts, self.causal, short, self._autocast):
            self._parts = None
        return self._parts is not None

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss, fp32 scalar, of a batch: `labels` `[batch, seq]` and what the model takes."""
        with self._autocast():
            if self._parts is not None:
                return self._parts.loss_sum(**batch)
            return full_loss_sum(self.causal, **batch)

    @torch.no_grad()
    def row_losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss of each row of a batch, fp32 `[rows]`: as `forward`, told apart, without gradients."""
        rows = rows_of(batch["labels"], batch.get("row_lengths"))
        with self._autocast():
            if self._parts is not None:
                return self._parts.row_losses(rows, **batch)
            return full_row_losses(self.causal, rows, **batch)


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Put the model in evaluation mode without gradients, and back as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
