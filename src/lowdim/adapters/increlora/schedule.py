"""The learning rate of parameters that are added during training."""

from __future__ import annotations

from collections.abc import Callable

from lowdim.errors import check_int

__all__ = ["increlora_lr_lambda"]


def increlora_lr_lambda(warmup: int, total: int, start: int) -> Callable[[int], float]:
    """The factor of the learning rate, at each global step, of a parameter group that was added at step `start`.

    0 up to `start`, then `warmup` steps up to 1, then down to 0 at step `total`, all linear. For
    `torch.optim.lr_scheduler.LambdaLR`, whose lists `adapted.follow(scheduler, warmup=..., total=...)` keeps as long as the
    optimizer's.

    Example:
        >>> from lowdim.adapters import increlora_lr_lambda
        >>> factor = increlora_lr_lambda(warmup=2, total=12, start=4)
        >>> [factor(step) for step in (0, 4, 5, 6, 9, 12)]
        [0.0, 0.0, 0.5, 1.0, 0.5, 0.0]
    """
    check_int("warmup", warmup, 0)
    check_int("total", total, 1)
    check_int("start", start, 0)

    def factor(step: int) -> float:
        if step < start:
            return 0.0
        if step < start + warmup:
            return (step - start) / warmup
        return max(0.0, (total - step) / max(1, total - start - warmup))

    return factor
