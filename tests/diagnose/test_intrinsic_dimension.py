import math

import numpy as np
import pytest
import torch
from torch import nn

import vectors
from lowdim.diagnose import intrinsic_dimension
from lowdim.testing.result_case import ResultCase

SCORES = {None: [0.9, 1.0], 5: [0.5, 0.3], 20: [0.85, 0.8], 30: [0.86, 0.9], 80: [0.7, 0.95]}


class TestIntrinsicDimension(ResultCase):
    plots = True

    def result(self, **changes):
        how = {"threshold": 0.9, "seeds": (7, 3), "full_dimension": 400, **changes}
        return intrinsic_dimension(lambda d, seed: SCORES[d][(7, 3).index(seed)], [30, 5, 80, 20], **how)

    def expected(self):
        """The baseline is 0.95, so 0.855 is enough: 30 is the first whose mean 0.88 reaches it."""
        return {
            "dimension": 30, "baseline": 0.95, "threshold": 0.9, "dims": (5, 20, 30, 80),
            "scores": [SCORES[d] for d in (5, 20, 30, 80)], "full_dimension": 400, "measured": 8, "reduce": "mean",
            "seeds": (7, 3),
            "score": [0.4, 0.825, 0.88, 0.825], "compression": 400 / 30, "description_bits": 32 * 30 + 64,
            "spread": [0.2 / 2**0.5, 0.05 / 2**0.5, 0.04 / 2**0.5, 0.25 / 2**0.5],
        }  # fmt: skip

    def refusals(self):
        def fails(d, seed):
            if d == 20:
                raise RuntimeError("diverged")
            return SCORES[d][0]

        measure = lambda d, seed: 1.0  # noqa: E731
        nan = lambda d, seed: math.nan if d == 5 else 1.0  # noqa: E731
        return [
            (ValueError, "dims must hold at least one", lambda: intrinsic_dimension(measure, [])),
            (ValueError, "dims must be an int >= 1; got 0", lambda: intrinsic_dimension(measure, [0, 3])),
            (ValueError, "dims must be an int >= 1; got 2.5", lambda: intrinsic_dimension(measure, [2.5])),
            (ValueError, "at most full_dimension=10; got 11", lambda: intrinsic_dimension(measure, [11], full_dimension=10)),
            (ValueError, "threshold", lambda: intrinsic_dimension(measure, [3], threshold=0.0)),
            (ValueError, "threshold", lambda: intrinsic_dimension(measure, [3], threshold=1.1)),
            (ValueError, "seeds", lambda: intrinsic_dimension(measure, [3], seeds=())),
            (ValueError, "baseline", lambda: intrinsic_dimension(measure, [3], baseline=math.inf)),
            (ValueError, "search must be one of grid, bisect", lambda: intrinsic_dimension(measure, [3], search="binary")),
            (ValueError, "reduce must be one of mean", lambda: intrinsic_dimension(measure, [3], reduce="sum")),
            (ValueError, "dimension 5, seed 2: the score is nan; scores so far: {'baseline': [1.0]}",
             lambda: intrinsic_dimension(nan, [5], seeds=(2,))),
            (ValueError, "dimension 20, seed 0: the training failed (RuntimeError: diverged)",
             lambda: intrinsic_dimension(fails, [5, 20])),
            (ValueError, "5: [0.5]", lambda: intrinsic_dimension(fails, [5, 20])),
        ]  # fmt: skip

    def test_a_given_baseline_is_not_trained(self):
        seen = []
        found = self.result(baseline=0.5, callback=lambda *at: seen.append(at))
        assert found.dimension == 20
        assert [at[0] for at in seen] == [5, 5, 20, 20, 30, 30, 80, 80]
        seen = []
        self.result(callback=lambda *at: seen.append(at))
        assert seen[:2] == [(None, 7, 0.9), (None, 3, 1.0)], "it follows baselines, too"

    def test_a_row_names_its_dimension_and_its_seed(self):
        want = [(d, seed, SCORES[d][i]) for d in (5, 20, 30, 80) for i, seed in enumerate((7, 3))]
        assert [(row["dim"], row["seed"], row["score"]) for row in self.result().rows()] == want

    def test_dimensions_of_numpy_and_torch(self):
        for dims in (np.array([9, 3]), list(np.array([9, 3])), torch.tensor([9, 3])):
            found = intrinsic_dimension(lambda d, seed: 1.0, dims)
            assert found.dims == (3, 9)
            assert found.to_dict()["dimension"] == 3
        with pytest.raises(ValueError, match=r"dims must be an int >= 1; got 2\.5"):
            intrinsic_dimension(lambda d, seed: 1.0, np.array([2.5]))

    def test_where_none_is_enough(self):
        found = self.result(threshold=1.0)
        assert (found.dimension, found.compression, found.description_bits) == (None, None, None)
        assert "no dimension up to 80 reaches 1" in found.summary
        assert found.to_dict()["dimension"] is None
        assert intrinsic_dimension(lambda d, seed: 1.0, [3]).spread == [None]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 15, 16])
def test_bisection_trains_a_logarithm(count):
    dims = [3 * d for d in range(1, count + 1)]
    for least in (*dims, dims[-1] + 1):
        trained = []

        def measure(d, seed, least=least, trained=trained):
            trained.append(d)
            return 1.0 if d is None or d >= least else 0.2

        found = intrinsic_dimension(measure, dims, search="bisect")
        assert found.dimension == (least if least <= dims[-1] else None)
        assert trained[0] is None
        assert found.measured == len(trained) - 1 <= math.ceil(math.log2(count + 1))
        assert list(found.dims) == sorted(trained[1:])


def test_vectors():
    case = vectors.load("intrinsic-dimension", "diagnostic")
    dims, scores, baselines = case["dims"].tolist(), case["scores"], case["baselines"]

    def measure(d, seed):
        return float(baselines[seed] if d is None else scores[seed, dims.index(d)])

    for reduce in ("mean", "max"):
        found = intrinsic_dimension(measure, dims, seeds=range(3), reduce=reduce, **case.hyperparameters)
        assert found.dimension == int(case[f"dimension_{reduce}"])
        if reduce == "mean":
            torch.testing.assert_close(torch.tensor(found.score, dtype=torch.float64), case["mean_scores"], rtol=1e-12, atol=0)


def test_d_90_of_said_names_a_dimension_below_its_scales():
    from lowdim.adapters import said

    def measure(d, seed):
        return 1.0 if d is None else float(said(nn.Linear(6, 4), d, seed=seed).dimension)

    assert intrinsic_dimension(measure, [3, 8]).dimension == 3
    with pytest.raises(ValueError, match=r"dimension 2, seed 0: .*dimension must be above 2, one for the scale of each"):
        intrinsic_dimension(measure, [2, 8])


def test_memory_errors_pass_through():
    def measure(d, seed):
        raise MemoryError

    with pytest.raises(MemoryError):
        intrinsic_dimension(measure, [3])
