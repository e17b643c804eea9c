"""Systems that make features, labels and prediction heads low-dimensional."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowdim.lazy import lazy_names
from lowdim.represent.a_mtrl import (
    ActiveMultiTask,
    ActiveResult,
    SharedLinearRepresentation,
    allocate_samples,
    task_relevance,
)
from lowdim.represent.d_simplex import (
    DSimplexClassifier,
    HOCLoss,
    ReplacementReport,
    StationaryLoss,
    average_accuracy,
    average_compatibility,
    compatibility_inequalities,
    identification_accuracy,
    replacement_report,
    simplex_vertices,
)
from lowdim.represent.drs.bounds import (
    ABSTAIN,
    clopper_pearson_lower,
    dual_radius,
    dual_smoothing_radius,
    smallest_n,
    smoothing_radius,
)
from lowdim.represent.drs.certificates import Certificate, Certificates
from lowdim.represent.drs.halves import checkerboard, fill_masked
from lowdim.represent.drs.smoothing import DualRandomizedSmoothing, RandomizedSmoothing
from lowdim.represent.fccov.covariance import FCCovLoss, frechet_cumulative_covariance
from lowdim.represent.fewshot.features import episode_features
from lowdim.represent.fewshot.graph import bound_update, knn_affinity
from lowdim.represent.loki.locus import active_selection, label_locus, select_next_class
from lowdim.represent.loki.prediction import (
    embedding_distances,
    frechet_one_hot,
    frechet_predict,
    frechet_scores,
    squared_distance_risk,
)
from lowdim.represent.matryoshka.cascade import CascadeResult, MatryoshkaCascade
from lowdim.represent.matryoshka.heads import MatryoshkaCrossEntropy, MatryoshkaEmbeddingLoss, MatryoshkaHead
from lowdim.represent.matryoshka.indexes import index_bytes, nested_index
from lowdim.represent.matryoshka.retrieval import RetrievalResult, adaptive_retrieve, funnel_retrieve
from lowdim.represent.mlc.memberships import membership, sinkhorn_projection
from lowdim.represent.mlc.rates import MLCLoss, TotalCodingRateLoss, clustered_coding_rate, coding_rate
from lowdim.represent.starbucks import (
    SizeTable,
    StarbucksCollator,
    StarbucksLoss,
    StarbucksPretraining,
    nested_whole_word_masks,
    shrink_encoder,
    size_table,
    starbucks_retrieval_loss,
)

if TYPE_CHECKING:
    from lowdim.represent.fccov.net import FCCovNet
    from lowdim.represent.fewshot.clustering import TransductiveClustering
    from lowdim.represent.loki.classifier import LokiClassifier
    from lowdim.represent.mlc.clustering import ManifoldLinearizingClustering

__all__ = [
    "ABSTAIN",
    "ActiveMultiTask",
    "ActiveResult",
    "CascadeResult",
    "Certificate",
    "Certificates",
    "DSimplexClassifier",
    "DualRandomizedSmoothing",
    "FCCovLoss",
    "FCCovNet",
    "HOCLoss",
    "LokiClassifier",
    "MLCLoss",
    "ManifoldLinearizingClustering",
    "MatryoshkaCascade",
    "MatryoshkaCrossEntropy",
    "MatryoshkaEmbeddingLoss",
    "MatryoshkaHead",
    "RandomizedSmoothing",
    "ReplacementReport",
    "RetrievalResult",
    "SharedLinearRepresentation",
    "SizeTable",
    "StarbucksCollator",
    "StarbucksLoss",
    "StarbucksPretraining",
    "StationaryLoss",
    "TotalCodingRateLoss",
    "TransductiveClustering",
    "active_selection",
    "adaptive_retrieve",
    "allocate_samples",
    "average_accuracy",
    "average_compatibility",
    "bound_update",
    "checkerboard",
    "clopper_pearson_lower",
    "clustered_coding_rate",
    "coding_rate",
    "compatibility_inequalities",
    "dual_radius",
    "dual_smoothing_radius",
    "embedding_distances",
    "episode_features",
    "fill_masked",
    "frechet_cumulative_covariance",
    "frechet_one_hot",
    "frechet_predict",
    "frechet_scores",
    "funnel_retrieve",
    "identification_accuracy",
    "index_bytes",
    "knn_affinity",
    "label_locus",
    "membership",
    "nested_index",
    "nested_whole_word_masks",
    "replacement_report",
    "select_next_class",
    "shrink_encoder",
    "simplex_vertices",
    "sinkhorn_projection",
    "size_table",
    "smallest_n",
    "smoothing_radius",
    "squared_distance_risk",
    "starbucks_retrieval_loss",
    "task_relevance",
]

_HOMES = {
    "FCCovNet": "fccov.net",
    "LokiClassifier": "loki.classifier",
    "ManifoldLinearizingClustering": "mlc.clustering",
    "TransductiveClustering": "fewshot.clustering",
}

__getattr__ = lazy_names(__name__, _HOMES)
