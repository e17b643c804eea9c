"""The page of `diagnose all`: any record can be drawn, nothing in it runs, and its numbers are there."""

import json
import re

from lowdim.report import render_diagnosis
from lowdim.report.figures import dots, grid, lines


def layer(name, **changes):
    numbers = {"alpha": 2.0, "alpha_error": 0.1, "ks_distance": 0.1, "full_alpha": 3.0, "half_error": 0.4, "stable_rank": 9.0}
    return {
        "name": name,
        "shape": [8, 4],
        "spectrum": [1.0, 0.5, 0.0],
        "effective_rank": 3.0,
        "half_rank": 1,
        **numbers,
        **changes,
    }


def tuned(name, **changes):
    measured = {"strength": 0.02, "intruders": 1, "doubtful": 1, "overlap": 0.9, "update_rank": 2.0}
    return layer(name, **{**measured, **changes})


def test_an_empty_record_and_damaged_entries_are_drawn():
    for record in ({}, {"layers": None}, {"layers": [3, {"alpha": "x"}, {"alpha": float("nan")}], "on_data": [], "data": 5}):
        assert "<h1>" in render_diagnosis(record)


def test_text_never_runs():
    record = {"model": "<script>alert(1)</script>", "layers": [tuned("a.0.<b>.weight")], "base": "</script>"}
    record["not_measured"] = {"x": "<img src=x>"}
    page = render_diagnosis(record)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("<script") == 2  # the data, and ours
    assert " style=" not in page  # the policy forbids it


def test_numbers_errors_and_meanings():
    rows = [tuned("model.layers.0.q_proj.weight", strength=0.5), tuned("model.layers.10.q_proj.weight")]
    page = render_diagnosis({"model": "tuned", "base": "base", "layers": rows, "data": ["texts"]})
    assert "What tuning did to base" in page
    assert "Tuning changed 2 of 2 layers and left 2 intruder dimensions." in page
    assert "2.00 ± 0.10" in page
    assert "1 (1 doubtful)" in page
    assert "Strong directions that the base does not have" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["record"]["layers"][0]["strength"] == 0.5
    assert "spectrum" not in data["record"]["layers"][0]


def test_limits_and_curvature():
    limits = {"ratio": 3.0, "bound": 6.0, "degree_needed": None, "below": False, "pays": False}
    found = {
        "heads": [{"layer": "layers.3.attn", "head": 1, "limits": limits}, {"layer": None, "head": None}],
        "notes": ["a note"],
    }
    curvature = {
        "largest": 3.5, "largest_bound": 0.01, "measured_largest": 7.25, "measured_bound": 0.2, "batch_size": 8, "max_lr": None,
        "predicted": {"largest": 3.6}, "spread": 0.4, "measured_lr": 0.276, "optimizer": "sgd", "nodes": [1.0, 3.5],
    }  # fmt: skip
    page = render_diagnosis({"model": "m", "layers": [layer("w")], "on_data": {"lora-limits": found, "batch-lr": curvature}})
    assert "degree needed above 64" in page
    assert "a note" in page
    assert "Curvature and stable rates" in page
    assert "largest eigenvalue, all samples</dt><dd>3.5 ± 0.01</dd>" in page
    assert "largest eigenvalue, batches of 8</dt><dd>7.25 ± 0.2</dd>" in page
    assert "2 / measured</dt><dd>0.276</dd>" in page
    assert "nodes" not in page.partition('id="data">')[0]
    without = render_diagnosis({"model": "m", "layers": [layer("w")]})
    assert "LoRA limits" not in without
    assert "Curvature" not in without
    assert "What m looks like" in without


def test_over_training_of_a_readout():
    found = {
        "times": [0.0, 0.1, 10.0, 1e6], "train_error": [1.0, 0.6, 0.2, 0.1], "test_error": [1.0, 0.8, 0.5, 0.75],
        "samples": 30, "features": 64, "frozen_dim": 34, "eigenvalues": [3.0],
    }  # fmt: skip
    page = render_diagnosis({"model": "m", "layers": [layer("w")], "on_data": {"generalization-dynamics": found}})
    assert "Training the readout to time 1e+06 raises the held-out error by 50 %: stop at 10." in page
    for name, value in (("samples", 30), ("features", 64), ("directions that never move", 34)):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert page.count("<polyline") >= 2
    found["test_error"] = [1.0, 0.8, 0.5, 0.5]
    page = render_diagnosis({"model": "m", "layers": [layer("w")], "on_data": {"generalization-dynamics": found}})
    assert "The readout does not over-train within these times." in page
    for damaged in ({}, {"times": [1.0]}, {"times": 3, "train_error": "x", "test_error": [None]}, [1]):
        page = render_diagnosis({"model": "m", "layers": [layer("w")], "on_data": {"generalization-dynamics": damaged}})
        assert "Over-training" not in page


def test_figures_of_one_value_and_of_none():
    assert grid("g", [], [], {}) == dots("d", [], "y") == lines("l", [], "y") == ""
    assert 'fill-opacity="0.050"' in grid("g", ["0"], ["a"], {(0, 0): (1.0, "1", "tip")})
    shaded = grid("g", ["0"], ["a", "b"], {(0, 0): (0.0, "0", ""), (0, 1): (1.0, "1", "")})
    assert 'fill-opacity="0.600"' in shaded
    one = dots("d", [("a", [(2.0, 0.1, "here")])], "alpha")
    assert one.count("<title>here</title>") == 1
    curve = lines("l", [("flat", [1.0, 1.0], True)], "y")
    assert "nan" not in curve
    assert curve.count("<polyline") == 1
