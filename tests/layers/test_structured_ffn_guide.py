import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vectors
from lowdim.errors import CheckpointError
from lowdim.layers import BlockDense, BlockShuffle, LowRank, Monarch, SelfGuide, SelfGuided, densify
from lowdim.testing.layer_case import LayerCase


class TestSelfGuided(LayerCase):
    """After two of six steps the guide's share is ½ (1 + cos(π / 3)) = ¾."""

    layer_class = SelfGuided

    # it is made around a layer, not from sizes or from a plain layer
    test_from_linear_keeps_what_it_can = None  # type: ignore[assignment]
    test_from_linear_is_stationary = None  # type: ignore[assignment]
    test_from_linear_can_be_exact = None  # type: ignore[assignment]
    test_from_linear_leaves_the_given_layer = None  # type: ignore[assignment]
    test_from_linear_refuses_other_layers = None  # type: ignore[assignment]
    test_from_linear_refuses_nan = None  # type: ignore[assignment]
    test_loads_in_another_process = None  # type: ignore[assignment]
    test_bad_sizes = None  # type: ignore[assignment]
    # the guide is dense
    test_backward_keeps_no_dense_matrix = None  # type: ignore[assignment]
    # the inner layer's bias has another name; the gradients of all parameters are compared by another test
    test_dense_weight_is_the_formula = None  # type: ignore[assignment]

    def make(self, *, bias=True, dtype=torch.float64, device=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        how = {"device": device, "dtype": dtype, "generator": generator}
        made = SelfGuided(BlockDense(12, 20, bias, rank=6, nblocks=3, **how), steps=6)
        made.step()
        made.step()
        if device is None:
            with torch.no_grad():  # otherwise the guide is still the layer's weight, and the share changes nothing
                made.guide.add_(torch.randn(20, 12, generator=generator))
        return made

    def dense(self, layer):
        return 0.75 * layer.guide + 0.25 * layer.layer.B @ torch.block_diag(*layer.layer.blkdiag)


def test_official_steps():
    v = vectors.load("structured-ffn", "self_guided")
    how = v.hyperparameters
    layer = LowRank(how["in_features"], how["out_features"], rank=how["rank"], dtype=torch.float64)
    layer.load_state_dict({name: v[name] for name in ("A", "B", "bias")})
    guided = SelfGuided(layer, steps=how["steps"], schedule=how["schedule"])
    v.close(guided.guide, "guide")  # it starts as the dense equivalent
    optimizer = torch.optim.SGD(guided.parameters(), lr=how["lr"])
    ratios = []
    for x, target, y in zip(v["x"], v["target"], v["y"], strict=True):
        ratios.append(guided.ratio)
        got = guided(x)
        v.close(got, y)
        F.mse_loss(got, target).backward()
        optimizer.step()
        optimizer.zero_grad()
        guided.step()
    v.close(torch.tensor(ratios, dtype=torch.float64), "ratios")
    for name in ("A", "B"):
        v.close(getattr(layer, name), f"{name}_after")
    v.close(guided.guide, "guide_after")
    assert guided.finish() is layer


@pytest.mark.parametrize(
    ("schedule", "want"),
    [("cosine", [1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0, 0]), ("linear", [1, 0.75, 0.5, 0.25, 0, 0])],
)
def test_schedules(schedule, want):
    guided, seen = SelfGuided(BlockShuffle(4, 4), steps=4, schedule=schedule), []
    for _ in want:
        seen.append(guided.ratio)
        guided.step()
    assert seen == pytest.approx(want, abs=1e-15)
    assert int(guided.count) == len(want)


@pytest.mark.parametrize(
    "layer",
    [LowRank(8, 6, rank=3), BlockDense(8, 6, rank=4), BlockShuffle(8, 6), Monarch(8, 6)],
    ids=lambda x: type(x).__name__,
)
def test_the_guide_starts_as_the_same_function(layer):
    """Of every kind, the shuffled one included."""
    x = torch.randn(5, 8)
    torch.testing.assert_close(SelfGuided(layer, steps=3)(x), layer(x), rtol=1e-5, atol=1e-6)


def test_without_a_share_the_guide_is_left_alone():
    guided = SelfGuided(BlockShuffle(4, 4), steps=1)
    guided.step()
    guided(torch.ones(2, 4)).sum().backward()
    assert guided.guide.grad is None
    assert guided.layer.blkdiag1.grad is not None


def test_reduced_flops_use_the_guide_in_its_share_of_the_steps():
    """Skipped, the output is that of the layer alone; in eval mode nothing is drawn."""
    guided = SelfGuided(BlockShuffle(4, 4, seed=0), steps=2000, reduce_flops=True, schedule="linear", seed=3)
    x = torch.ones(1, 4)
    with torch.no_grad():
        guided.guide.add_(1.0)
        alone, blend = guided.layer(x), []
        for step in range(2000):
            y = guided(x)
            assert torch.equal(guided(x), y), "all passes of a step agree"
            used = not torch.equal(y, alone)
            if used and step > 0:
                want = (1 - step / 2000) * F.linear(x, guided.guide) + step / 2000 * alone
                torch.testing.assert_close(y, want)
            blend.append(used)
            guided.step()
        assert sum(blend[:1000]) == pytest.approx(750, abs=50)
        assert sum(blend[1000:]) == pytest.approx(250, abs=50)
        guided.load_state_dict({**guided.state_dict(), "count": torch.tensor(1999)})
        assert guided.ratio == pytest.approx(1 / 2000)
        assert not torch.equal(guided.eval()(x), alone)


def test_a_saved_count_goes_on():
    guided, again = (SelfGuided(BlockShuffle(4, 4), steps=4) for _ in range(2))
    guided.step()
    again.load_state_dict(guided.state_dict())
    assert again.ratio == guided.ratio == 0.5 * (1 + math.cos(math.pi / 4))
    assert "count" in guided.state_dict()


# A whole model


def net():
    return nn.Sequential(
        BlockDense(8, 12, rank=4, seed=1), nn.GELU(), LowRank(12, 12, rank=3, init="svd", seed=2), nn.GELU(), nn.Linear(12, 1)
    )


def train(model, optimizer, guide, steps):
    x, losses = torch.linspace(-1, 1, 80).view(10, 8), []
    for _ in range(steps):
        loss = (model(x) - x.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        guide.step(optimizer)
        losses.append(loss.item())
    return losses


def start(**how):
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    return model, optimizer, SelfGuide(model, optimizer, **{"total_steps": 10, "fraction": 0.6, **how})


def test_a_model_is_guided_and_plain_again():
    model, optimizer, guide = start()
    assert {name: type(layer.layer).__name__ for name, layer in guide.layers.items()} == {
        "0": "BlockDense",
        "2": "LowRankLinear",
    }
    assert [layer.steps for layer in guide.layers.values()] == [6, 6]
    assert len(optimizer.param_groups) == 2
    assert {k: v for k, v in optimizer.param_groups[1].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }
    before = [g.detach().clone() for g in guide.guides()]
    train(model, optimizer, guide, 6)
    assert not any(torch.equal(a, b) for a, b in zip(before, guide.guides(), strict=True)), "the guides are trained"
    left = [g.detach().clone() for g in guide.guides()]
    train(model, optimizer, guide, 2)
    assert all(torch.equal(a, b) for a, b in zip(left, guide.guides(), strict=True)), "later ones stay, decay included"
    x = torch.randn(3, 8)
    said = model(x)
    guide.finish()
    guide.finish()
    guide.step()
    assert [type(m).__name__ for m in model] == ["BlockDense", "GELU", "LowRankLinear", "GELU", "Linear"]
    assert torch.equal(model(x), said)
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.state) == set(model.parameters())
    assert guide.layers == {}


def test_densify_in_between_keeps_the_blend():
    model, optimizer, guide = start()
    train(model, optimizer, guide, 2)
    x = torch.randn(3, 8)
    said = model(x)
    torch.testing.assert_close(densify(model)(x), said, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [3, 8])
def test_a_resumed_training_gives_the_same_bits(steps):
    """Also where the model is loaded before it is guided, when the names of the guided layers mean nothing to it."""
    model, optimizer, guide = start(reduce_flops=True)
    train(model, optimizer, guide, steps)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), guide.state_dict()))
    want = train(model, optimizer, guide, 10 - steps)
    torch.manual_seed(5)
    again = net()
    again.load_state_dict(saved[0], strict=False)
    second = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.3)
    guide = SelfGuide(again, second, total_steps=10, fraction=0.6, reduce_flops=True)
    second.load_state_dict(saved[1])
    guide.load_state_dict(saved[2])
    assert train(again, second, guide, 10 - steps) == want
    guide.finish()
    assert len(second.param_groups) == 1


def test_a_state_of_another_model_is_refused():
    _, _, guide = start()
    with pytest.raises(CheckpointError, match=r"guides the layers \['1'\]; this one guides \['0', '2'\]"):
        guide.load_state_dict({"version": 1, "layers": {"1": {}}})
    with pytest.raises(CheckpointError, match="version 1; got None"):
        guide.load_state_dict({})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, o: SelfGuide(m, o), "total_steps must be an int >= 1; got None"),
        (lambda m, o: SelfGuide(m, o, total_steps=4, fraction=0.0), "fraction must be"),
        (lambda m, o: SelfGuide(m, o, total_steps=4, schedule="sine"), "schedule must be one of cosine, linear; got 'sine'"),
        (lambda m, o: SelfGuide(m[4], o, total_steps=4), "must have a structured layer"),
        (lambda m, o: SelfGuide(m[0], o, total_steps=4), "is itself a BlockDense"),
        (lambda m, o: [SelfGuide(m, o, total_steps=4), SelfGuide(m, o, total_steps=4)], "guided layers already"),
        (lambda m, o: SelfGuided(m[0], steps=0), "steps must be an int >= 1; got 0"),
        (lambda m, o: SelfGuided(m[0], steps=1, schedule="sine"), "schedule must be one of cosine, linear; got 'sine'"),
    ],
)
def test_bad_values(make, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        make(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="got Linear"):
        SelfGuided(nn.Linear(4, 4), steps=1)
