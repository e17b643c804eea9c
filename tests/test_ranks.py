import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowdim.ranks import by_energy, energy_rank


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
