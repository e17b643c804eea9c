import copy
import io
import math

import formulas
import pytest
import torch
from torch import nn

import vectors
from lowdim.catalogue import variant
from lowdim.linalg import stream
from lowdim.methods import apply, with_options
from lowdim.modules import LowRankLinear
from lowdim.optim import GaLore, Restart, param_groups, quick_recovery_cosine
from lowdim.testing.sharded_case import Subject

SCHEDULE = {"total_steps": 400, "warmup_steps": 40, "restart_interval": 100}


def case_layer(v):
    layer = LowRankLinear(v["A"].shape[1], v["B"].shape[0], False, rank=v["A"].shape[0], alpha=v.hyperparameters["alpha"])
    layer = layer.double()
    with torch.no_grad():
        layer.A.copy_(v["A"])
        layer.B.copy_(v["B"])
    return layer


def make(dtype=torch.float32):
    """Two low-rank layers with a plain one between."""
    draw = stream(0, "restart", "net")
    net = nn.Sequential(LowRankLinear(7, 12, rank=3), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), LowRankLinear(12, 9, rank=4))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)
    return net.to(dtype)


def adam(net, **more):
    return torch.optim.AdamW(net.parameters(), **{"lr": 0.02, "weight_decay": 0.0, **more})


def train(net, optimizer, steps, restart=None, each=None):
    dtype = next(net.parameters()).dtype
    for step in steps:
        x = torch.randn(16, 7, generator=stream(0, "restart", step)).to(dtype)
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if restart is not None:
            restart.step()
        if each is not None:
            each(step)
    return [p.detach().clone() for p in net.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Vectors.


def test_official_refactorization():
    v = vectors.load("pretrain-bench", "refactorize")
    layer = case_layer(v)
    v.close(layer.B @ layer.A, "product")
    layer.refactorize()
    v.close(layer.B @ layer.A, "product_after")
    for gram, name in ((layer.A @ layer.A.mT, "gram_A"), (layer.B.mT @ layer.B, "gram_B")):
        v.close(gram, name)
        v.close(gram.diagonal(), "singular_values")


def test_official_schedule():
    v = vectors.load("pretrain-bench", "schedule")
    factors = [quick_recovery_cosine(int(step), **v.hyperparameters) for step in v["steps"]]
    v.close(torch.tensor(factors, dtype=torch.float64), "factor", scale=1.0)


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}])
def test_reference_training(how):
    v = vectors.load("pretrain-bench", "restart")
    h, layer = v.hyperparameters, case_layer(v)
    optimizer = torch.optim.Adam(layer.parameters(), lr=h["lr"], **how)
    restart = Restart(optimizer, layer, interval=h["interval"])
    acted, weights = [], []
    for _ in range(h["steps"]):
        (layer(v["x"]) - v["target"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(layer.dense_weight().detach())
        acted.append(restart.step())
        torch.testing.assert_close(layer.dense_weight().detach(), weights[-1])
    v.close(torch.stack(weights), "weights_after")
    assert acted == [(k + 1) % h["interval"] == 0 for k in range(h["steps"])]


def test_training_is_the_formula():
    """Adam on both factors; after every third step `B ← U √S`, `A ← √S Vᵀ` of `B A = U S Vᵀ`, and Adam begins anew."""
    draw = stream(0, "restart", "formula")
    A, B, x, y = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((3, 7), (5, 3), (16, 7), (16, 5)))
    layer = LowRankLinear.from_factors(A, B)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    restart = Restart(optimizer, layer, interval=3)
    state_A, state_B = {}, {}
    for step in range(8):
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        G = 2 * (x @ (B @ A).T - y).T @ x / y.numel()
        grad_A, grad_B, eta = B.T @ G, G @ A.T, formulas.step_size(step % 3, 0.05)
        A = A - eta * formulas.adam_inside(grad_A, state_A, step % 3)
        B = B - eta * formulas.adam_inside(grad_B, state_B, step % 3)
        torch.testing.assert_close((layer.B @ layer.A).detach(), B @ A, rtol=1e-10, atol=1e-12)
        if restart.step():
            U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
            A, B = S[:3].sqrt()[:, None] * Vh[:3], U[:, :3] * S[:3].sqrt()
            state_A, state_B = {}, {}


# What a restart does.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_and_become_balanced(dtype):
    net = make(dtype)
    optimizer = adam(net)
    restart = Restart(optimizer, net, interval=3)
    train(net, optimizer, range(2), restart)
    before, parameters, seen = copy.deepcopy(net), list(net.parameters()), net[2].weight.detach().clone()
    train(net, optimizer, range(2, 3), each=lambda _: before.load_state_dict(net.state_dict()))
    assert restart.step() is True
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for index in (0, 4):
        layer, old = net[index], before[index]
        torch.testing.assert_close(layer.dense_weight(), old.dense_weight(), rtol=near, atol=near)
        gram = layer.A @ layer.A.mT
        torch.testing.assert_close(gram, layer.B.mT @ layer.B, rtol=near, atol=3 * near)
        assert float((gram - gram.diagonal().diag()).detach().abs().max()) < 3 * near
    assert torch.equal(net[2].weight, before[2].weight)
    assert not torch.equal(net[2].weight, seen)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))


def test_all_state_of_all_parameters_goes():
    """Of the plain layer too, and the step counters with the moments."""
    net = make()
    optimizer = adam(net)
    restart = Restart(optimizer, net, interval=2, refactorize=False)
    train(net, optimizer, range(2))
    assert len(optimizer.state) == len(list(net.parameters()))
    restart.step()
    restart.step()
    assert not optimizer.state
    train(net, optimizer, range(2, 3))
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}, {"capturable": False, "amsgrad": True}])
def test_reset_is_a_new_optimizer(how):
    net, other = make(), make()
    optimizer, second = adam(net, **how), adam(other, **how)
    got = train(net, optimizer, range(6), Restart(optimizer, net, interval=3, refactorize=False))
    train(other, second, range(3))
    want = train(other, adam(other, **how), range(3, 6))
    assert same(got, want)


def test_only_refactorizing_keeps_the_state():
    net = make()
    optimizer = adam(net)
    restart = Restart(optimizer, net, interval=1, reset=False)
    train(net, optimizer, range(3), restart)
    assert {float(s["step"]) for s in optimizer.state.values()} == {3.0}
    gram = net[0].A @ net[0].A.mT
    torch.testing.assert_close(gram, net[0].B.mT @ net[0].B)


def test_refactorizing_comes_before_the_reset():
    net, order = make(), []
    optimizer = adam(net)

    class Watched(nn.Module):
        def refactorize(self):
            order.append(len(optimizer.state))

    train(net, optimizer, range(1))
    net.add_module("watched", Watched())
    Restart(optimizer, net, interval=1).step()
    assert order == [len(list(net.parameters()))]
    assert not optimizer.state


def test_any_layer_that_can_is_asked_once():
    class Shared(nn.Module):
        count = 0

        def refactorize(self):
            self.count += 1

    shared = Shared()
    model = nn.ModuleDict({"one": shared, "two": shared, "plain": nn.Linear(2, 2)})
    assert Restart(torch.optim.SGD(model["plain"].parameters(), lr=1.0), model, interval=1).step()
    assert shared.count == 1


def test_a_broken_layer_is_named():
    net = make()
    with torch.no_grad():
        net[4].B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="4: matrix has NaN"):
        Restart(adam(net), net, interval=1).step()


@pytest.mark.parametrize("layerwise", [False, True])
def test_projected_optimizers_choose_new_subspaces(layerwise):
    net = make()
    optimizer = GaLore(param_groups(net, rank=2), lr=0.01, update_interval=50, layerwise=layerwise)
    restart = Restart(optimizer, net, interval=4)
    bases = []

    def note(_):
        found = [t for s in optimizer.state.values() for k, t in s.items() if isinstance(t, torch.Tensor) and t.ndim == 2]
        bases.append([t.clone() for t in found])

    train(net, optimizer, range(6), restart, note)
    assert bases[0]
    assert not bases[3]
    assert {s["step"] for s in optimizer.state.values()} == {2}


def test_unused_layers_and_tied_weights():
    net = make()
    optimizer = torch.optim.AdamW(net[0].parameters(), lr=0.02)
    train(net, optimizer, range(2), Restart(optimizer, net, interval=2))
    assert not optimizer.state


# Learning rate.


def rates_seen(restart_how, scheduler=True, **more):
    net = make()
    optimizer = adam(net, **more)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)) if scheduler else None
    restart = Restart(optimizer, net, **restart_how)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(float(o.param_groups[0]["lr"])))
    outside = []

    def each(_):
        outside.append(float(optimizer.param_groups[0]["lr"]))
        if schedule is not None:
            schedule.step()

    train(net, optimizer, range(10), restart, each)
    return seen, outside


@pytest.mark.parametrize("scheduler", [False, True])
def test_recovery_bends_the_rate_of_the_steps_alone(scheduler):
    seen, outside = rates_seen({"interval": 4, "recovery_steps": 3}, scheduler)
    plain = [0.02 / (s + 1) if scheduler else 0.02 for s in range(10)]
    bend = [1, 1, 1, 1, 0.001, 0.5005, 1, 1, 0.001, 0.5005]
    assert seen == pytest.approx([p * b for p, b in zip(plain, bend, strict=True)])
    assert outside == pytest.approx(plain)


def test_recovery_of_one_step_and_none_change_no_rate():
    for how in ({"interval": 2, "recovery_steps": 1}, {"interval": 2}):
        assert rates_seen(how, scheduler=False)[0] == [0.02] * 10


def test_recovery_with_a_rate_that_is_a_tensor():
    seen, _ = rates_seen({"interval": 4, "recovery_steps": 3}, scheduler=False, lr=torch.tensor(0.02), foreach=False)
    assert seen[3:7] == pytest.approx([0.02, 0.00002, 0.01001, 0.02])


def test_removed_it_leaves_the_optimizer_alone():
    net = make()
    optimizer = adam(net)
    restart = Restart(optimizer, net, interval=1, recovery_steps=1)
    restart.step()
    restart.remove()
    train(net, optimizer, range(2))
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}
    assert not optimizer._optimizer_step_pre_hooks


def test_schedule_by_hand():
    at = lambda step, **how: quick_recovery_cosine(step, **{**SCHEDULE, **how})  # noqa: E731
    assert at(20) == 0.5
    assert at(40) == at(20, recovery_steps=1) * 2 == 1.0
    assert at(220) == 0.1 + 0.45 * (1 + math.cos(math.pi * 0.5))
    assert at(200) == 0.001 * at(210)
    assert at(0, recovery_steps=1) == 1 / 40
    assert at(200, recovery_steps=1) == at(201, recovery_steps=1)
    assert at(399, min_ratio=1.0) == 1.0
    assert at(15, warmup_steps=0) == 0.1 + 0.45 * (1 + math.cos(math.pi * 15 / 400))


# Resuming.


@pytest.mark.parametrize("at", [1, 4, 5, 6, 8])
def test_resumes_exactly(at):
    """Also right after a restart, and within a recovery."""
    how = {"interval": 4, "recovery_steps": 2}
    net = make()
    optimizer = adam(net)
    want = train(net, optimizer, range(10), Restart(optimizer, net, **how))
    net = make()
    optimizer = adam(net)
    restart = Restart(optimizer, net, **how)
    train(net, optimizer, range(at), restart)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "restart": restart.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net = make()
    optimizer = adam(net)
    train(net, optimizer, range(20, 23))  # other numbers than the saved ones
    restart = Restart(optimizer, net, **how)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    restart.load_state_dict(saved["restart"])
    assert same(train(net, optimizer, range(at, 10), restart), want)


@pytest.mark.parametrize("first", ["optimizer", "restart"])
def test_a_distributed_checkpoint_right_after_a_restart_is_exact(first):
    """torch.distributed.checkpoint fills an empty state by a step at rate 0, which counts."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net = make()
    optimizer = adam(net)
    want = train(net, optimizer, range(6), Restart(optimizer, net, interval=4))
    net = make()
    optimizer = adam(net)
    restart = Restart(optimizer, net, interval=4)
    train(net, optimizer, range(4), restart)
    saved = copy.deepcopy((net.state_dict(), get_optimizer_state_dict(net, optimizer), restart.state_dict()))
    assert optimizer.state, "the premise of this test is gone"
    assert same(train(net, optimizer, range(4, 6), restart), want)
    net = make()
    optimizer = adam(net)
    restart = Restart(optimizer, net, interval=4)
    net.load_state_dict(saved[0])
    loads = [lambda: set_optimizer_state_dict(net, optimizer, saved[1]), lambda: restart.load_state_dict(saved[2])]
    for load in loads if first == "optimizer" else loads[::-1]:
        load()
    assert same(train(net, optimizer, range(4, 6), restart), want)


@pytest.mark.parametrize("state", [{}, {"steps": -1}, {"steps": 1.5}, {"steps": None}])
def test_a_foreign_state_is_refused(state):
    net = make()
    restart = Restart(adam(net), net)
    with pytest.raises(ValueError, match="steps must be an int >= 0; got"):
        restart.load_state_dict(state)
    assert restart.state_dict() == {"steps": 0}


def test_companion_of_the_catalogues_variant():
    """Swapped in, trained and restarted through the one interface of `compare` and `run`."""
    chosen = with_options(variant("low-rank-restart"), {"rank": 2, "interval": 3, "recovery_steps": 2})
    net = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 9))
    applied = apply(chosen, net, lr=0.02, steps=10, scratch=True)
    optimizer = applied.make_optimizer(0.02)
    restart = applied.make_companion(optimizer)
    assert isinstance(restart, Restart)
    assert (restart.interval, restart.recovery_steps, net[0].rank, net[0].scale) == (3, 2, 2, 1.0)
    train(net, optimizer, range(3), restart)
    assert not optimizer.state
    torch.testing.assert_close(net[0].A @ net[0].A.mT, net[0].B.mT @ net[0].B)


# Bad input.


def test_bad_options():
    net = make()
    optimizer = adam(net)
    for interval in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="interval must be an int >= 1; got"):
            Restart(optimizer, net, interval=interval)
    for recovery in (0, 11, 1.0):
        with pytest.raises(ValueError, match=r"recovery_steps must be an int in \[1, 10\]; got"):
            Restart(optimizer, net, interval=10, recovery_steps=recovery)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer; got Sequential"):
        Restart(net, optimizer)
    with pytest.raises(TypeError, match=r"model must be an nn.Module; got list"):
        Restart(optimizer, [net])
    with pytest.raises(TypeError, match="Adagrad"):
        Restart(torch.optim.Adagrad(net.parameters()), net)
    with pytest.raises(ValueError, match="recovery_steps must be None with layerwise=True"):
        Restart(GaLore(param_groups(net, rank=2), lr=0.01, layerwise=True), net, interval=10, recovery_steps=2)
    assert not optimizer._optimizer_step_pre_hooks, "what is refused must leave nothing behind"


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"step": -1}, "step must be an int >= 0; got -1"),
        ({"total_steps": 0}, "total_steps must be an int >= 1; got 0"),
        ({"warmup_steps": 400}, r"warmup_steps must be an int in \[0, 399\]; got 400"),
        ({"restart_interval": 0}, "restart_interval must be an int >= 1; got 0"),
        ({"recovery_steps": 101}, r"recovery_steps must be an int in \[1, 100\]; got 101"),
        ({"recovery_steps": 0}, r"recovery_steps must be an int in \[1, 100\]; got 0"),
        ({"min_ratio": 0.0}, r"min_ratio must be a finite number in \(0, 1\]; got 0.0"),
        ({"min_ratio": 1.1}, r"min_ratio must be a finite number in \(0, 1\]; got 1.1"),
    ],
)
def test_bad_schedule(how, match):
    with pytest.raises(ValueError, match=match):
        quick_recovery_cosine(**{"step": 0, **SCHEDULE, **how})


# FSDP2.


def sharded_net():
    return make(torch.float64)


SHARDED = {
    "restart": Subject(
        net=sharded_net,
        optimizer=lambda net: adam(net, lr=0.05),
        companion=lambda net, optimizer: Restart(optimizer, net, interval=4, recovery_steps=2),
    ),
    "restart right after the checkpoint": Subject(
        net=sharded_net,
        optimizer=lambda net: adam(net, lr=0.05),
        companion=lambda net, optimizer: Restart(optimizer, net, interval=6),
    ),
    "restart of galore": Subject(
        net=sharded_net,
        optimizer=lambda net: GaLore(param_groups(net, rank=2), lr=0.05, update_interval=3),
        companion=lambda net, optimizer: Restart(optimizer, net, interval=4),
    ),
}
