"""SaRA's progressive selection: what is inactive stays, and what an optimizer does to the rest."""

import copy

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import SaRA
from lowdim.testing.small_model import sample_input, small_model


def single(threshold=0.2, **options):
    torch.manual_seed(0)
    return lowdim.adapt(nn.Sequential(nn.Linear(8, 6)), SaRA(threshold, **options))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_inactive_entries_stay_to_the_bit_whatever_the_optimizer(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, dtype=dtype))
    adapted = lowdim.adapt(model, SaRA(0.2, progressive_iter=3))
    update = adapted.layers["0"].update
    optimizer = OPTIMIZERS[name](list(adapted.trainable().values()))
    x = torch.randn(16, 8, dtype=dtype)
    moments: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        if step > 3:
            assert not bool(update.values.grad[~update.active].any())
            assert bool(update.values.grad[update.active].any())
        optimizer.step()
        if step == 3:
            moments = {k: v.clone() for k, v in optimizer.state[update.values].items() if torch.is_tensor(v)}
        adapted.step(optimizer)
        if step < 3:
            assert bool(update.active.all())
        if step == 3:
            assert torch.equal(update.active, update.values.detach().float().abs() < 0.2)
            assert 0 < int(update.active.sum()) < len(update.active)
            held = update.values.detach().clone()
            state = optimizer.state[update.values]
            assert all(torch.equal(value, state[key]) for key, value in moments.items())
    assert torch.equal(update.values[~update.active], held[~update.active])
    assert not torch.equal(update.values[update.active], held[update.active])
    assert not torch.equal(update.active, update.values.detach().abs() < 0.2) or name == "adagrad"  # selected once


def test_select_and_restore_by_hand():
    update = single().layers["0"].update
    with torch.no_grad():
        update.values.copy_(torch.linspace(-1, 1, len(update.values)))
    want = update.values.detach().clone()
    update.restore()
    assert torch.equal(update.values, want)
    update.select(0.5)
    assert torch.equal(update.active, want.abs() < 0.5)
    left = ~update.active
    with torch.no_grad():
        update.values.add_(1.0)
    update.select(0.3)  # restores first: what left stays at what it left with
    assert torch.equal(update.values[left], want[left])
    assert not bool(update.active.any())
    moved_on = update.values.detach().clone()
    with torch.no_grad():
        update.values.fill_(float("nan"))
    x = torch.randn(3, 8)
    assert bool(update.dense().isfinite().all())
    update.restore()
    assert torch.equal(update.values, moved_on)
    assert bool(single().model(x).isfinite().all())


def test_weight_decay_pulls_the_values_themselves():
    adapted = single()
    update = adapted.layers["0"].update
    before = update.values.detach().clone()
    groups = adapted.param_groups(0.1, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    update.values.grad = torch.zeros_like(update.values)
    optimizer.step()
    torch.testing.assert_close(update.values.detach(), before * (1 - 0.1 * 0.5))


def test_the_selection_continues_after_saving_and_after_a_trainers_checkpoint(tmp_path):
    def go(adapted, optimizer, first, last):
        for step in range(first, last):
            x = sample_input(16, seed=step)
            optimizer.zero_grad()
            (adapted.model(x) - x[:, :3].sin()).square().mean().backward()
            optimizer.step()
            adapted.step(optimizer)

    def begin():
        adapted = lowdim.adapt(small_model(), SaRA(0.15, progressive_iter=4))
        return adapted, torch.optim.AdamW(adapted.param_groups(0.05))

    whole, optimizer = begin()
    go(whole, optimizer, 0, 9)
    for killed in (2, 4, 6):
        part, optimizer = begin()
        go(part, optimizer, 0, killed)
        part.save(tmp_path / str(killed))
        fresh = lowdim.adapt(small_model(), SaRA(0.15, progressive_iter=4))
        fresh.model.load_state_dict(copy.deepcopy(part.model.state_dict()))
        loaded = lowdim.load_adapter(small_model(), tmp_path / str(killed))
        for resumed in (fresh, loaded):
            again = torch.optim.AdamW(resumed.param_groups(0.05))
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            go(resumed, again, killed, 9)
            for name, layer in resumed.layers.items():
                update = whole.layers[name].update
                assert torch.equal(layer.update.values, update.values)
                assert torch.equal(layer.update.active, update.active)
                assert not bool(update.active.all())
