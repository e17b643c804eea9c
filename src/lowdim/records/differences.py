"""A difference of two methods in words: of shares in points (hundredths), of everything else in its own unit."""

from __future__ import annotations

import math

from lowdim.records.comparison import metric_title

__all__ = ["difference_text", "in_points", "with_error"]

#: Shares, of which a hundredth is a point.
_SHARES = ("accuracy", "f1", "auc", "exact-match", "entity-f1", "token-accuracy")


def in_points(judged: str) -> bool:
    """Whether differences of this metric are printed in points: hundredths of a share.

    Example:
        >>> from lowdim.records import in_points
        >>> in_points("accuracy"), in_points("f1-binary"), in_points("loss")
        (True, True, False)
    """
    return judged in _SHARES or judged.startswith("f1-")


def with_error(value: float, half_width: float | None) -> str:
    """A number with the half-width of its interval, which has two digits.

    Example:
        >>> from lowdim.records import with_error
        >>> with_error(1.6234, 0.42), with_error(0.0951, 0.0123), with_error(31.2, 14)
        ('1.62 ± 0.42', '0.095 ± 0.012', '31 ± 14')
    """
    if not half_width:
        return f"{value:.2g}" if value and abs(value) < 100 else f"{value:.0f}"
    digits = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{value:.{digits}f} ± {half_width:.{digits}f}"


def difference_text(judged: str, difference: float, half_width: float | None = None) -> str:
    """A difference with its unit.

    Args:
        judged: what is judged, as in `JudgementRecord`.

    Example:
        >>> from lowdim.records import difference_text
        >>> difference_text("accuracy", 0.016, 0.004), difference_text("loss", 0.0951, 0.0123)
        ('1.6 ± 0.4 points of accuracy', '0.095 ± 0.012 in loss')
    """
    title = metric_title(judged).replace("-", " ")
    if in_points(judged):
        points, error = 100 * difference, 100 * (half_width or 0.0)
        digits = 2 if 0 < error < 0.1 else 1
        return f"{points:.{digits}f}{f' ± {error:.{digits}f}' if error else ''} points of {title}"
    return f"{with_error(difference, half_width)} in {title}"
