"""What is made low-dimensional here: features, labels and prediction heads."""

from lowdim.represent.cascade import CascadeResult, MatryoshkaCascade
from lowdim.represent.mrl import MatryoshkaCrossEntropy, MatryoshkaEmbeddingLoss, MatryoshkaHead
from lowdim.represent.retrieval import RetrievalResult, adaptive_retrieve, funnel_retrieve

__all__ = [
    "CascadeResult",
    "MatryoshkaCascade",
    "MatryoshkaCrossEntropy",
    "MatryoshkaEmbeddingLoss",
    "MatryoshkaHead",
    "RetrievalResult",
    "adaptive_retrieve",
    "funnel_retrieve",
]
