"""The settings of a field and of its training."""

from __future__ import annotations

from dataclasses import dataclass

from lowdim.errors import Options, check_float, check_int

__all__ = ["NeuMetaConfig"]


@dataclass(frozen=True)
class NeuMetaConfig(Options):
    """How `neumeta` builds a field and trains it.

    Attributes:
        hidden_dim: units of each layer of an MLP, >= 1; there is one MLP for each parameter of the network.
        num_layers: hidden layers of an MLP, >= 1; all but the first are residual blocks.
        num_freqs: Fourier frequencies of each coordinate, >= 0, at most 24: float32 has no digits for higher ones.
        residual_scale: start of the learned factor of each block, >= 0.
        coordinate_noise: width of the uniform noise that training adds to the coordinates, in [0, 2): from 2 on a size could
            become zero.
        norm: what coordinates are divided by, > 0; the largest width.
        ce_weight: factor of the task's loss, >= 0.
        recon_weight: factor of the distance to the reference at the reference's width, >= 0. Short trainings need a large one.
        reg_weight: factor of the sum of the weights' norms, >= 0.
        ema_decay: of the average of the field that is kept, in [0, 1).
        lr: learning rate of AdamW, > 0.
        weight_decay: decoupled decay of the field, >= 0.
        steps: training steps, >= 0.
        seed: of the field's start, the widths, the noise and dropout, >= 0.

    Source: Yang and Wang, "Neural Metamorphosis", arXiv 2410.11878.
    """

    hidden_dim: int = 256
    num_layers: int = 8
    num_freqs: int = 16
    residual_scale: float = 0.1
    coordinate_noise: float = 1.0
    norm: float = 32.0
    ce_weight: float = 1.0
    recon_weight: float = 1.0
    reg_weight: float = 1e-4
    ema_decay: float = 0.995
    lr: float = 1e-3
    weight_decay: float = 0.0
    steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("hidden_dim", self.hidden_dim, 1)
        check_int("num_layers", self.num_layers, 1)
        check_int("num_freqs", self.num_freqs, 0, 24)
        check_float("coordinate_noise", self.coordinate_noise, 0.0, 2.0, high_open=True)
        check_float("ema_decay", self.ema_decay, 0.0, 1.0, high_open=True)
        for name in ("norm", "lr"):
            check_float(name, getattr(self, name), 0.0, low_open=True)
        for name in ("residual_scale", "ce_weight", "recon_weight", "reg_weight", "weight_decay"):
            check_float(name, getattr(self, name), 0.0)
        for name in ("steps", "seed"):
            check_int(name, getattr(self, name), 0)
