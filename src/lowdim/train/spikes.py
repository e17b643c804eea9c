"""An alarm for losses that jump."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

__all__ = ["SpikeAlarm"]


class SpikeAlarm:
    """Distinguishes a jump of the loss from its usual noise.

    Formula: with the median `M` and `D`, 1.4826 times the median distance from it, of the last `window` losses, a loss above
    `M + max(factor · D, share · M)` is a spike. Spikes do not enter the window, so a loss that stays high is reported
    repeatedly.

    Args:
        patience: number of losses before any loss can be a spike.

    Example:
        >>> from lowdim.train.spikes import SpikeAlarm
        >>> alarm = SpikeAlarm(patience=4)
        >>> [alarm.spike(loss) for loss in (3.0, 2.9, 3.1, 2.8, 2.9, 9.0)]
        [False, False, False, False, False, True]
    """

    def __init__(self, *, window: int = 50, patience: int = 20, factor: float = 6.0, share: float = 0.2):
        self.patience, self.factor, self.share = patience, factor, share
        self._seen: deque[float] = deque(maxlen=window)

    def spike(self, loss: float) -> bool:
        """Whether this loss is a spike; otherwise it enters the window."""
        if len(self._seen) >= self.patience and loss > self.threshold():
            return True
        self._seen.append(loss)
        return False

    def threshold(self) -> float:
        """The current threshold for spikes."""
        middle = statistics.median(self._seen)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self._seen)
        return middle + max(self.factor * spread, self.share * abs(middle))

    def recall(self, losses: Iterable[float]) -> list[bool]:
        """Fill the window with the losses of a resumed run; returns which of them were spikes."""
        return [self.spike(loss) for loss in losses]
