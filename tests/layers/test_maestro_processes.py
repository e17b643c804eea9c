"""Maestro in two processes: the sampled pass, the lasso and shrinking, with FSDP2 and with DDP."""

import pytest
import torch
from maestro_net import data, net, sgd, training
from torch.nn import functional as F

from lowdim.layers import maestro_merge
from lowdim.linalg import gather
from lowdim.testing.processes import in_processes
from lowdim.testing.sharded_case import Subject

SHARDED = {
    "maestro": Subject(
        net=lambda: net(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
        companion=lambda model, optimizer: training(model, optimizer, threshold=0.3),
    )
}


def _with_everything(rank, world, how):
    """Sampled pass, lasso and shrinking; 12 steps."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(rank)  # nothing may hang on it
    model = net()
    run = model
    if how == "fsdp":
        mesh = dist.init_device_mesh("cpu", (world,))
        for child in (model[0], model[2]):  # the last layer belongs to the root, which stays whole between passes
            fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "ddp":
        run = DistributedDataParallel(model)
    optimizer = sgd(model)
    beside = training(model, optimizer)
    for step in range(12):
        x, y = (part.chunk(world)[rank] for part in data(step))
        logits = run(x)
        (F.cross_entropy(logits, y) + beside.extra_loss(lambda x=x: run(x), logits)).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        beside.step()
    weights = {name: gather(p).detach().numpy() for name, p in model.named_parameters()}
    lasso = [float(layer.group_lasso().detach()) for layer in beside.sampler.layers.values()]
    importance = [layer.importance().tolist() for layer in beside.sampler.layers.values()]
    if how == "fsdp":
        with pytest.raises(ValueError, match="prune must be False while the parameters are sharded"):
            model[0].shrink(0.1, prune=True)
        with pytest.raises(ValueError, match="model must hold whole parameters; got sharded ones"):
            maestro_merge(model)
    return weights, beside.sampler.ranks(), lasso, importance


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_sampled_pass_lasso_and_shrinking_in_two_processes(how):
    want, ranks, lasso, importance = _with_everything(0, 1, "alone")
    got, found, spread, tails = in_processes(_with_everything, 2, how)
    assert found == ranks != {"0": 5, "2": 5, "4": 3}
    for name, value in want.items():
        assert abs(got[name] - value).max() < 1e-11, name
    for a, b in zip([lasso, *importance], [spread, *tails], strict=True):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-12)
