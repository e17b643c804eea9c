"""LR2VQ in training: the low-rank weight, the codes, the tables afterwards, and what stays as it was."""

import copy

import pytest
import torch
from torch import nn

from lowdim.compress import LR2VQConfig, LR2VQConv2d, dkm, lowrank_subvectors, lr2vq, lr2vq_tables
from lowdim.compress.lr2vq import training
from lowdim.errors import LowdimError
from lowdim.layers import densify
from lowdim.linalg import stream
from lowdim.testing.compress_case import small_net


def regression(seed=0):
    """A net, batches, and the loss against a fixed target."""
    net = small_net(seed)
    batches = [torch.randn(64, 12, generator=stream(i, "batch")) for i in range(4)]
    target = small_net(7).eval()
    return net, batches, lambda model, x: (model(x) - target(x).detach()).square().mean()


SMALL = {"codebook_size": 6, "subvector_size": 4, "clustering_dim": 2, "lr": 3e-3}


@pytest.mark.parametrize("steps", [{"pretrain_steps": 40}, {"train_steps": 40}, {"pretrain_steps": 20, "train_steps": 20}])
def test_training_lowers_the_loss_of_the_codes(steps):
    losses = []
    for how in ({}, steps):
        net, batches, loss_fn = regression()
        lr2vq(net, LR2VQConfig(**SMALL, **how), iter(batches), loss_fn)
        net.eval()
        losses.append(sum(float(loss_fn(net, x).detach()) for x in batches))
    assert losses[1] < 0.9 * losses[0]


def test_everything_else_is_as_it_was_after_training():
    net, batches, loss_fn = regression()
    net.classifier.bias.requires_grad_(False)
    net.norm.weight.grad = torch.ones(48)
    net.drop.eval()
    rest = {n: v.clone() for n, v in net.state_dict().items() if not n.startswith(("up.", "down."))}
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    lr2vq(net, LR2VQConfig(**SMALL, pretrain_steps=3, train_steps=3), batches, loss_fn)
    assert torch.equal(torch.rand(1), want)
    state = net.state_dict()
    assert all(torch.equal(state[n], value) for n, value in rest.items())  # running statistics too
    assert net.training
    assert not net.drop.training
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {"classifier.bias"}
    assert torch.equal(net.norm.weight.grad, torch.ones(48))
    assert net.up.basis.grad is None


@pytest.mark.parametrize("given", [None, 0.7])
def test_soft_codes_begin_at_a_twentieth_of_the_distance_to_the_nearest_codeword(given, monkeypatch):
    net, seen = small_net(dtype=torch.float64), []
    how = {"codebook_size": 6, "subvector_size": 4, "clustering_dim": 2}
    z, _ = lowrank_subvectors(net.up.weight, 4, 2)
    start = lr2vq(copy.deepcopy(net), LR2VQConfig(**how)).up.codebook.detach()

    def watched(points, codebook, **options):
        seen.append((points.detach().clone(), codebook, options))
        return dkm(points, codebook, **options)

    monkeypatch.setattr(training, "dkm", watched)
    batches = [torch.randn(8, 12, dtype=torch.float64)]
    lr2vq(net, LR2VQConfig(**how, train_steps=1, temperature=given), batches, lambda model, x: model(x).square().mean())
    points, codebook, options = seen[0]
    torch.testing.assert_close(points, z)
    torch.testing.assert_close(codebook, start)
    want = 0.05 * float(torch.cdist(z, start).min(1).values.mean()) if given is None else given
    assert options == {"temperature": pytest.approx(want, rel=1e-9), "iterations": 5, "tolerance": 1e-4}


def test_low_rank_training_keeps_distances():
    """After stage 1 the basis is orthonormal again: clusters in z are clusters of the weight."""
    net, batches, loss_fn = regression()
    lr2vq(net, LR2VQConfig(**SMALL, pretrain_steps=10), batches, loss_fn)
    torch.testing.assert_close(net.up.basis.T @ net.up.basis, torch.eye(2), rtol=1e-5, atol=1e-5)


def test_the_weight_after_stage_one_is_the_trained_one():
    """With as many codewords as subvectors nothing is lost in hardening: the loss is that of `P z`."""
    net, batches, loss_fn = regression()
    seen = []

    def watched(model, x):
        loss = loss_fn(model, x)
        seen.append(float(loss.detach()))
        return loss

    net.drop.p = 0.0
    config = LR2VQConfig(codebook_size=1000, subvector_size=4, clustering_dim=2, lr=1e-9, pretrain_steps=4)
    lr2vq(net, config, batches, watched)
    net.train()
    net.norm.eval()  # which it was while the others were trained
    assert [float(loss_fn(net, x).detach()) for x in batches] == pytest.approx(seen, rel=1e-4)


def test_half_precision_is_trained_in_float32():
    net, batches = small_net(dtype=torch.bfloat16), [torch.randn(64, 12).bfloat16()]
    lr2vq(net, LR2VQConfig(**SMALL, pretrain_steps=2, train_steps=2), batches, lambda m, x: m(x).square().mean())
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net.up.basis.requires_grad


def test_conv1d_and_convolutions_are_trained():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(1), conv1d(6, 8 * 9))
    x = torch.randn(16, 4, 3, 3)
    lr2vq(model, LR2VQConfig(**SMALL, pretrain_steps=2, train_steps=2), [x], lambda m, x: m(x).square().mean())
    assert model(x).shape == (16, 6)
    assert type(model[0]) is LR2VQConv2d
    assert type(densify(model)[2]) is conv1d


def test_only_tables_and_biases_are_tuned():
    model = lr2vq(small_net(), LR2VQConfig(codebook_size=16, subvector_size=4, clustering_dim=2))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(lr2vq_tables(model), lr=1e-2)
    x = torch.randn(64, 12)
    model.eval()
    losses = []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{layer}.{part}" for layer in ("up", "down") for part in ("basis", "codebook", "bias")}
    with pytest.raises(ValueError, match="BatchNorm1d has no quantized layer to train; quantize it with lr2vq first"):
        lr2vq_tables(small_net().norm)


@pytest.mark.parametrize(
    ("batches", "loss_fn", "match"),
    [
        (None, lambda m, x: m(x).sum(), "batches is missing: 3 training steps need sample data"),
        ([], lambda m, x: m(x).sum(), "batches is empty: 3 training steps need sample data"),
        ([torch.ones(2, 12)], None, r"loss_fn is missing: 3 training steps need loss_fn\(model, batch\)"),
        (torch.ones(2, 12), lambda m, x: m(x).sum(), "batches must be an iterable of batches; got a single Tensor"),
        ([torch.ones(2, 12)], lambda m, x: m(x).sum() * torch.nan, "the loss of training step 1 is nan; try a smaller lr"),
    ],
)
def test_training_that_cannot_be_leaves_the_model_as_it_was(batches, loss_fn, match):
    net = small_net()
    before, layer = copy.deepcopy(net.state_dict()), net.up
    with pytest.raises((ValueError, TypeError, LowdimError), match=match):
        lr2vq(net, LR2VQConfig(**SMALL, pretrain_steps=3), batches, loss_fn)
    assert net.up is layer
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
