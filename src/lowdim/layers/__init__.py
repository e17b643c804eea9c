"""Systems that make the weight itself low-dimensional, from the start of training."""

from lowdim.layers.core.swap import densify, swap_linear
from lowdim.layers.core.token_mixer import as_token_mixer
from lowdim.layers.delta_product.layer import DeltaProduct, DeltaProductState
from lowdim.layers.gbw_bn.layer import GBWBatchNorm
from lowdim.layers.gbw_bn.sgd import SPDSGD
from lowdim.layers.householder import HouseholderProjector
from lowdim.layers.maestro.layers import MaestroConv2d, MaestroLinear
from lowdim.layers.maestro.model import maestro_decompose, maestro_merge, maestro_recalibrate
from lowdim.layers.maestro.training import MaestroSampler, MaestroTraining
from lowdim.layers.monarch import Monarch
from lowdim.layers.s4d import S4D
from lowdim.layers.sltrain import SLTrainLinear
from lowdim.layers.sst.layer import SSTLinear
from lowdim.layers.sst.lorentz import LorentzLinear
from lowdim.layers.sst.schedule import SSTScheduler
from lowdim.layers.structured_ffn.blocks import BlockDense, BlockShuffle
from lowdim.layers.structured_ffn.guide import SelfGuide, SelfGuided
from lowdim.layers.structured_ffn.mlp import StructuredFFN, structured_mlp
from lowdim.layers.structured_ffn.premerged import PreMerged
from lowdim.modules import LowRankLinear
from lowdim.moved import keep_importable

LowRank = LowRankLinear
keep_importable(__name__, maestro_model="maestro.model")

__all__ = [
    "S4D",
    "SPDSGD",
    "BlockDense",
    "BlockShuffle",
    "DeltaProduct",
    "DeltaProductState",
    "GBWBatchNorm",
    "HouseholderProjector",
    "LorentzLinear",
    "LowRank",
    "LowRankLinear",
    "MaestroConv2d",
    "MaestroLinear",
    "MaestroSampler",
    "MaestroTraining",
    "Monarch",
    "PreMerged",
    "SLTrainLinear",
    "SSTLinear",
    "SSTScheduler",
    "SelfGuide",
    "SelfGuided",
    "StructuredFFN",
    "as_token_mixer",
    "densify",
    "maestro_decompose",
    "maestro_merge",
    "maestro_recalibrate",
    "structured_mlp",
    "swap_linear",
]
