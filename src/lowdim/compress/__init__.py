"""Systems that make trained weights, activations and the KV cache low-dimensional."""

from lowdim.compress.core.load import load_compressed, load_low_rank
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report, last_report
from lowdim.compress.core.schedule import Scheduled, SparseTraining, finalize, step
from lowdim.compress.lord import LoRDConfig, lord, lord_factors, lord_rank, lord_spectra
from lowdim.compress.welore import WeLoreConfig, WeLoreLinear, welore, welore_freeze
from lowdim.modules import LowRankLinear

__all__ = [
    "CompressedLayer",
    "CompressionReport",
    "LoRDConfig",
    "LowRankLinear",
    "Scheduled",
    "SparseTraining",
    "WeLoreConfig",
    "WeLoreLinear",
    "attach_report",
    "finalize",
    "last_report",
    "load_compressed",
    "load_low_rank",
    "lord",
    "lord_factors",
    "lord_rank",
    "lord_spectra",
    "step",
    "welore",
    "welore_freeze",
]
