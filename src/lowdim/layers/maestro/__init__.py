"""Maestro: layers whose rank is found during training."""

from lowdim.layers.maestro.layers import MaestroConv2d, MaestroLinear
from lowdim.layers.maestro.model import maestro_decompose, maestro_merge, maestro_recalibrate
from lowdim.layers.maestro.training import MaestroSampler, MaestroTraining

__all__ = [
    "MaestroConv2d",
    "MaestroLinear",
    "MaestroSampler",
    "MaestroTraining",
    "maestro_decompose",
    "maestro_merge",
    "maestro_recalibrate",
]
