"""Random numbers: where they begin, and what of a model in training mode draws them, such as dropout."""

import random
import re
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_RANDOM = re.compile("drop|jitter|noise")
_READ_AT_USE = ("attention_dropout", "dropout")
"""What some families' layers read from the configuration as they run (Persimmon, BLT)."""


def is_random(module: nn.Module) -> bool:
    """Return whether a module has a probability or a noise of its own, or may read that of a child."""
    read = any(isinstance(child, _DropoutNd) for child in module.children())
    return bool(_chances(module)) or read or isinstance(module, _DropoutNd)


def draws(model: nn.Module) -> bool:
    """Return whether a step of a model draws random numbers."""
    config: Any = getattr(model, "config", None)
    said = () if config is None else (getattr(config.get_text_config(), name, 0) for name in _READ_AT_USE)
    modules = list(model.modules())
    dropped = any(isinstance(module, _DropoutNd) and module.p > 0 for module in modules)
    return dropped or any(map(_chances, modules)) or any(isinstance(value, float) and value > 0 for value in said)


def _chances(module: nn.Module) -> list[float]:
    return [v for name, v in vars(module).items() if _RANDOM.search(name) and isinstance(v, float) and v]


def set_seed(seed: int) -> None:
    """Begin the random numbers of Python, numpy and torch anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes no larger seed
    torch.manual_seed(seed)
