"""Radii from counts, the two halves, and certificates."""

import numpy as np
import pytest
import torch
from torch import nn

import vectors
from lowdim.represent import (
    ABSTAIN,
    Certificate,
    DualRandomizedSmoothing,
    RandomizedSmoothing,
    checkerboard,
    clopper_pearson_lower,
    dual_radius,
    dual_smoothing_radius,
    fill_masked,
    smallest_n,
    smoothing_radius,
)
from lowdim.represent.drs import smoothing
from lowdim.represent.drs.halves import Spread
from lowdim.testing.agreement import refuses
from lowdim.testing.result_case import ResultCase

stats = pytest.importorskip("scipy.stats", reason="the certificate's quantiles are scipy's")
SHAPE = (2, 4, 6)


def constant(chosen, classes=4):
    """A model that always gives one class: all samples agree."""
    return lambda images: torch.eye(classes)[chosen].expand(len(images), classes)


def by_first_pixel(images):
    """Class 1 where the first pixel is positive, class 0 elsewhere: its probability under noise is known."""
    first = images[:, 0, 0, 0]
    return torch.stack([-first, first], 1)


def image(value=0.0):
    x = torch.zeros(SHAPE)
    x[0, 0, 0] = value
    return x


def agreed(n, alpha):
    """The bound where all of n samples agree, `alpha^(1/n)`, through the normal quantile."""
    return stats.norm.ppf(alpha ** (1 / n))


class TestCohensCertificate(ResultCase):
    def result(self):
        return RandomizedSmoothing(constant(2), 4, 0.5).certify(torch.zeros(SHAPE), n=500, alpha=0.01)

    def expected(self):
        return {"prediction": 2, "radius": 0.5 * agreed(500, 0.01)}

    def refusals(self):
        smoothed, x = RandomizedSmoothing(constant(2), 4, 0.5), torch.zeros(SHAPE)

        def broken(images):
            return images[:, 0, 0, :4] * torch.nan

        return [
            (ValueError, "n must be >= 10 for alpha=0.001", lambda: smoothed.certify(x, n=9)),
            (ValueError, "n0", lambda: smoothed.certify(x, n0=0)),
            (ValueError, "batch_size", lambda: smoothed.certify(x, batch_size=0)),
            (ValueError, "alpha", lambda: smoothed.certify(x, alpha=1.0)),
            (ValueError, "(C, H, W)", lambda: smoothed.certify(x[0])),
            (ValueError, "int64", lambda: smoothed.certify(x.long())),
            (ValueError, "x has NaN", lambda: smoothed.certify(x * torch.nan)),
            (
                ValueError,
                "the model gave NaN",
                lambda: RandomizedSmoothing(lambda z: z[:, 0, 0, :4] * torch.nan, 4, 1.0).predict(x),
            ),
            (ValueError, "(100, 3)", lambda: RandomizedSmoothing(constant(2), 3, 0.5).certify(x)),
            (ValueError, "sigma", lambda: RandomizedSmoothing(constant(2), 4, 0.0)),
            (ValueError, "num_classes", lambda: RandomizedSmoothing(constant(0), 1, 0.5)),
            (TypeError, "str", lambda: RandomizedSmoothing("model", 4, 0.5)),
            (ValueError, "(B, C, H, W)", lambda: smoothed.certify_all(x)),
            (ValueError, "2 images", lambda: smoothed.certify_all(torch.zeros(2, *SHAPE), [1], n=20)),
            (ValueError, "seed", lambda: smoothed.certify_all(x[None], seed=-1)),
        ]


class TestDualCertificates(ResultCase):
    plots = True
    unchecked = {"seconds": "a measurement"}  # noqa: RUF012 (typed in the base class)

    def smoothed(self, **how):
        return DualRandomizedSmoothing(constant(2), constant(2), 4, 0.5, **how)

    def result(self):
        return self.smoothed().certify_all(torch.zeros(3, *SHAPE), [2, 1, 2], n0=10, n=300, alpha=0.01)

    def expected(self):
        radius = 0.5 / np.sqrt(2) * 2 * agreed(300, 0.005)
        return {"predictions": [2, 2, 2], "radii": [radius] * 3, "labels": [2, 1, 2]}

    def answer(self, result):
        return result

    test_a_second_call_gives_the_same_bits = None  # seconds are in the record; see the test of streams below

    def refusals(self):
        x, left = torch.zeros(SHAPE), checkerboard(4, 6)[0]
        none = torch.zeros(4, 6, dtype=torch.bool)
        return [
            (ValueError, "n must be >= 11", lambda: self.smoothed().certify(x, n=10)),
            (ValueError, "24 are in both", lambda: self.smoothed(masks=(~none, ~none))),
            (ValueError, "12 in none", lambda: self.smoothed(masks=(left, none))),
            (ValueError, "0 are in both", lambda: self.smoothed(masks=(~none, none))),
            (ValueError, "masks[1]", lambda: self.smoothed(masks=(left, ~left[1:]))),
            (TypeError, "bool", lambda: self.smoothed(masks=(left.int(), 1 - left.int()))),
            (ValueError, "(3, 6), the image's", lambda: self.smoothed(masks=(left, ~left)).certify(x[:, :3])),
            (ValueError, "no second half", lambda: self.smoothed().certify(x[:, :1, :1])),
            (ValueError, "fill must be one of", lambda: self.smoothed(fill="mean")),
            (ValueError, "rule must be one of", lambda: self.smoothed(rule="code")),
            (ValueError, "labels", lambda: self.smoothed().certify_all(x[None], n=20).average_radius()),
        ]


def test_bounds_and_radii_of_the_vectors():
    case = vectors.load("drs", "radius")
    h = case.hyperparameters
    n, alpha, sigma = h["n"], h["alpha"], h["sigma"]
    pairs = list(zip(case["count_left"].tolist(), case["count_right"].tolist()))
    found = {
        "lower_left": [clopper_pearson_lower(a, n, alpha) for a, _ in pairs],
        "lower_right": [clopper_pearson_lower(b, n, alpha) for _, b in pairs],
        "cohen": [smoothing_radius(a, n, alpha, sigma) for a, _ in pairs],
        "radius_code": [dual_smoothing_radius(a, b, n, alpha, sigma, rule="official") for a, b in pairs],
        "radius_sound": [dual_smoothing_radius(a, b, n, alpha, sigma) for a, b in pairs],
    }
    for name, values in found.items():
        case.close(torch.tensor(values, dtype=torch.float64), name, scale=1.0)
    for a, b in pairs:
        assert dual_smoothing_radius(a, b, n, alpha, sigma) <= dual_smoothing_radius(a, b, n, alpha, sigma, rule="official")


def test_the_radius_is_that_of_the_worst_attack():
    case = vectors.load("drs", "worst_case")
    given = zip(case["p_left"].tolist(), case["p_right"].tolist(), case["sigma"].tolist())
    case.close(torch.tensor([dual_radius(*each) for each in given], dtype=torch.float64), "radius")


def test_a_branch_may_be_below_one_half_but_not_the_sum():
    assert dual_radius(0.9, 0.3, 1.0) == pytest.approx((stats.norm.ppf(0.9) + stats.norm.ppf(0.3)) / 2**0.5)
    assert dual_radius(0.9, 0.0, 1.0) == dual_radius(0.0, 1.0, 1.0) == dual_radius(0.6, 0.4, 1.0) == 0.0
    assert dual_smoothing_radius(900, 0, 1000, 0.001, 1.0) == 0.0
    assert dual_smoothing_radius(900, 0, 1000, 0.001, 1.0, rule="official") > 0  # the authors' over-claim


def test_counts_may_be_numpys_or_torchs_whole_numbers_but_no_fractions():
    for count in (np.int64(90), torch.tensor([90])[0], np.array([90, 3])[0]):
        assert clopper_pearson_lower(count, np.int32(100), 0.01) == clopper_pearson_lower(90, 100, 0.01)
        assert dual_smoothing_radius(count, 95, 100, 0.01, 1.0) == dual_smoothing_radius(90, 95, 100, 0.01, 1.0)
    for count in (90.0, np.float64(90), torch.tensor(90.0), True, "90"):
        with pytest.raises(ValueError, match="successes must be an int"):
            clopper_pearson_lower(count, 100, 0.01)


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.125, 0.4])
def test_the_smallest_n_is_where_a_certificate_becomes_possible(alpha):
    for dual, radius in ((False, smoothing_radius), (True, lambda n, *rest: dual_smoothing_radius(n, n, *rest))):
        n = smallest_n(alpha, dual=dual)
        assert radius(n, n, alpha, 1.0) if not dual else radius(n, n, alpha, 1.0) > 0
        assert n == 1 or radius(n - 1, n - 1, alpha, 1.0) < 1e-12


def test_bounds_hold_as_often_as_they_promise():
    counts = np.random.default_rng(0).binomial(200, 0.8, size=4000)
    above = {k: clopper_pearson_lower(int(k), 200, 0.05) > 0.8 for k in np.unique(counts)}
    assert np.mean([above[k] for k in counts]) <= 0.05
    assert clopper_pearson_lower(150, 200, 0.05) == pytest.approx(stats.beta.ppf(0.05, 150, 51), rel=1e-12)


def test_halves():
    case = vectors.load("drs", "partition")
    for variant, prefix in (("paper", ""), ("official", "official_")):
        left, right = checkerboard(8, 8, variant=variant)
        assert torch.equal(left, case[f"{prefix}left"])
        assert torch.equal(right, case[f"{prefix}right"])
    left, right = checkerboard(3, 5)
    assert torch.equal(left, ~right)
    assert [left.tolist()[i][j] for i, j in ((0, 0), (0, 1), (1, 1), (2, 4))] == [True, False, True, True]


def test_fills_are_maps_of_the_kept_pixels():
    x = torch.arange(1.0, 31.0).view(1, 1, 5, 6)
    left = checkerboard(5, 6)[0]
    zero = fill_masked(x, left, fill="zero")
    assert torch.equal(zero, x * left)
    near = fill_masked(x, left)
    for i in range(5):
        for j in range(6):
            cells = [(i + a, j + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1)) if 0 <= i + a < 5 and 0 <= j + b < 6]
            want = x[0, 0, i, j] if left[i, j] else torch.stack([x[0, 0, a, b] for a, b in cells]).mean()
            assert torch.isclose(near[0, 0, i, j], want)
    peaks = fill_masked(x, left, fill="maxpool")
    assert peaks[0, 0, 0, 0] == x[0, 0, 0, 0] + x[0, 0, 1, 1]
    assert peaks[0, 0, 4, 4] == 2 * x[0, 0, 4, 4]  # a block at the edge
    assert not peaks[0, 0][~left].any()
    other = torch.where(left, x, torch.nan_to_num(x * 1e9))
    for fill in ("zero", "neighbour", "maxpool"):
        assert torch.equal(fill_masked(other, left, fill=fill), fill_masked(x, left, fill=fill))
        assert fill_masked(x.bfloat16(), left, fill=fill).dtype == torch.bfloat16
    alone = torch.zeros(5, 6, dtype=torch.bool)
    alone[0, 0] = True
    assert int((fill_masked(x, alone) != 0).sum()) == 3  # the pixel and its two neighbours
    refuses(
        [
            (ValueError, "fill", lambda: fill_masked(x, left, fill="mean")),
            (ValueError, "(5, 6)", lambda: fill_masked(x, left.T)),
            (TypeError, "bool", lambda: fill_masked(x, left.float())),
            (ValueError, "(B, C, H, W)", lambda: fill_masked(x[0], left)),
            (ValueError, "variant", lambda: checkerboard(2, 2, variant="code")),
            (ValueError, "height", lambda: checkerboard(0, 2)),
            (ValueError, "successes", lambda: clopper_pearson_lower(5, 4, 0.1)),
            (ValueError, "alpha", lambda: clopper_pearson_lower(5, 5, 0.0)),
            (ValueError, "n must", lambda: smoothing_radius(0, 0, 0.1, 1.0)),
            (ValueError, "p_left", lambda: dual_radius(1.1, 0.5, 1.0)),
            (ValueError, "sigma", lambda: dual_radius(0.9, 0.5, -1.0)),
            (ValueError, "rule", lambda: dual_smoothing_radius(1, 1, 2, 0.1, 1.0, rule="code")),
        ]
    )


def test_a_radius_is_below_the_true_one_and_close_to_it():
    """P[first pixel + noise > 0] = Φ(0.8), so Cohen's true radius is the distance 0.4 to the boundary."""
    x, n = image(0.4), 20_000
    cohen = RandomizedSmoothing(by_first_pixel, 2, 0.5).certify(x, n=n, generator=torch.Generator().manual_seed(1))
    assert cohen.prediction == 1
    assert 0.37 < cohen.radius < 0.4
    # The pixel is on the left; on the right the answer is a coin's that falls on 1 with Φ(-0.2).
    right = lambda images: by_first_pixel(images[:, :, :, 1:] - 0.1 * (images[:, :1, :, 1:] != 0))  # noqa: E731
    dual = DualRandomizedSmoothing(by_first_pixel, right, 2, 0.5, fill="zero")
    got = dual.certify(x, n=n, generator=torch.Generator().manual_seed(1))
    assert got.prediction == 1
    truth = (0.4 - 0.1) / 2**0.5
    assert truth - 0.03 < got.radius < truth


def test_predictions_and_abstentions():
    generator = torch.Generator().manual_seed(0)
    smoothed = RandomizedSmoothing(by_first_pixel, 2, 0.5)
    assert smoothed.predict(image(0.3), n=1000, generator=generator) == 1
    assert smoothed.predict(image(-0.3), n=1000, generator=generator) == 0
    assert smoothed.predict(image(0.0), n=1000, generator=generator) == ABSTAIN
    assert smoothed.certify(image(0.0), n=1000, generator=generator) == Certificate(ABSTAIN, 0.0)
    split = DualRandomizedSmoothing(constant(0), constant(1), 4, 0.5)
    assert split.certify(torch.zeros(SHAPE), n=1000) == Certificate(ABSTAIN, 0.0)
    assert split.certify(torch.zeros(SHAPE), n=1000).to_dict() == {"prediction": -1, "radius": 0.0}


def test_noise_is_fresh_independent_and_only_on_kept_pixels():
    seen = {0: [], 1: []}

    def model(side):
        def look(images):
            seen[side].append(images.clone())
            return constant(2)(images)

        return look

    dual = DualRandomizedSmoothing(model(0), model(1), 4, 0.5, fill="zero")
    dual.certify_all(torch.ones(2, *SHAPE), n0=30, n=250, batch_size=100)
    left = checkerboard(4, 6)[0]
    noise = {}
    for side, mask in ((0, left), (1, ~left)):
        assert [len(images) for images in seen[side]] == [30, 100, 100, 50] * 2
        samples = torch.cat(seen[side])
        assert not samples[..., ~mask].any()
        noise[side] = (samples[..., mask] - 1) / 0.5
        assert len(torch.unique(noise[side].flatten(1), dim=0)) == len(samples) == 560  # no sample twice, no image's either
        assert abs(float(noise[side].mean())) < 0.03
        assert abs(float(noise[side].std()) - 1) < 0.03
    mixed = (noise[0].flatten(1) * noise[1].flatten(1)).mean()
    assert abs(float(mixed)) < 0.03  # the branches' noise is independent


@pytest.mark.parametrize("dual", [False, True])
def test_neither_batches_nor_order_change_a_count(dual, monkeypatch):
    def smoothed():
        if dual:
            return DualRandomizedSmoothing(by_first_pixel, by_first_pixel, 2, 0.5)
        return RandomizedSmoothing(by_first_pixel, 2, 0.5)

    images = torch.stack([image(v) for v in (0.1, 0.2, 0.3)])
    counted, radius = [], type(smoothed())._radius
    monkeypatch.setattr(
        type(smoothed()), "_radius", lambda self, counts, *rest: counted.append(counts) or radius(self, counts, *rest)
    )
    seen = []
    runs = [
        smoothed().certify_all(images, n0=30, n=330, batch_size=size, callback=lambda *pair: seen.append(pair))
        for size in (7, 100, 1000)
    ]
    assert counted[:3] == counted[3:6] == counted[6:]
    assert [i for i, _ in seen] == [0, 1, 2] * 3
    assert seen[1][1].radius == runs[0].radii[1]
    again = smoothed().certify_all(images.numpy()[:2], n0=30, n=330)
    assert np.array_equal(again.radii, runs[0].radii[:2])
    other = smoothed().certify_all(images, n0=30, n=330, seed=1)
    assert not np.array_equal(other.radii, runs[0].radii)
    predictions, radii = runs[0]
    assert predictions.dtype == np.int64
    assert radii.dtype == np.float64


def test_certified_accuracy():
    x = torch.stack([image(value) for value in (5.0, 5.0, 0.0, -5.0)])
    found = RandomizedSmoothing(by_first_pixel, 2, 0.5).certify_all(x, torch.tensor([1, 0, 1, 0]), n=200)
    assert found.predictions.tolist() == [1, 1, ABSTAIN, 0]
    radius = found.radii[0]
    assert found.accuracy_at([0.0, radius, radius + 1e-6]).tolist() == [0.5, 0.5, 0.0]
    assert float(found.accuracy_at(0.0)) == 0.5
    assert found.average_radius() == pytest.approx((found.radii[0] + found.radii[3]) / 4)
    assert found.to_dict()["labels"] == [1, 0, 1, 0]
    assert "abstained" in found.summary


def test_modules_are_put_back_and_outputs_may_have_logits():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.score = nn.Dropout(0.9), nn.Linear(48, 3)

        def forward(self, images):
            assert not self.training
            assert not torch.is_grad_enabled()
            return type("Output", (), {"logits": self.score(self.drop(images.flatten(1)))})

    net = Classifier().train()
    net.drop.eval()
    for x in (torch.zeros(SHAPE), torch.zeros(SHAPE, dtype=torch.bfloat16), torch.zeros(SHAPE, dtype=torch.float64)):
        DualRandomizedSmoothing(net.to(x.dtype), net, 3, 0.5).certify(x, n=20)
    assert net.training
    assert not net.drop.training
    assert smoothing._DRAW == 100  # n0's default is one draw


@pytest.mark.parametrize("fill", ["neighbour", "zero", "maxpool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_kept_pixels_are_filled_to_the_bit_as_whole_images_are(fill, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 2, 5, 7, generator=generator, dtype=dtype)
    for mask in (checkerboard(5, 7)[1], torch.rand(5, 7, generator=generator) < 0.3):
        spread, out = Spread(mask, fill, images.device, dtype), torch.empty_like(images)
        spread(images.flatten(2)[:, :, spread.kept].permute(1, 2, 0).contiguous(), out)
        assert torch.equal(out, fill_masked(images, mask, fill=fill))
