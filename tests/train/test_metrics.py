import math

import pytest

from lowdim.errors import UnknownNameError
from lowdim.train.metrics import METRICS, Metric, metric_for


def test_the_metric_of_a_task():
    assert metric_for("classify").name == "accuracy"
    assert metric_for("causal-lm").name == "perplexity"
    assert metric_for("classify", "mcc") is METRICS["mcc"]
    with pytest.raises(
        UnknownNameError,
        match=r"metric for classify must be one of accuracy, f1, .*auc; got 'acuracy' \(nearest: accuracy",
    ):
        metric_for("classify", "acuracy")
    with pytest.raises(UnknownNameError, match="must be one of perplexity, loss, bits-per-byte; got 'accuracy'"):
        metric_for("causal-lm", "accuracy")


def test_better_knows_its_direction_and_nan_beats_nothing():
    up, down = Metric("a", "classify", True), Metric("b", "causal-lm", False)
    assert up.better(2.0, 1.0)
    assert not up.better(1.0, 1.0)
    assert down.better(1.0, 2.0)
    for metric in (up, down):
        assert metric.better(1.0, math.nan)
        assert not metric.better(math.nan, 1.0)
        assert not metric.better(math.nan, math.nan)
