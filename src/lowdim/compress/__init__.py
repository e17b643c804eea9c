"""Systems that make trained weights, activations and the KV cache low-dimensional."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowdim.compress.core.load import load_compressed, load_low_rank
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report, last_report
from lowdim.compress.core.schedule import Scheduled, SparseTraining, finalize, step
from lowdim.compress.lord import LoRDConfig, lord, lord_factors, lord_rank, lord_spectra
from lowdim.compress.lr2vq import (
    LR2VQConfig,
    LR2VQConv2d,
    LR2VQLinear,
    dkm,
    estimate_clustering_dim,
    lowrank_subvectors,
    lr2vq,
    lr2vq_tables,
    vq_bytes,
)
from lowdim.compress.matryoshka_kv import (
    MatryoshkaKVConfig,
    MatryoshkaProjection,
    greedy_kv_ranks,
    kv_cache_bytes,
    kv_pca,
    matryoshka_attention,
    matryoshka_freeze,
    matryoshka_kv,
    matryoshka_loss,
    matryoshka_step,
    sample_kv_ranks,
    search_kv_ranks,
    set_kv_ranks,
)
from lowdim.compress.neumeta import (
    NeuMeta,
    NeuMetaConfig,
    NeuMetaField,
    neumeta,
    neumeta_coordinates,
    neumeta_reconstruction_loss,
    neumeta_weights,
    permute_channels,
    smooth_order,
    total_variation,
)
from lowdim.compress.nm_decay import NMConv2d, NMDecayConfig, NMLinear, nm_decay
from lowdim.compress.pela import (
    PELAConfig,
    PELALoss,
    PELAObjective,
    pela,
    pela_factors,
    pela_rank,
    perturbation_loss,
)
from lowdim.compress.pst import PSTConfig, PSTLinear, pst
from lowdim.compress.welore import WeLoreConfig, WeLoreLinear, welore, welore_freeze
from lowdim.compress.wina import (
    WINAConfig,
    WINALinear,
    greedy_sparsity,
    wina,
    wina_mask,
    wina_report,
    wina_threshold,
)
from lowdim.lazy import lazy_names
from lowdim.modules import LowRankLinear

if TYPE_CHECKING:
    from lowdim.compress.matryoshka_kv.cache import MatryoshkaCache

__all__ = [
    "CompressedLayer",
    "CompressionReport",
    "LR2VQConfig",
    "LR2VQConv2d",
    "LR2VQLinear",
    "LoRDConfig",
    "LowRankLinear",
    "MatryoshkaCache",
    "MatryoshkaKVConfig",
    "MatryoshkaProjection",
    "NMConv2d",
    "NMDecayConfig",
    "NMLinear",
    "NeuMeta",
    "NeuMetaConfig",
    "NeuMetaField",
    "PELAConfig",
    "PELALoss",
    "PELAObjective",
    "PSTConfig",
    "PSTLinear",
    "Scheduled",
    "SparseTraining",
    "WINAConfig",
    "WINALinear",
    "WeLoreConfig",
    "WeLoreLinear",
    "attach_report",
    "dkm",
    "estimate_clustering_dim",
    "finalize",
    "greedy_kv_ranks",
    "greedy_sparsity",
    "kv_cache_bytes",
    "kv_pca",
    "last_report",
    "load_compressed",
    "load_low_rank",
    "lord",
    "lord_factors",
    "lord_rank",
    "lord_spectra",
    "lowrank_subvectors",
    "lr2vq",
    "lr2vq_tables",
    "matryoshka_attention",
    "matryoshka_freeze",
    "matryoshka_kv",
    "matryoshka_loss",
    "matryoshka_step",
    "neumeta",
    "neumeta_coordinates",
    "neumeta_reconstruction_loss",
    "neumeta_weights",
    "nm_decay",
    "pela",
    "pela_factors",
    "pela_rank",
    "permute_channels",
    "perturbation_loss",
    "pst",
    "sample_kv_ranks",
    "search_kv_ranks",
    "set_kv_ranks",
    "smooth_order",
    "step",
    "total_variation",
    "vq_bytes",
    "welore",
    "welore_freeze",
    "wina",
    "wina_mask",
    "wina_report",
    "wina_threshold",
]

__getattr__ = lazy_names(__name__, {"MatryoshkaCache": "matryoshka_kv.cache"})
