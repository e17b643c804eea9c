"""How a step is made: clipping by projected norms, micro-batches, staggered refreshes, what is logged, what is refused."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lowdim.linalg import stream
from lowdim.optim import (
    AdamW,
    AdamWRule,
    DCTAdamW,
    Fira,
    GaLore,
    Identity,
    Parts,
    ProjectedOptimizer,
    QGaLore,
    SVDProjector,
    param_groups,
    quantize_linears,
)
from lowdim.optim.core import progress as progress_module
from lowdim.testing.optimizer_problem import OptimizerProblem


class Case(OptimizerProblem):
    """With GaLore in its usual form."""

    def make(self, params, **options):
        return GaLore(params, **{"lr": 0.1, "rank": 3, "update_interval": 3, **options})


CASE = Case()


def train(net, optimizer, steps, micro=1, each=lambda: None):
    for step in range(steps):
        for part in range(micro):
            (CASE.loss(net, micro * step + part, torch.float64) / micro).backward()
        each()
        optimizer.step()
        optimizer.zero_grad()


def pair(first, second, steps=7, micro=1):
    """The weights that two optimizers lead to from the same start."""
    ends = []
    for options in (first, second):
        net = CASE.model(torch.float64)
        train(net, CASE.make(CASE.groups(net), **options), steps, micro)
        ends.append(CASE.weights(net))
    return ends


def gradients(net, index=0):
    CASE.loss(net, index, torch.float64).backward()
    return [p.grad for p in net.parameters()]


# --- clipping -------------------------------------------------------------------------------------------------------------


def test_clipping_scales_what_the_rules_see():
    """One step with a bound equals one with every gradient scaled by bound / (norm of the projected gradients)."""
    net, other = CASE.model(torch.float64), CASE.model(torch.float64)
    clipped, plain = CASE.make(CASE.groups(net), max_norm=0.01), CASE.make(CASE.groups(other))
    gradients(net), gradients(other)
    clipped.step()
    squares = 0.0
    for group in plain.param_groups:
        for p in group["params"]:
            projector = plain.parts(group, p.ndim).projector
            state = {}
            projector.prepare(p.grad, state, 0)
            squares += float(projector.down(p.grad, state).square().sum())
    norm = math.sqrt(squares)
    assert norm > 0.01
    for p in other.parameters():
        p.grad = p.grad * (0.01 / (norm + 1e-6))
    plain.step()
    CASE.close(CASE.weights(net), CASE.weights(other), 1e-9)
    assert clipped.log()["projected_norm"] == pytest.approx(norm)


def test_a_bound_that_is_never_reached_changes_nothing():
    CASE.close(*pair({"max_norm": 1e9}, {}), 1e-12)


def test_a_bound_changes_something():
    a, b = pair({"max_norm": 1e-3}, {}, steps=2)
    assert not torch.allclose(a[0], b[0])


@pytest.mark.parametrize("micro", [1, 3])
def test_layerwise_clipping_equals_clipping(micro):
    """Adam hides a constant factor, so the bound is one that some steps reach and others do not."""
    layered = {"layerwise": True, "accumulate": micro, "max_norm": 0.4}
    a, b = pair(layered, {"max_norm": 0.4}, micro=micro)
    CASE.close(a, b, 1e-9)


def test_layerwise_clipping_frees_the_full_gradients_before_the_step():
    net = CASE.model(torch.float64)
    optimizer = CASE.make(CASE.groups(net), layerwise=True, max_norm=0.4)
    before = CASE.weights(net)
    gradients(net)
    assert all(p.grad is None for p in net.parameters())
    CASE.same(CASE.weights(net), before)  # nothing moves before all norms are known
    optimizer.step()
    assert not torch.equal(net[0].weight, before[0])


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_bad_bounds(bound):
    with pytest.raises(ValueError, match="max_norm"):
        CASE.make(CASE.groups(CASE.model()), max_norm=bound)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_norm": 1.0, "layerwise": True}])
def test_rules_that_look_at_the_full_gradient_cannot_clip_the_projected_one(options):
    with pytest.raises(ValueError, match=r"max_norm=1.0.*clip_grad_norm_"):
        Fira([nn.Parameter(torch.zeros(8, 6))], rank=2, **options)


def test_rules_that_look_at_the_full_gradient_cannot_sum_the_projected_one():
    with pytest.raises(ValueError, match=r"accumulate=2.*layerwise=False"):
        Fira([nn.Parameter(torch.zeros(8, 6))], rank=2, layerwise=True, accumulate=2)


# --- micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_with_fewer_micro_batches_is_finished_by_step(step):
    """The last step of an epoch: at a refresh (0) and between two (1)."""
    net, other = CASE.model(torch.float64), CASE.model(torch.float64)
    layered = CASE.make(CASE.groups(net), layerwise=True, accumulate=3)
    plain = CASE.make(CASE.groups(other))
    for model, optimizer in ((net, layered), (other, plain)):
        train(model, optimizer, step, micro=3)
        for part in range(2):
            (CASE.loss(model, 50 + part, torch.float64) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    CASE.close(CASE.weights(net), CASE.weights(other), 1e-9)
    assert {s["step"] for s in layered.state.values()} == {step + 1}
    assert not any(s.get("micro") for s in layered.state.values())
    assert not any("low_sum" in s for s in layered.state.values())


MAKERS = {
    "galore": lambda net, **how: GaLore(CASE.groups(net), rank=3, **how),
    "galore, clipped": lambda net, **how: GaLore(CASE.groups(net), rank=3, max_norm=0.5, **how),
    "dct": lambda net, **how: DCTAdamW(CASE.groups(net), rank=3, **how),
    "adamw": lambda net, **how: AdamW(net.parameters(), **how),
    "q-galore": lambda net, **how: QGaLore(
        param_groups(quantize_linears(net, None, group_size=8), rank=3), min_8bit_size=1, **how
    ),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_a_second_update_within_a_step_is_an_error(name, accumulate):
    net = CASE.model()
    optimizer = MAKERS[name](net, layerwise=True, accumulate=accumulate)
    for _ in range(2):
        for part in range(accumulate):
            CASE.loss(net, part, torch.float32).backward()
        optimizer.step()
    for part in range(accumulate):
        CASE.loss(net, part, torch.float32).backward()
    before = CASE.weights(net)
    with pytest.raises(RuntimeError, match=rf"accumulate={accumulate}: .*parameter .* would be updated twice.*Set accumulate"):
        CASE.loss(net, 2, torch.float32).backward()
    CASE.same(before, CASE.weights(net))
    optimizer.zero_grad()  # a new step
    CASE.loss(net, 0, torch.float32).backward()


def test_a_rule_that_looks_at_the_full_gradient_raises_too():
    net = CASE.model()
    Fira(CASE.groups(net), rank=3, layerwise=True)
    CASE.loss(net, 0, torch.float32).backward()
    with pytest.raises(RuntimeError, match="would be updated twice"):
        CASE.loss(net, 1, torch.float32).backward()


def test_gradients_that_came_without_a_backward_pass_are_used_by_step():
    """Checkpoint tools step once on zeros to create the state."""
    net = CASE.model(torch.float64)
    optimizer = CASE.make(CASE.groups(net), layerwise=True)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert len(optimizer.state) == len(list(net.parameters()))
    assert all(p.grad is None for p in net.parameters())


# --- refreshes --------------------------------------------------------------------------------------------------------------


def refreshes(optimizer, net, steps):
    """For each step, which matrices chose a new subspace."""
    seen, before = [], {}
    for step in range(steps):
        gradients(net, step)
        optimizer.step()
        optimizer.zero_grad()
        now = {
            i: s.get("right_basis", s.get("left_basis")).clone()
            for i, s in enumerate(optimizer.state.values())
            if "energy" in s
        }
        seen.append({i for i, basis in now.items() if i not in before or not torch.equal(basis, before[i])})
        before = now
    return seen


def test_staggered_refreshes_never_fall_together():
    net = CASE.model(torch.float64)
    optimizer = CASE.make(CASE.groups(net), stagger=True, update_interval=6)
    seen = refreshes(optimizer, net, 19)
    assert seen[0] == {0, 1, 2}  # nothing can be projected before
    later = seen[1:]
    assert max(map(len, later)) == 1
    for matrix in range(3):
        when = [step for step, chosen in enumerate(later, 1) if matrix in chosen]
        assert len(when) == 3, when
        assert {b - a for a, b in pairwise(when)} == {6}


class Scheduled(ProjectedOptimizer):
    """Its groups have no `update_interval`: only the projector knows one."""

    method = "scheduled"

    def parts(self, group, ndim):
        return Parts(SVDProjector(2, 6) if group["rank"] else Identity(), AdamWRule())


def test_staggering_asks_the_projector_for_its_interval():
    net = CASE.model(torch.float64)
    optimizer = Scheduled(CASE.groups(net), {"lr": 0.01, "rank": 2, "weight_decay": 0.0}, stagger=True)
    seen = refreshes(optimizer, net, 13)
    assert [step for step, chosen in enumerate(seen) if chosen] == [0, 2, 4, 6, 8, 10, 12]
    assert max(map(len, seen[1:])) == 1
    assert not any("phase" in optimizer.state[p] for p in net.parameters() if p.ndim == 1)


def test_without_staggering_they_do():
    net = CASE.model(torch.float64)
    seen = refreshes(CASE.make(CASE.groups(net), update_interval=6), net, 13)
    assert [step for step, chosen in enumerate(seen) if chosen] == [0, 6, 12]


def test_a_staggered_run_resumes_exactly():
    net = CASE.model(torch.float64)
    optimizer = CASE.make(CASE.groups(net), stagger=True)
    train(net, optimizer, 4)
    other = CASE.model(torch.float64)
    other.load_state_dict(net.state_dict())
    again = CASE.make(CASE.groups(other), stagger=False)  # the phases are in the state, and the flag in the groups
    again.load_state_dict(optimizer.state_dict())
    train(net, optimizer, 5)
    train(other, again, 5)
    CASE.same(CASE.weights(net), CASE.weights(other))


def test_a_slow_refresh_says_so(monkeypatch, capsys):
    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls):
            cls.now += 0.6
            return cls.now

    monkeypatch.setattr(progress_module, "time", Clock)
    net = CASE.model()
    CASE.run(net, CASE.make(CASE.groups(net)), range(1))
    told = capsys.readouterr().err
    assert "GaLore: 2 of 3 subspaces chosen" in told
    assert "GaLore: 3 of 3 subspaces chosen" in told
    assert "step 0" in told


def test_a_quick_refresh_says_nothing(capsys):
    net = CASE.model()
    CASE.run(net, CASE.make(CASE.groups(net)), range(4))
    assert capsys.readouterr().err == ""


# --- what is logged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"max_norm": 5.0}, {"layerwise": True, "max_norm": 5.0}], ids=str)
def test_norms_of_the_step(options):
    net = CASE.model(torch.float64)
    full = math.sqrt(sum(float(g.square().sum()) for g in gradients(CASE.model(torch.float64))))
    optimizer = CASE.make(CASE.groups(net), foreach=False, **options)
    optimizer.watcher.on = True
    gradients(net)
    optimizer.step()
    log = optimizer.log()
    assert log["true_grad_norm"] == pytest.approx(full)
    assert 0 < log["projected_norm"] <= log["true_grad_norm"]
    assert 0 < log["captured"] <= 1
    assert log["overlap"] == 1.0


def test_energy_and_overlap_are_true():
    net = CASE.model(torch.float64)
    optimizer = CASE.make(CASE.groups(net), update_interval=2)
    train(net, optimizer, 2)
    old = {p: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in optimizer.state}
    grads = dict(zip(net.parameters(), gradients(net, 9)))
    optimizer.step()
    for p, state in optimizer.state.items():
        if "energy" not in state:
            continue
        name = "right_basis" if "right_basis" in state else "left_basis"
        new, before = state[name], old[p][name]
        assert float(state["overlap"]) == pytest.approx(float((before.mT @ new).square().sum() / new.shape[1]), abs=1e-6)
        low = grads[p] @ new if name == "right_basis" else new.mT @ grads[p]
        assert float(state["energy"]) == pytest.approx(float(low.square().sum() / grads[p].square().sum()), abs=1e-6)
        assert 0 < float(state["overlap"]) < 1
    kept = [s for s in optimizer.state.values() if "energy" in s]
    assert optimizer.log()["overlap"] == pytest.approx(sum(float(s["overlap"]) for s in kept) / len(kept))


def test_norms_of_summed_gradients_are_not_made_up():
    net = CASE.model(torch.float64)
    optimizer = CASE.make(CASE.groups(net), layerwise=True, accumulate=2)
    optimizer.watcher.on = True
    train(net, optimizer, 3, micro=2)
    assert set(optimizer.log()) == {"energy", "overlap"}


# --- what is refused ----------------------------------------------------------------------------------------------------


class FlatParameter(nn.Parameter):
    """Called as FSDP1 calls its own."""


def test_flattened_parameters():
    flat = FlatParameter(torch.zeros(100))
    with pytest.raises(ValueError, match=r"FSDP1 has flattened.*fully_shard"):
        GaLore([{"params": [flat], "rank": None}])
    original = nn.Parameter(torch.zeros(12))
    original._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"FSDP1.*shape here \(12,\)"):
        GaLore([original], rank=2)
    cut = nn.Parameter(torch.zeros(0))
    cut.ds_id = 3
    with pytest.raises(ValueError, match=r"ZeRO-3.*fsdp_version 2"):
        GaLore([cut], rank=None)


def test_a_duplicate_parameter():
    p = nn.Parameter(torch.zeros(8, 6))
    with pytest.raises(ValueError, match="more than one parameter group"):
        GaLore([{"params": [p]}, {"params": [p], "rank": None}], rank=2)
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="group 0 has a duplicate parameter"),
    ):
        GaLore([{"params": [p, p]}], rank=2)  # torch only warns


def test_replicas_need_layerwise():
    with pytest.raises(ValueError, match="replicas=True needs layerwise=True"):
        GaLore([nn.Parameter(torch.zeros(8, 6))], rank=2, replicas=True)


def test_layerwise_updates_of_what_many_processes_hold(monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    net = nn.Sequential(nn.Linear(6, 8))
    optimizer = GaLore(param_groups(net, rank=2), layerwise=True)
    with pytest.raises(ValueError, match=r"parameter \d of group \d.*held by 4 processes.*replicas=True"):
        net(torch.randn(3, 6, generator=stream(0, "x"))).sum().backward()
    optimizer.remove_hooks()
