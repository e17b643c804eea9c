"""The search of each system."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lowdim.errors import UnknownNameError, listed
from lowdim.jobs.budgets.budget import Budget, Fitted
from lowdim.jobs.budgets.cache import fit_cache
from lowdim.jobs.budgets.codes import fit_codes
from lowdim.jobs.budgets.low_rank import fit_lord, fit_pela, fit_welore
from lowdim.jobs.budgets.sparsity import fit_sparsity
from lowdim.jobs.systems import Compressor

__all__ = ["check_budget_options", "fit_budget", "looks_at_samples"]

#: Slug -> its search, and the options that the search finds.
_SEARCHES: dict[str, tuple[Callable[..., Fitted], tuple[str, ...]]] = {
    "lord": (fit_lord, ("rank", "rank_ratio", "param_ratio")),
    "pela": (fit_pela, ("rank", "compression_ratio")),
    "welore": (fit_welore, ("target", "threshold")),
    "lr2vq": (fit_codes, ()),
    "wina": (fit_sparsity, ("sparsity",)),
    "matryoshka-kv": (fit_cache, ("budget", "key_ranks", "value_ranks")),
}


#: Those whose search looks at samples.
_LOOKING = frozenset({"lord", "wina", "matryoshka-kv"})


def looks_at_samples(method: Compressor) -> bool:
    """Whether the search looks at samples."""
    return method.entry.slug in _LOOKING


def check_budget_options(method: Compressor, given: Mapping[str, Any]) -> None:
    """Raise unless the method has a search, and the options leave it something to find.

    Raises:
        UnknownNameError: it has none. ValueError: an option that the search finds.
    """
    slug = method.entry.slug
    if slug not in _SEARCHES:
        raise UnknownNameError(f"a budget is met by {listed(sorted(_SEARCHES))}; {slug} has nothing to search for")
    found = [name for name in _SEARCHES[slug][1] if name in given]
    if found:
        raise ValueError(f"a budget determines {' and '.join(found)} of {slug}; give one or the other")


def fit_budget(
    method: Compressor, given: Mapping[str, Any], model: nn.Module, batches: Sequence[Any], budget: Budget
) -> Fitted:
    """Settings of a system with which the model meets a budget; the model is unchanged.

    Args:
        given: options of the system.
        batches: samples, for systems whose search looks at outputs.

    Raises:
        UnknownNameError, ValueError: see `check_budget_options`.
        BudgetError: no settings meet the budget; the smallest size that some do is named.

    Example:
        >>> from torch import nn
        >>> from lowdim.jobs import compressor
        >>> from lowdim.jobs.budgets import Budget, fit_budget
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        >>> fitted = fit_budget(compressor("pela"), {}, model, [], Budget.parse("0.5x"))
        >>> sorted(fitted.config.rank), fitted.allowed <= 0.5 * fitted.dense
        (['0', '2'], True)
    """
    check_budget_options(method, given)
    return _SEARCHES[method.entry.slug][0](method, given, model, batches, budget)
