"""A layer's weight on its way to codes: the start in one shot, and training with free and with soft codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowdim.compress.core.fitting import LossFn, fit_parameters
from lowdim.compress.lr2vq.clustering import cluster, dkm, lowrank_subvectors, nearest_codes, nearest_distance
from lowdim.compress.lr2vq.layers import LR2VQConv2d, LR2VQLinear
from lowdim.surgery import dense_matrix, is_conv1d, matrix_shape, replace_layers, swap_layers, with_matrix

__all__ = ["Parts", "train_parts"]


class Parts:
    """A layer's weight on its way to codes: basis, coordinates and codebook, in float64."""

    def __init__(self, basis: Tensor, z: Tensor, codebook: Tensor, codes: Tensor, energy: float, seed: torch.Generator):
        self.basis, self.z, self.codebook, self.codes = basis, z, codebook, codes
        self.energy, self.seed = energy, seed

    @classmethod
    def of(cls, layer: nn.Module, config: Any, generator: torch.Generator) -> Parts:
        """The one-shot start."""
        weight = dense_matrix(layer).detach()
        z, basis = lowrank_subvectors(weight, config.subvector_size, config.clustering_dim)
        codebook, codes = cluster(z, config.codebook_size, generator)
        return cls(basis, z, codebook, codes, float(weight.to(z).square().sum()), generator)

    def errors(self) -> dict[str, float]:
        """Both errors of the start, as shares of `Σ‖w‖²`."""
        if not self.energy:
            return {"approximation_error": 0.0, "clustering_error": 0.0}
        kept = float(self.z.square().sum())
        lost = float((self.z - self.codebook[self.codes]).square().sum())
        approximation = max(0.0, 1 - kept / self.energy)
        return {"approximation_error": approximation, "clustering_error": lost / self.energy}

    def renew(self, basis: Tensor, z: Tensor) -> None:
        """Take trained numbers, with orthonormal columns of the basis: distances of z are then those of the weights."""
        self.basis, turn = torch.linalg.qr(basis.detach().to(self.z))
        self.z = z.detach().to(self.z) @ turn.mT

    def layer(self, layer: nn.Module, dtype: torch.dtype) -> LR2VQLinear | LR2VQConv2d:
        """The quantized layer in the place of `layer`."""
        out, columns = matrix_shape(layer)
        codes = self.codes.view(out, -1)
        tables = self.basis.to(dtype), self.codebook.to(dtype), codes
        bias = cast("Tensor | None", layer.bias)
        if isinstance(layer, nn.Conv2d):
            return LR2VQConv2d(layer, *tables, bias)
        return LR2VQLinear(*tables, (out, columns), bias).take_place_of(layer)


class _Subvectors(nn.Module):
    """A layer whose weight is `P z`, both trained; with a temperature, z is replaced by its soft codes.

    Args:
        layer: the layer whose geometry and class are used.
        parts: where it starts.
        dtype: of quantized layers that do not tell theirs; numbers are trained in float32 or better.
        soft: how `dkm` is called; None: no codes.
    """

    def __init__(self, layer: nn.Module, parts: Parts, dtype: torch.dtype, soft: dict[str, Any] | None = None):
        super().__init__()
        plain: Any = with_matrix(layer, dense_matrix(layer), dtype=dtype)
        self._layer = (plain,)  # not a submodule: its weight is not used
        wide = torch.promote_types(plain.weight.dtype, torch.float32)
        self.basis, self.z = (nn.Parameter(value.to(wide, copy=True)) for value in (parts.basis, parts.z))
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach().to(wide, copy=True))
        self.soft = soft
        self.codebook = parts.codebook.to(wide)
        self.train(layer.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (layer,) = self._layer
        z = self.z
        if self.soft is not None:
            z, codebook, _ = dkm(z, self.codebook, **self.soft)
            self.codebook = codebook.detach()  # the next step starts from here
        matrix = (z @ self.basis.mT).view(matrix_shape(layer))
        weight = matrix.mT if is_conv1d(layer) else matrix.view(layer.weight.shape)
        given = {"weight": weight} | ({} if self.bias is None else {"bias": self.bias})
        given = {name: value.to(layer.weight.dtype) for name, value in given.items()}
        return functional_call(layer, given, args, kwargs)


def train_parts(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    twins: Mapping[str, str],
    parts: Mapping[str, Parts],
    config: Any,
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
    dtype: torch.dtype,
) -> None:
    """Stages 1 and 2: train `parts` (and the layers' biases, in place); the model has its own layers again afterwards."""

    def fit(steps: int, soft: Mapping[str, dict[str, Any]] | None, seed: int) -> dict[str, _Subvectors]:
        made: dict[str, _Subvectors] = {}

        def make(name: str, layer: nn.Module) -> nn.Module:
            made[name] = _Subvectors(layer, parts[twins[name]], dtype, None if soft is None else soft[twins[name]])
            return made[name]

        swap_layers(model, layers, make)
        try:
            own = list({id(p): p for new in made.values() for p in new.parameters()}.values())
            fit_parameters(model, own, batches, loss_fn, steps=steps, lr=config.lr, seed=seed)
        finally:
            replace_layers(model, layers)
        return made

    biases = {name: layer.bias for name, layer in layers.items()}
    trained: dict[str, _Subvectors] = {}
    if config.pretrain_steps:
        trained = fit(config.pretrain_steps, None, config.seed)
        for name, part in parts.items():
            part.renew(trained[name].basis, trained[name].z)
            part.codebook, part.codes = cluster(part.z, config.codebook_size, part.seed)
    if config.train_steps:
        how = {"iterations": config.dkm_iterations, "tolerance": config.tolerance}
        soft = {name: {"temperature": _temperature(part, config), **how} for name, part in parts.items()}
        trained = fit(config.train_steps, soft, config.seed + 1)
        for name, part in parts.items():
            part.basis, part.z, part.codebook = (
                value.detach().to(part.z) for value in (trained[name].basis, trained[name].z, trained[name].codebook)
            )
            part.codes = nearest_codes(part.z, part.codebook)
    with torch.no_grad():
        for name, bias in biases.items():
            new = trained[name].bias
            if isinstance(bias, Tensor) and new is not None:
                bias.copy_(new)


def _temperature(part: Parts, config: Any) -> float:
    if config.temperature is not None:
        return config.temperature
    return max(0.05 * nearest_distance(part.z, part.codebook), 1e-12)
