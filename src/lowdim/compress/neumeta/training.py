"""Training a field: at each step the network of one width, its loss, and the distance to a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lowdim.compress.core.fitting import fit_parameters
from lowdim.compress.neumeta.config import NeuMetaConfig
from lowdim.compress.neumeta.family import Build, NeuMeta, coordinate_noise, empty, places_of
from lowdim.compress.neumeta.field import NeuMetaField, Places, weights_at
from lowdim.errors import check_float, check_int, listed, shown
from lowdim.linalg import stream
from lowdim.surgery import model_device

__all__ = ["neumeta", "neumeta_reconstruction_loss"]


def neumeta(
    build: Build,
    config: NeuMetaConfig,
    batches: Iterable[tuple[Any, Any]] | None,
    *,
    widths: Sequence[int],
    reference: nn.Module | None = None,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> NeuMeta:
    """Train one field that generates the weights of a network at every width.

    Formula: a step draws a width w of `widths`, generates its weights W with noise on the coordinates, and minimizes
    `ce_weight · loss_fn(net_w(x), y) + recon_weight · R + reg_weight · Σ_t ‖W_t‖` by the field, R at the reference's width only
    (`neumeta_reconstruction_loss`). The result holds the exponential moving average of the field.

    Args:
        build: `build(width) -> nn.Module`, with the same parameter names in the same order at every width.
        batches: pairs `(x, y)`, kept and cycled; `x` may be a dictionary of keyword arguments.
        widths: of the networks that are trained.
        reference: a trained network of one of the widths, its channels in a smooth order (`permute_channels`). Short trainings
            come to nothing without one.
        loss_fn: `loss_fn(logits, y) -> scalar`, as torch's losses; of an output with `logits` these are taken.

    Returns:
        A `NeuMeta`: `sample(width)` is a network of any width.

    Raises:
        ValueError: no widths or a width below 1, a reference of no width in `widths`, batches that are missing or no pairs;
            networks with batch normalisation, parameters of 3 axes, or other parameters from width to width.
        LowdimError: a loss that is not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import NeuMetaConfig, neumeta
        >>> build = lambda width: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        >>> batches = [(torch.randn(16, 4), torch.randint(3, (16,)))]
        >>> family = neumeta(build, NeuMetaConfig(hidden_dim=16, num_layers=2, steps=5), batches, widths=[4, 8])
        >>> family.sample(6)[0]
        Linear(in_features=4, out_features=6, bias=True)

    For one network of one width use `lord`, `lr2vq` or plain training: the field is larger than a small network.

    Source: Yang and Wang, "Neural Metamorphosis", arXiv 2410.11878.
    """
    chosen = list(widths)
    if not chosen:
        raise ValueError("widths is empty; name the widths of the networks to train")
    for width in chosen:
        check_int("widths", width, 1)
    nets, names = _networks(build, chosen)
    at, wanted = _reference(reference, nets)
    with torch.random.fork_rng(devices=[]):
        device = model_device(reference if reference is not None else build(chosen[0]))
    field = NeuMetaField(len(names), max(where.output_dim for _, where in nets.values()), config).to(device)
    nets = {width: (net.train(), where.to(device)) for width, (net, where) in nets.items()}
    draw, noise = stream(config.seed, "neumeta", "widths"), stream(config.seed, "neumeta", "noise")

    def loss_of(field: NeuMetaField, batch: Any) -> Tensor:
        x, y = _pair(batch)
        width = chosen[int(torch.randint(len(chosen), (1,), generator=draw))]
        net, where = nets[width]
        moved = coordinate_noise(where, config.coordinate_noise, noise) if config.coordinate_noise else None
        weights = weights_at(field, where, moved)
        loss = torch.zeros((), device=device)
        if config.ce_weight:
            loss = loss + config.ce_weight * loss_fn(_call(net, weights, x), y)
        if width == at and config.recon_weight:
            loss = loss + config.recon_weight * neumeta_reconstruction_loss(weights, wanted)
        if config.reg_weight:
            loss = loss + config.reg_weight * torch.stack([weight.norm() for weight in weights.values()]).sum()
        return loss

    average = [p.detach().clone() for p in field.parameters()]

    def follow() -> None:
        with torch.no_grad():
            for mean, p in zip(average, field.parameters()):
                mean.lerp_(p, 1 - config.ema_decay)

    if config.steps:
        how = {"steps": config.steps, "lr": config.lr, "weight_decay": config.weight_decay, "seed": config.seed}
        fit_parameters(field, field.parameters(), batches, loss_of, **how, after_step=follow)  # type: ignore[arg-type]
    with torch.no_grad():
        for mean, p in zip(average, field.parameters()):
            p.copy_(mean)
    return NeuMeta(field.requires_grad_(False), build, config, chosen, names)


def neumeta_reconstruction_loss(
    weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], epsilon: float = 1e-6
) -> Tensor:
    """The distance of generated weights to those of a trained network, in which large weights count more.

    Formula: `R = mean_t mean((W_t − W*_t)² e_t)`, `e_t = (|W*_t| + ε) / max(|W*_t| + ε)`.

    Args:
        weights, reference: W and W* by parameter name.

    Raises:
        ValueError: other names or shapes, epsilon not positive.

    Example:
        >>> import torch
        >>> from lowdim.compress import neumeta_reconstruction_loss
        >>> found = neumeta_reconstruction_loss({"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, 1.0])})
        >>> round(float(found), 6)
        0.5

    Source: arXiv 2410.11878.
    """
    check_float("epsilon", epsilon, 0.0, low_open=True)
    if weights.keys() != reference.keys():
        raise ValueError(
            f"weights and reference must have the same names; only one has {listed(weights.keys() ^ reference.keys())}"
        )
    terms = []
    for name, target in reference.items():
        if weights[name].shape != target.shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, and {tuple(target.shape)} in the reference")
        size = target.abs() + epsilon
        terms.append(((weights[name] - target).square() * (size / size.max())).mean())
    return torch.stack(terms).mean()


def _networks(build: Build, widths: Sequence[int]) -> tuple[dict[int, tuple[nn.Module, Places]], list[str]]:
    nets: dict[int, tuple[nn.Module, Places]] = {}
    names: list[str] | None = None
    for width in dict.fromkeys(widths):
        net = empty(build, width)
        where = places_of(net, f"build({width})", names)
        names = names or list(where.shapes)
        nets[width] = net, where
    return nets, names or []


def _reference(model: nn.Module | None, nets: Mapping[int, tuple[nn.Module, Places]]) -> tuple[int | None, dict[str, Tensor]]:
    """The reference's width and weights."""
    if model is None:
        return None, {}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = {name: w if w.dtype == torch.float64 else w.float() for name, w in weights.items()}
    shapes = {name: w.shape for name, w in weights.items()}
    for width, (_, where) in nets.items():
        if where.shapes == shapes:
            return width, weights
    found = {name: tuple(shape) for name, shape in shapes.items()}
    raise ValueError(f"reference must be a network of one of the widths {list(nets)}; its parameters are {shown(found, 300)}")


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"batches must be pairs (x, y); got {type(batch).__name__} {shown(batch)}")
    return batch[0], batch[1]


def _call(net: nn.Module, weights: Mapping[str, Tensor], x: Any) -> Any:
    ready = {name: weights[name].to(p.dtype) for name, p in net.named_parameters()}
    out = functional_call(net, ready, (), dict(x)) if isinstance(x, Mapping) else functional_call(net, ready, (x,))
    return getattr(out, "logits", out)
