"""MatryoshkaKV's ranks: drawn, searched greedily, and set by a budget."""

import pytest
import torch
from projected_models import logits, projected, projections

import kv_models
import vectors
from lowdim.compress import greedy_kv_ranks, kv_cache_bytes, last_report, sample_kv_ranks, search_kv_ranks, set_kv_ranks

pytest.importorskip("transformers")


def test_reference_greedy():
    v = vectors.load("matryoshka-kv", "greedy")
    how = dict(v.hyperparameters)
    sizes = [how.pop(name) for name in ("num_layers", "num_kv_heads", "head_dim")]
    how.pop("hidden")

    def hidden(keys, values):
        left = 1 - torch.stack([keys, values]).double() / sizes[2]
        return (1 + v["w"] * (1 - left ** v["p"])).flatten()

    keys, values = greedy_kv_ranks(hidden, *sizes, **how)
    assert torch.equal(keys, v["key_ranks"].long())
    assert torch.equal(values, v["value_ranks"].long())


def test_sampled_ranks():
    keys, values = sample_kv_ranks(40, 5, 32, seed=3)  # an eighth of 32
    both = torch.stack([keys, values])
    assert set(both.flatten().tolist()) == set(range(4, 33, 4))
    assert abs(float(both.double().mean()) - 18) < 1.5  # 4 · mean(1 .. 8)
    assert torch.equal(keys, sample_kv_ranks(40, 5, 32, seed=3)[0])
    assert not torch.equal(keys, sample_kv_ranks(40, 5, 32, seed=4)[0])
    assert not torch.equal(keys, values)
    assert sample_kv_ranks(1, 1, 4, generator=torch.Generator().manual_seed(0))[0].shape == (1, 1)


def test_greedy_stops_inside_a_round_and_at_the_floor():
    def hidden(keys, values):
        return torch.cat([keys.double(), 100.0 * values], 1)

    keys, values = greedy_kv_ranks(hidden, 1, 2, 16, budget=0.875, interval=4, round_fraction=1.0)
    assert [keys.tolist(), values.tolist()] == [[[12, 12]], [[16, 16]]]  # a whole round would be 0.75
    keys, values = greedy_kv_ranks(hidden, 1, 2, 16, budget=0.25, interval=4, round_fraction=0.01)  # at least one a round
    assert set(torch.cat([keys, values]).flatten().tolist()) == {4}
    assert [r.tolist() for r in greedy_kv_ranks(hidden, 1, 2, 16, budget=1.0)] == [[[16, 16]], [[16, 16]]]


def test_greedy_keeps_the_heads_that_matter():
    weights = torch.tensor([[1.0, 50.0], [1.0, 50.0]])

    def hidden(keys, values):
        return torch.stack([1 / keys * weights, 1 / values * weights])

    keys, values = greedy_kv_ranks(hidden, 2, 2, 16, budget=0.5, interval=2, round_fraction=0.125)
    assert bool((keys[:, 1] > keys[:, 0]).all())
    assert bool((values[:, 1] > values[:, 0]).all())
    assert int(keys.sum() + values.sum()) == 64


def test_search_finds_better_ranks_than_uniform_ones_and_leaves_the_model_alone():
    model = projected(dtype=torch.float64)
    batch = kv_models.batches()[0]
    want = logits(model, batch["input_ids"])
    keys, values = search_kv_ranks(model, batch, budget=0.5, interval=1, round_fraction=0.1)
    assert torch.equal(logits(model, batch["input_ids"]), want)
    assert int(keys.sum() + values.sum()) <= 0.5 * 2 * 2 * 2 * 8

    def error(key_ranks, value_ranks):
        set_kv_ranks(model, key_ranks, value_ranks)
        return float((logits(model, batch["input_ids"]) - want).norm())

    assert error(keys, values) < error(4, 4)


def test_a_budget_sets_the_ranks():
    model = projected(budget=0.5)
    ranks = [p.ranks for p in projections(model)]
    assert sum(sum(k) + sum(v) for k, v in ranks) == 0.5 * 2 * 2 * 2 * 8
    assert last_report(model).after == 32


def test_bytes():
    assert kv_cache_bytes([[4, 8], [1, 1]], [[2, 2], [3, 3]], tokens=10, batch=3, element_size=4) == 24 * 10 * 3 * 4
