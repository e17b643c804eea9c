"""FSDP2: two gloo processes give what one gives, in float64, across refreshes; states stay sharded or agree."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowdim.linalg import stream
from lowdim.optim import GaLore, param_groups, state_bytes
from lowdim.optim.sharded import local
from lowdim.testing.processes import in_processes

STEPS = 10


def small_net():
    """Tall, wide and square matrices with sides that two does not divide."""
    net = nn.Sequential(nn.Linear(7, 18), nn.Tanh(), nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 9)).double()
    draw = stream(0, "sharded", "net")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return net


def train(net, rank, world, layerwise=False, **options):
    """Each process sees its share of every batch."""
    optimizer = GaLore(param_groups(net, rank=3), lr=0.05, update_interval=4, weight_decay=0.01, layerwise=layerwise, **options)
    for step in range(STEPS):
        x = torch.randn(8, 7, generator=stream(0, "sharded", step), dtype=torch.float64)
        part = x.chunk(world)[rank]
        (net(part) - part.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


SETTINGS = {
    "adamw": {},
    "reverse": {"proj_type": "reverse_std"},
    "full": {"proj_type": "full"},
    "adafactor": {"inner": "adafactor", "inner_options": {"scale_parameter": True}},
    "8bit": {"inner": "adamw8bit", "inner_options": {"min_size": 16}},
    "randomized": {"svd": "randomized"},
    "layerwise": {"layerwise": True},
}


def shard(net, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def same_after_loading(net, optimizer, fresh, again):
    """torch.distributed.checkpoint's way, which Trainer takes under FSDP2: whole on the first process, then spread out."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    saved = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(fresh, again, saved, options=whole)
    for a, b in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert type(value) is type(b[key]), key
            if isinstance(value, torch.Tensor):
                assert value.dtype == b[key].dtype, key
                assert torch.equal(local(value), local(b[key])), key
            else:
                assert value == b[key], key


def work(rank, world):
    mesh = dist.init_device_mesh("cpu", (world,))
    found = {}
    for name, options in SETTINGS.items():
        net = shard(small_net(), mesh)
        optimizer = train(net, rank, world, **options)
        weights = [p.full_tensor().detach().numpy() for p in net.parameters()]
        if name in ("adamw", "8bit"):
            fresh = shard(small_net(), mesh)
            again = GaLore(param_groups(fresh, rank=3), lr=0.05, update_interval=4, weight_decay=0.01, **options)
            same_after_loading(net, optimizer, fresh, again)
        found[name] = (weights, state_bytes(optimizer))
    return found


@pytest.fixture(scope="module")
def two_processes():
    return in_processes(work)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_processes_equal_one(two_processes, name):
    net = small_net()
    optimizer = train(net, 0, 1, **SETTINGS[name])
    weights, held = two_processes[name]
    start = small_net()
    for p, got, old in zip(net.parameters(), weights, start.parameters(), strict=True):
        moved = float((p - old).detach().norm())
        assert moved > 0
        error = float((torch.from_numpy(got) - p.detach()).norm()) / moved
        assert error <= (1e-10 if name != "8bit" else 1e-6), f"{tuple(p.shape)}: {error:.3g}"
    if name in ("adamw", "reverse", "layerwise"):  # moments are sharded; bases are on both
        assert held < 0.75 * state_bytes(optimizer)
