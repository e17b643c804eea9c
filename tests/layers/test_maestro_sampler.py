"""Maestro's sampler: which ranks are drawn, for how long they hold, and its state."""

import json
from collections import Counter

import pytest
import torch
from maestro_net import data, net
from torch import nn

from lowdim.errors import CheckpointError
from lowdim.layers import MaestroSampler


def test_per_layer_draws_every_pair_once_a_round():
    sampler = MaestroSampler(net())
    assert list(sampler.layers) == ["0", "2", "4"]
    pairs = {(name, rank) for name, most in (("0", 5), ("2", 5), ("4", 3)) for rank in range(1, most + 1)}
    rounds = []
    for _ in range(3):
        draws = [sampler.draw() for _ in range(13)]
        assert all(len(draw) == 1 for draw in draws)
        rounds.append([next(iter(draw.items())) for draw in draws])
        assert set(rounds[-1]) == pairs
    assert rounds[0] != rounds[1] != rounds[2]


def test_across_layers_draws_uniform_ranks_of_all():
    sampler = MaestroSampler(net(), kind="across_layers")
    draws = [sampler.draw() for _ in range(1500)]
    assert all(draw.keys() == {"0", "2", "4"} for draw in draws)
    for name, most in (("0", 5), ("4", 3)):
        counts = Counter(draw[name] for draw in draws)
        assert set(counts) == set(range(1, most + 1))
        assert max(counts.values()) < 1.35 * min(counts.values())
    both = Counter((draw["0"], draw["2"]) for draw in draws)
    assert len(both) == 25  # independent


def test_draws_follow_from_the_seed():
    def some(seed, kind):
        sampler = MaestroSampler(net(), kind=kind, seed=seed)
        torch.manual_seed(seed + 17)  # the global generator has no say
        return [sampler.draw() for _ in range(20)]

    for kind in ("per_layer", "across_layers"):
        assert some(0, kind) == some(0, kind) != some(1, kind)


@pytest.mark.parametrize("kind", ["per_layer", "across_layers"])
@pytest.mark.parametrize("reset", [True, False])
def test_draws_stay_within_shrunk_ranks(kind, reset):
    model = net()
    sampler = MaestroSampler(model, kind=kind)
    sampler.draw()
    model[0].rank, model[2].rank, model[4].rank = 2, 0, 1
    if reset:
        sampler.reset()
    draws = [pair for _ in range(30) for pair in sampler.draw().items()]
    assert set(draws) == {("0", 1), ("0", 2), ("4", 1)}
    model[0].rank = model[4].rank = 0
    assert sampler.draw() == {}


def test_sampled_sets_ranks_inside_only():
    model, (x, _) = net(), data(0)
    sampler, full = MaestroSampler(model), model(x)
    model_at = [layer.sampled for layer in sampler.layers.values()]
    with sampler.sampled({"2": 2}) as ranks:
        assert ranks == {"2": 2}
        small = model(x)
    want = model[4](torch.tanh(model[2](torch.tanh(model[0](x)), rank=2)))
    assert torch.equal(small, want)
    assert not torch.allclose(small, full)
    assert torch.equal(model(x), full)
    assert model_at == [None, None, None] == [layer.sampled for layer in sampler.layers.values()]


def test_sampled_draws_by_itself():
    model = net()
    sampler, other = MaestroSampler(model), MaestroSampler(net())
    for _ in range(5):
        with sampler.sampled() as ranks:
            assert {name: layer.sampled for name, layer in sampler.layers.items() if layer.sampled is not None} == ranks
        assert ranks == other.draw()


def test_sampled_restores_after_an_exception():
    model = net()
    sampler = MaestroSampler(model)
    with pytest.raises(RuntimeError, match="inside"), sampler.sampled({"0": 1}):
        raise RuntimeError("inside")
    assert all(layer.sampled is None for layer in sampler.layers.values())
    with sampler.sampled({"0": 1}):
        with sampler.sampled({"2": 1}):
            assert model[0].sampled is None
        assert model[0].sampled == 1


def test_bad_samplers():
    with pytest.raises(ValueError, match="model must hold Maestro layers; got Sequential without any"):
        MaestroSampler(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="kind must be one of per_layer, across_layers; got 'per-layer'"):
        MaestroSampler(net(), kind="per-layer")
    sampler = MaestroSampler(net())
    for ranks, message in (
        ({"0": 6}, r"ranks\['0'\] must be an int in \[0, 5\]; got 6"),
        ({"0": -1}, r"ranks\['0'\] must be an int in \[0, 5\]; got -1"),
        ({"1": 1}, "a layer of ranks must be one of 0, 2, 4; got '1'"),
    ):
        with pytest.raises(ValueError, match=message), sampler.sampled(ranks):
            pass
    assert all(layer.sampled is None for layer in sampler.layers.values())


@pytest.mark.parametrize("kind", ["per_layer", "across_layers"])
def test_sampler_state(kind):
    sampler = MaestroSampler(net(), kind=kind)
    for _ in range(17):
        sampler.draw()
    state = json.loads(json.dumps(sampler.state_dict()))
    other = MaestroSampler(net(), kind=kind)
    other.load_state_dict(state)
    assert [sampler.draw() for _ in range(20)] == [other.draw() for _ in range(20)]


def test_foreign_sampler_states():
    state = MaestroSampler(net()).state_dict()
    for other, message in (
        (MaestroSampler(net(), kind="across_layers"), "the saved sampler is of kind 'per_layer'"),
        (MaestroSampler(nn.Sequential(net())), "the saved sampler covers layers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="state must have the entries"):
        MaestroSampler(net()).load_state_dict({"round": 1})
