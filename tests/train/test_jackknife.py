"""The jackknife: one value for each example of a metric that is no mean."""

import math

import numpy as np
import pytest

from lowdim.train.jackknife import jackknife


def test_the_jackknife_of_a_mean_is_its_examples():
    values = np.random.default_rng(0).normal(size=40)
    assert jackknife(lambda rows: float(values[rows].mean()), 40) == pytest.approx(values)


def test_the_jackknife_gives_the_error_of_a_correlation():
    draw = np.random.default_rng(2)
    x = draw.normal(size=400)
    y = 0.6 * x + 0.8 * draw.normal(size=400)
    values = jackknife(lambda rows: float(np.corrcoef(x[rows], y[rows])[0, 1]), 400)
    r = float(np.corrcoef(x, y)[0, 1])
    assert values.mean() == pytest.approx(r, abs=0.005)
    assert values.std(ddof=1) / math.sqrt(400) == pytest.approx((1 - r**2) / math.sqrt(400), rel=0.15)
    with pytest.raises(ValueError, match="at least two examples; got 1"):
        jackknife(lambda rows: 0.0, 1)
