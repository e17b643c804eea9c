"""`diagnose all`: each number by its formula, the same from every kind of source, and reasons for what is left out."""

import math
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowdim import adapt
from lowdim.adapters import LoRA
from lowdim.diagnose import Weights, farms, fit_alpha
from lowdim.errors import DataError
from lowdim.jobs import DiagnosisSettings, diagnose_all, write_diagnosis
from lowdim.testing.agreement import agrees
from lowdim.testing.diagnose_case import save_sharded

HOW = {"rows": 6, "k": 4}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 9))


def tuned():
    model = net()
    with torch.no_grad():
        g = torch.Generator().manual_seed(5)
        model[2].weight += 2.0 * torch.outer(torch.randn(9, generator=g), torch.randn(14, generator=g))
    return model


def diagnosed(model, base=None, **how):
    return diagnose_all(DiagnosisSettings(model=model, base=base, **{**HOW, **how}))


def test_every_number_by_its_formula():
    done = diagnosed(tuned(), net())
    (layer,) = (layer for layer in done.layers if layer.name == "2.weight")
    w, w0 = (m.state_dict()["2.weight"].double().numpy() for m in (tuned(), net()))
    (u, s, _), (u0, s0, _), change = (*map(np.linalg.svd, (w, w0)), np.linalg.svd(w - w0)[1])
    u, u0 = u[:, :9], u0[:, :9]
    shares = s**2 / (s**2).sum()
    moved = change**2 / (change**2).sum()
    cosines = abs(u[:, :4].T @ u0)
    full = fit_alpha(s**2)
    windows = farms({"2.weight": tuned().state_dict()["2.weight"]}, rows=6).layers[0]
    rank = int(0.5 * 9 * 14 / (9 + 14))
    want = {
        "alpha": windows.alpha,
        "alpha_error": windows.alpha_error,
        "ks_distance": windows.ks_distance,
        "full_alpha": full.alpha,
        "full_alpha_error": (full.alpha - 1) / math.sqrt(5),
        "full_ks_distance": full.ks_distance,
        "spectral_norm": s[0],
        "frobenius_norm": np.linalg.norm(w),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "effective_rank": math.exp(-(shares * np.log(shares)).sum()),
        "half_error": math.sqrt(shares[rank:].sum()),
        "strength": np.linalg.norm(w - w0) / np.linalg.norm(w0),
        "update_spectral": change[0] / s0[0],
        "update_rank": math.exp(-sum(p * math.log(p) for p in moved if p > 1e-30)),
        "least_similar": cosines.max(1).min(),
        "overlap": (cosines[:, :4] ** 2).sum() / 4,
        "overlap_chance": 4 / 9,
    }
    agrees({name: getattr(layer, name) for name in want}, want, 1e-4)
    assert (layer.shape, layer.half_rank, layer.n_tail) == ((9, 14), rank, windows.n_tail)
    assert layer.rank_90 == int((np.cumsum(shares) < 0.9).sum()) + 1
    assert layer.intruders == int((cosines.max(1) < 0.5).sum())
    assert len(layer.spectrum) == 9
    assert layer.spectrum[0] == 1.0
    untouched = done.layers[0]
    assert (untouched.strength, untouched.update_rank, untouched.intruders) == (0.0, None, 0)
    assert untouched.overlap == pytest.approx(1.0, abs=1e-5)
    assert f"{done.layers[1].intruders} intruders" in done.summary


def test_all_sources_agree(tmp_path):
    want = diagnosed(tuned(), net()).rows()
    tensors = [model.state_dict() for model in (tuned(), net())]
    save_file(tensors[0], tmp_path / "model.safetensors")
    folder = save_sharded(tensors[1], tmp_path / "base")
    for given in (tensors, (tmp_path / "model.safetensors", folder), (str(tmp_path / "model.safetensors"), net())):
        assert diagnosed(*given).rows() == want


def test_adapters_are_merged_and_their_base_is_found():
    model = net()
    adapted = adapt(model, LoRA(rank=2, target_modules=["0"]))
    with torch.no_grad():
        model[0].update.B.normal_(generator=torch.Generator().manual_seed(0))
    done = diagnosed(model, net())
    assert done.layers[0].update_rank <= 2 + 1e-6
    assert done.layers[0].strength > 0
    assert done.layers[1].strength == 0.0
    assert done.layers[0].alpha == pytest.approx(diagnosed(adapted.merge()).layers[0].alpha, rel=1e-5)


def test_one_layer_of_each_model_is_in_memory(tmp_path, monkeypatch):
    given, most = [], []
    load = Weights.__getitem__

    def counted(self, name):
        tensor = load(self, name)
        if self.origin != str(tmp_path):  # not read, but handed on
            return tensor
        tensor = tensor.clone()
        given.append(weakref.ref(tensor))
        most.append(sum(each() is not None for each in given))
        return tensor

    monkeypatch.setattr(Weights, "__getitem__", counted)
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).state_dict()
    save_file(layers, tmp_path / "model.safetensors")
    assert len(diagnosed(tmp_path, tmp_path).layers) == 6
    assert max(most) == 2  # the layer and its base


def test_reasons_for_what_is_left_out(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
    with torch.no_grad():
        model["up"].weight.zero_()
    done = diagnosed(model)
    assert "embedding" in done.skipped["embed.weight"]
    assert done.skipped["up.weight"] == "every entry is 0"
    assert done.not_measured["lora-limits"] == "it needs data"
    assert "by its folder or name" in diagnosed(model, data=("texts",)).not_measured["lora-limits"]
    assert done.not_measured["intruders"] == "it needs a base"
    assert done.to_dataframe().shape[0] == len(done.layers)
    other = diagnosed({"a": torch.randn(8, 8), "b": torch.randn(8, 8)}, {"a": torch.randn(8, 8)})
    assert other.skipped == {"b": "the base has no such weight"}


def test_what_is_refused():
    bad = net()
    with torch.no_grad():
        bad[2].weight[0, 0] = math.nan
    cases = [
        (ValueError, "layer 2.weight: the weight has NaN", lambda: diagnosed(bad)),
        (ValueError, "nothing to measure", lambda: diagnosed({"w": torch.ones(3)})),
        (ValueError, "has none of the weights", lambda: diagnosed(net(), {"other": torch.eye(4)})),
        (ValueError, "the same shape", lambda: diagnosed({"w": torch.eye(8)}, {"w": torch.eye(9)})),
        (ValueError, "k must", lambda: diagnosed(net(), k=0)),
        (ValueError, "threshold", lambda: diagnosed(net(), threshold=0.0)),
        (ValueError, "rows", lambda: diagnosed(net(), rows=0)),
    ]
    for kind, word, call in cases:
        with pytest.raises(kind, match=word):
            call()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no safetensors file"):
        diagnose_all(DiagnosisSettings(model=tmp_path))


def test_a_diagnostic_that_refuses_leaves_its_reason_on_the_page(tmp_path, monkeypatch):
    from lowdim.jobs.diagnosis import whole

    def refuse(settings):
        raise NotImplementedError("layers.0: q_norm changes <queries>")

    monkeypatch.setitem(whole._ON_DATA, "lora-limits", refuse)
    done = diagnosed(net(), data=("texts",))
    assert "q_norm" in done.not_measured["lora-limits"]
    page, record, table = write_diagnosis(done, tmp_path)
    assert "q_norm changes &lt;queries&gt;" in page.read_text()
    assert record.is_file()
    assert len(table.read_text().splitlines()) == 3
