"""Tables of forecasts for the terminal, and the layers that a method would change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lowdim.catalogue import Variant, variant
from lowdim.methods import Setup, strategy_for
from lowdim.plan.fake import Subject, fake_mode
from lowdim.plan.fitting import Fit
from lowdim.plan.forecasting import NOT_COUNTED, Forecast
from lowdim.results import Result
from lowdim.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Touched", "fit_table", "shows", "table"]


def table(
    forecasts: Sequence[Forecast], budget: int | str | None = None, rates: Mapping[str, float | None] | None = None
) -> Table:
    """The forecasts as a table of 80 columns, least memory first, each with the verdict on the budget.

    All sizes but the file's are in one unit, which the title names; activations include workspace.

    Args:
        budget: bytes, or a text such as `"8GiB"`; None uses each forecast's own.
        rates: learning rate by method, None where there is none; they get a column.
    """
    from rich.table import Table

    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    limits = {f.budget_bytes for f in forecasts if f.budget_bytes is not None} if limit is None else {limit}
    unit, scale, digits = _unit(max((f.total for f in forecasts), default=0))
    title = f"{forecasts[0].model}: memory at the peak of training, in {unit}" if forecasts else "memory of training"
    shown = Table(title=title, caption=_caption(forecasts, limits), box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("method")
    for name in ("trained", "weights", "grads", "state", "activ."):
        shown.add_column(name, justify="right")
    shown.add_column("peak", justify="right", style="bold")
    if limits:
        shown.add_column("fits")
    shown.add_column("file", justify="right")
    shown.add_column("step", justify="right")
    if rates is not None:
        shown.add_column("rate", justify="right")
    for f in sorted(forecasts, key=lambda f: f.total):
        parts = f.weights, f.gradients, f.optimizer_state, f.activations + f.workspace, f.total
        row = [f.label, _count(f.trained_parameters), *(f"{part / scale:.{digits}f}" for part in parts)]
        if limits:
            allowed = limit if limit is not None else f.budget_bytes
            row.append("" if allowed is None else "[green]yes[/]" if f.total <= allowed else "[red]no[/]")
        row += [format_bytes(f.file_bytes), format_seconds(f.seconds_per_step)]
        if rates is not None:
            lr = rates.get(f.method)
            row.append("" if lr is None else f"{lr:.2g}")
        shown.add_row(*row)
    return shown


def fit_table(fits: Sequence[Fit]) -> Table:
    """How each method fits its budget, as a table of 80 columns: its peak, and the change as options of `lowdim plan`."""
    from rich.table import Table

    title = ""
    if fits:
        f = fits[0].forecast
        passes = f.batch_size * f.accumulate
        title = f"{f.model}: {passes} x {f.sequence_length} tokens a step in {format_bytes(fits[0].budget_bytes)}"
    caption = f"Not counted: {NOT_COUNTED}. Every change keeps the texts of a step."
    shown = Table(title=title, caption=caption, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("method")
    shown.add_column("peak", justify="right", style="bold", no_wrap=True)
    shown.add_column("change")
    for found in fits:
        change = found.flags or "none"
        if not found.fits:
            change = f"[red]{format_bytes(found.missing_bytes)} missing[/]" + (f" with {found.flags}" if found.changes else "")
        shown.add_row(found.label, format_bytes(found.forecast.total), change)
    return shown


def _unit(largest: float) -> tuple[str, int, int]:
    """The unit in which the largest size has one to four digits, its bytes, and the number of decimals to show."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    unit, scale = next((item for item in units.items() if largest < 1000 * item[1]), ("TiB", 2**40))
    return unit, scale, 2 if largest < 10 * scale else 1 if largest < 100 * scale else 0


def _count(number: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _caption(forecasts: Sequence[Forecast], limits: Iterable[int]) -> str:
    if not forecasts:
        return ""
    f = forecasts[0]
    budget = "".join(f"budget {format_bytes(limit)}; " for limit in sorted(limits))
    passes = f", {f.accumulate} batches a step" if f.accumulate > 1 else ""
    words = f", vocabulary {f.vocabulary:,}" if f.vocabulary else ""
    batch = f"batch {f.batch_size} of {f.sequence_length} tokens{passes}{words}"
    spread = f", on each of {f.devices} devices (FSDP2)" if f.devices > 1 else ""
    return f"{budget}{batch}{spread}. Not counted: {NOT_COUNTED}. Times are rough."


@dataclass(frozen=True)
class Touched(Result):
    """A module that a method changes or trains: its name, class, weight's shape, and the number of its trained parameters."""

    name: str
    kind: str
    shape: tuple[int, ...]
    trained: int


def shows(
    model: Any,
    method: str | Variant,
    *,
    task: str = "classify",
    num_labels: int = 2,
) -> list[Touched]:
    """The modules that `method` would swap, project or train, in model order; nothing is allocated.

    Args:
        model: as for `forecast`.

    Raises:
        ValueError: the method cannot train this model; `NoMatchingModuleError` for a pattern that matches nothing.

    Example:
        >>> import torch
        >>> from lowdim.plan import shows
        >>> [(t.name, t.shape, t.trained) for t in shows(torch.nn.Sequential(torch.nn.Linear(30, 20)), "lora")]
        [('0', (20, 30), 400)]
    """
    chosen = method if isinstance(method, Variant) else variant(method)
    subject = Subject.of(model, task=task, num_labels=num_labels)
    with fake_mode():
        from lowdim.models import head_modules

        built = subject.build()
        before = {name: (type(m).__name__, _shape(m)) for name, m in built.named_modules()}
        head = head_modules(built, task)
        applied = strategy_for(chosen).apply(built, Setup(lr=chosen.rates[0], steps=100, head=head, initialise=False))
        if applied.adapted is not None:
            composed = {name.rpartition(".")[0] for name in getattr(applied.adapted, "names", ())}  # SAID: any parameter
            names = {*applied.adapted.layers, *composed, *head}
        elif applied.kind in ("layer", "compress"):
            names = {n for n, m in built.named_modules() if n in before and type(m).__name__ != before[n][0]}
        elif applied.kind == "optimizer":
            projected = {id(p) for g in applied.make_optimizer(1e-3).param_groups if g.get("rank") for p in g["params"]}
            names = {n for n, m in built.named_modules() if any(id(p) in projected for p in m.parameters(recurse=False))}
        else:
            names = {n for n, m in built.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
        return [
            Touched(name, *before[name], sum(p.numel() for p in module.parameters() if p.requires_grad))
            for name, module in built.named_modules()
            if name in names
        ]


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if weight is not None and hasattr(weight, "shape") else ()
