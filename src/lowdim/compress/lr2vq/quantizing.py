"""A model's weights as codes: in one shot, or after training in the low-rank representation and with soft codes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowdim.calibrate.batches import is_one_batch
from lowdim.compress.core.fitting import LossFn
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
from lowdim.compress.lr2vq.coded import Coded
from lowdim.compress.lr2vq.training import Parts, train_parts
from lowdim.errors import Options, check_float, check_int, listed
from lowdim.linalg import stream
from lowdim.surgery import (
    Patterns,
    dense_matrix,
    find_layers,
    float_dtype,
    freeze_except,
    is_linear,
    is_matrix_layer,
    known_dtype,
    matrix_shape,
    named_layers,
    submodule,
    swap_layers,
    without_tied,
)

__all__ = ["LR2VQConfig", "lr2vq", "lr2vq_tables"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LR2VQConfig(Options):
    """How `lr2vq` quantizes a model.

    Attributes:
        codebook_size: k, codewords of each layer, >= 1; a layer with fewer subvectors gets as many as it has.
        subvector_size: m, weights for each code, >= 1; it must divide the inputs of each layer and sets the size: log2(k) / m
            bits a weight.
        clustering_dim: dimension d̃ in which subvectors are clustered, >= 1, at most the subvector size; the size hardly
            depends on it.
        target_modules: names, dotted suffixes or a regular expression; None selects every nn.Linear, Conv1D and nn.Conv2d whose
            name contains no entry of `exclude` (and is not the model's prediction head).
        exclude: used where `target_modules` is None.
        seed: of k-means and of dropout in training, >= 0.
        temperature: τ of the soft codes, > 0; None: 0.05 of the mean distance to the nearest codeword, layer by layer.
        dkm_iterations: k-means iterations in each training step with soft codes, >= 1.
        tolerance: they stop when no codeword moves by more, >= 0.
        pretrain_steps: training steps in the low-rank representation before quantizing, >= 0.
        train_steps: training steps with soft codes afterwards, >= 0.
        lr: learning rate of both trainings, > 0.
    """

    codebook_size: int = 256
    subvector_size: int = 8
    clustering_dim: int = 4
    target_modules: Patterns = None
    exclude: tuple[str, ...] = ("lm_head", "embed", "classifier")
    seed: int = 0
    temperature: float | None = None
    dkm_iterations: int = 5
    tolerance: float = 1e-4
    pretrain_steps: int = 0
    train_steps: int = 0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("codebook_size", "subvector_size", "dkm_iterations"):
            check_int(name, getattr(self, name), 1)
        check_int("clustering_dim", self.clustering_dim, 1, self.subvector_size)
        for name in ("seed", "pretrain_steps", "train_steps"):
            check_int(name, getattr(self, name), 0)
        if self.temperature is not None:
            check_float("temperature", self.temperature, 0.0, low_open=True)
        check_float("tolerance", self.tolerance, 0.0)
        check_float("lr", self.lr, 0.0, low_open=True)
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))

    @property
    def trains(self) -> bool:
        """Whether batches and a loss function are needed."""
        return self.pretrain_steps + self.train_steps > 0

    @property
    def what(self) -> str:
        """For reports."""
        return f"k {self.codebook_size}, m {self.subvector_size}, d̃ {self.clustering_dim}"


def lr2vq(
    model: nn.Module,
    config: LR2VQConfig,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
) -> nn.Module:
    """Replace the weights of linear layers and convolutions by codes of their subvectors, in place.

    Formula: a weight `(out, in)` is cut into subvectors `w_i (m,)` along its rows, `w_i ≈ P z_i` with a basis `P (m, d̃)` for
    each layer, and `z_i ≈ C[a_i]` with a codebook `C (k, d̃)`. Basis and codebook start from the leading eigenvectors of
    `Σ w wᵀ` and from k-means. With `pretrain_steps` P and z are trained first; with `train_steps` they are trained on, through
    soft codes (`dkm`). Then `a_i = argmin_j ‖z_i − C_j‖`.

    Args:
        config: sizes, which layers, training.
        batches: for training only: consumed once, and used again and again in their order.
        loss_fn: for training only: `loss_fn(model, batch) -> scalar`.

    Returns:
        The model; basis, codebook and bias of the new layers are trainable, codes are not (`lr2vq_tables`).
        `lowdim.compress.last_report(model)` has `‖W − W̃‖ / ‖W‖` of each layer and its bytes in a file before and after; its
        details have both errors of the one-shot quantization (see `estimate_clustering_dim`).

    Raises:
        ValueError: nothing matched, m that does not divide a layer's inputs, a weight with NaN or infinity, training without
            batches or loss function. The model is then unchanged.
        LowdimError: a loss of the training is not finite; the model is then unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import LR2VQConfig, last_report, lr2vq
        >>> torch.manual_seed(0) and None
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> model = lr2vq(model, LR2VQConfig(codebook_size=16, subvector_size=8, clustering_dim=2))
        >>> report = last_report(model)
        >>> report.layers[0].what, report.before, report.after
        ('k 16, m 8, d̃ 2', 33280, 1408)

    Without training, d̃ = m has about the least error: a smaller one gains only after `pretrain_steps`. No arithmetic is saved,
    since weights are decoded before they are multiplied. When not: where speed is wanted, or 4 bits a weight are small enough
    (torchao's int4 needs no codebooks and has kernels).

    Source: Zhu et al., "Learning Low-Rank Representations for Model Compression", arXiv 2211.11397. The abstract and a summary
    were at hand; what they leave open is the standard construction (see docs/systems/lr2vq.md).
    """
    layers, tied = _select(model, config)
    _check_sizes(layers, config.subvector_size)
    if config.trains and batches is not None and not is_one_batch(batches):
        batches = list(batches)
    dtype = float_dtype(model)
    first: dict[int, str] = {}
    twins = {name: first.setdefault(id(getattr(layer, "weight", layer)), name) for name, layer in layers.items()}
    parts: dict[str, Parts] = {}
    with torch.no_grad():
        for name, layer in layers.items():
            if twins[name] == name:
                try:
                    parts[name] = Parts.of(layer, config, stream(config.seed, "lr2vq", name))
                except ValueError as error:
                    raise ValueError(f"layer {name}: {error}") from error
    errors = {name: part.errors() for name, part in parts.items()}
    if config.trains:
        train_parts(model, layers, twins, parts, config, batches, loss_fn, dtype)
    before = _bytes(layers)
    shapes, lost = {name: matrix_shape(layer) for name, layer in layers.items()}, dict.fromkeys(layers, 0.0)

    def make(name: str, layer: nn.Module) -> nn.Module:
        new = parts[twins[name]].layer(layer, known_dtype(layer) or dtype)
        weight = dense_matrix(layer).detach()
        size = float(torch.linalg.vector_norm(weight))
        lost[name] = float(torch.linalg.vector_norm(weight - new.matrix().to(weight))) / size if size else 0.0
        return new

    with torch.no_grad():
        swap_layers(model, layers, make)
    after = _bytes({name: submodule(model, name) for name in layers})
    rows = {
        name: CompressedLayer(name, *shapes[name], None, lost[name], before[name], after[name], what=config.what, replaced=True)
        for name in layers
    }
    for name, others in tied.items():
        layer = submodule(model, name)
        size = _bytes({name: layer})[name]
        note = f"left dense: tied to {', '.join(others)}"
        rows[name] = CompressedLayer(name, *matrix_shape(layer), None, 0.0, size, size, note)
    details = {"errors": errors, "ratio": sum(before.values()) / sum(after.values())}
    order = [name for name in named_layers(model) if name in rows]
    report = CompressionReport("LR2VQ", tuple(rows[name] for name in order), details, counted="bytes")
    attach_report(model, report)
    _log.info("%s", report.summary)
    return model


def lr2vq_tables(model: nn.Module) -> list[nn.Parameter]:
    """Freeze a model but for the bases, codebooks and biases of its quantized layers: tuning with fixed codes.

    Returns:
        The trained parameters, in model order.

    Raises:
        ValueError: the model has no quantized layer.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import LR2VQConfig, lr2vq, lr2vq_tables
        >>> len(lr2vq_tables(lr2vq(nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32)), LR2VQConfig())))
        3

    Source: arXiv 2211.11397.
    """
    coded = [module for module in model.modules() if isinstance(module, Coded)]
    if not coded:
        raise ValueError(f"{type(model).__name__} has no quantized layer to train; quantize it with lr2vq first")
    return freeze_except(model, (p for m in coded for p in (m.basis, m.codebook, m.bias) if p is not None))


def _select(model: nn.Module, config: LR2VQConfig) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    automatic = config.target_modules in (None, "all-linear")
    found = find_layers(model, config.target_modules, exclude=config.exclude if automatic else (), accept=_can_be_quantized)
    return without_tied(model, found, named=not automatic)


def _can_be_quantized(layer: nn.Module) -> bool:
    return is_linear(layer) or (isinstance(layer, nn.Conv2d) and is_matrix_layer(layer))


def _check_sizes(layers: Mapping[str, nn.Module], subvector_size: int) -> None:
    columns = {name: matrix_shape(layer)[1] for name, layer in layers.items()}
    odd = {name: count for name, count in columns.items() if count % subvector_size}
    if odd:
        common = math.gcd(*columns.values())
        raise ValueError(
            f"subvector_size must divide the inputs of every layer; got {subvector_size}, and "
            f"{listed(f'layer {name} has {count}' for name, count in odd.items())}. Divisors of {common} fit all; "
            "or leave these out (exclude, target_modules)"
        )


def _bytes(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The bytes of each layer in a file; a shared parameter counts at the first layer that has it."""
    seen: set[int] = set()
    sizes = {}
    for name, layer in layers.items():
        own = {key: id(p) for key, p in layer.named_parameters(recurse=False)}
        new = [value for key, value in layer.state_dict().items() if own.get(key) not in seen]
        sizes[name] = sum(value.numel() * value.element_size() for value in new)
        seen |= set(own.values())
    return sizes
