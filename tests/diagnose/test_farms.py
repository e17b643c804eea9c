import math

import numpy as np
import pytest
import torch
from torch import nn

import vectors
from lowdim.diagnose import farms, farms_eigs, farms_windows, fit_alpha
from lowdim.testing.agreement import refuses
from lowdim.testing.diagnose_case import DiagnoseCase
from lowdim.testing.result_case import ResultCase, ValueCase

MATRICES = [name for name in vectors.cases("farms") if name not in ("conv", "assignment")]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 30), nn.LayerNorm(30), nn.Linear(30, 4, dtype=torch.float64)
    )


def hill(values):
    """From the definition: exponent, distance and start of the upper half."""
    e = np.sort(values)
    i = len(e) // 2
    n = len(e) - i
    alpha = 1 + n / sum(math.log(e[j] / e[i]) for j in range(i, len(e)))
    distance = max(abs(1 - (e[j] / e[i]) ** (1 - alpha) - (j - i) / n) for j in range(i, len(e)))
    return alpha, distance, e[i], n


class TestFarms(DiagnoseCase):
    plots = True
    tolerance = 2e-5  # two of the weights are float32

    def models(self):
        return (net(),)

    def measure(self, source):
        return farms(source, rows=6, windows=3, exclude=("nothing",))

    def expected(self):
        layers = []
        # Window sides 6, 6 and 4: `min(rows, out, in)`.
        places = {"0.weight": ((0, 3, 6), (0, 7, 14)), "2.weight": ((0, 12, 24), (0, 3, 6)), "4.weight": ((0,), (0, 13, 26))}
        for name, (down, across) in places.items():
            w = self.models()[0].get_parameter(name).detach().numpy().astype(np.float64)
            side = min(6, *w.shape)
            pieces = [w[i : i + side, j : j + side] for i in down for j in across]
            eigs = np.sort(np.concatenate([np.linalg.svd(piece)[1] ** 2 for piece in pieces]))
            alpha, distance, xmin, n = hill(eigs)
            layers.append(
                {
                    "name": name,
                    "shape": w.shape,
                    "alpha": alpha,
                    "ks_distance": distance,
                    "xmin": xmin,
                    "n_tail": n,
                    "spectral_norm": eigs[-1],
                    "squared_frobenius": eigs.sum(),
                    "stable_rank": eigs.sum() / eigs[-1],
                    "alpha_hat": alpha * math.log10(eigs[-1]),
                    "n_eigs": len(eigs),
                    "eigs": eigs,
                }
            )
        alphas = {layer["name"]: layer["alpha"] for layer in layers}
        return {"layers": layers, "skipped": {}, "alphas": alphas}

    def refusals(self):
        bad = net()
        with torch.no_grad():
            bad[2].weight[3, 1] = math.inf
        w = {"w": torch.eye(8)}
        return [
            (ValueError, "layer 2.weight: the weight has NaN", lambda: farms(bad)),
            (ValueError, "nothing to measure", lambda: farms({"b": torch.ones(3)})),
            (ValueError, "excluded by 'w'", lambda: farms(w, exclude=("w",))),
            (TypeError, "exclude", lambda: farms(w, exclude="w")),
            (ValueError, "rows", lambda: farms(w, rows=0)),
            (ValueError, "ratio", lambda: farms(w, ratio=0.0)),
            (ValueError, "windows", lambda: farms(w, windows=0)),
            (ValueError, "step", lambda: farms(w, windows=None)),
            (ValueError, "step", lambda: farms(w, windows=None, step=0)),
            (ValueError, "conv_scale", lambda: farms(w, conv_scale=0.0)),
            (ValueError, "min_eigs", lambda: farms(w, min_eigs=1)),
            (ValueError, "method must be one of median, ks, peak", lambda: farms(w, method="best")),  # type: ignore[arg-type]
            (ValueError, "2-D", lambda: farms_eigs(torch.ones(3, 3, 3))),
            (ValueError, "NaN", lambda: farms_eigs(torch.full((3, 3), math.nan))),
            (ValueError, "columns of the weight", lambda: farms_windows((3, 0))),
            (TypeError, "source", lambda: farms(3)),
        ]

    def test_weightwatchers_columns(self):
        result = self.result()
        frame = result.to_weightwatcher()
        second = frame.iloc[1]
        assert (second["longname"], second["name"], second["layer_type"], second["N"], second["M"]) == (
            "2",
            "2",
            "dense",
            30,
            12,
        )
        assert (second["rf"], second["Q"], second["layer_id"]) == (1, 2.5, 1)
        layer = result.layers[1]
        assert second["norm"] == pytest.approx(float(layer.eigs.sum()), rel=1e-6)
        assert second["log_alpha_norm"] == pytest.approx(math.log10(float((layer.eigs.double() ** layer.alpha).sum())))
        assert second["alpha_weighted"] == pytest.approx(layer.alpha * math.log10(second["lambda_max"]))
        assert frame.notna().all().all()


class TestFit(ResultCase):
    tolerance = 1e-12

    def eigs(self):
        return np.random.default_rng(0).pareto(1.5, 40) + 0.3

    def result(self):
        return fit_alpha(torch.as_tensor(self.eigs()).flip(0), method="ks")

    def expected(self):
        e = np.sort(self.eigs())
        best = (1.0, 0.0, 0)
        for i in range(len(e) - 1):
            n = len(e) - i
            alpha = 1 + n / np.log(e[i:] / e[i]).sum()
            distance = max(abs(1 - (e[j] / e[i]) ** (1 - alpha) - (j - i) / n) for j in range(i, len(e)))
            if alpha > 1 and distance < best[0]:
                best = (distance, alpha, i)
        return {"alpha": best[1], "ks_distance": best[0], "xmin": e[best[2]], "n_tail": len(e) - best[2]}

    def refusals(self):
        return [
            (ValueError, "at least 2", lambda: fit_alpha([1.0])),
            (ValueError, "one list", lambda: fit_alpha(torch.ones(2, 2))),
            (ValueError, "finite and not negative", lambda: fit_alpha([-1.0, 2.0])),
            (ValueError, "finite and not negative", lambda: fit_alpha([1.0, math.inf])),
            (ValueError, "method", lambda: fit_alpha([1.0, 2.0], method="mean")),  # type: ignore[arg-type]
            (ValueError, "xmin_pos", lambda: fit_alpha([1.0, 2.0], xmin_pos=1)),
            (ValueError, "bins", lambda: fit_alpha([1.0, 2.0], bins=0)),
            (ValueError, "set eig_threshold", lambda: fit_alpha([0.0, 0.0, 0.0, 1.0])),
            (ValueError, "equal eigenvalues", lambda: fit_alpha([1.0, 2.0, 2.0, 2.0])),
        ]

    def test_zeros_below_the_tail_and_the_threshold(self):
        assert math.isfinite(fit_alpha([0.0, 0.0, 1.0, 2.0, 3.0]).alpha)
        want = fit_alpha([1.0, 2.0, 3.0])
        assert fit_alpha([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0], eig_threshold=0.5) == want
        assert fit_alpha([1.0, 2.0, 3.0], eig_threshold=9.0) == want  # none would be left

    def test_no_start_fits(self):
        for method in ("ks", "peak"):
            assert fit_alpha([2.0, 2.0, 2.0], method=method).to_dict() == {
                "alpha": 0.0,
                "ks_distance": 1.0,
                "xmin": 2.0,
                "n_tail": 3,
            }
        assert fit_alpha([0.0, 0.0], method="ks").alpha == 0.0

    def test_the_scale_of_the_weights_does_not_matter(self):
        e = self.eigs()
        for method in ("median", "ks"):
            assert fit_alpha(9 * e, method=method).alpha == pytest.approx(fit_alpha(e, method=method).alpha)


class TestWindows(ValueCase):
    def result(self):
        starts, r, c = farms_windows((11, 30), rows=9, ratio=2.5, windows=3)
        return [*np.array(starts).flatten(), r, c]

    def expected(self):
        starts = [(i, j) for i in (0, 1, 2) for j in (0, 4, 8)]  # (11 - 9) // 2 = 1, (30 - 22) // 2 = 4
        return [*np.array(starts).flatten(), 9, 22]

    def refusals(self):
        return [(ValueError, "rows", lambda: farms_windows((3, 3), rows=0))]

    def test_clamping_and_one_window(self):
        assert farms_windows((3, 2), rows=128, windows=1) == ([(0, 0)], 2, 2)
        assert farms_windows((1, 1)) == ([(0, 0)], 1, 1)
        starts, r, c = farms_windows((5, 3), rows=4, ratio=8.0)  # no row fits eight times into three columns
        assert (r, c) == (1, 3)
        assert starts == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]


@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name):
    case = vectors.load("farms", name)
    how = dict(case.hyperparameters)
    bins = how.pop("bins")
    eigs, single = (farms_eigs(case["weight"].to(dtype), **how) for dtype in (torch.float64, torch.float32))
    case.close(eigs, "eigs")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), case["eigs"], rtol=1e-4, atol=1e-6)
    tails = {"median": {}, "median3": {"xmin_pos": 3}, "ks": {"method": "ks"}, "peak": {"method": "peak", "bins": bins}}
    for key, tail in tails.items():
        want = case[f"fit.{key}"]
        fit, coarse = (fit_alpha(each, **tail) for each in (eigs, single))
        case.close(torch.tensor([fit.alpha, fit.ks_distance], dtype=torch.float64), want)
        assert [coarse.alpha, coarse.ks_distance] == pytest.approx(want.tolist(), rel=1e-4)
        (layer,) = farms({"w": case["weight"]}, **how, **tail).layers
        case.close(torch.tensor(layer.alpha_hat, dtype=torch.float64), f"alpha_hat.{key}")
        summary = [layer.spectral_norm, layer.squared_frobenius, layer.stable_rank]
        case.close(torch.tensor(summary, dtype=torch.float64), "summary")
    assert farms_eigs(case["weight"].bfloat16(), **how).dtype == torch.float32


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_small_singular_values_of_float32_keep_their_digits(shape):
    """`σ²` down to 1e-10 of the largest, where singular values found in float32 have lost more than half of theirs."""
    generator, k = torch.Generator().manual_seed(0), min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0] for n in shape)
    weight = (u * torch.logspace(0, -5, k, dtype=torch.float64) @ v.T).float()
    want = torch.linalg.svdvals(weight.double()).square().flip(0)
    got = farms_eigs(weight, rows=shape[0], ratio=shape[1] / shape[0], windows=1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    assert float((torch.linalg.svdvals(weight).square().flip(0).double() / want - 1).abs().max()) > 1e-4


def test_a_window_without_full_rank_has_no_negative_eigenvalue():
    weight = torch.ones(16, 16) * torch.linspace(-1, 3, 16)
    eigs = farms_eigs(weight, rows=8, windows=3)
    assert bool((eigs >= 0).all())
    want = weight.unfold(0, 8, 4).unfold(1, 8, 4).double().square().sum((-2, -1)).flatten()  # of rank 1: all in one
    torch.testing.assert_close(eigs[-9:].double(), want.sort().values, rtol=1e-6, atol=0)
    assert float(eigs[:-9].max()) < 1e-14 * float(want.min())


def test_convolution():
    case = vectors.load("farms", "conv")
    (layer,) = farms({"w": case["weight"]}, **case.hyperparameters).layers
    for key in ("alpha", "ks_distance", "spectral_norm", "stable_rank"):
        case.close(torch.tensor(getattr(layer, key), dtype=torch.float64), key)
    assert layer.n_eigs == int(case["n_eigs"])
    assert layer.shape == (16, 8, 3, 3)
    turned = farms({"w": case["weight"].transpose(0, 1)}, **case.hyperparameters).layers[0]
    assert turned.alpha == pytest.approx(layer.alpha)


@pytest.mark.parametrize(("ratio", "r", "c"), [(0.5, 8, 4), (2.0, 4, 8), (100.0, 1, 8)])
def test_convolution_of_another_ratio(ratio, r, c):
    kernel = torch.randn(20, 8, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (layer,) = farms({"w": kernel}, ratio=ratio, conv_scale=2.0).layers
    pieces = [2**0.5 * kernel[d * r : (d + 1) * r, :c, i, j] for d in range(2) for i in range(2) for j in range(2)]
    want = torch.cat([torch.linalg.svdvals(piece) ** 2 for piece in pieces]).sort().values
    assert torch.allclose(layer.eigs, want)


def test_reasons_for_skipping():
    model = nn.Module()
    model.embed, model.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
    model.body, model.twin = nn.Linear(8, 8), nn.Linear(8, 8)
    model.zero, model.small, model.flat = nn.Linear(8, 8), nn.Linear(2, 2), nn.Linear(8, 8)
    model.head.weight, model.twin.weight = model.embed.weight, model.body.weight
    with torch.no_grad():
        model.zero.weight.zero_()
        model.flat.weight.copy_(torch.eye(8))
    seen = []
    result = farms(model, callback=lambda *news: seen.append(news))
    assert list(result.alphas) == ["body.weight"]
    assert result.skipped["embed.weight"] == "excluded by 'embed'"
    assert result.skipped["head.weight"] == "the same tensor as embed.weight"
    assert result.skipped["twin.weight"] == "the same tensor as body.weight"
    assert result.skipped["zero.weight"] == "every entry is 0"
    assert "fewer than min_eigs=5" in result.skipped["small.weight"]
    assert "equal eigenvalues" in result.skipped["flat.weight"]
    assert seen[-1] == ("flat.weight", 7, 7)
    assert "no tail" in farms(model, method="ks").skipped["flat.weight"]


def test_the_aspect_ratio_does_not_matter():
    wide = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    whole = [fit_alpha(torch.linalg.svdvals(w) ** 2).alpha for w in (wide, wide[:, :64])]
    windows = [farms({"w": w}, rows=32).layers[0].alpha for w in (wide, wide[:, :64])]
    assert abs(windows[0] - windows[1]) < 0.1 * abs(whole[0] - whole[1])


def test_adapters_are_merged_in_a_copy():
    from lowdim import adapt
    from lowdim.adapters import LoRA

    plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12))
    adapted = adapt(plain, LoRA(rank=2, target_modules=["0"]))
    with torch.no_grad():
        plain[0].update.B.normal_(generator=torch.Generator().manual_seed(0))
    got = farms(plain, rows=8).alphas
    assert got == pytest.approx(farms(adapted.merge(), rows=8).alphas, rel=1e-5)


def test_models_without_what_is_asked_for_name_it():
    refuses([(ValueError, "layer conv: the weight has NaN", lambda: farms({"conv": torch.full((2, 2, 1, 1), math.nan)}))])
