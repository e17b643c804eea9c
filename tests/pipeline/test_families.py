"""`lowdim compare --compress`: bytes that the test counts itself, the judge's rule, going on, and the page."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from lowdim.comparison.judge import judge
from lowdim.errors import CheckpointError, LowdimError
from lowdim.jobs import report
from lowdim.jobs.ratios import ratios_by_layer
from lowdim.modules import PrunedLinear
from lowdim.pipeline import FamilySettings, compare_families, families
from lowdim.pipeline.pruning import pruned
from lowdim.pretrained import stored_bytes
from lowdim.report import render_families

pytest.importorskip("torchao")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")
SMALL = {
    "model": "stories260k",
    "data": ("lowdim:shakespeare",),
    "max_length": 16,
    "samples": 8,
    "held_out": 6,
}
SETTINGS = FamilySettings(
    **SMALL, methods=("lord", "pela", "magnitude", "int8"), budgets=("0.8x", "0.3x"), steps=1, rates=1, seeds=2, batch_size=4
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("families") / "out"
    said = []
    return out, compare_families(SETTINGS, out, say=said.append), said


def test_every_method_meets_every_budget(done):
    _, record, _ = done
    runs = {(run.method, run.budget, run.seed): run for run in record.runs}
    assert len(runs) == 2 * (3 * 2 + 1), "a method of a fixed size runs once for each seed"
    for (_, budget, _), run in runs.items():
        assert not run.failure
        assert len(run.values) == 6
        if budget:
            allowed = float(budget[:-1]) * record.dense_bytes
            assert 0.9 * allowed < run.size <= allowed
    assert runs["int8", "", 0].size < 0.5 * record.dense_bytes


def test_the_verdict_is_the_judges(done):
    _, record, said = done
    high, low = record.levels
    names = ["lord", "pela", "magnitude", "int8"]
    table = [[run.values for run in record.runs if run.method == name and run.budget in ("0.8x", "")] for name in names]
    found = judge(names, np.array(table))
    assert (high.best, tuple(high.may_be_best), high.leader) == (found.best, found.may_be_best, found.leader)
    assert high.means == pytest.approx(dict(zip(names, found.means)))
    assert "int8" in low.not_judged, "it is larger than this budget"
    assert said[-1].startswith("0.3x: ")


def test_going_on_repeats_nothing(done, monkeypatch, tmp_path):
    out, record, _ = done
    part = json.loads((out / "families.json").read_text())
    monkeypatch.setattr(families._Comparison, "_run", lambda *args: pytest.fail("a recorded run is repeated"))
    assert compare_families(SETTINGS, out, resume=True) == record
    assert json.loads((out / "families.json").read_text()) == part
    with pytest.raises(CheckpointError, match="differs in steps"):
        compare_families(FamilySettings(**{**vars(SETTINGS), "steps": 2}), out, resume=True)
    with pytest.raises(FileExistsError, match="--resume"):
        compare_families(SETTINGS, out)


def test_a_lack_of_memory_is_no_verdict(tmp_path, monkeypatch):
    settings = FamilySettings(**SMALL, methods=("pela", "int8"), budgets=("0.8x",), steps=1, rates=1, seeds=1, batch_size=4)
    usual = families.train

    def starved(*args, **how):
        raise LowdimError("training ended") from MemoryError("no memory")

    monkeypatch.setattr(families, "train", starved)
    with pytest.raises(LowdimError, match="training ended"):
        compare_families(settings, tmp_path / "out")
    monkeypatch.setattr(families, "train", usual)
    record = compare_families(settings, tmp_path / "out", resume=True)
    assert [(run.method, run.failure) for run in record.runs] == [("pela", ""), ("int8", "")]


def test_the_page(done):
    out, record, _ = done
    page = (out / "report.html").read_text(encoding="utf-8")
    assert record.levels[0].headline.split(".")[0] in page
    assert "magnitude 0.3x" in page
    assert page.startswith(render_families(json.loads((out / "families.json").read_text()))[:500])
    assert report(out) == out / "report.html"
    for broken in ({}, {"runs": [None, 3]}, {"levels": [{}]}, None):
        assert "<main" in render_families(broken)


def test_a_narrow_projection_is_told(tmp_path):
    """LoRD at a low budget cuts grouped key and value projections below the size of a head."""
    settings = FamilySettings(**SMALL, methods=("lord",), budgets=("0.2x",), steps=0, seeds=1)
    said = []
    record = compare_families(settings, tmp_path / "out", say=said.append)
    assert any("grouped-query attention" in note for note in record.notes)
    assert any("grouped-query attention" in line for line in said)
    assert "grouped-query attention" in (tmp_path / "out" / "report.html").read_text()


def test_pruning_keeps_the_largest_and_no_more_than_fits():
    model = tiny.llama(1)
    whole = stored_bytes(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    weights = sum(w.numel() for w in dense.values())
    small, size, _ = pruned(model, whole, int(0.6 * whole))
    masks = {name: small.get_submodule(name).mask().bool() for name in dense}
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert size == whole - 4 * weights + 4 * kept + -(-weights // 8) <= int(0.6 * whole)
    smallest = min(float(dense[n][m].abs().min()) for n, m in masks.items())
    assert all(float(dense[n][~m].abs().max()) <= smallest for n, m in masks.items() if not m.all())
    layer = small.model.layers[0].mlp.up_proj
    x = torch.randn(2, 32)
    torch.testing.assert_close(layer(x), x @ (dense["model.layers.0.mlp.up_proj"] * masks["model.layers.0.mlp.up_proj"]).T)
    assert isinstance(layer, PrunedLinear)


def test_pruning_each_layer_by_itself():
    """At one share of every layer, and at shares that follow its exponent, with the same number kept up to rounding."""
    dense = tiny.llama(2)
    whole = stored_bytes(dense)
    kept = {}
    for ratios in ("uniform", "farms"):
        small, size, notes = pruned(copy.deepcopy(dense), whole, int(0.6 * whole), ratios)
        masks = {name: layer.mask().bool() for name, layer in small.named_modules() if isinstance(layer, PrunedLinear)}
        weights = {name: dense.get_submodule(name).weight.abs() for name in masks}
        assert 0.97 * int(0.6 * whole) < size <= int(0.6 * whole)
        for name, mask in masks.items():
            assert float(weights[name][~mask].max()) <= float(weights[name][mask].min())
        kept[ratios] = {name: float(mask.double().mean()) for name, mask in masks.items()}
        assert bool(notes) == (ratios == "farms")
    share = kept["uniform"]["model.layers.0.mlp.up_proj"]
    assert all(abs(value - share) < 0.01 for value in kept["uniform"].values())
    layers = {name: dense.get_submodule(name) for name in kept["farms"]}
    shares, _ = ratios_by_layer(dense, layers, 1 - share)
    assert max(shares.values()) > min(shares.values()) + 0.05
    assert all(abs(kept["farms"][name] - (1 - shares[name])) < 0.01 for name in layers)


def test_the_verdict_says_whether_ratios_by_layer_helped(tmp_path):
    settings = FamilySettings(
        **SMALL, methods=("magnitude+uniform", "magnitude+farms"), budgets=("0.6x",), steps=0, rates=1, seeds=2
    )
    record = compare_families(settings, tmp_path / "out")
    found = judge(
        ["magnitude+uniform", "magnitude+farms"],
        np.array([[r.values for r in record.runs if r.method == name] for name in settings.methods]),
    )
    gap, width = found.difference("magnitude+farms", "magnitude+uniform")
    word = "better than" if gap > width else "worse than" if gap < -width else "not distinguishable from"
    assert f"{word} one ratio" in record.levels[0].headline
    assert f"{gap:.1f}"[:2] in record.levels[0].headline
    assert "Pruning ratios from FARMS" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"methods": ("lora",)}, "--methods with --compress must be one of lord, pela"),
        ({"budgets": ("2x",)}, "--budget"),
        ({"rates": 4}, "--rates must be"),
        ({"seeds": 0}, "--seeds must be"),
        ({"budgets": ()}, "must name at least one each"),
    ],
)
def test_bad_settings(changes, part):
    with pytest.raises(ValueError, match=part):
        FamilySettings(**{**SMALL, **changes})
