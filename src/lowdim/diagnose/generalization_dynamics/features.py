"""The dynamics of a linear readout on the features of a model's layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.calibrate import capture
from lowdim.calibrate.batches import is_one_batch
from lowdim.diagnose.generalization_dynamics.flow import LinearFlow, Modes
from lowdim.diagnose.generalization_dynamics.theory import as_float64, marchenko_pastur_edges, plot_errors, read_times
from lowdim.errors import check_float, check_int, nearest
from lowdim.linalg import stream
from lowdim.results import Result

__all__ = ["FeatureDynamics", "feature_dynamics"]


@dataclass(frozen=True, kw_only=True)
class FeatureDynamics(Result):
    """A linear readout that is trained on a layer's features by gradient flow.

    Attributes:
        times: `(n,)` float64.
        train_error: `(n,)`, squared errors, mean over samples, summed over outputs.
        test_error: the same on held-out samples; None without any.
        frozen_dim: directions of the weights that training never moves.
        naive, frozen_aware: complexities, `(n,)`, summed over outputs (`LinearFlow.complexity`).
        eigenvalues: of `XᵀX` that are not zero, `(rank,)` descending.
        marchenko_pastur: lower edge, upper edge and mass at 0 for independent entries, as many and of the variance of these. A
            mean that is not 0 adds one eigenvalue outside.
        outside: share of the eigenvalues above the upper edge.
        samples, features, rank: `P`, `N`, and the rank of the features.
        rtol: the tolerance of the rank.
    """

    times: Tensor
    train_error: Tensor
    test_error: Tensor | None
    frozen_dim: int
    naive: Tensor
    frozen_aware: Tensor
    eigenvalues: Tensor
    marchenko_pastur: tuple[float, float, float]
    outside: float
    samples: int
    features: int
    rank: int
    rtol: float

    @property
    def best_time(self) -> float | None:
        """The time among `times` with the smallest held-out error; None without held-out samples."""
        return None if self.test_error is None else float(self.times[int(self.test_error.argmin())])

    def to_dict(self) -> dict[str, Any]:
        """The fields and `best_time`, as strict JSON."""
        return {**super().to_dict(), "best_time": self.best_time}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each time."""
        test = [None] * len(self.times) if self.test_error is None else self.test_error.tolist()
        columns = zip(self.times.tolist(), self.train_error.tolist(), test, self.naive.tolist(), self.frozen_aware.tolist())
        names = ("time", "train_error", "test_error", "naive", "frozen_aware")
        return [dict(zip(names, values)) for values in columns]

    def plot(self, *, ax: Any = None) -> Any:
        """Errors against time."""
        curves = {"training error": self.train_error}
        if self.test_error is not None:
            curves["held-out error"] = self.test_error
        return plot_errors(self._axes(ax), self.times, curves)

    @property
    def summary(self) -> str:
        """One line, with one sentence on over-training."""
        sizes = f"{self.samples} samples, {self.features} features, rank {self.rank}, {self.frozen_dim} frozen directions"
        if self.test_error is None:
            return f"{sizes}; give held-out samples to see over-training"
        best, last = float(self.test_error.min()), float(self.test_error[-1])
        verdict = (
            f"training to time {float(self.times[-1]):.3g} costs {last / best - 1:.0%}: stop at {self.best_time:.3g}"
            if best > 0 and last > 1.01 * best
            else "no over-training within these times"
        )
        return f"{sizes}; held-out error {best:.4g} at best; {verdict}"


def feature_dynamics(
    model: nn.Module,
    layer: str,
    batches: Iterable[Any],
    targets: Any = None,  # (P,) or (P, outputs)
    *,
    times: Any,  # (n,)
    held_out: Any = None,
    seed: int = 0,
    rtol: float = 1e-10,
) -> FeatureDynamics:
    """Train a linear readout on a layer's features, in closed form: error over time, frozen directions, over-training.

    Formula: `LinearFlow` from zero weights on the outputs of `layer`, one for each output over one SVD.

    Args:
        model: runs in evaluation mode and is restored.
        layer: name of a module; its output `(samples, features)`. A time axis is averaged, over the `attention_mask` where a
            batch has one.
        batches: tensors, tuples or mappings, as everywhere; dict batches of transformers may hold `labels`.
        targets: `(P,)` or `(P, outputs)`; None: the integer `labels` of the batches, one-hot minus the mean.
        times: training times, >= 0. Eigenvalues grow with the samples: `1 / smallest eigenvalue` is a long time.
        held_out: other batches, `(batches, targets)`, or the share of the samples that is held out, in (0, 1).
        seed: which samples that share is, >= 0.
        rtol: singular values up to this share of the largest count as zero, in [0, 1).

    Returns:
        A `FeatureDynamics`.

    Raises:
        ValueError: a layer that is not there (the nearest are listed), no labels, targets of another length, fewer than two
            samples, negative times, features that are not finite.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import feature_dynamics
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 30), torch.nn.ReLU(), torch.nn.Linear(30, 1))
        >>> x = torch.randn(20, 4)
        >>> found = feature_dynamics(net, "1", [x], x[:, 0], times=[0.0, 10.0])
        >>> found.samples, found.features, found.frozen_dim, bool(found.train_error[1] < found.train_error[0])
        (20, 30, 10, True)

    Nothing is centred: a constant feature acts as a bias. It describes the last layer alone; earlier layers move too in
    training.

    Source: Advani, Saxe, Sompolinsky, arXiv 1710.03667.
    """
    moments = read_times(times)
    check_int("seed", seed, 0)
    check_layer(model, layer)
    X, labels = _features(model, layer, batches)
    y, classes, mean = _targets(targets, labels, len(X))
    test: tuple[Tensor, Tensor] | None = None
    if isinstance(held_out, float):
        check_float("held_out", held_out, 0.0, 1.0, low_open=True, high_open=True)
        order = torch.randperm(len(X), generator=stream(seed, "feature_dynamics"))
        left, kept = order.tensor_split([max(1, round(held_out * len(X)))])
        X, y, test = X[kept], y[kept], (X[left], y[left])
    elif held_out is not None:
        pair = isinstance(held_out, tuple) and len(held_out) == 2 and not isinstance(held_out[0], Tensor)
        other, given = held_out if pair else (held_out, None)
        test_X, test_labels = _features(model, layer, other)
        test = test_X, _targets(given, test_labels, len(test_X), classes, mean)[0]
        if test[1].shape[1] != y.shape[1]:
            raise ValueError(f"held_out must have {y.shape[1]} outputs, as the targets; got {test[1].shape[1]}")
    modes = Modes(X, rtol)
    flows = [LinearFlow(X, column, modes=modes) for column in y.T]
    P, N = X.shape
    low, high = marchenko_pastur_edges(P / N)
    scale = N * float(X.var(correction=0))  # for entries of variance 1/N; a mean moves one eigenvalue, not the edges
    edges = low * scale, high * scale
    eigenvalues = modes.S.square()
    return FeatureDynamics(
        times=moments,
        train_error=_over(moments, lambda flow, i, t: flow.train_error(t), flows),
        test_error=None
        if test is None
        else _over(moments, lambda flow, i, t: flow.test_error(t, test[0], test[1][:, i]), flows),
        frozen_dim=N - modes.rank,
        naive=_over(moments, lambda flow, i, t: flow.complexity(t)[0], flows),
        frozen_aware=_over(moments, lambda flow, i, t: flow.complexity(t)[1], flows),
        eigenvalues=eigenvalues,
        marchenko_pastur=(*edges, max(0.0, 1.0 - P / N)),
        outside=float((eigenvalues > edges[1]).double().mean()) if len(eigenvalues) else 0.0,
        samples=P,
        features=N,
        rank=modes.rank,
        rtol=rtol,
    )


def check_layer(model: nn.Module, layer: str) -> None:
    """Raise ValueError unless the model has a module of this name."""
    names = dict(model.named_modules())
    if layer not in names:
        raise ValueError(f"layer: {layer!r} is not a module of the model; nearest: {', '.join(nearest(layer, names))}")


def _over(times: Tensor, value: Any, flows: list[LinearFlow]) -> Tensor:
    return torch.tensor([sum(value(flow, i, t) for i, flow in enumerate(flows)) for t in times.tolist()], dtype=torch.float64)


def _features(model: nn.Module, layer: str, batches: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """Features `(samples, features)` in float64, and the labels of dict batches, if all have some."""
    kept = batches if is_one_batch(batches) else list(batches)
    parts, labels = [], []
    for found, batch in zip(capture(model, [layer], kept), kept):
        if layer not in found:
            raise ValueError(f"layer {layer} was not reached by a batch")
        parts.append(_pooled(as_float64(found[layer]), batch, layer))
        given = batch.get("labels") if isinstance(batch, Mapping) else None
        labels += [given.detach().cpu()] if isinstance(given, Tensor) else []
    if not parts:
        raise ValueError("batches must hold at least one batch; got none")
    X = torch.cat(parts)
    if not bool(torch.isfinite(X).all()):
        raise ValueError(f"layer {layer}: its features have NaN or infinite entries")
    return X, torch.cat(labels) if len(labels) == len(parts) else None


def _pooled(features: Tensor, batch: Any, layer: str) -> Tensor:
    """A row for each sample: the mean over a time axis, of the tokens that count."""
    if features.ndim < 2:
        raise ValueError(f"layer {layer}: its output must be (samples, features); got shape {tuple(features.shape)}")
    if features.ndim == 3:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == features.shape[:2]:
            weight = mask.to("cpu", torch.float64)[..., None]
            return (features * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return features.mean(1)
    return features.flatten(1)


def _targets(
    targets: Any, labels: Tensor | None, count: int, classes: int = 0, mean: Tensor | None = None
) -> tuple[Tensor, int, Tensor | None]:
    """Targets `(P, outputs)`; the number of classes and their mean, where they are labels."""
    if targets is None:
        if labels is None or labels.is_floating_point() or labels.ndim != 1 or len(labels) != count:
            raise ValueError("targets must be given: the batches have no integer labels, one for each sample")
        check_int("labels", int(labels.min()), 0)
        classes = max(classes, int(labels.max()) + 1)
        one_hot = F.one_hot(labels.long(), classes).double()
        mean = one_hot.mean(0) if mean is None else F.pad(mean, (0, classes - len(mean)))
        return one_hot - mean, classes, mean
    y = as_float64(targets)
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or len(y) != count or not y.shape[1]:
        raise ValueError(f"targets must be ({count},) or ({count}, outputs), one row for each sample; got {tuple(y.shape)}")
    return y, classes, mean
