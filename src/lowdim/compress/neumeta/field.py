"""The field: from the coordinates of a weight in a network of some width to its value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowdim.compress.neumeta.config import NeuMetaConfig
from lowdim.errors import check_int, listed
from lowdim.linalg import compute_dtype, draw_uniform, stream

__all__ = ["NeuMetaField", "Places", "neumeta_coordinates", "neumeta_weights", "places"]


class _MLP(nn.Module):
    """`h = relu(W_in φ + b)`, `h ← h + s_l relu(W_l h + b_l)`, then `W_out h + b`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, blocks: int, scale: float):
        super().__init__()
        self.input = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.scales = nn.Parameter(torch.full((blocks,), float(scale)))
        self.output = nn.Linear(hidden, outputs)

    def forward(self, features: Tensor) -> Tensor:  # (n, inputs) -> (n, outputs)
        h = torch.relu(self.input(features))
        for scale, block in zip(self.scales, self.blocks):
            h = h + scale * torch.relu(block(h))
        return self.output(h)


class NeuMetaField(nn.Module):
    """One MLP for each parameter tensor of a network: coordinates in, weights out.

    Formula: `u = c / norm`, `u[0:3] ← u[0:3] / u[3:6]`; features `[u, sin(2⁰π u), cos(2⁰π u), …]` with the frequency outermost,
    then the coordinate, sine before cosine; the MLP of the coordinate's tensor; division by the tensor's fan-in.

    Args:
        num_tensors: P, parameter tensors of the network, >= 1.
        output_dim: entries of the family's largest kernel, >= 1; 1 without convolutions.
        config: sizes, frequencies, norm, and the seed of the start.

    Raises:
        ValueError: a size below 1; in `forward`, inputs of other shapes or a tensor id outside 0 … P − 1.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import NeuMetaConfig, NeuMetaField, neumeta_coordinates
        >>> coords, tensor_id = neumeta_coordinates(nn.Linear(3, 2))
        >>> field = NeuMetaField(2, 1, NeuMetaConfig(hidden_dim=8, num_layers=2))
        >>> field(coords, tensor_id, coords[:, 5]).shape
        torch.Size([8, 1])

    Source: arXiv 2410.11878.
    """

    def __init__(self, num_tensors: int, output_dim: int, config: NeuMetaConfig):
        super().__init__()
        check_int("num_tensors", num_tensors, 1)
        check_int("output_dim", output_dim, 1)
        self.num_tensors, self.output_dim, self.config = num_tensors, output_dim, config
        inputs = 6 + 12 * config.num_freqs
        sizes = config.hidden_dim, output_dim, config.num_layers - 1
        with torch.random.fork_rng(devices=[]):  # the start below is drawn from the seed
            self.mlps = nn.ModuleList(_MLP(inputs, *sizes, config.residual_scale) for _ in range(num_tensors))
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                draw = stream(config.seed, "neumeta", "field", name)
                for p in (layer.weight, layer.bias):  # Kaiming-uniform with a = √5 is U(±1/√fan_in), as for the bias
                    draw_uniform(p, 1 / math.sqrt(layer.in_features), draw)

    def forward(
        self,
        coords: Tensor,  # (n, 6), not yet divided by the norm
        tensor_id: Tensor,  # (n,) int
        fan_in: Tensor,  # (n,)
    ) -> Tensor:  # (n, output_dim)
        """The outputs of each coordinate's MLP, divided by the fan-in."""
        n = len(coords)
        if coords.shape != (n, 6):
            raise ValueError(f"coords must have shape (n, 6); got {tuple(coords.shape)}")
        for name, given in (("tensor_id", tensor_id), ("fan_in", fan_in)):
            if given.shape != (n,):
                raise ValueError(f"{name} must have shape ({n},), one for each coordinate; got {tuple(given.shape)}")
        counts = torch.bincount(tensor_id.clamp_min(-1) + 1, minlength=self.num_tensors + 1).tolist()
        if counts[0] or len(counts) > self.num_tensors + 1:
            raise ValueError(f"tensor_id must lie in 0 to {self.num_tensors - 1}; got {tensor_id.unique().tolist()}")
        order = tensor_id.argsort(stable=True)
        parts = self.features(coords)[order].split(counts[1:])
        found = torch.cat([mlp(part) for mlp, part in zip(self.mlps, parts)])
        return found[order.argsort()] / fan_in.to(found.dtype).unsqueeze(1)

    def features(self, coords: Tensor) -> Tensor:  # (n, 6) -> (n, 6 + 12 num_freqs)
        """Fourier features, computed in float32 or better."""
        weight = next(self.parameters())
        u = coords.to(weight.device, compute_dtype(weight.dtype)) / self.config.norm
        u = torch.cat([u[:, :3] / u[:, 3:], u[:, 3:]], 1)
        rates = math.pi * 2.0 ** torch.arange(self.config.num_freqs, device=u.device, dtype=u.dtype)
        angles = rates[:, None] * u[:, None, :]  # (n, frequency, coordinate)
        waves = torch.stack([angles.sin(), angles.cos()], -1)
        return torch.cat([u, waves.flatten(1)], 1).to(weight.dtype)


def neumeta_coordinates(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The coordinates of a network's weights: one for each pair of channels, `c = (t, a, b, P, o, i)`.

    Tensor t of P, in the order of `named_parameters()`, has o output and i input channels; vectors have i = 1, and a kernel is
    one coordinate. Tied weights are one tensor. Rows are ordered by t, then a < o, then b < i.

    Returns:
        coords `(n, 6)` float64 and tensor_id `(n,)` int64.

    Raises:
        ValueError: a parameter without axes, of 3 or of more than 4; stored buffers, as those of batch normalisation.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import neumeta_coordinates
        >>> coords, tensor_id = neumeta_coordinates(nn.Linear(2, 1))
        >>> coords.tolist()
        [[0.0, 0.0, 0.0, 2.0, 1.0, 2.0], [0.0, 0.0, 1.0, 2.0, 1.0, 2.0], [1.0, 0.0, 0.0, 2.0, 1.0, 1.0]]

    Source: arXiv 2410.11878.
    """
    where = places(model)
    return where.coords, where.tensor_id


def neumeta_weights(
    field: NeuMetaField,
    model: nn.Module,
    noise: Tensor | None = None,  # (n, 6)
) -> dict[str, Tensor]:
    """The weights that the field gives a network of this model's shapes, differentiable by the field.

    Kernels take the central outputs, matrices and vectors output 0. The model's own numbers are not read.

    Args:
        noise: added to the coordinates; the tensor's index and the fan-in come from the clean ones.

    Returns:
        Tensors by parameter name, in the field's dtype.

    Raises:
        ValueError: see `neumeta_coordinates`; another number of tensors than the field has, a kernel with more entries than the
            field's `output_dim`, noise of another shape.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import NeuMetaConfig, NeuMetaField, neumeta_weights
        >>> field = NeuMetaField(2, 9, NeuMetaConfig(hidden_dim=8, num_layers=2))
        >>> {name: tuple(w.shape) for name, w in neumeta_weights(field, nn.Conv2d(2, 5, 3)).items()}
        {'weight': (5, 2, 3, 3), 'bias': (5,)}

    Source: arXiv 2410.11878.
    """
    return weights_at(field, places(model), noise)


@dataclass(frozen=True)
class Places:
    """Where the weights of a network stand: coordinates, and the shape of each parameter."""

    coords: Tensor
    tensor_id: Tensor
    shapes: dict[str, torch.Size]

    @property
    def output_dim(self) -> int:
        """Entries of the largest kernel."""
        return max(math.prod(shape[2:]) for shape in self.shapes.values())

    def to(self, device: torch.device) -> Places:
        """On a device, so that no step copies."""
        coords = self.coords if device.type == "cpu" else self.coords.float()  # not every device has float64
        return Places(coords.to(device), self.tensor_id.to(device), self.shapes)


def places(model: nn.Module) -> Places:
    """See `neumeta_coordinates`."""
    stored = model.state_dict().keys()
    buffers = [name for name, _ in model.named_buffers() if name in stored]
    if buffers:
        raise ValueError(
            f"model has buffers that no field generates: {listed(buffers)}; fold batch normalisation into the layer before it"
        )
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if not shapes:
        raise ValueError("model has no parameters; there is nothing to generate")
    for name, shape in shapes.items():
        if len(shape) not in (1, 2, 4):
            raise ValueError(f"parameters must be vectors, matrices or 4-dimensional kernels; {name} has shape {tuple(shape)}")
    parts, ids = [], []
    for t, shape in enumerate(shapes.values()):
        o, i = shape[0], shape[1] if len(shape) > 1 else 1
        head = torch.cartesian_prod(torch.arange(o), torch.arange(i)).double()
        tail = torch.tensor([len(shapes), o, i]).double().expand(o * i, 3)
        parts.append(torch.cat([torch.full((o * i, 1), t).double(), head, tail], 1))
        ids.append(torch.full((o * i,), t))
    return Places(torch.cat(parts), torch.cat(ids), shapes)


def weights_at(field: NeuMetaField, where: Places, noise: Tensor | None = None) -> dict[str, Tensor]:
    """See `neumeta_weights`."""
    if len(where.shapes) != field.num_tensors:
        raise ValueError(f"field has {field.num_tensors} tensors and model {len(where.shapes)}: {listed(where.shapes)}")
    for name, shape in where.shapes.items():
        if math.prod(shape[2:]) > field.output_dim:
            raise ValueError(
                f"kernels must have at most output_dim={field.output_dim} entries; {name} has {tuple(shape[2:])}, give the"
                " field the largest kernel of the family"
            )
    coords = where.coords
    if noise is not None:
        if noise.shape != coords.shape:
            raise ValueError(f"noise must have the coordinates' shape {tuple(coords.shape)}; got {tuple(noise.shape)}")
        coords = coords + noise
    device = next(field.parameters()).device
    found = field(coords.to(device), where.tensor_id.to(device), where.coords[:, 5].to(device))
    sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in where.shapes.values()]
    made = {}
    for (name, shape), part in zip(where.shapes.items(), found.split(sizes)):
        if len(shape) == 4:
            entries = math.prod(shape[2:])
            start = field.output_dim // 2 - entries // 2
            made[name] = part[:, start : start + entries].reshape(shape)
        else:
            made[name] = part[:, 0].reshape(shape)
    return made
