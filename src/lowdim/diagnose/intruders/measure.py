"""Intruder dimensions: strong singular vectors of a tuned weight that the base weight does not have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.diagnose.core.weights import Weights, plain_model, weights_of
from lowdim.errors import check_float, check_int, nearest
from lowdim.linalg import compute_dtype, svd
from lowdim.results import Result

__all__ = ["IntruderResult", "LayerIntruders", "find_intruders", "intruder_dimensions", "paired_weights", "scale_intruders"]

_GAP = 1e-6  # relative to the largest singular value: closer neighbours have no well-defined vectors
_SHOWN = 64  # rows and columns of |Uᵀ U0| that are kept for the heat map


@dataclass(frozen=True)
class LayerIntruders(Result):
    """One layer's measurement. Tensors are on the CPU, in float32 or better."""

    left_out: ClassVar[tuple[str, ...]] = ("overlap",)

    similarity: Tensor  # (min(k, min(out, in)),): max_i |u_jᵀ u0_i|
    indices: list[int]  # intruders among the first k, ascending
    singular_values: Tensor  # (min(out, in),) of the tuned weight, descending
    degenerate: list[int]  # j < k whose gap to j + 1 is below 1e-6 s_1: their vectors (and intruders there) are arbitrary
    overlap: Tensor = field(repr=False)  # upper left corner of |Uᵀ U0|, at most (64, 64)

    @property
    def count(self) -> int:
        """Number of intruders."""
        return len(self.indices)

    @property
    def doubtful(self) -> list[int]:
        """Intruders whose singular value is one of a near-equal pair, so that their vector is arbitrary."""
        return [j for j in self.indices if j in self.degenerate or j - 1 in self.degenerate]


@dataclass(frozen=True)
class IntruderResult(Result):
    """Intruder dimensions of a model, layer by layer."""

    layers: dict[str, LayerIntruders]
    k: int
    threshold: float

    @property
    def total(self) -> int:
        """Intruders in all layers."""
        return sum(layer.count for layer in self.layers.values())

    @property
    def doubtful(self) -> dict[str, list[int]]:
        """Layers with intruders that are arbitrary because of near-equal singular values."""
        return {name: layer.doubtful for name, layer in self.layers.items() if layer.doubtful}

    def to_dict(self) -> dict[str, Any]:
        """The measurements without heat maps, as strict JSON."""
        layers = {name: {"count": layer.count, **layer.to_dict()} for name, layer in self.layers.items()}
        return {"k": self.k, "threshold": self.threshold, "total": self.total, "layers": layers}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each of the first k singular vectors of each layer."""
        return [
            {
                "layer": name,
                "index": j,
                "similarity": similarity,
                "singular_value": float(layer.singular_values[j]),
                "intruder": j in layer.indices,
                "degenerate": j in layer.degenerate,
            }
            for name, layer in self.layers.items()
            for j, similarity in enumerate(layer.similarity.tolist())
        ]

    def _table(self) -> list[dict[str, Any]]:
        """The rows to show: one for each layer."""
        return [
            {"layer": name, "intruders": layer.count, "least similar": float(layer.similarity.min())}
            for name, layer in self.layers.items()
        ]

    @property
    def summary(self) -> str:
        """One line."""
        return f"{self.total} intruder dimensions among the first {self.k} of {len(self.layers)} matrices"

    def plot(self, name: str | None = None, *, ax: Any = None) -> Any:
        """Heat map of `|Uᵀ U0|` for one layer (by default the one with the most intruders); returns the matplotlib axes."""
        if not self.layers:
            raise ValueError("nothing to plot: no layer was measured")
        if name is None:
            name = max(self.layers, key=lambda n: self.layers[n].count)
        if name not in self.layers:
            raise ValueError(f"name must be a measured layer; got {name!r}, nearest: {', '.join(nearest(name, self.layers))}")
        layer = self.layers[name]
        axes = self._axes(ax)
        image = axes.imshow(layer.overlap.float().numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.figure.colorbar(image, ax=axes, label="|uᵀ u0|")
        axes.set_xlabel("left singular vector of the base")
        axes.set_ylabel("left singular vector of the tuned weight")
        axes.set_title(f"{name or 'weight'}: {layer.count} intruders below {self.threshold:g}")
        return axes


def intruder_dimensions(
    base: Any,
    tuned: Any,
    *,
    k: int = 10,
    threshold: float = 0.5,
    names: Iterable[str] | None = None,
) -> IntruderResult:
    """Count the singular vectors of a tuned model that its base lacks.

    Formula: with `W0 = U0 S0 V0ᵀ`, `W = U S Vᵀ`: `similarity_j = max_i |u_jᵀ u0_i|`; intruders are
    `{ j < k : similarity_j < threshold }`.

    Args:
        base, tuned: two matrices `(out, in)`, two mappings name -> weight, two modules, or paths (a safetensors file or a
            checkpoint folder), in any combination. Adapters (PEFT's and lowdim's) are merged in a copy, layer by layer. If
            both are the same adapted model, `base` means its weights before adapting.
        k: number of strongest singular vectors to measure, >= 1.
        threshold: similarity below which a vector is an intruder, in (0, 1].
        names: only these weights; None means every 2-D weight of `base`.

    Returns:
        IntruderResult: `.layers[name]` with `.similarity`, `.indices`, `.singular_values`, `.count`, and `.degenerate`,
        the places where near-equal singular values make the vectors arbitrary; `.total`. One layer is in memory at a time.

    Raises:
        ValueError: shapes that differ or are not 2-D, `k < 1`, threshold outside (0, 1], a weight without a counterpart, NaN
            or infinity (each names the layer). TypeError: a source of another kind.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import intruder_dimensions
        >>> base = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[:, :2]
        >>> tuned = base + 9 * torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        >>> intruder_dimensions(base, tuned, k=2).layers[""].indices
        [0]

    Weights are compared as stored: keep base and tuned in one precision. Only left singular vectors are compared, so
    a layer with `out > in` can show a vector outside the base's column space for any change there. A flat spectrum
    (a random matrix) gives false intruders: see `.doubtful`.

    Source: Shuttleworth, Andreas, Torralba, Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228.
    """
    check_options(k, threshold)
    base_weights, tuned_weights, wanted = paired_weights(base, tuned, names)
    layers = {}
    for name in wanted:
        layers[name] = find_intruders(base_weights[name], tuned_weights[name], k=k, threshold=threshold, name=name)[0]
    return IntruderResult(layers, k, threshold)


def scale_intruders(
    base: Tensor,  # (out, in)
    tuned: Tensor,  # (out, in)
    *,
    scale: float = 0.75,
    k: int = 10,
    threshold: float = 0.5,
) -> Tensor:
    """The tuned weight with its intruder dimensions scaled.

    Formula: `W_new = W + (scale - 1) Σ_{j in intruders} s_j u_j v_jᵀ`.

    Args:
        base, tuned: `(out, in)`.
        scale: multiplier of the intruders: 1 changes nothing, 0 removes them, above 1 enlarges them.
        k, threshold: as in intruder_dimensions.

    Returns:
        `(out, in)` in the dtype of `tuned`, a new tensor; computed in float32 or better.

    Raises:
        ValueError: as intruder_dimensions; a negative scale.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import scale_intruders
        >>> base = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[:, :2]
        >>> tuned = base + 9 * torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        >>> bool(scale_intruders(base, tuned, scale=0.0, k=2)[2].norm() < 1e-6)  # the row that came with tuning
        True

    Smaller is not always better: pre-training loss can rise again towards 0. Choose `scale` on held-out data of both tasks.

    Source: Shuttleworth et al., arXiv 2410.21228, section 5.
    """
    check_options(k, threshold, scale)
    if not isinstance(base, Tensor) or not isinstance(tuned, Tensor):
        raise TypeError(f"base and tuned must be tensors; got {type(base).__name__} and {type(tuned).__name__}")
    layer, (u, s, vh) = find_intruders(base, tuned, k=k, threshold=threshold)
    if not layer.indices:
        return tuned.detach().clone()
    j = layer.indices
    return (tuned.detach().to(u) + (scale - 1) * (u[:, j] * s[j]) @ vh[j]).to(tuned.dtype)


def find_intruders(
    base: Tensor,  # (out, in)
    tuned: Tensor,  # (out, in)
    *,
    k: int,
    threshold: float,
    name: str = "",
) -> tuple[LayerIntruders, tuple[Tensor, Tensor, Tensor]]:
    """One layer's measurement, and the thin SVD of the tuned weight on which it is based."""
    where = f"layer {name}: " if name else ""
    if base.ndim != 2 or base.shape != tuned.shape:
        raise ValueError(
            f"{where}base and tuned must be matrices of the same shape; got {tuple(base.shape)} and {tuple(tuned.shape)}"
        )
    if 0 in base.shape or not (base.is_floating_point() and tuned.is_floating_point()):
        raise ValueError(
            f"{where}weights must be floating point and not empty; got {tuple(base.shape)}, {base.dtype}, {tuned.dtype}"
        )
    dtype = compute_dtype(torch.promote_types(compute_dtype(base.dtype), compute_dtype(tuned.dtype)))
    pair = [base.detach().to(dtype), tuned.detach().to(device=base.device, dtype=dtype)]
    for which, matrix in zip(("base", "tuned"), pair):
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"{where}the {which} weight has NaN or infinite entries")
    u0 = svd(pair[0])[0]
    u, s, vh = svd(pair[1])
    first = min(k, s.shape[0])
    overlap = (u[:, :first].T @ u0).abs()  # (first, min(out, in))
    similarity = overlap.amax(1).clamp(max=1.0)
    gaps = s[:first] - torch.cat([s[1:], s.new_zeros(1)])[:first]
    if first == s.shape[0]:
        gaps[-1] = s[0]  # the last one has no neighbour
    indices = (similarity < threshold).nonzero()[:, 0].tolist()
    degenerate = (gaps < _GAP * s[0]).nonzero()[:, 0].tolist() if float(s[0]) > 0 else list(range(first))
    corner = overlap[:_SHOWN, :_SHOWN].cpu().clone()
    return LayerIntruders(similarity.cpu(), indices, s.cpu(), degenerate, corner), (u, s, vh)


def paired_weights(base: Any, tuned: Any, names: Iterable[str] | None) -> tuple[Weights, Weights, list[str]]:
    """Both models' weights with one layout, and the names to measure; every name must be in both."""
    # PEFT and lowdim adapt in place: if the base is the tuned model itself, use its weights before adapting.
    models = isinstance(base, nn.Module) and isinstance(tuned, nn.Module)
    same = models and plain_model(base) is plain_model(tuned)
    base_weights, tuned_weights = weights_of(base, merged=not same), weights_of(tuned)
    base_weights = base_weights.oriented_like(tuned_weights)
    tuned_weights = tuned_weights.oriented_like(base_weights)
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names; got the string {names!r}")
    wanted = list(base_weights) if names is None else list(names)
    if not wanted:
        raise ValueError(f"{base_weights.origin} has no 2-D floating-point weight to measure (names={names!r})")
    for which, weights in (("base", base_weights), ("tuned", tuned_weights)):
        missing = [name for name in wanted if name not in weights]
        if missing:
            close = ", ".join(nearest(missing[0], weights)) or "there is none"
            raise ValueError(
                f"{which}: {weights.origin} has no 2-D weight {missing[0]!r}"
                f"{f' ({len(missing)} names are missing)' if len(missing) > 1 else ''}; nearest: {close}"
            )
    return base_weights, tuned_weights, wanted


def check_options(k: int, threshold: float, scale: float = 1.0) -> None:
    """Raise ValueError unless the options are in range."""
    check_int("k", k, 1)
    check_float("threshold", threshold, 0.0, 1.0, low_open=True)
    check_float("scale", scale, 0.0)
