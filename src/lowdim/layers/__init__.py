"""Systems that make the weight itself low-dimensional, from the start of training."""

from lowdim.layers.lorentz import LorentzLinear
from lowdim.layers.maestro import MaestroConv2d, MaestroLinear
from lowdim.layers.maestro_model import maestro_decompose, maestro_merge, maestro_recalibrate
from lowdim.layers.maestro_training import MaestroSampler, MaestroTraining
from lowdim.layers.monarch import Monarch
from lowdim.layers.sltrain import SLTrainLinear
from lowdim.layers.sst import SSTLinear
from lowdim.layers.sst_schedule import SSTScheduler
from lowdim.layers.swap import densify, swap_linear
from lowdim.modules import LowRankLinear

LowRank = LowRankLinear

__all__ = [
    "LorentzLinear",
    "LowRank",
    "LowRankLinear",
    "MaestroConv2d",
    "MaestroLinear",
    "MaestroSampler",
    "MaestroTraining",
    "Monarch",
    "SLTrainLinear",
    "SSTLinear",
    "SSTScheduler",
    "densify",
    "maestro_decompose",
    "maestro_merge",
    "maestro_recalibrate",
    "swap_linear",
]
