"""Adaptive classification with nested embeddings: use the smallest size whose classifier is confident enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.represent.core.nested import check_dims
from lowdim.results import Result

__all__ = ["CascadeResult", "MatryoshkaCascade"]


@dataclass(frozen=True)
class CascadeResult(Result):
    """Predictions of a cascade, and the sizes that it used."""

    predictions: Tensor  # (N,) int64
    level: Tensor  # (N,) int64, index into dims of the size that was used
    expected_dim: float  # mean of dims[level]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each sample."""
        pairs = zip(self.predictions.tolist(), self.level.tolist())
        return [{"sample": i, "prediction": prediction, "level": level} for i, (prediction, level) in enumerate(pairs)]


class MatryoshkaCascade:
    """Confidence thresholds that decide which size of a nested classifier answers.

    Formula: `conf_g = max_c P_g`, `pred_g = argmax_c P_g`. Pair by pair, `t_g` is the smallest grid value at which "`pred_g`
    where `conf_g > t`, else `pred_{g+1}`" is most accurate on held-out data. A prediction uses the first level below
    `max_level` with `conf_g > t_g`, else `max_level`.

    Args:
        dims: the nested sizes, for the expected size.
        grid: thresholds to try; None means `linspace(0.1, 1, 100)`. Sorted before use.

    Attributes: `thresholds_ (G-1,)` float64 after `fit`.

    Raises:
        ValueError: probabilities that are not `(G, N, C)`, a target of another length, a level outside the list, predict
            before fit; dims as in MatryoshkaHead. TypeError: dims that are not integers.

    Example:
        >>> import torch
        >>> from lowdim.represent import MatryoshkaCascade
        >>> sure, unsure = [0.9, 0.1], [0.4, 0.6]
        >>> P = torch.tensor([[sure, unsure], [sure, sure]])  # the small head errs where it is unsure
        >>> cascade = MatryoshkaCascade([2, 8]).fit(P, torch.tensor([0, 0]))
        >>> result = cascade.predict(P)
        >>> result.predictions.tolist(), result.level.tolist(), result.expected_dim
        ([0, 0], [0, 1], 5.0)

    Fit on data that is used neither for training nor for testing. The expected size leaves out the smaller heads
    that were tried first: the backbone runs once, and a head is small compared with it.

    Source: Kusupati et al., NeurIPS 2022, arXiv 2205.13147, section 4.2.
    """

    thresholds_: Tensor

    def __init__(self, dims: Iterable[int], grid: Iterable[float] | None = None):
        self.dims = check_dims(dims)
        values = np.linspace(0.1, 1.0, 100) if grid is None else np.sort(np.asarray(list(grid), dtype=np.float64))
        if values.size == 0 or not np.isfinite(values).all():
            raise ValueError(f"grid must hold finite thresholds; got {values.tolist()}")
        self.grid = torch.from_numpy(values)

    def fit(
        self,
        probabilities: Tensor,  # (G, N, C)
        target: Tensor,  # (N,)
    ) -> MatryoshkaCascade:
        """Choose the thresholds on held-out data."""
        confidence, prediction = self._read(probabilities)
        target = torch.as_tensor(target).to(prediction.device)
        if target.shape != prediction.shape[1:]:
            raise ValueError(f"target must have shape ({prediction.shape[1]},); got {tuple(target.shape)}")
        if target.numel() == 0:
            raise ValueError("probabilities must hold at least one sample; got none")
        right = (prediction == target).to(torch.int64)  # (G, N)
        self.thresholds_ = torch.stack(
            [self._best(confidence[g], right[g] - right[g + 1]) for g in range(len(self.dims) - 1)]
            or [torch.empty(0, dtype=torch.float64)]
        ).reshape(-1)
        return self

    def predict(
        self,
        probabilities: Tensor,  # (G, N, C)
        max_level: int | None = None,
    ) -> CascadeResult:
        """Predictions, the level of each, and the mean size.

        Args:
            max_level: index into dims of the largest size that may answer; None means the last.
        """
        if not hasattr(self, "thresholds_"):
            raise ValueError("MatryoshkaCascade must be fitted before predict: call fit(probabilities, target)")
        last = len(self.dims) - 1
        if max_level is None:
            max_level = last
        check_int("max_level", max_level, 0, last)
        confidence, prediction = self._read(probabilities)
        sure = confidence[:max_level] > self.thresholds_[:max_level, None].to(confidence.device)
        # One more row of True: samples without a confident level get max_level. argmax returns the first True.
        always = torch.ones_like(sure[:1]) if max_level else torch.ones(1, confidence.shape[1], dtype=torch.bool)
        level = torch.cat([sure, always.to(sure.device)]).to(torch.int8).argmax(0)
        chosen = prediction.gather(0, level[None])[0]
        sizes = torch.tensor(self.dims, dtype=torch.float64, device=level.device)
        return CascadeResult(chosen, level, float(sizes[level].mean()))

    def _read(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.as_tensor(probabilities)
        if p.ndim != 3 or p.shape[0] != len(self.dims) or p.shape[2] == 0:
            raise ValueError(f"probabilities must have shape ({len(self.dims)}, N, C), one row per size; got {tuple(p.shape)}")
        # argmax is the first of equals; thresholds are float64, so the comparison is too.
        prediction = p.argmax(-1)
        return p.gather(-1, prediction[..., None])[..., 0].to(torch.float64), prediction

    def _best(self, confidence: Tensor, gain: Tensor) -> Tensor:
        """The smallest grid value with the largest `Σ gain[confidence > t]`, in integers: no rounding decides."""
        order = confidence.argsort()
        suffix = torch.cat([gain.new_zeros(1), gain[order].flip(0).cumsum(0)]).flip(0)  # suffix[i] = Σ_{j ≥ i}
        first_above = torch.searchsorted(confidence[order], self.grid.to(confidence.device), right=True)
        return self.grid[int(suffix[first_above].argmax())]
