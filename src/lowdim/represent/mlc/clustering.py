"""MLC with a network of two heads, as a scikit-learn clusterer and transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import k_means
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.functional import normalize

from lowdim.errors import warn_caller
from lowdim.linalg import derive_seed, stream
from lowdim.represent.core.fitting import as_input, batches, build, outputs, seed_from, train
from lowdim.represent.mlc.memberships import KERNELS, balanced, membership
from lowdim.represent.mlc.rates import MLCLoss, TotalCodingRateLoss

__all__ = ["ManifoldLinearizingClustering"]

_MANY = 10_000  # rows above which a matrix of memberships is announced
_FEW = 10  # samples a cluster up to which all eigenvectors are taken
_DECAY, _DECAY_CLUSTER, _MOMENTUM = 1e-4, 5e-3, 0.9  # the authors'


class ManifoldLinearizingClustering(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Clusters and features that make each of them flat, learned together without labels.

    Formula: a network with two heads gives `Z = normalize(feature(h))` and `C = normalize(cluster(h))`, rows of length 1. First
    the feature head spreads (`TotalCodingRateLoss`), and the cluster head becomes a copy of it; then both minimise
    `MLCLoss(Z, membership(C))`. Labels are those of spectral clustering on the memberships of all samples.

    Args:
        n_clusters: in [1, n_samples].
        n_components: size d of both heads.
        hidden: width of the backbone: Linear, BatchNorm, ReLU, Linear, ReLU.
        eps_sq: ε² > 0 of the coding rates.
        eta, kernel, sinkhorn_iterations: of `membership`.
        membership_penalty: p >= 0 of `MLCLoss`.
        warmup_epochs, epochs, batch_size: of the two parts of the training; memberships are those within a batch.
        lr, lr_cluster: of backbone and feature head, and of the cluster head (SGD with momentum).
        augment: `(batch, generator) -> batch` of standardised rows, drawn twice for each batch; None takes rows as they are.
        alignment: a >= 0 of `TotalCodingRateLoss`, a sum over the batch; only with `augment`.
        random_state: seed of the first weights, the batches, the augmentations and the spectral clustering.

    Attributes:
        labels_ (n,): clusters of the samples given to `fit`. network_: the trained module, `x -> (Z, C)` of standardised rows.

    `transform(X)` is Z, `(n, n_components)` in float64. `membership(X)` is Γ of any samples, `(n, n)`. There is no `predict`:
    labels are of all samples at once. `fit` and `membership` hold `(n, n)` in float64, and warn above 10,000 rows.

    Raises:
        ValueError: options out of range, more clusters than samples, NaN in X or in the network's outputs.
        NotFittedError: used before `fit`.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import ManifoldLinearizingClustering
        >>> X = np.kron(np.eye(2), np.ones((30, 3))) + 0.1 * np.random.default_rng(0).normal(size=(60, 6))
        >>> mlc = ManifoldLinearizingClustering(2, n_components=4, hidden=16, lr=0.01, lr_cluster=0.01, random_state=0).fit(X)
        >>> [len(set(mlc.labels_[part])) for part in (slice(30), slice(30, 60))]
        [1, 1]

    Not to beat KMeans on raw features: on digits it does not. It gives features in which clusters are nearly orthogonal
    subspaces; strong pre-trained features are what the paper's clustering rests on.

    Source: Ding et al., "Unsupervised Manifold Linearizing and Clustering", ICCV 2023, arXiv 2301.01805.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **{
            name: [Interval(Integral, 1, None, closed="left")]
            for name in ("n_clusters", "n_components", "hidden", "sinkhorn_iterations", "epochs")
        },
        **{name: [Interval(Real, 0, None, closed="neither")] for name in ("eps_sq", "eta", "lr", "lr_cluster")},
        **{name: [Interval(Real, 0, None, closed="left")] for name in ("membership_penalty", "alignment")},
        "kernel": [StrOptions(set(KERNELS))],
        "warmup_epochs": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "augment": [None, callable],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_clusters=8,
        *,
        n_components=32,
        hidden=256,
        eps_sq=0.1,
        eta=0.175,
        kernel="abs",
        sinkhorn_iterations=5,
        membership_penalty=0.05,
        warmup_epochs=10,
        epochs=20,
        batch_size=256,
        lr=3e-3,
        lr_cluster=2e-3,
        augment=None,
        alignment=0.1,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.n_components = n_components
        self.hidden = hidden
        self.eps_sq = eps_sq
        self.eta = eta
        self.kernel = kernel
        self.sinkhorn_iterations = sinkhorn_iterations
        self.membership_penalty = membership_penalty
        self.warmup_epochs = warmup_epochs
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.lr_cluster = lr_cluster
        self.augment = augment
        self.alignment = alignment
        self.random_state = random_state

    def fit(self, X, y=None):
        """Train on the samples and cluster them; y is ignored."""
        self._validate_params()
        how: Any = {"dtype": np.float64, "ensure_min_samples": 2}
        samples: Any = validate_data(self, X, **how)
        X = samples
        if self.n_clusters > len(X):
            raise ValueError(f"n_clusters must be at most n_samples = {len(X)}; got {self.n_clusters}")
        seed = seed_from(self.random_state)
        self._mean, scale = X.mean(axis=0), X.std(axis=0)
        # The deviation of a constant column need not come out as 0: that of 0.1 is 1e-17.
        self._scale = np.where((scale > 0) & (np.ptp(X, axis=0) > 0), scale, 1.0)
        self.network_ = self._trained(self._standardised(X), seed)
        self.labels_ = self._labels(X, seed) if self.n_clusters > 1 else np.zeros(len(X), dtype=np.int32)
        return self

    def transform(self, X):
        """The features of each sample, rows of length 1."""
        return self._head(self._checked(X), "feature")

    def membership(self, X):
        """Γ of these samples, `(n, n)`: doubly stochastic to 1e-9."""
        return self._membership(self._checked(X))

    @property
    def _n_features_out(self) -> int:
        return self.n_components

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        how: Any = {"dtype": np.float64, "reset": False}
        samples: Any = validate_data(self, X, **how)
        return samples

    def _standardised(self, X: np.ndarray) -> np.ndarray:
        return (X - self._mean) / self._scale

    def _head(self, X: np.ndarray, name: str) -> np.ndarray:
        net: Any = self.network_
        return outputs(nn.Sequential(net.backbone, net.get_submodule(name), _Unit()), self._standardised(X))

    def _membership(self, X: np.ndarray) -> np.ndarray:
        kernel, scale = self._balanced(X)
        return kernel.mul_(scale[:, None]).mul_(scale).numpy()

    def _balanced(self, X: np.ndarray) -> tuple[Tensor, Tensor]:
        """The kernel of the samples and the scale s with which `diag(s) kernel diag(s)` is their membership."""
        if len(X) > _MANY:
            warn_caller(f"memberships of {len(X):,} samples are {8 * len(X) ** 2 / 1e9:.1f} GB, several times")
        C = torch.from_numpy(self._head(X, "cluster"))
        if not bool(torch.isfinite(C).all()):
            raise ValueError(
                "the network's outputs are not finite: fit it with a smaller lr_cluster, and scale the columns of X"
            )
        return balanced(C, self.eta, kernel=self.kernel)

    def _labels(self, X: np.ndarray, seed: int) -> np.ndarray:
        """Those of scikit-learn's `SpectralClustering` on the memberships, by the few eigenvectors that it needs."""
        kernel, scale = self._balanced(X)
        affinity, draws = kernel.mul_(scale[:, None]).mul_(scale).numpy(), check_random_state(seed)
        np.fill_diagonal(affinity, 0)  # a sample is no neighbour of its own
        degree = np.sqrt(affinity.sum(0))
        degree[degree == 0] = 1
        affinity /= degree
        affinity /= degree[:, None]
        start = draws.uniform(-1, 1, len(X))
        if len(X) > _FEW * self.n_clusters:
            how: Any = {"which": "LA", "ncv": max(20, 3 * self.n_clusters), "tol": 1e-8, "v0": start}
            vectors = eigsh(affinity, self.n_clusters, **how)[1]
        else:
            vectors = eigh(affinity, subset_by_index=[len(X) - self.n_clusters, len(X) - 1])[1]
        options: Any = {"random_state": draws, "n_init": 10}
        found: Any = k_means(vectors[:, ::-1] / degree[:, None], self.n_clusters, **options)
        return found[1]

    def _trained(self, X: np.ndarray, seed: int) -> nn.Module:
        network: Any = build(lambda: _TwoHeads(X.shape[1], self.hidden, self.n_components), seed)
        samples, generator = as_input(X, network), stream(seed, "augmentations")

        def views(batch: Tensor) -> list[Tensor]:
            return [samples[batch]] if self.augment is None else [self.augment(samples[batch], generator) for _ in range(2)]

        spread, flatten = (
            TotalCodingRateLoss(self.eps_sq, self.alignment),
            MLCLoss(self.eps_sq, membership_penalty=self.membership_penalty),
        )

        def start(batch: Tensor) -> Tensor:
            return spread(*(normalize(features(view)) for view in views(batch)))

        def both(batch: Tensor) -> Tensor:
            Z, C = zip(*(network(view) for view in views(batch)))
            how: Any = {"kernel": self.kernel, "iterations": self.sinkhorn_iterations}
            gammas = [membership(each, self.eta, **how) for each in C]
            return flatten(normalize(torch.stack(Z).mean(0)), torch.stack(gammas).mean(0))

        def part(loss: Callable[[Tensor], Tensor], epochs: int, name: str, *heads: tuple[nn.Module, float, float]) -> None:
            optimizers = [
                torch.optim.SGD(module.parameters(), lr=lr, momentum=_MOMENTUM, weight_decay=decay, fused=True)
                for module, lr, decay in heads
            ]
            part_seed = derive_seed(seed, name)
            train(network, loss, batches(len(X), self.batch_size, epochs, part_seed), optimizers, part_seed)

        features = nn.Sequential(network.backbone, network.feature)
        part(start, self.warmup_epochs, "warmup", (features, self.lr, _DECAY))
        network.cluster.load_state_dict(copy.deepcopy(network.feature.state_dict()))
        heads = (features, self.lr, _DECAY), (network.cluster, self.lr_cluster, _DECAY_CLUSTER)
        part(both, self.epochs, "training", *heads)
        return network


class _TwoHeads(nn.Module):
    """`x -> (Z, C)`, rows of length 1."""

    def __init__(self, in_features: int, hidden: int, n_components: int):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(in_features, hidden, dtype=torch.float32),
            nn.BatchNorm1d(hidden, dtype=torch.float32),
            nn.ReLU(),
            nn.Linear(hidden, hidden, dtype=torch.float32),
            nn.ReLU(),
        )
        self.feature = nn.Linear(hidden, n_components, dtype=torch.float32)
        self.cluster = nn.Linear(hidden, n_components, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.backbone(x)
        return normalize(self.feature(h)), normalize(self.cluster(h))


class _Unit(nn.Module):
    """Rows scaled to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x)
