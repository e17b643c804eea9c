import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vectors
from lowdim.ranks import by_energy, energy_rank, parameter_rank, welore, welore_at


def test_energy_rank_is_the_smallest_that_reaches_the_share():
    s = torch.tensor([2.0, 1.0, 1.0, 0.0])
    for energy, rank in [(0.5, 1), (4 / 6, 1), (0.67, 2), (5 / 6, 2), (0.9, 3), (1.0, 3)]:
        assert energy_rank(s, energy) == rank


def test_energy_rank_tolerates_rounding():
    s = torch.full((10,), 0.1)
    assert energy_rank(s, 0.3) == 3
    assert energy_rank(s, 0.7) == 7


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_energy_rank_by_its_definition(values, energy):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    r = energy_rank(s, energy)
    share = s.square().cumsum(0) / s.square().sum()
    assert share[r - 1] >= energy - 1e-9
    assert r == 1 or share[r - 2] < energy + 1e-9


@pytest.mark.parametrize("bad", [0.0, 1.01, float("nan"), "0.5"])
def test_energy_out_of_range(bad):
    with pytest.raises(ValueError, match="energy"):
        energy_rank(torch.ones(3), bad)


@given(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_by_energy_hands_out_nearly_equal_groups(layers, choices, seed):
    generator = torch.Generator().manual_seed(seed)
    spectra = [torch.rand(8, generator=generator).sort(descending=True).values for _ in range(layers)]
    ranks = by_energy(spectra, rank=3, choices=choices)
    groups = [ranks.count(choice) for choice in set(choices)]
    assert sum(groups) == layers
    if len(set(choices)) == len(choices):
        assert max(groups + [0] * (len(choices) - len(groups))) - min(groups + [layers]) <= 1
    energy = [float(s[:3].square().sum() / s.square().sum()) for s in spectra]
    order = sorted(range(layers), key=energy.__getitem__)
    assert [ranks[i] for i in order] == sorted(ranks, reverse=True)


def test_by_energy_breaks_ties_by_order_and_takes_short_spectra():
    same = [torch.ones(4)] * 4
    assert by_energy(same, rank=2, choices=(1, 5)) == [5, 5, 1, 1]
    assert by_energy([torch.ones(2), torch.ones(8)], rank=4, choices=(2, 6)) == [2, 6]


def test_the_remainder_goes_to_the_groups_with_flat_spectra():
    spectra = [torch.tensor([1.0, 1 / (i + 1)]) for i in range(8)]
    assert by_energy(spectra, rank=1, choices=(1, 2, 3)) == [3, 3, 3, 2, 2, 2, 1, 1]


def test_by_energy_of_a_zero_matrix():
    assert by_energy([torch.zeros(3), torch.ones(3)], rank=1, choices=(1, 2)) == [2, 1]


@pytest.mark.parametrize(
    ("spectra", "rank", "choices"),
    [([], 1, (1,)), ([torch.ones(2)], 1, ()), ([torch.ones(2)], 0, (1,)), ([torch.ones(2)], 1, (0,))],
)
def test_by_energy_refuses(spectra, rank, choices):
    with pytest.raises(ValueError, match=r"rank|choices"):
        by_energy(spectra, rank=rank, choices=choices)


# WeLore


def by_definition(spectra, target, grid=0.005):
    """Threshold and ranks, one layer and one threshold at a time; None where no threshold removes enough."""
    total = sum(len(s) for s in spectra.values() if len(s) > 1)
    for i in range(1, int(1 / grid + 1e-9) + 1):
        threshold, kept = round(i * grid, 12), {}
        for name, s in spectra.items():
            low, high = float(s.min()), float(s.max())
            below = 0 if low == high else sum((float(x) - low) / (high - low) < threshold for x in s)
            kept[name] = len(s) - below
        if sum(len(s) - kept[n] for n, s in spectra.items()) / total >= target:
            return threshold, kept
    return None


def test_welore_vector():
    v = vectors.load("welore", "target")
    threshold, kept = welore({f"l{i}": v[f"s{i}"] for i in range(4)}, v.hyperparameters["target"])
    assert threshold == pytest.approx(float(v["threshold"]), abs=1e-9)
    assert list(kept.values()) == v["ranks"].tolist()


values = st.lists(st.one_of(st.floats(0, 100, width=32), st.integers(0, 4).map(float)), min_size=1, max_size=12)


@given(st.lists(values, min_size=1, max_size=5), st.floats(0.01, 0.99), st.sampled_from([0.005, 0.03, 0.25, 1.0]))
def test_welore_by_its_definition(layers, target, grid):
    spectra = {str(i): torch.tensor(s, dtype=torch.float64) for i, s in enumerate(layers)}
    if all(len(s) == 1 for s in layers):
        with pytest.raises(ValueError, match="more than one singular value"):
            welore(spectra, target, grid=grid)
        return
    want = by_definition(spectra, target, grid)
    if want is None:
        with pytest.raises(ValueError, match="target must be at most"):
            welore(spectra, target, grid=grid)
        return
    assert welore(spectra, target, grid=grid) == want
    assert welore_at(spectra, want[0]) == want[1]
    assert all(1 <= r <= len(spectra[n]) for n, r in want[1].items())


def test_welore_normalises_by_the_least_value_too():
    spectra = {"a": torch.tensor([1.0, 0.6, 0.5])}  # z = 1, 0.2, 0; s / max would be 1, 0.6, 0.5
    assert welore_at(spectra, 0.21) == {"a": 1}
    assert welore(spectra, 0.5) == (0.205, {"a": 1})


def test_welore_does_not_look_at_scale_order_or_dtype():
    s = torch.tensor([7.0, 3.0, 2.0, 0.5, 0.25])
    flat = torch.tensor([3.0, 2.5, 2.25, 2.0])
    want = welore({"s": s, "flat": flat}, 0.5)
    assert welore({"s": s.flip(0) * 64, "flat": flat.bfloat16()}, 0.5) == want


def test_welore_of_equal_values_and_single_ones():
    spectra = {
        "flat": torch.full((4,), 0.3),
        "zero": torch.zeros(3),
        "one": torch.ones(1),
        "falls": torch.tensor([9.0, 1.0, 0.0]),
    }
    threshold, kept = welore(spectra, 0.2)
    assert kept == {"flat": 4, "zero": 3, "one": 1, "falls": 1}
    assert threshold == 0.115  # z = 1, 1/9, 0: both lie below; ten values count
    with pytest.raises(ValueError, match=r"target must be at most 0\.2, which threshold 1 removes; got 0\.21"):
        welore(spectra, 0.21)


def test_welore_at_the_ends():
    spectra = {"a": torch.tensor([3.0, 3.0, 1.0, 0.0])}
    assert welore_at(spectra, 0.0) == {"a": 4}
    assert welore_at(spectra, 1.0) == {"a": 2}  # both maxima stay


@pytest.mark.parametrize(
    ("spectra", "target", "grid", "match"),
    [
        ({}, 0.5, 0.005, "singular_values must hold at least one layer"),
        ({"a": torch.ones(2)}, 0.0, 0.005, r"target must be a finite number in \(0, 1\); got 0\.0"),
        ({"a": torch.ones(2)}, 1, 0.005, r"target must be .* got 1"),
        ({"a": torch.ones(2)}, 0.5, 0.0, r"grid must be a finite number in \(0, 1\]; got 0\.0"),
        ({"a": torch.ones(2, 2)}, 0.5, 0.005, r"singular_values\['a'\] must be a vector .* got shape \(2, 2\)"),
        ({"a": torch.ones(0)}, 0.5, 0.005, r"singular_values\['a'\] must be a vector"),
        ({"a": torch.tensor([1.0, torch.nan])}, 0.5, 0.005, r"singular_values\['a'\] has negative, NaN or infinite"),
        ({"a": torch.tensor([1.0, -1.0])}, 0.5, 0.005, r"singular_values\['a'\] has negative"),
    ],
)
def test_welore_refuses(spectra, target, grid, match):
    with pytest.raises(ValueError, match=match):
        welore(spectra, target, grid=grid)


@pytest.mark.parametrize("bad", [-0.1, 1.01, float("nan"), None])
def test_welore_at_refuses(bad):
    with pytest.raises(ValueError, match="threshold"):
        welore_at({"a": torch.ones(2)}, bad)


@pytest.mark.parametrize(("out", "inn", "share"), [(1536, 384, 0.5), (40, 24, 1 / 3), (18, 33, 1 / 1.5), (100, 100, 0.58)])
def test_parameter_rank_is_the_largest_that_fits_the_share(out, inn, share):
    rank = parameter_rank(out, inn, share=share)
    assert rank * (out + inn) <= share * out * inn + 1e-6 < (rank + 1) * (out + inn)


def test_parameter_rank_in_multiples():
    assert parameter_rank(100, 100, share=0.58) == 29  # 0.58 * 100 * 100 / 200 falls just below 29 in floating point
    assert parameter_rank(1536, 384, share=0.5, multiple=64) == 128
    assert parameter_rank(40, 24, share=0.5, multiple=64) == 7  # below one multiple it stays
    assert parameter_rank(2, 2, share=0.5) == 0
    assert parameter_rank(8, 8, share=3.0) == 12
    for bad in ({"share": 0.0}, {"share": float("nan")}, {"share": 0.5, "multiple": 0}):
        with pytest.raises(ValueError, match="must be"):
            parameter_rank(8, 8, **bad)
