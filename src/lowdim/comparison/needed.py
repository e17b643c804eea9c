"""What would show a smaller difference: more seeds, or more test rows."""

from __future__ import annotations

from collections.abc import Callable

from lowdim.comparison.judge import Judgement
from lowdim.records import difference_text

__all__ = ["needed"]

_MOST = 64  # times the seeds or rows of the comparison


def needed(found: Judgement, judged: str) -> str:
    """One sentence: what cannot be seen, and what would halve it; `""` where a difference to every other row is shown.

    With one seed, what the test rows alone cannot tell.
    """
    if found.best is not None or not found.half_width > 0:
        return ""
    seeds, rows, target = found.seeds, found.examples, 1.001 * found.half_width / 2  # half of it, as it is printed
    ways = []
    more_seeds = _least(lambda count: found.half_width_with(count, rows), seeds, target)
    more_rows = _least(lambda count: found.half_width_with(seeds, count), rows, target)
    if more_seeds is not None and not found.one_seed:
        ways.append(f"{more_seeds} seeds instead of {seeds}")
    if more_rows is not None:
        ways.append(f"{more_rows:,} test rows instead of {rows:,}")
    if not ways:
        both = _least(lambda factor: found.half_width_with(seeds * factor, rows * factor), 1, target)
        ways = [f"{seeds * both} seeds and {rows * both:,} test rows"] if both else []
    unseen = f"Two methods that differ by less than {difference_text(judged, found.half_width)} cannot be told apart here"
    return f"{unseen}; half of that would take {', or '.join(ways)}." if ways else f"{unseen}."


def _least(width: Callable[[int], float], start: int, target: float) -> int | None:
    """The smallest count from `start` on whose half-width is at most the target; None above 64 times `start`."""
    low, high = start, _MOST * start
    if width(high) > target:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if width(middle) <= target else (middle + 1, high)
    return low
