"""Q-GaLore in several processes: replicas that hold the same codes, and shards."""

import pytest
import torch
from torch import nn

from lowdim.linalg import gather, stream
from lowdim.optim import Int8Parameter, QGaLore, param_groups, quantize_linears
from lowdim.testing.processes import in_processes
from lowdim.testing.sharded_case import Subject, uneven_net

REPLICAS = {
    "nearest": {"stochastic": False},
    "stochastic": {},
    "clipped": {"max_norm": 0.3},
    "staggered": {"stagger": True},
    "layerwise": {"layerwise": True},
    "layerwise, micro-batches": {"layerwise": True, "accumulate": 2},
}


def small_net(stochastic=True):
    """Sides that 16 divides, in float64, down to the scales."""
    net = nn.Sequential(
        nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    draw = stream(0, "replicas", "net")
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return quantize_linears(net, ["0", "2", "4"], group_size=16, stochastic_round=stochastic)


def train(rank, world, *, stochastic=True, wrap=None, **options):
    """Ten steps, each process on its share of every batch; the dense weights as numbers."""
    net = small_net(stochastic)
    layerwise, micro = options.get("layerwise", False), options.get("accumulate", 1)
    if world > 1 and layerwise:
        options["replicas"] = True
    model = net
    if wrap is not None:
        model = wrap(net)
    elif world > 1 and not layerwise:
        model = nn.parallel.DistributedDataParallel(net)
    optimizer = QGaLore(
        param_groups(net, rank=4), lr=0.02, update_interval=4, projector_group_size=16, weight_decay=0.01, **options
    )
    for step in range(10):
        for part in range(micro):
            x = torch.randn(8, 16, generator=stream(0, "replicas", step, part), dtype=torch.float64)
            mine = x.chunk(world)[rank]
            ((model(mine) - mine[:, :3]).square().mean() / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: gather(value).double().numpy() for name, value in net.state_dict().items() if name != "step"}


def replicas(rank, world):
    return {name: train(rank, world, **options) for name, options in REPLICAS.items()}


def agrees(got, want):
    for name, value in want.items():
        if name.endswith(("weight", "zeros")) and f"{name.rsplit('.', 1)[0]}.scales" in want:
            assert (got[name] == value).all(), f"{name}: other codes"
        else:
            assert abs(got[name] - value).max() <= 1e-10 * abs(value).max(), name


@pytest.mark.slow
def test_two_replicas_equal_one_process():
    """DDP for what is floating, our own averages for the rest: the same codes, with nearest and with stochastic rounding."""
    found = in_processes(replicas)
    for name, options in REPLICAS.items():
        agrees(found[name], train(0, 1, **options))


def int8_weights(net):
    return {p for p in net.parameters() if isinstance(p, Int8Parameter)}


def sharded(rank, world):
    """FSDP2 with the 8-bit weights passed over; and what it says where they are not."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (world,))

    def wrap(net):
        for child in net:
            if isinstance(child, nn.Linear):
                fully_shard(child, mesh=mesh)
        return fully_shard(net, mesh=mesh, ignored_params=int8_weights(net))

    numbers = train(rank, world, wrap=wrap)
    said = []
    net = fully_shard(small_net(), mesh=mesh)
    for attempt in (lambda: net(torch.zeros(2, 16, dtype=torch.float64)), lambda: QGaLore(list(net.parameters()), rank=None)):
        try:
            attempt()
        except TypeError as error:
            said.append(str(error))
    return numbers, said


@pytest.mark.slow
def test_fsdp2_with_8bit_weights_passed_over():
    numbers, said = in_processes(sharded)
    agrees(numbers, train(0, 1))
    assert len(said) == 2
    assert all("ignored_params" in text for text in said)


def on_shards(net):
    return QGaLore(param_groups(net, rank=3), lr=0.05, update_interval=2, cos_threshold=0.0, queue_size=2, weight_decay=0.01)


SHARDED = {"q-galore": Subject(uneven_net, on_shards)}
