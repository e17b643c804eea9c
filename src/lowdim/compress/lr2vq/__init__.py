"""LR²VQ: vector quantization of a weight's subvectors in a lower dimension than they have."""

from lowdim.compress.lr2vq.clustering import dkm, estimate_clustering_dim, lowrank_subvectors
from lowdim.compress.lr2vq.coded import vq_bytes
from lowdim.compress.lr2vq.layers import LR2VQConv2d, LR2VQLinear
from lowdim.compress.lr2vq.quantizing import LR2VQConfig, lr2vq, lr2vq_tables

__all__ = [
    "LR2VQConfig",
    "LR2VQConv2d",
    "LR2VQLinear",
    "dkm",
    "estimate_clustering_dim",
    "lowrank_subvectors",
    "lr2vq",
    "lr2vq_tables",
    "vq_bytes",
]
