"""The spectrum of a model's Hessian over all data and over batches, and the largest stable learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate import evaluating
from lowdim.diagnose.batch_lr.parts import Parts
from lowdim.diagnose.batch_lr.theory import OPTIMIZERS, BatchExtremes, batch_extremes, hessian_variance, max_lr
from lowdim.diagnose.core.curvature import hessian_matvec, mean_hessian, twice_differentiable
from lowdim.diagnose.core.quadrature import Quadrature, lanczos_quadrature, plot_spectrum
from lowdim.errors import check_choice, check_int
from lowdim.linalg import Operator, stream
from lowdim.results import Result

__all__ = ["BatchSpectrum", "batch_spectrum"]


@dataclass(frozen=True, kw_only=True)
class BatchSpectrum(Result):
    """Extreme eigenvalues of the Hessian over all data and over batches, each with its bound, and the rates that follow.

    Attributes:
        optimizer: "sgd" or "adam".
        batch_size, n_data, n_params: `B`, samples, trained parameters.
        largest, smallest: over all data, from the outermost Lanczos nodes.
        largest_bound, smallest_bound: an eigenvalue lies within this distance of them.
        variance: `s²`, of an entry of one sample's Hessian.
        predicted: extremes of a batch by random matrix theory.
        measured_largest, measured_smallest: of batches, means over them.
        measured_bound: the largest of the batches' bounds on these.
        spread: standard deviation of the largest over batches; 0 for one batch.
        max_lr: by theory, an upper estimate at small batches; infinity where nothing limits it.
        measured_lr: `2 / measured_largest`, SGD's rate for batches as they are; infinity without positive curvature.
        nodes, weights, bounds: the quadrature over all data, ascending `(m,)`.
        products: matrix-vector products spent; one over all data counts once.
    """

    optimizer: str
    batch_size: int
    n_data: int
    n_params: int
    largest: float
    smallest: float
    largest_bound: float
    smallest_bound: float
    variance: float
    predicted: BatchExtremes
    measured_largest: float
    measured_smallest: float
    measured_bound: float
    spread: float
    max_lr: float
    nodes: Tensor
    weights: Tensor
    bounds: Tensor
    products: int

    @property
    def measured_lr(self) -> float:
        """`2 / measured_largest`."""
        return 2.0 / self.measured_largest if self.measured_largest > 0.0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The fields and `measured_lr` as strict JSON; infinity is null."""
        return {**super().to_dict(), "measured_lr": self.measured_lr if self.measured_lr < math.inf else None}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each node of the spectrum over all data."""
        return Quadrature(self.nodes, self.weights, self.bounds).rows()

    def plot(self, *, ax: Any = None) -> Any:
        """The spectrum over all data; lines at the batches' measured and predicted extremes."""
        axes = plot_spectrum(self._axes(ax), self.nodes, self.weights, self.bounds)
        for value, color, name in (
            (self.measured_largest, "C1", f"measured, batches of {self.batch_size}"),
            (self.measured_smallest, "C1", None),
            (self.predicted.largest, "C2", "predicted"),
            (self.predicted.smallest, "C2", None),
        ):
            axes.axvline(value, color=color, linestyle="--", label=name)
        axes.legend()
        return axes

    @property
    def summary(self) -> str:
        """One line: eigenvalues with their bounds, and rates."""
        whole = f"largest eigenvalue {self.largest:.4g} ± {self.largest_bound:.1g} over all {self.n_data} samples"
        part = (
            f"{self.measured_largest:.4g} ± {self.measured_bound:.1g} (predicted {self.predicted.largest:.4g}, deviation over "
            f"batches {self.spread:.2g}) over {self.batch_size}"
        )
        rate = f"largest stable rate of {self.optimizer}: {self.max_lr:.3g} by theory"
        return f"{whole}, {part}; {rate}; 2 / measured {self.measured_lr:.3g}"


def batch_spectrum(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    inputs: Any,  # (n, …), or a mapping of such
    targets: Any = None,  # (n, …)
    batch_size: int | None = None,
    *,
    optimizer: str = "sgd",
    steps: int = 30,
    batches: int = 4,
    probes: int = 2,
    seed: int = 0,
    callback: Callable[[int, int], None] | None = None,
) -> BatchSpectrum:
    """Measure what a batch size does to the curvature of a model's loss, and the largest learning rate that it allows.

    Formula: Lanczos quadrature of the Hessian over all data and over random batches (`lanczos_quadrature`), the noise from
    random vectors (`hessian_variance`), prediction and rate from both (`batch_extremes`, `max_lr`).

    Args:
        model: its trained parameters are those that require gradients. It runs in evaluation mode and is restored.
        loss_fn: `loss_fn(model(inputs), targets)`, a mean. For dict batches of transformers (`inputs` a mapping with labels,
            `targets=None`) `loss_fn(model, batch)`, or None for `model(**batch).loss`.
        inputs: all samples, a tensor or a mapping of tensors with one first dimension.
        targets: theirs.
        batch_size: `B`, in [1, n]; required. Products over all data run in parts of this size, weighted by the labels that
            count (those that are not −100).
        optimizer: "sgd" or "adam".
        steps: Lanczos steps, >= 1; fewer where the space is complete.
        batches: batches that are measured, >= 1.
        probes: random vectors for the variance, >= 1.
        seed: of batches and vectors, >= 0.
        callback: called as `callback(products, total)` after each product.

    Returns:
        A `BatchSpectrum`.

    Raises:
        TypeError: no batch size; loss and targets that do not fit together.
        ValueError: an option out of range, a batch larger than the data, lengths that differ, no trained parameter, a loss
            that is not finite or cannot be differentiated twice.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import batch_spectrum
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(32, 4), torch.randint(2, (32,))
        >>> found = batch_spectrum(model, torch.nn.functional.cross_entropy, x, y, 8, steps=10)
        >>> found.measured_largest > found.largest > 0, found.n_params, found.products
        (True, 23, 60)

    Products: `(1 + batches) (steps + probes)`, each about three gradients of its data; memory `steps · P` numbers. The theory
    takes the noise for a Wigner matrix; that of real networks is aligned with the outliers, so use `measured_lr` at small
    batches.

    Source: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural
    Network Training", JMLR 23 (173), 2022, arXiv 2006.09092.
    """
    if batch_size is None:
        raise TypeError("batch_size is required: the size of a batch in training")
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_int("steps", steps, 1)
    check_int("batches", batches, 1)
    check_int("probes", probes, 1)
    check_int("seed", seed, 0)
    data = Parts(model, loss_fn, inputs, targets)
    check_int("batch_size", batch_size, 1, data.n)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(f"{type(model).__name__} has no parameter that requires gradients")
    P = sum(p.numel() for p in params)
    draw = stream(seed, "batch_spectrum")
    chosen = [torch.randperm(data.n, generator=draw)[:batch_size] for _ in range(batches)]
    signs = torch.randint(0, 2, (probes, P), generator=draw).float().mul_(2).sub_(1)
    start = torch.randn(P, generator=draw)
    counter = _Counter(callback, (1 + batches) * (min(steps, P) + (probes if batch_size < data.n else 0)))

    def over(parts: Iterable[tuple[Tensor, float]]) -> Operator:
        return counter(mean_hessian([(partial(data.loss, rows), weight) for rows, weight in parts], params))

    with evaluating(model), twice_differentiable(model):
        full = over(data.split(batch_size))
        whole = lanczos_quadrature(full, start, steps=steps)
        found = [
            lanczos_quadrature(counter(hessian_matvec(partial(data.loss, rows), params)), start, steps=steps) for rows in chosen
        ]
        noisy = [over([(rows, 1.0)]) for rows in chosen]
        variance = hessian_variance(full, noisy, P, batch_size, n_data=data.n, probes=signs)
    tops = [float(each.nodes[-1]) for each in found]
    largest, smallest = float(whole.nodes[-1]), float(whole.nodes[0])
    return BatchSpectrum(
        optimizer=optimizer,
        batch_size=batch_size,
        n_data=data.n,
        n_params=P,
        largest=largest,
        smallest=smallest,
        largest_bound=float(whole.bounds[-1]),
        smallest_bound=float(whole.bounds[0]),
        variance=variance,
        predicted=batch_extremes(largest, smallest, variance, P, batch_size, n_data=data.n),
        measured_largest=statistics.fmean(tops),
        measured_smallest=statistics.fmean(float(each.nodes[0]) for each in found),
        measured_bound=max(max(float(each.bounds[0]), float(each.bounds[-1])) for each in found),
        spread=statistics.stdev(tops) if len(tops) > 1 else 0.0,
        max_lr=max_lr(largest, variance, P, batch_size, n_data=data.n, optimizer=optimizer),
        nodes=whole.nodes,
        weights=whole.weights,
        bounds=whole.bounds,
        products=counter.done,
    )


class _Counter:
    """Counts the products of all operators that went through it, and reports each."""

    def __init__(self, callback: Callable[[int, int], None] | None, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, operator: Operator) -> Operator:
        def product(vector: Tensor) -> Tensor:
            found = operator(vector)
            self.done += 1
            if self.callback is not None:
                self.callback(self.done, self.total)
            return found

        return Operator(product, operator.n, dtype=operator.dtype, device=operator.device)
