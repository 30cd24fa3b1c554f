"""An exponential mean without a bias at its start. Knows no widget."""

import math
from collections.abc import Iterable


class Smoother:
    """Exponential moving average without the pull towards zero at the start (the bias correction of Adam)."""

    def __init__(self, keep: float = 0.9) -> None:
        """Weigh the past with `keep`.

        Raises:
            ValueError: `keep` is not at least 0 and below 1.
        """
        if not 0 <= keep < 1:
            raise ValueError(f"found keep {keep}; wanted at least 0 and below 1")
        self._keep = keep
        self._mean = 0.0
        self._weight = 0.0

    def feed(self, values: Iterable[float]) -> list[float]:
        """Return the mean after each value; a non-finite value is returned as it is and does not enter the mean."""
        means = []
        for value in values:
            if not math.isfinite(value):
                means.append(value)
                continue
            self._mean = self._keep * self._mean + (1 - self._keep) * value
            self._weight = self._keep * self._weight + (1 - self._keep)
            means.append(self._mean / self._weight)
        return means
