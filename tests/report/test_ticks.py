"""Axis ticks of the page, run in node: at least two, told apart by their labels, and each label is its tick."""

import json
import shutil
import subprocess
from importlib.resources import files
from itertools import pairwise

import pytest

# What the page has and node has not; no chart is drawn.
_STUB = """
const stub = new Proxy(function () {}, { get: (t, k) => (k === Symbol.toPrimitive ? () => 0 : stub), apply: () => stub });
globalThis.document = stub; JSON.parse = () => ({ metric: { name: "accuracy", decimals: 3 } });
"""
RANGES = [
    (0.705, 0.7802, 3),
    (0.74, 0.76, 3),
    (0.95, 0.95 + 3e-7, 6),
    (0.999, 1.0, 3),
    (-1.0, 1.0, 6),
    (12.86, 12.87, 6),
    (47.8, 1200.0, 6),
    (5.0e13, 5.1e13, 6),
    (1.0, 3.0e21, 6),
    (2.0e-7, 9.0e-7, 3),
    (0.0, 4.0e-5, 6),
    (1234567.0, 1234568.0, 3),
]


@pytest.fixture(scope="module")
def labelled():
    """The ticks of every range and their labels."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    source = files("lowdim.report").joinpath("charts.js").read_text(encoding="utf-8")
    ask = "const ask = ([a, b, n]) => { const t = linearTicks(a, b, n); return [t, t.map(tickFormat(t, 'score'))]; };"
    script = f"{_STUB}{source}\n{ask}\nconsole.log(JSON.stringify({json.dumps(RANGES)}.map(ask)))"
    done = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True)
    return dict(zip(RANGES, json.loads(done.stdout)))


@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_ticks_are_told_apart_and_are_what_their_labels_say(limits, labelled):
    low, high, wanted = limits
    ticks, labels = labelled[limits]
    assert 2 <= len(ticks) <= max(4, 2 * wanted)
    assert len(set(labels)) == len(labels)
    step = min(b - a for a, b in pairwise(ticks))
    for tick, label in zip(ticks, labels):
        assert low - step <= tick <= high + step
        assert abs(float(label.replace("−", "-")) - tick) < 1e-3 * step
        assert len(label) < 12
