"""Certified predictions: of one image, and of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowdim.represent.drs.bounds import ABSTAIN
from lowdim.results import Result

__all__ = ["Certificate", "Certificates"]


@dataclass(frozen=True)
class Certificate(Result):
    """A prediction that no perturbation of norm below the radius can change."""

    prediction: int  # a class, or ABSTAIN (-1)
    radius: float  # l2, in the units of the pixels; 0 where it abstains


@dataclass(frozen=True)
class Certificates(Result):
    """Certificates of many images. `predictions, radii = ...` unpacks the pair that ART's `certify` gives."""

    predictions: np.ndarray  # (B,) int64; -1 where it abstains
    radii: np.ndarray  # (B,) float64, l2
    seconds: float
    labels: np.ndarray | None = None  # (B,) int64, as they were given

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.predictions
        yield self.radii

    def accuracy_at(self, radii: Sequence[float] | float) -> np.ndarray:
        """Certified accuracy: the share of images with the right prediction and a radius of at least that much.

        Raises:
            ValueError: no labels were given.
        """
        at = np.asarray(radii, dtype=np.float64)
        return (self._right() & (self.radii >= at[..., None])).mean(-1)

    def average_radius(self) -> float:
        """Mean radius over all images; wrong predictions and abstentions count 0.

        Raises:
            ValueError: no labels were given.
        """
        return float(np.where(self._right(), self.radii, 0.0).mean())

    def _right(self) -> np.ndarray:
        if self.labels is None:
            raise ValueError("certified accuracy needs labels: give them to certify_all")
        return self.predictions == self.labels

    def rows(self) -> list[dict[str, Any]]:
        """A row for each image."""
        rows = [
            {"image": i, "prediction": int(prediction), "radius": float(radius)}
            for i, (prediction, radius) in enumerate(zip(self.predictions, self.radii))
        ]
        if self.labels is not None:
            for row, label in zip(rows, self.labels):
                row["label"] = int(label)
        return rows

    @property
    def summary(self) -> str:
        """One line."""
        abstained = int((self.predictions == ABSTAIN).sum())
        text = f"{len(self.radii)} images in {self.seconds:.3g} s: {abstained} abstained, largest radius {self.radii.max():.4g}"
        if self.labels is None:
            return text
        return f"{text}, certified accuracy {float(self.accuracy_at(0.0)):.4g}, average radius {self.average_radius():.4g}"

    def plot(self, *, ax: Any = None) -> Any:
        """Certified accuracy against the radius; without labels, the share of images that are certified."""
        axes = self._axes(ax)
        counted = self.predictions != ABSTAIN if self.labels is None else self._right()
        steps = np.sort(self.radii[counted])
        shares = np.arange(len(steps), 0, -1) / len(self.radii)
        axes.step(np.concatenate([[0.0], steps]), np.concatenate([shares[:1], shares]) if len(steps) else [0.0], where="pre")
        axes.set_xlabel("l2 radius")
        axes.set_ylabel("certified share" if self.labels is None else "certified accuracy")
        axes.set_ylim(0.0, 1.0)
        return axes
