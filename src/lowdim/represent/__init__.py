"""Systems that make features, labels and prediction heads low-dimensional."""

from lowdim.represent.matryoshka.cascade import CascadeResult, MatryoshkaCascade
from lowdim.represent.matryoshka.heads import MatryoshkaCrossEntropy, MatryoshkaEmbeddingLoss, MatryoshkaHead
from lowdim.represent.matryoshka.retrieval import RetrievalResult, adaptive_retrieve, funnel_retrieve

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
