"""SST's scheduler: iterations, rounds and warm-up, exact resumption, training, and several processes."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowdim.layers import SSTLinear, SSTScheduler, swap_linear
from lowdim.linalg import stream
from lowdim.testing.sharded_case import Subject


def build(seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    return swap_linear(net, SSTLinear, ["0", "2"], rank=2)


def step(net, optimizer, turn, index):
    x = torch.randn(8, 7, generator=stream(0, "scheduler", index), dtype=torch.float64)
    optimizer.zero_grad()
    (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
    turn.step()


@pytest.mark.parametrize("fused", [True, False])
def test_an_iteration_drops_the_state_of_the_active_vectors_only(fused):
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)
    turn = SSTScheduler(net, optimizer, steps_per_iteration=3, warmup=0)
    active = {p for layer in (net[0], net[2]) for p in (layer.U_active, layer.Vh_active)}
    before = [layer.active.clone() for layer in turn.layers]
    for index in range(2):
        step(net, optimizer, turn, index)
    assert set(optimizer.state) == set(net.parameters())
    step(net, optimizer, turn, 2)
    assert set(optimizer.state) == set(net.parameters()) - active
    assert any(not torch.equal(a, layer.active) for a, layer in zip(before, turn.layers, strict=True))
    step(net, optimizer, turn, 3)
    counts = {bool(p in active): float(optimizer.state[p]["step"]) for p in net.parameters()}
    assert counts == {True: 1.0, False: 4.0}


def test_iterations_and_rounds(monkeypatch):
    net, calls = build(), []
    for name in ("reinitialize", "resample"):
        plain = getattr(SSTLinear, name)
        monkeypatch.setattr(
            SSTLinear, name, lambda self, *a, name=name, plain=plain: (calls.append((name, self.out_features)), plain(self, *a))
        )
    optimizer = torch.optim.AdamW(net.parameters())
    turn = SSTScheduler(net, optimizer, steps_per_iteration=1)
    rounds = {9: 4, 6: 3}  # ⌈7 / 2⌉, ⌈6 / 2⌉
    for index in range(1, 13):
        calls.clear()
        step(net, optimizer, turn, index)
        want = []
        for size, length in rounds.items():
            want += [("reinitialize", size)] * (index % length == 0) + [("resample", size)]
        assert calls == want
    turn = SSTScheduler(net, optimizer, steps_per_iteration=2, iterations_per_round=2)
    calls.clear()
    for index in range(4):
        step(net, optimizer, turn, index)
    assert [name for name, size in calls if size == 9] == ["resample", "reinitialize", "resample"]


def test_warm_up_bends_the_rate_within_the_step_only():
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    turn, seen = SSTScheduler(net, optimizer, steps_per_iteration=5, warmup=4), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    for index in range(7):
        step(net, optimizer, turn, index)
        assert optimizer.param_groups[0]["lr"] == 0.5 * 0.5**index
        schedule.step()
    factors = [0.25, 0.5, 0.75, 1, 1, 0.25, 0.5]
    assert seen == [0.5 * 0.5**index * factor for index, factor in enumerate(factors)]


def test_every_step_clips_and_normalises():
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=3.0)
    turn = SSTScheduler(net, optimizer, warmup=0)
    step(net, optimizer, turn, 0)
    for layer in turn.layers:
        assert float(layer.S.detach().min()) >= 0
        assert torch.allclose(layer.U_active.norm(dim=0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("stop", [4, 6])  # inside an iteration; at its end, when states were just dropped
def test_resume_is_exact(stop):
    def begin():
        net = build()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
        return net, optimizer, SSTScheduler(net, optimizer, steps_per_iteration=3, iterations_per_round=2, warmup=2)

    through = begin()
    for index in range(stop):
        step(*through, index)
    saved = copy.deepcopy([part.state_dict() for part in through])
    again = begin()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    for index in range(stop, 14):
        step(*through, index)
        step(*again, index)
    assert all(torch.equal(value, again[0].state_dict()[name]) for name, value in through[0].state_dict().items())
    assert through[2].state_dict() == again[2].state_dict() == {"steps": 14, "seed": 0}


def test_scheduler_seed_decides_the_draws():
    def draws(seed):
        net = build()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        turn, found = SSTScheduler(net, optimizer, steps_per_iteration=1, seed=seed), []
        for index in range(4):
            step(net, optimizer, turn, index)
            found.append([layer.active.tolist() for layer in turn.layers])
        return found

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)
    assert any(first != second for first, second in draws(0)), "layers draw alike"


def test_trains_below_what_its_active_rank_allows():
    """Turning directions over reaches what the first two alone do not."""
    target = torch.linalg.qr(torch.randn(8, 8, generator=stream(0, "target"), dtype=torch.float64)).Q

    def loss_after(turns):
        layer = SSTLinear(8, 8, rank=2, bias=False, dtype=torch.float64)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        scheduler = SSTScheduler(layer, optimizer, steps_per_iteration=20 if turns else 10_000, warmup=3)
        for _ in range(800):
            optimizer.zero_grad()
            loss = (layer(torch.eye(8, dtype=torch.float64)) - target.T).square().sum()
            loss.backward()
            optimizer.step()
            scheduler.step()
        return float(loss.detach())

    assert loss_after(turns=True) < 0.3 * loss_after(turns=False)


def test_forecast_under_fake_tensors():
    with FakeTensorMode():
        layer = SSTLinear(6, 5, rank=2)
        optimizer = torch.optim.AdamW(layer.parameters())
        turn = SSTScheduler(layer, optimizer, steps_per_iteration=1, iterations_per_round=1)
        layer(torch.randn(3, 6)).sum().backward()
        optimizer.step()
        turn.step()
        assert layer.U_active.grad.shape == (5, 2)
        assert SSTLinear.from_linear(nn.Linear(6, 5), rank=2).U.shape == (5, 5)


def _optimizer(net):
    return torch.optim.AdamW(net.parameters(), lr=0.02)


def _turn(net, optimizer):
    return SSTScheduler(net, optimizer, steps_per_iteration=2, iterations_per_round=2, warmup=2)  # rounds end at 4 and 8


def _slow_turn(net, optimizer):
    return SSTScheduler(net, optimizer, steps_per_iteration=4, iterations_per_round=1, warmup=2)  # the checkpoint falls inside


SHARDED = {
    "sst": Subject(net=build, optimizer=_optimizer, companion=_slow_turn),
    "sst, states just dropped": Subject(net=build, optimizer=_optimizer, companion=_turn),
}
