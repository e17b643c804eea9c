"""16-bit weights: small updates add up, by stochastic rounding or in float32 masters, in every optimizer."""

import copy

import pytest
import torch
from torch import nn

import lowdim
from lowdim.companion import warn_of_lost_updates
from lowdim.linalg import stream
from lowdim.optim import AdamW, DCTAdamW, Fira, GaLore, QGaLore, Restart, param_groups, quantize_linears
from lowdim.optim.core.rounding import round_at_random
from lowdim.testing.processes import in_processes

HALF = [torch.bfloat16, torch.float16]


def adamw(groups, **how):
    return AdamW([{"params": g["params"]} for g in groups], weight_decay=0.0, **how)


#: Every composition that writes an ordinary parameter: projected or not, with and without a residual, every inner rule.
MAKERS = {
    "adamw": adamw,
    "galore": lambda g, **how: GaLore(g, **how),
    "galore, both sides": lambda g, **how: GaLore(g, proj_type="full", **how),
    "galore, 8 bits": lambda g, **how: GaLore(g, inner="adamw8bit", inner_options={"min_size": 1}, **how),
    "galore, 16 bits": lambda g, **how: GaLore(g, inner="adamw16bit", **how),
    "galore, layerwise": lambda g, **how: GaLore(g, layerwise=True, **how),
    "galore, clipped": lambda g, **how: GaLore(g, max_norm=1e9, **how),
    "fira": lambda g, **how: Fira(g, **how),
    "dct": lambda g, **how: DCTAdamW(g, **how),
    "dct, error feedback": lambda g, **how: DCTAdamW(g, error_feedback=True, **how),
    "q-galore": lambda g, **how: QGaLore(g, **how),
}


def net(dtype):
    """Weights of about 1, where a bfloat16 has steps of 1/128."""
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 96)).to(dtype)
    generator = stream(0, "weights")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1.0 + torch.rand(p.shape, generator=generator))
    return model


def train(model, optimizer, steps, start=0):
    """Gradients that do not depend on the weights, and agree in sign over the steps."""
    for step in range(start, start + steps):
        loss = sum(
            (p * (2.0 + torch.randn(p.shape, generator=stream(step, "grad", i))).to(p.dtype)).sum()
            for i, p in enumerate(model.parameters())
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def moved(name, dtype, steps=40, **how):
    """The change of the two matrices."""
    model = net(dtype)
    before = [p.detach().float().clone() for p in model.parameters() if p.ndim == 2]
    optimizer = MAKERS[name](param_groups(model, rank=4), lr=2e-4 if name == "adamw" else 2e-3, **how)
    train(model, optimizer, steps)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    after = [optimizer.state[p]["master"] if how.get("master_weights") else p.detach().float() for p in matrices]
    return [end - start for end, start in zip(after, before, strict=True)]


@pytest.mark.parametrize("how", [{}, {"master_weights": True}], ids=["stochastic", "masters"])
@pytest.mark.parametrize("name", MAKERS)
def test_small_updates_add_up(name, how):
    want, got = moved(name, torch.float32), moved(name, torch.bfloat16, **how)
    for a, b in zip(got, want, strict=True):
        assert float(b.abs().max()) / 40 < 2.0**-9, "no single step is half a last bit"
        share = float((a * b).sum() / b.square().sum())
        assert share == pytest.approx(1.0, abs=0.1 if how else 0.25)


def test_torch_loses_them():
    """What the test above would find without rounding."""
    p = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([p], lr=1e-4, weight_decay=0.0)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, -3e3, 1e-6, 3e-8])
def test_rounding_is_to_a_neighbour_and_unbiased(dtype, scale):
    """1e-6 and 3e-8 lie below float16's normal numbers, where its spacing is fixed."""
    x = torch.rand(64, generator=stream(1, "x")).add(0.5).mul(scale)
    draws = torch.stack([round_at_random(x, stream(seed, "rounding"), dtype).float() for seed in range(4000)])
    nearest = x.to(dtype)
    away = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).float() - nearest.float()
    assert bool(((draws - x).abs() < away * 1.0001).all()), "never further than the next number"
    assert bool(((draws.mean(0) - x).abs() < 4 * 0.5 * away / 4000**0.5).all())
    kept = round_at_random(nearest.float(), stream(0, "rounding"), dtype)
    assert torch.equal(kept, nearest), "a number of the dtype stays"


def test_noise_differs_by_step_place_and_seed():
    def after(steps=1, seed=0, twice=False):
        p, q = (nn.Parameter(torch.ones(400, dtype=torch.bfloat16)) for _ in range(2))
        optimizer = AdamW([q, p] if twice else [p], lr=1e-3, weight_decay=0.0, seed=seed)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach() != 1

    assert torch.equal(after(), after())
    assert not torch.equal(after(), after(seed=1))
    assert not torch.equal(after(), after(twice=True)), "each parameter draws its own"
    moved_once, moved_twice = after(), after(2)
    assert bool((moved_twice & ~moved_once).any()), "with one noise for all steps the same entries would move"


@pytest.mark.parametrize("how", [{}, {"master_weights": True}], ids=["stochastic", "masters"])
@pytest.mark.parametrize("name", [name for name in MAKERS if "clipped" not in name])
def test_resumed_to_the_same_bits(name, how, tmp_path):
    whole = net(torch.bfloat16)
    optimizer = MAKERS[name](param_groups(whole, rank=4), lr=1e-3, **how)
    train(whole, optimizer, 3)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(whole, optimizer, 3, start=3)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = net(torch.bfloat16)
    again.load_state_dict(saved["model"])
    resumed = MAKERS[name](param_groups(again, rank=4), lr=1e-3, **how)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 3, start=3)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[q][key])), key


def test_a_master_follows_what_others_change():
    """A proximal step between two steps is not undone; entries that were left alone keep what rounding hides."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p[0] = 0.0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["master"].tolist() == pytest.approx([-1e-4, *[1 - 2e-4] * 3], rel=1e-4)
    assert float(p[0].detach()) == pytest.approx(-1e-4, rel=0.01)
    assert p[1:].tolist() == [1.0] * 3


def test_float32_is_as_without_the_option():
    ends = []
    for how in ({}, {"master_weights": True}):
        model = net(torch.float32)
        optimizer = GaLore(param_groups(model, rank=4), lr=1e-2, **how)
        train(model, optimizer, 3)
        assert not any("master" in state for state in optimizer.state.values())
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_float32_is_torchs_adamw(decay):
    ends = []
    for make in (AdamW, torch.optim.AdamW):
        model = net(torch.float64)
        train(model, make(model.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=decay), 5)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*ends, strict=True))


def test_weight_decay_and_state_sizes_in_16_bits():
    p = nn.Parameter(torch.full((400, 50), 0.5, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert float(p.detach().float().mean()) == pytest.approx(0.5 * (1 - 1e-4) ** 20, rel=2e-4)
    assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.bfloat16


def test_a_restart_forgets_masters_with_the_rest():
    model = net(torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-3, master_weights=True)
    restart = Restart(optimizer, model, interval=2, refactorize=False)
    for step in range(3):
        train(model, optimizer, 1, start=step)
        restart.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_layers_that_are_not_contiguous():
    ends = []
    for shape in (False, True):
        value = torch.rand(20, 30, generator=stream(0, "w")).add(1).bfloat16()
        p = nn.Parameter(value.mT.contiguous().mT if shape else value.clone())
        optimizer = AdamW([p], lr=1e-3, weight_decay=0.0)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends.append(float((p.detach().float() - value.float()).mean()))
    assert ends[0] == pytest.approx(-0.02, rel=0.1)
    assert ends[1] == pytest.approx(-0.02, rel=0.1)


def test_eight_bit_weights_have_no_masters():
    model = quantize_linears(nn.Sequential(nn.Linear(16, 16)), None, group_size=16)
    with pytest.raises(ValueError, match=r"master_weights=True: 8-bit weights have no float32 copy"):
        QGaLore(param_groups(model, rank=4), master_weights=True)
    with pytest.raises(ValueError, match="master_weights must be True or False; got 'yes'"):
        AdamW([nn.Parameter(torch.zeros(2))], master_weights="yes")


# --- states of another dtype ---------------------------------------------------------------------------------------------


def _state(name, dtype, **how):
    model = net(dtype)
    optimizer = MAKERS[name](param_groups(model, rank=4), lr=1e-3, **how)
    train(model, optimizer, 2)
    return optimizer.state_dict()


@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["galore", "galore, 8 bits", "fira", "dct, error feedback", "q-galore"])
def test_states_of_another_dtype_are_converted(name, source, target):
    model = net(target)
    optimizer = MAKERS[name](param_groups(model, rank=4), lr=1e-3)
    saved = _state(name, source)
    optimizer.load_state_dict(copy.deepcopy(saved))
    train(model, optimizer, 1, start=2)
    own = _state(name, target)
    for place, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        assert optimizer.state[p]["step"] == 3
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == own["state"][place][key].dtype, key


def test_states_of_8_bit_weights_of_another_dtype():
    def made(dtype):
        model = quantize_linears(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)).to(dtype), None, group_size=16)
        return model, QGaLore(param_groups(model, rank=4), lr=1e-3, min_8bit_size=1)

    model, optimizer = made(torch.float32)
    model(torch.ones(2, 16)).square().mean().backward()
    optimizer.step()
    wide, other = made(torch.float64)
    other.load_state_dict(optimizer.state_dict())
    wide(torch.ones(2, 16, dtype=torch.float64)).square().mean().backward()
    other.step()
    assert other.state[wide[0].weight]["first_vector"].dtype == torch.float64


def test_states_that_cannot_be_converted():
    saved = _state("galore", torch.float32)
    place = next(iter(saved["state"]))
    saved["state"][place]["exp_avg"] = saved["state"][place]["exp_avg"].to(torch.uint8)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*needs 'exp_avg' in torch.float32; found torch.uint8"):
        GaLore(param_groups(net(torch.float32), rank=4)).load_state_dict(saved)


def test_masters_come_with_the_state_or_not_at_all():
    saved = _state("galore", torch.bfloat16, master_weights=True)
    with pytest.raises(ValueError, match="master_weights=True; this optimizer has False"):
        GaLore(param_groups(net(torch.bfloat16), rank=4)).load_state_dict(saved)
    for state in saved["state"].values():
        del state["master"]
    with pytest.raises(ValueError, match=r"needs 'master' of shape .*found nothing"):
        GaLore(param_groups(net(torch.bfloat16), rank=4), master_weights=True).load_state_dict(saved)


def test_states_of_a_former_lowdim_load():
    """Groups were saved without the option."""
    saved = _state("galore", torch.float32)
    for group in saved["param_groups"]:
        del group["master_weights"]
    model = net(torch.float32)
    optimizer = GaLore(param_groups(model, rank=4), lr=1e-3)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)


# --- optimizers that lose updates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "lr", "value", "lost"),
    [
        (torch.bfloat16, 1e-3, 1.0, True),
        (torch.bfloat16, 5e-3, 1.0, False),  # above half of the last bit, 1/256
        (torch.bfloat16, 1e-4, 0.02, False),
        (torch.bfloat16, 1e-5, 0.02, True),
        (torch.float16, 1e-4, 1.0, True),
        (torch.float16, 1e-3, 1.0, False),
        (torch.float32, 1e-7, 1.0, False),
    ],
)
def test_who_loses_updates_is_told(dtype, lr, value, lost, recwarn):
    p = nn.Parameter(torch.full((10,), value, dtype=dtype))
    warn_of_lost_updates(torch.optim.AdamW([p], lr=lr))
    assert [w for w in recwarn if "lowdim.optim.AdamW" in str(w.message)] == recwarn.list
    assert len(recwarn) == lost
    warn_of_lost_updates(AdamW([p], lr=lr))
    assert len(recwarn) == lost


def test_an_adapter_tells_at_its_first_step():
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    adapted = lowdim.adapt(model, lowdim.adapters.LoRA(rank=2))
    optimizer = torch.optim.AdamW(adapted.param_groups(1e-6), lr=1e-6)
    with pytest.warns(UserWarning, match=r"AdamW rounds updates to 16 bits: .* of the trained numbers are lost"):
        adapted.step(optimizer)


def _sharded(rank, world, name, masters):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model = net(torch.bfloat16)
    if world > 1:
        fully_shard(model)
    optimizer = MAKERS[name](param_groups(model, rank=4), lr=2e-3, master_weights=masters)
    for step in range(20):
        for i, p in enumerate(model.parameters()):
            grad = (2 + torch.randn(p.shape, generator=stream(step, "grad", i))).bfloat16()
            p.grad = grad if world == 1 else distribute_tensor(grad, p.device_mesh, p.placements)
        optimizer.step()
    return [(p.full_tensor() if world > 1 else p).detach().float().numpy() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_sharded_weights_move_as_far(name, masters):
    start = [p.detach().float() for p in net(torch.bfloat16).parameters()]
    want, got = _sharded(0, 1, name, masters), in_processes(_sharded, 2, name, masters)
    for a, b, begin in zip(want, got, start, strict=True):
        a, b = torch.from_numpy(a) - begin, torch.from_numpy(b) - begin
        assert float(b.mean()) == pytest.approx(float(a.mean()), rel=1e-3 if masters else 0.25)
