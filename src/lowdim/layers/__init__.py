"""Systems that make the weight itself low-dimensional, from the start of training."""

from lowdim.layers.core.swap import densify, swap_linear
from lowdim.layers.maestro.layers import MaestroConv2d, MaestroLinear
from lowdim.layers.maestro.model import maestro_decompose, maestro_merge, maestro_recalibrate
from lowdim.layers.maestro.training import MaestroSampler, MaestroTraining
from lowdim.layers.monarch import Monarch
from lowdim.layers.sltrain import SLTrainLinear
from lowdim.layers.sst.layer import SSTLinear
from lowdim.layers.sst.lorentz import LorentzLinear
from lowdim.layers.sst.schedule import SSTScheduler
from lowdim.modules import LowRankLinear
from lowdim.moved import keep_importable

LowRank = LowRankLinear
keep_importable(__name__, maestro_model="maestro.model")

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
