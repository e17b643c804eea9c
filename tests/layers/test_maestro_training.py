"""Maestro's companion in a training loop: the extra loss, shrinking, exact resumption, and what is refused."""

import copy
import itertools
import json

import pytest
import torch
from maestro_net import data, net, sgd, training
from torch import nn
from torch.nn import functional as F

from lowdim.errors import CheckpointError
from lowdim.layers import MaestroLinear, MaestroSampler, MaestroTraining


def test_extra_loss_by_its_definition():
    model, (x, _) = net(), data(0)
    beside = training(model, sgd(model), lasso=0.03)
    logits = model(x)
    got = beside.extra_loss(lambda: model(x), logits)
    with MaestroSampler(model).sampled(beside.drawn):
        small = model(x)
    soft = -(logits.detach().softmax(-1) * small.log_softmax(-1)).sum(-1).mean()
    want = soft + 0.03 * sum(layer.group_lasso() for layer in beside.sampler.layers.values())
    assert torch.allclose(got, want)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b)
    assert beside.extra_loss(lambda: model(x), logits.view(2, 4, 3)).allclose(want)  # any leading dimensions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_loss_in_lower_precision(dtype):
    model, (x, _) = net(dtype=dtype), data(0)
    exact = copy.deepcopy(model).double()
    x = x.to(dtype)
    beside, reference = training(model, sgd(model)), training(exact, sgd(exact))
    logits = model(x)
    loss = beside.extra_loss(lambda: model(x), logits)
    assert loss.dtype == torch.float32
    want = reference.extra_loss(lambda: exact(x.double()), logits.double())
    assert float(abs(loss - want).detach()) < (1e-5 if dtype == torch.float32 else 2e-2) * float(want.detach())
    loss.backward()
    assert all(p.grad.dtype == dtype and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_micro_batches_of_a_step_share_the_draw():
    model = net()
    beside, other, seen = training(model, sgd(model)), MaestroSampler(net()), {}

    def forward():
        seen.update({n: layer.sampled for n, layer in beside.sampler.layers.items() if layer.sampled is not None})
        return model(data(0)[0])

    for _ in range(2):
        want = other.draw()
        for _ in range(2):
            seen.clear()
            beside.extra_loss(forward, model(data(0)[0]))
            assert seen == want
        beside.step()


def test_training_shrinks_at_the_interval_and_every_parameter_gets_a_gradient():
    model = net()
    optimizer = sgd(model)
    beside = training(model, optimizer)
    before = [id(p) for p in model.parameters()]
    ranks = []
    for step in range(30):
        ranks.append(list(beside.sampler.ranks().values()))
        x, y = data(step)
        logits = model(x)
        loss = F.cross_entropy(logits, y) + beside.extra_loss(lambda x=x: model(x), logits)
        assert all(
            g is not None for g in torch.autograd.grad(F.cross_entropy(logits, y), model.parameters(), retain_graph=True)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        beside.step()
    changes = [i for i, (a, b) in enumerate(itertools.pairwise(ranks), 1) if a != b]
    assert changes
    assert all(i % 3 == 0 for i in changes)
    assert all(b <= a for one, two in itertools.pairwise(ranks) for a, b in zip(one, two, strict=True))
    assert [id(p) for p in model.parameters()] == before


def test_lasso_alone_empties_the_last_components_first():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    beside = training(model, optimizer, lasso=1.0)
    first = model[0].importance()
    for _ in range(10):
        beside.penalty().backward()
        optimizer.step()
        optimizer.zero_grad()
    left = model[0].importance() / first
    assert float(left[4]) < 0.1 < float(left[0])
    assert bool((left.diff() < 0).all())


def test_the_interval_follows_from_the_length():
    model = net()
    assert training(model, sgd(model), shrink_interval=None, total_steps=157).shrink_interval == 15
    assert training(model, sgd(model), shrink_interval=None, total_steps=4).shrink_interval == 1
    assert training(model, sgd(model), shrink_interval=7, total_steps=157).shrink_interval == 7
    beside = training(model, sgd(model), shrink_interval=None, threshold=1e9)
    beside.step()
    assert set(beside.sampler.ranks().values()) == {5, 3}
    assert beside.shrink() == {"0": 0, "2": 0, "4": 0}
    x, _ = data(0)
    logits = model(x)
    assert torch.equal(beside.extra_loss(lambda: pytest.fail("nothing can be sampled"), logits), beside.penalty())


def test_without_a_full_pass_the_plain_pass_is_sampled():
    model, (x, _) = net(), data(0)
    full = model(x)
    beside = training(model, sgd(model), full_pass=False)
    want = dict(beside.drawn)
    y = model(x)
    with MaestroSampler(model).sampled(want), torch.no_grad():
        assert torch.equal(nn.Sequential(*model)(x), y)
    assert not torch.allclose(y, full)
    assert torch.equal(beside.extra_loss(lambda: pytest.fail("no second pass"), y), beside.penalty())
    assert torch.equal(model.eval()(x), full)
    model.train()
    with pytest.raises(ValueError, match="x must have 7 features"):
        model(x[:, :3])
    assert all(layer.sampled is None for layer in beside.sampler.layers.values())
    beside.step()
    assert beside.drawn != want
    beside.close()
    assert torch.equal(model(x), full)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("full_pass", [True, False])
@pytest.mark.parametrize("extra_first", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant, full_pass, extra_first):
    """What runs again in the backward pass runs at the ranks at which it ran before."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for i in (0, 2):
                x = checkpoint(nn.Sequential(*list(self)[i : i + 2]), x, use_reentrant=reentrant)
            return self[4](x)

    grads = []
    for kind in (nn.Sequential, Checkpointed):
        model = kind(*net())
        beside = training(model, sgd(model), kind="across_layers", full_pass=full_pass)
        x, y = data(0)
        x.requires_grad_(True)
        logits = model(x)
        if extra_first:
            extra = beside.extra_loss(lambda m=model, x=x: m(x), logits)
            loss = F.cross_entropy(logits, y) + extra
        else:
            loss = F.cross_entropy(logits, y)
            loss = loss + beside.extra_loss(lambda m=model, x=x: m(x), logits)
        loss.backward()
        assert all(layer.sampled is None for layer in beside.sampler.layers.values())
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for one, two in zip(*grads, strict=True):
        assert torch.allclose(one, two)


def train(model, optimizer, beside, steps):
    for step in steps:
        x, y = data(step)
        logits = model(x)
        (F.cross_entropy(logits, y) + beside.extra_loss(lambda x=x: model(x), logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
        beside.step()


@pytest.mark.parametrize("full_pass", [True, False])
@pytest.mark.parametrize("kind", ["per_layer", "across_layers"])
def test_resume_is_exact(kind, full_pass):
    how = {"kind": kind, "full_pass": full_pass, "seed": 3}
    one = net()
    optimizer = sgd(one)
    beside = training(one, optimizer, **how)
    train(one, optimizer, beside, range(10))
    saved = copy.deepcopy((one.state_dict(), optimizer.state_dict(), json.loads(json.dumps(beside.state_dict()))))
    train(one, optimizer, beside, range(10, 20))
    two = net()
    other = sgd(two)
    again = training(two, other, **how)
    two.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert again.sampler.ranks() != {"0": 5, "2": 5, "4": 3}, "nothing was shrunk: nothing is tested"
    train(two, other, again, range(10, 20))
    assert again.sampler.ranks() == beside.sampler.ranks()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_companion_state_restores_the_ranks_by_itself():
    model = net()
    beside = training(model, sgd(model))
    model[0].rank = 2
    state = beside.state_dict()
    other = net()
    again = training(other, sgd(other))
    again.load_state_dict(state)
    assert other[0].rank == 2
    with pytest.raises(CheckpointError, match="state must have the entries"):
        again.load_state_dict({})
    with pytest.raises(CheckpointError, match="_extra_state must be a rank"):
        again.load_state_dict({**state, "ranks": {"0": 99}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lasso": -1e-3}, r"lasso must be a finite number in \[0, inf\]; got -0.001"),
        ({"lasso": None}, "lasso must be a finite number"),
        ({"threshold": -1}, "threshold must be a finite number"),
        ({"shrink_interval": 0}, "shrink_interval must be an int >= 1; got 0"),
        ({"total_steps": 1.5}, "total_steps must be an int >= 1; got 1.5"),
        ({"kind": "all"}, "kind must be one of per_layer, across_layers; got 'all'"),
    ],
)
def test_bad_trainings(changes, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        training(model, sgd(model), **changes)


def test_lambda_and_threshold_have_no_default():
    model = net()
    with pytest.raises(TypeError, match=r"lasso.*threshold"):
        MaestroTraining(model, sgd(model))


@pytest.mark.parametrize("shape", [(8, 1), (8,)])
def test_logits_must_be_of_classes(shape):
    model = net()
    with pytest.raises(ValueError, match=r"logits must be \(..., classes\) with at least 2 classes; got shape"):
        training(model, sgd(model)).extra_loss(lambda: torch.zeros(shape), torch.zeros(shape))


def test_trains_as_a_strategy():
    from lowdim.catalogue import variant
    from lowdim.methods import apply, with_options

    chosen = with_options(variant("maestro"), {"threshold": 0.3, "shrink_interval": 2})
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    applied = apply(chosen, model, lr=1e-3, steps=40, scratch=True)
    optimizer = applied.make_optimizer(1e-3)
    beside = applied.make_companion(optimizer)
    assert isinstance(beside, MaestroTraining)
    assert isinstance(applied.model[0], MaestroLinear)
    assert (beside.threshold, beside.shrink_interval) == (0.3, 2)
