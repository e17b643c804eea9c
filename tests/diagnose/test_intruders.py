import copy

import numpy as np
import pytest
import torch
from torch import nn

import vectors
from lowdim.diagnose import intruder_dimensions, scale_intruders
from lowdim.testing.diagnose_case import DiagnoseCase

MODELS = [name for name in vectors.cases("intruders") if name != "lora_factors"]


def spectrum(out, width, seed, dtype=torch.float32):
    """A weight with well separated singular values, as trained ones have."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, min(out, width), generator=g, dtype=torch.float64)).Q for n in (out, width))
    return (u * 0.8 ** torch.arange(min(out, width)) @ v.T).to(dtype)


def with_intruder(base, strength, seed=9):
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.nn.functional.normalize(torch.randn(n, generator=g, dtype=torch.float64), dim=0) for n in base.shape)
    return (base.double() + strength * torch.outer(u, v)).to(base.dtype)


def net():
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 30))
    with torch.no_grad():
        model[0].weight.copy_(spectrum(20, 24, 0))
        model[2].weight.copy_(spectrum(30, 20, 1))
        model[0].bias.zero_()
        model[2].bias.zero_()
    return model


class TestIntruders(DiagnoseCase):
    plots = True
    tolerance = 1e-5  # weights are float32

    def models(self):
        base, tuned = net(), net()
        with torch.no_grad():
            tuned[2].weight.copy_(with_intruder(tuned[2].weight, 3.0))
        return base, tuned

    def measure(self, *sources):
        return intruder_dimensions(*sources, k=6)

    def expected(self):
        base, tuned = self.models()
        layers = {}
        for name in ("0.weight", "2.weight"):
            w0, w = (model.get_parameter(name).detach().numpy().astype(np.float64) for model in (base, tuned))
            (u0, _, _), (u, s, _) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (w0, w))
            overlap = np.abs(u[:, :6].T @ u0)
            similarity = overlap.max(axis=1)
            layers[name] = {
                "similarity": similarity,
                "indices": [j for j in range(6) if similarity[j] < 0.5],
                "singular_values": s,
                "degenerate": [j for j in range(6) if s[j] - s[j + 1] < 1e-6 * s[0]],
                "overlap": overlap,
            }
        total = sum(len(layer["indices"]) for layer in layers.values())
        return {"layers": layers, "k": 6, "threshold": 0.5, "total": total}

    def refusals(self):
        base, w = net(), torch.eye(3)
        nan = copy.deepcopy(base)
        with torch.no_grad():
            nan[2].weight[0, 0] = float("nan")
        return [
            (ValueError, "k must", lambda: intruder_dimensions(w, w, k=0)),
            (ValueError, "threshold", lambda: intruder_dimensions(w, w, threshold=0.0)),
            (ValueError, "threshold", lambda: intruder_dimensions(w, w, threshold=1.5)),
            (ValueError, "(3, 3) and (3, 2)", lambda: intruder_dimensions(w, w[:, :2])),
            (ValueError, "2-D", lambda: intruder_dimensions(torch.ones(3), w)),
            (ValueError, "layer 2.weight: the tuned weight has NaN", lambda: intruder_dimensions(base, nan)),
            (ValueError, "layer 2.weight: the base weight has NaN", lambda: intruder_dimensions(nan, base)),
            (ValueError, "'2.weight'", lambda: intruder_dimensions(base, base[:1])),
            (ValueError, "'0.wight'", lambda: intruder_dimensions(base, base, names=["0.wight"])),
            (TypeError, "names", lambda: intruder_dimensions(base, base, names="0.weight")),
            (ValueError, "no 2-D", lambda: intruder_dimensions({"b": torch.ones(3)}, {})),
            (ValueError, "nearest", lambda: self.measure(*self.models()).plot("3.weight")),
            (ValueError, "scale", lambda: scale_intruders(w, w, scale=-0.1)),
            (TypeError, "dict", lambda: scale_intruders({}, w)),  # type: ignore[arg-type]
        ]

    def test_finds_the_one_that_was_put_in(self):
        result = self.measure(*self.models())
        assert result.total == 1
        assert result.layers["2.weight"].indices == [0]
        assert result.layers["0.weight"].count == 0
        assert not result.doubtful
        assert list(result.to_dataframe().query("intruder")["layer"]) == ["2.weight"]
        assert "2.weight" in result.plot().get_title()  # the layer with most intruders
        assert intruder_dimensions(*self.models(), names=["0.weight"]).total == 0


@pytest.mark.parametrize("name", MODELS)
def test_vectors(name):
    case = vectors.load("intruders", name)
    h = dict(case.hyperparameters)
    scale = h.pop("scale")
    base, tuned = ({k[len(p) :]: v for k, v in case.tensors.items() if k.startswith(p)} for p in ("base.", "tuned."))
    result = intruder_dimensions(base, tuned, **h)
    assert result.total == int(case["total"])
    for layer in base:
        case.close(result.layers[layer].similarity, f"similarity.{layer}")
        assert result.layers[layer].indices == case[f"indices.{layer}"].tolist()
        case.close(scale_intruders(base[layer], tuned[layer], scale=scale, **h), f"scaled.{layer}")
        case.close(result.layers[layer].singular_values, torch.linalg.svdvals(tuned[layer]))


def test_scaling_moves_only_the_intruders():
    base = spectrum(12, 10, 0, torch.float64)
    tuned = with_intruder(base, 4.0)
    j = intruder_dimensions(base, tuned).layers[""].indices
    assert j
    before = torch.linalg.svdvals(tuned)
    for scale in (0.0, 0.5, 1.0, 2.0):
        want = before.clone()
        want[j] *= scale
        got = torch.linalg.svdvals(scale_intruders(base, tuned, scale=scale))
        assert torch.allclose(got, want.sort(descending=True).values, atol=1e-12)
    assert torch.allclose(scale_intruders(base, tuned, scale=1.0), tuned, atol=1e-14)


def test_without_intruders_a_copy_comes_back():
    w = spectrum(8, 6, 0)
    got = scale_intruders(w, w)
    assert torch.equal(got, w)
    assert got.data_ptr() != w.data_ptr()


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_k_beyond_the_rank_takes_all(shape):
    base = spectrum(*shape, 0)
    layer = intruder_dimensions(base, with_intruder(base, 2.0), k=50).layers[""]
    assert layer.similarity.shape == layer.singular_values.shape == (8,)
    assert float(layer.similarity.max()) <= 1.0


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_narrow_weights_are_measured_wide_and_returned_narrow(dtype, atol):
    base = spectrum(20, 16, 0, torch.float64)
    tuned = with_intruder(base, 3.0)
    want = scale_intruders(base, tuned, scale=0.5, k=4)
    got = scale_intruders(base.to(dtype), tuned.to(dtype), scale=0.5, k=4)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), want, atol=atol)
    result = intruder_dimensions(base.to(dtype), tuned.to(dtype), k=4)
    assert result.layers[""].similarity.dtype == torch.float32
    assert result.layers[""].indices == intruder_dimensions(base, tuned, k=4).layers[""].indices


def test_a_flat_spectrum_is_flagged():
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64)).Q
    other = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64)).Q
    result = intruder_dimensions(q, other)  # all singular values 1: the vectors are arbitrary
    assert result.layers[""].degenerate == list(range(10))
    assert result.layers[""].indices
    assert result.doubtful == {"": result.layers[""].indices}
    assert result.to_dict()["layers"][""]["degenerate"] == list(range(10))


def test_one_close_pair_flags_its_upper_member():
    s = torch.tensor([4.0, 2.0, 2.0 - 1e-7, 1.0], dtype=torch.float64)
    layer = intruder_dimensions(torch.diag(s), torch.diag(s)).layers[""]
    assert layer.degenerate == [1]
    assert not intruder_dimensions(torch.diag(s), torch.diag(s), k=1).layers[""].degenerate
    full = intruder_dimensions(torch.diag(s[:2]), torch.diag(s[:2])).layers[""]
    assert not full.degenerate  # the last value has no neighbour


def test_zero_weight_is_degenerate_not_an_error():
    layer = intruder_dimensions(torch.eye(4), torch.zeros(4, 4)).layers[""]
    assert layer.degenerate == [0, 1, 2, 3]


def test_peft_model_on_the_very_base_object():
    peft = pytest.importorskip("peft", reason="adapters of PEFT are tested where it is installed")
    base = net()
    tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    with torch.no_grad():
        for layer in tuned.base_model.model:
            if hasattr(layer, "lora_B"):
                layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    want = intruder_dimensions(base, tuned, k=4)
    assert want.total > 0
    assert list(want.layers) == ["0.weight", "2.weight"]
    inner = tuned.get_base_model()  # adapted in place: as a base it means its weights from before
    assert intruder_dimensions(inner, tuned, k=4).to_dict() == want.to_dict()
    assert intruder_dimensions(base, tuned.merge_and_unload(), k=4).total == want.total


def test_similarity_beyond_the_heat_map_is_measured():
    base = spectrum(80, 80, 0, torch.float64)
    base = base + torch.eye(80, dtype=torch.float64) * 0.01
    layer = intruder_dimensions(base, base, k=80).layers[""]
    assert layer.overlap.shape == (64, 64)
    assert layer.similarity.shape == (80,)
    assert float(layer.similarity.min()) > 0.99
