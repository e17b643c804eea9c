import itertools
import math

import numpy as np
import torch

from lowdim.linalg import exp_features
from lowdim.testing.result_case import ValueCase


class TestExpFeatures(ValueCase):
    tolerance = 1e-13

    def z(self):
        return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def result(self):
        return exp_features(self.z(), 3).sort(dim=1).values

    def expected(self):
        columns = []
        for a in itertools.product(range(4), repeat=3):
            if sum(a) <= 3:
                size = math.sqrt(math.prod(map(math.factorial, a)))
                columns.append(np.prod([self.z().numpy()[:, i] ** a[i] for i in range(3)], axis=0) / size)
        return np.sort(np.stack(columns, 1), axis=1)

    def refusals(self):
        return [
            (ValueError, "degree", lambda: exp_features(self.z(), 0)),
            (ValueError, "degree", lambda: exp_features(self.z(), 2.0)),  # type: ignore[arg-type]
            (ValueError, "(n, h)", lambda: exp_features(self.z()[0], 2)),
            (ValueError, "814,385 features", lambda: exp_features(torch.zeros(1, 64), 4)),
        ]

    def test_inner_products_are_the_polynomial(self):
        z, w = self.z(), self.z().flip(0)
        for degree in (1, 2, 5):
            want = sum((z @ w.T) ** k / math.factorial(k) for k in range(degree + 1))
            assert torch.allclose(exp_features(z, degree) @ exp_features(w, degree).T, want)
        assert exp_features(z.float(), 2).dtype == torch.float32
        assert exp_features(z[:0], 2).shape == (0, 10)
        assert torch.allclose(exp_features(z[:, :1], 2), torch.stack([z[:, 0] ** 0, z[:, 0], z[:, 0] ** 2 / 2**0.5], 1))
