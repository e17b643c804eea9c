"""DDP and FSDP2: two gloo processes, each with half of every batch, give what one process gives, in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowdim
from lowdim.adapters import ModelMethod, registered_methods
from lowdim.linalg import gather, stream
from lowdim.testing.processes import in_processes
from lowdim.testing.small_model import small_model
from methods import LAYERED, tiny

STEPS = 8
METHODS = {name: tiny(name) for name in LAYERED}
#: Further ways to train one of them that processes must agree on, too.
METHODS["ALLoRA step"] = tiny("ALLoRA", apply_to="step")
#: Smoothed scores of one process's share of the batch, by definition.
OWN = ("lowdim_shared.I", "lowdim_shared.U")


def batch(step):
    x = torch.randn(8, 8, generator=stream(0, "distributed", step), dtype=torch.float64)
    return x, x[:, :3].sin()


def loss_fn(model, pair):
    return (model(pair[0]) - pair[1]).square().mean()


def adapted_model(name):
    samples = [batch(97), batch(98)]
    model = small_model(dtype=torch.float64)
    if "covariance" in " ".join(METHODS[name].needs):
        adapted = lowdim.adapt(model, METHODS[name], batches=[x for x, _ in samples], seed=3)
    else:
        adapted = lowdim.adapt(model, METHODS[name], batches=samples, loss_fn=loss_fn, seed=3)
    adapted.before_training(samples, loss_fn, 0.02, 20)
    return adapted


def train(adapted, run, rank=0, world=1):
    optimizer = torch.optim.AdamW(adapted.param_groups(0.02), weight_decay=0.0)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = (run(x.chunk(world)[rank]) - y.chunk(world)[rank]).square().mean() + adapted.regularizer()
        loss.backward()
        optimizer.step()
        adapted.step(optimizer)
    return {key: gather(value).detach() for key, value in adapted.state_dict().items()}


def ddp(adapted):
    # A schedule may stop giving some parameters a gradient (LaMDA, DiffoRA).
    return nn.parallel.DistributedDataParallel(adapted.model, find_unused_parameters=True)


def fsdp(adapted):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in adapted.layers.values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(adapted.model, mesh=mesh)


WRAPPERS = {"ddp": ddp, "fsdp": fsdp}


def work(rank, world):
    found = {}
    for name in METHODS:
        for how, wrap in WRAPPERS.items():
            adapted = adapted_model(name)
            try:
                found[name, how] = {k: v.numpy() for k, v in train(adapted, wrap(adapted), rank, world).items()}
            except Exception as error:  # noqa: BLE001 (told to the test, which fails with it)
                found[name, how] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def two_processes():
    return in_processes(work)


def test_every_method_has_a_row():
    layered = {
        n for n, c in registered_methods().items() if c.__module__.startswith("lowdim.") and not issubclass(c, ModelMethod)
    }
    assert layered <= {type(method).__name__ for method in METHODS.values()}


@pytest.mark.parametrize("how", list(WRAPPERS))
@pytest.mark.parametrize("name", list(METHODS))
def test_two_processes_equal_one(two_processes, name, how):
    got = two_processes[name, how]
    assert not isinstance(got, str), got
    adapted = adapted_model(name)
    start = {key: value.clone() for key, value in adapted.state_dict().items()}
    want = train(adapted, adapted.model)
    assert want.keys() == got.keys()
    want = {key: value for key, value in want.items() if key not in OWN}
    moved = 0.0
    for key, value in want.items():
        value = value.double()
        size = float(value.abs().max()) or 1.0
        error = float((torch.from_numpy(got[key]).double() - value).abs().max()) / size
        assert error <= 1e-9, f"{key}: {error:.3g}"
        moved += float((value - start[key].double()).abs().sum()) if key in start and value.shape == start[key].shape else 1.0
    assert moved > 0
