import copy
import itertools
import json
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowdim.errors import CheckpointError, NoMatchingModuleError
from lowdim.layers import (
    MaestroConv2d,
    MaestroLinear,
    MaestroSampler,
    MaestroTraining,
    maestro_decompose,
    maestro_merge,
    maestro_recalibrate,
)
from lowdim.linalg import gather
from lowdim.testing.processes import in_processes
from lowdim.testing.sharded_case import Subject


def net(*, dtype=torch.float64):
    """Ranks 5, 5, 3."""
    return nn.Sequential(
        MaestroLinear(7, 5, dtype=dtype, seed=0),
        nn.Tanh(),
        MaestroLinear(5, 6, dtype=dtype, seed=1),
        nn.Tanh(),
        MaestroLinear(6, 3, dtype=dtype, seed=2),
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def training(model, optimizer, **changes):
    return MaestroTraining(model, optimizer, **{"lasso": 0.02, "threshold": 0.35, "shrink_interval": 3, **changes})


def data(step, count=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 7, dtype=torch.float64, generator=generator)
    return x, x[:, :3].argmax(1)


def train(model, optimizer, beside, steps):
    for step in steps:
        x, y = data(step)
        logits = model(x)
        (F.cross_entropy(logits, y) + beside.extra_loss(lambda x=x: model(x), logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
        beside.step()


# --- sampling ------------------------------------------------------------------------------------------------------------


def test_per_layer_draws_every_pair_once_a_round():
    sampler = MaestroSampler(net())
    assert list(sampler.layers) == ["0", "2", "4"]
    pairs = {(name, rank) for name, most in (("0", 5), ("2", 5), ("4", 3)) for rank in range(1, most + 1)}
    rounds = []
    for _ in range(3):
        draws = [sampler.draw() for _ in range(13)]
        assert all(len(draw) == 1 for draw in draws)
        rounds.append([next(iter(draw.items())) for draw in draws])
        assert set(rounds[-1]) == pairs
    assert rounds[0] != rounds[1] != rounds[2]


def test_across_layers_draws_uniform_ranks_of_all():
    sampler = MaestroSampler(net(), kind="across_layers")
    draws = [sampler.draw() for _ in range(1500)]
    assert all(draw.keys() == {"0", "2", "4"} for draw in draws)
    for name, most in (("0", 5), ("4", 3)):
        counts = Counter(draw[name] for draw in draws)
        assert set(counts) == set(range(1, most + 1))
        assert max(counts.values()) < 1.35 * min(counts.values())
    both = Counter((draw["0"], draw["2"]) for draw in draws)
    assert len(both) == 25  # independent


def test_draws_follow_from_the_seed():
    def some(seed, kind):
        sampler = MaestroSampler(net(), kind=kind, seed=seed)
        torch.manual_seed(seed + 17)  # the global generator has no say
        return [sampler.draw() for _ in range(20)]

    for kind in ("per_layer", "across_layers"):
        assert some(0, kind) == some(0, kind) != some(1, kind)


@pytest.mark.parametrize("kind", ["per_layer", "across_layers"])
@pytest.mark.parametrize("reset", [True, False])
def test_draws_stay_within_shrunk_ranks(kind, reset):
    model = net()
    sampler = MaestroSampler(model, kind=kind)
    sampler.draw()
    model[0].rank, model[2].rank, model[4].rank = 2, 0, 1
    if reset:
        sampler.reset()
    draws = [pair for _ in range(30) for pair in sampler.draw().items()]
    assert set(draws) == {("0", 1), ("0", 2), ("4", 1)}
    model[0].rank = model[4].rank = 0
    assert sampler.draw() == {}


def test_sampled_sets_ranks_inside_only():
    model, (x, _) = net(), data(0)
    sampler, full = MaestroSampler(model), model(x)
    model_at = [layer.sampled for layer in sampler.layers.values()]
    with sampler.sampled({"2": 2}) as ranks:
        assert ranks == {"2": 2}
        small = model(x)
    want = model[4](torch.tanh(model[2](torch.tanh(model[0](x)), rank=2)))
    assert torch.equal(small, want)
    assert not torch.allclose(small, full)
    assert torch.equal(model(x), full)
    assert model_at == [None, None, None] == [layer.sampled for layer in sampler.layers.values()]


def test_sampled_draws_by_itself():
    model = net()
    sampler, other = MaestroSampler(model), MaestroSampler(net())
    for _ in range(5):
        with sampler.sampled() as ranks:
            assert {name: layer.sampled for name, layer in sampler.layers.items() if layer.sampled is not None} == ranks
        assert ranks == other.draw()


def test_sampled_restores_after_an_exception():
    model = net()
    sampler = MaestroSampler(model)
    with pytest.raises(RuntimeError, match="inside"), sampler.sampled({"0": 1}):
        raise RuntimeError("inside")
    assert all(layer.sampled is None for layer in sampler.layers.values())
    with sampler.sampled({"0": 1}):
        with sampler.sampled({"2": 1}):
            assert model[0].sampled is None
        assert model[0].sampled == 1


def test_bad_samplers():
    with pytest.raises(ValueError, match="model must hold Maestro layers; got Sequential without any"):
        MaestroSampler(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="kind must be one of per_layer, across_layers; got 'per-layer'"):
        MaestroSampler(net(), kind="per-layer")
    sampler = MaestroSampler(net())
    for ranks, message in (
        ({"0": 6}, r"ranks\['0'\] must be an int in \[0, 5\]; got 6"),
        ({"0": -1}, r"ranks\['0'\] must be an int in \[0, 5\]; got -1"),
        ({"1": 1}, "a layer of ranks must be one of 0, 2, 4; got '1'"),
    ):
        with pytest.raises(ValueError, match=message), sampler.sampled(ranks):
            pass
    assert all(layer.sampled is None for layer in sampler.layers.values())


@pytest.mark.parametrize("kind", ["per_layer", "across_layers"])
def test_sampler_state(kind):
    sampler = MaestroSampler(net(), kind=kind)
    for _ in range(17):
        sampler.draw()
    state = json.loads(json.dumps(sampler.state_dict()))
    other = MaestroSampler(net(), kind=kind)
    other.load_state_dict(state)
    assert [sampler.draw() for _ in range(20)] == [other.draw() for _ in range(20)]


def test_foreign_sampler_states():
    state = MaestroSampler(net()).state_dict()
    for other, message in (
        (MaestroSampler(net(), kind="across_layers"), "the saved sampler is of kind 'per_layer'"),
        (MaestroSampler(nn.Sequential(net())), "the saved sampler covers layers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="state must have the entries"):
        MaestroSampler(net()).load_state_dict({"round": 1})


# --- the companion -------------------------------------------------------------------------------------------------------


def test_extra_loss_by_its_definition():
    model, (x, _) = net(), data(0)
    beside = training(model, sgd(model), lasso=0.03)
    logits = model(x)
    got = beside.extra_loss(lambda: model(x), logits)
    with MaestroSampler(model).sampled(beside.drawn):
        small = model(x)
    soft = -(logits.detach().softmax(-1) * small.log_softmax(-1)).sum(-1).mean()
    want = soft + 0.03 * sum(layer.group_lasso() for layer in beside.sampler.layers.values())
    assert torch.allclose(got, want)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b)
    assert beside.extra_loss(lambda: model(x), logits.view(2, 4, 3)).allclose(want)  # any leading dimensions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_loss_in_lower_precision(dtype):
    model, (x, _) = net(dtype=dtype), data(0)
    exact = copy.deepcopy(model).double()
    x = x.to(dtype)
    beside, reference = training(model, sgd(model)), training(exact, sgd(exact))
    logits = model(x)
    loss = beside.extra_loss(lambda: model(x), logits)
    assert loss.dtype == torch.float32
    want = reference.extra_loss(lambda: exact(x.double()), logits.double())
    assert float(abs(loss - want).detach()) < (1e-5 if dtype == torch.float32 else 2e-2) * float(want.detach())
    loss.backward()
    assert all(p.grad.dtype == dtype and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_micro_batches_of_a_step_share_the_draw():
    model = net()
    beside, other, seen = training(model, sgd(model)), MaestroSampler(net()), {}

    def forward():
        seen.update({n: layer.sampled for n, layer in beside.sampler.layers.items() if layer.sampled is not None})
        return model(data(0)[0])

    for _ in range(2):
        want = other.draw()
        for _ in range(2):
            seen.clear()
            beside.extra_loss(forward, model(data(0)[0]))
            assert seen == want
        beside.step()


def test_training_shrinks_at_the_interval_and_every_parameter_gets_a_gradient():
    model = net()
    optimizer = sgd(model)
    beside = training(model, optimizer)
    before = [id(p) for p in model.parameters()]
    ranks = []
    for step in range(30):
        ranks.append(list(beside.sampler.ranks().values()))
        x, y = data(step)
        logits = model(x)
        loss = F.cross_entropy(logits, y) + beside.extra_loss(lambda x=x: model(x), logits)
        assert all(
            g is not None for g in torch.autograd.grad(F.cross_entropy(logits, y), model.parameters(), retain_graph=True)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        beside.step()
    changes = [i for i, (a, b) in enumerate(itertools.pairwise(ranks), 1) if a != b]
    assert changes
    assert all(i % 3 == 0 for i in changes)
    assert all(b <= a for one, two in itertools.pairwise(ranks) for a, b in zip(one, two, strict=True))
    assert [id(p) for p in model.parameters()] == before


def test_lasso_alone_empties_the_last_components_first():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    beside = training(model, optimizer, lasso=1.0)
    first = model[0].importance()
    for _ in range(10):
        beside.penalty().backward()
        optimizer.step()
        optimizer.zero_grad()
    left = model[0].importance() / first
    assert float(left[4]) < 0.1 < float(left[0])
    assert bool((left.diff() < 0).all())


def test_the_interval_follows_from_the_length():
    model = net()
    assert training(model, sgd(model), shrink_interval=None, total_steps=157).shrink_interval == 15
    assert training(model, sgd(model), shrink_interval=None, total_steps=4).shrink_interval == 1
    assert training(model, sgd(model), shrink_interval=7, total_steps=157).shrink_interval == 7
    beside = training(model, sgd(model), shrink_interval=None, threshold=1e9)
    beside.step()
    assert set(beside.sampler.ranks().values()) == {5, 3}
    assert beside.shrink() == {"0": 0, "2": 0, "4": 0}
    x, _ = data(0)
    logits = model(x)
    assert torch.equal(beside.extra_loss(lambda: pytest.fail("nothing can be sampled"), logits), beside.penalty())


def test_without_a_full_pass_the_plain_pass_is_sampled():
    model, (x, _) = net(), data(0)
    full = model(x)
    beside = training(model, sgd(model), full_pass=False)
    want = dict(beside.drawn)
    y = model(x)
    with MaestroSampler(model).sampled(want), torch.no_grad():
        assert torch.equal(nn.Sequential(*model)(x), y)
    assert not torch.allclose(y, full)
    assert torch.equal(beside.extra_loss(lambda: pytest.fail("no second pass"), y), beside.penalty())
    assert torch.equal(model.eval()(x), full)
    model.train()
    with pytest.raises(ValueError, match="x must have 7 features"):
        model(x[:, :3])
    assert all(layer.sampled is None for layer in beside.sampler.layers.values())
    beside.step()
    assert beside.drawn != want
    beside.close()
    assert torch.equal(model(x), full)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("full_pass", [True, False])
@pytest.mark.parametrize("extra_first", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant, full_pass, extra_first):
    """What runs again in the backward pass runs at the ranks at which it ran before."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for i in (0, 2):
                x = checkpoint(nn.Sequential(*list(self)[i : i + 2]), x, use_reentrant=reentrant)
            return self[4](x)

    grads = []
    for kind in (nn.Sequential, Checkpointed):
        model = kind(*net())
        beside = training(model, sgd(model), kind="across_layers", full_pass=full_pass)
        x, y = data(0)
        x.requires_grad_(True)
        logits = model(x)
        if extra_first:
            extra = beside.extra_loss(lambda m=model, x=x: m(x), logits)
            loss = F.cross_entropy(logits, y) + extra
        else:
            loss = F.cross_entropy(logits, y)
            loss = loss + beside.extra_loss(lambda m=model, x=x: m(x), logits)
        loss.backward()
        assert all(layer.sampled is None for layer in beside.sampler.layers.values())
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for one, two in zip(*grads, strict=True):
        assert torch.allclose(one, two)


@pytest.mark.parametrize("full_pass", [True, False])
@pytest.mark.parametrize("kind", ["per_layer", "across_layers"])
def test_resume_is_exact(kind, full_pass):
    how = {"kind": kind, "full_pass": full_pass, "seed": 3}
    one = net()
    optimizer = sgd(one)
    beside = training(one, optimizer, **how)
    train(one, optimizer, beside, range(10))
    saved = copy.deepcopy((one.state_dict(), optimizer.state_dict(), json.loads(json.dumps(beside.state_dict()))))
    train(one, optimizer, beside, range(10, 20))
    two = net()
    other = sgd(two)
    again = training(two, other, **how)
    two.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert again.sampler.ranks() != {"0": 5, "2": 5, "4": 3}, "nothing was shrunk: nothing is tested"
    train(two, other, again, range(10, 20))
    assert again.sampler.ranks() == beside.sampler.ranks()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_companion_state_restores_the_ranks_by_itself():
    model = net()
    beside = training(model, sgd(model))
    model[0].rank = 2
    state = beside.state_dict()
    other = net()
    again = training(other, sgd(other))
    again.load_state_dict(state)
    assert other[0].rank == 2
    with pytest.raises(CheckpointError, match="state must have the entries"):
        again.load_state_dict({})
    with pytest.raises(CheckpointError, match="_extra_state must be a rank"):
        again.load_state_dict({**state, "ranks": {"0": 99}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lasso": -1e-3}, r"lasso must be a finite number in \[0, inf\]; got -0.001"),
        ({"lasso": None}, "lasso must be a finite number"),
        ({"threshold": -1}, "threshold must be a finite number"),
        ({"shrink_interval": 0}, "shrink_interval must be an int >= 1; got 0"),
        ({"total_steps": 1.5}, "total_steps must be an int >= 1; got 1.5"),
        ({"kind": "all"}, "kind must be one of per_layer, across_layers; got 'all'"),
    ],
)
def test_bad_trainings(changes, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        training(model, sgd(model), **changes)


def test_lambda_and_threshold_have_no_default():
    model = net()
    with pytest.raises(TypeError, match=r"lasso.*threshold"):
        MaestroTraining(model, sgd(model))


@pytest.mark.parametrize("shape", [(8, 1), (8,)])
def test_logits_must_be_of_classes(shape):
    model = net()
    with pytest.raises(ValueError, match=r"logits must be \(..., classes\) with at least 2 classes; got shape"):
        training(model, sgd(model)).extra_loss(lambda: torch.zeros(shape), torch.zeros(shape))


def test_trains_as_a_strategy():
    from lowdim.catalogue import variant
    from lowdim.methods import apply, with_options

    chosen = with_options(variant("maestro"), {"threshold": 0.3, "shrink_interval": 2})
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    applied = apply(chosen, model, lr=1e-3, steps=40, scratch=True)
    optimizer = applied.make_optimizer(1e-3)
    beside = applied.make_companion(optimizer)
    assert isinstance(beside, MaestroTraining)
    assert isinstance(applied.model[0], MaestroLinear)
    assert (beside.threshold, beside.shrink_interval) == (0.3, 2)


# --- a whole model -------------------------------------------------------------------------------------------------------


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
    ).double()


def test_decompose_and_merge_keep_the_function():
    model, x = cnn().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    want = model(x)
    assert maestro_decompose(model) is model
    kinds = [type(m) for m in model]
    assert kinds[0] is kinds[4] is MaestroConv2d
    assert kinds[3] is nn.Conv2d  # grouped
    assert kinds[6] is MaestroLinear
    assert torch.allclose(model(x), want)
    assert maestro_merge(model) is model
    assert [type(m) for m in model] == [type(m) for m in cnn()]
    assert torch.allclose(model(x), want)


def test_decompose_only_what_is_named():
    model = maestro_decompose(cnn(), target_modules=["6"])
    assert [type(m) for m in model if isinstance(m, (MaestroConv2d, MaestroLinear))] == [MaestroLinear]
    model = cnn()
    with pytest.raises(ValueError, match="layer 3: conv must have groups=1; got 8"):
        maestro_decompose(model, target_modules=["0", "3"])
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(NoMatchingModuleError, match="matches no module"):
        maestro_decompose(model, target_modules=["convolution"])
    with pytest.raises(NoMatchingModuleError, match="no layer is left"):
        maestro_decompose(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))


def test_decompose_leaves_heads_and_tied_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
            self.classifier = nn.Linear(4, 2)
            self.out.weight = self.embed.weight

    model = maestro_decompose(Model())
    assert [name for name, m in model.named_modules() if isinstance(m, MaestroLinear)] == ["body"]


def test_merge_chooses_the_smaller():
    """Dense where rank (in + out) > in out; equal stays."""
    model = nn.Sequential(MaestroLinear(12, 6), MaestroLinear(6, 12), MaestroLinear(12, 6), MaestroConv2d(2, 8, 2)).double()
    model[0].rank, model[1].rank, model[2].rank, model[3].rank = 4, 5, 0, 4
    x = torch.randn(3, 12, dtype=torch.float64)
    image = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    want, kernel = model[:3](x), model[3](image)
    model.eval()
    maestro_merge(model)
    assert [type(m) for m in model] == [MaestroLinear, nn.Linear, MaestroLinear, MaestroConv2d]
    assert [m.U.shape[1] for m in model if not isinstance(m, nn.Linear)] == [4, 0, 4]
    assert torch.allclose(model[:3](x), want)
    assert torch.allclose(model[3](image), kernel)
    assert not model[1].training
    model[3].rank = 4
    assert type(maestro_merge(MaestroLinear(4, 4))) is nn.Linear
    assert type(maestro_merge(nn.Sequential(MaestroConv2d(2, 8, 2))[0])) is nn.Conv2d


def test_any_smaller_rank_without_retraining():
    """Deployment: ranks of a trained family, chosen by hand, and merged."""
    model, (x, _) = net(), data(0)
    with MaestroSampler(model).sampled({"0": 2, "2": 1}):
        want = model(x)
    model[0].rank, model[2].rank = 2, 1
    assert torch.equal(model(x), want)
    maestro_merge(model)
    assert torch.allclose(model(x), want)
    assert sum(p.numel() for p in model.parameters()) == 2 * 12 + 1 * 11 + 18 + 5 + 6 + 3


# --- BatchNorm -----------------------------------------------------------------------------------------------------------


def test_recalibration_gives_the_statistics_of_the_full_model():
    model = nn.Sequential(MaestroLinear(7, 5, dtype=torch.float64, seed=0), nn.BatchNorm1d(5).double(), nn.Dropout(0.5))
    sampler = MaestroSampler(model)
    batches = [data(step, 16)[0] for step in range(4)]
    for x in batches:
        with sampler.sampled({"0": 1}):
            model(x)
    spoilt = model[1].running_var.clone()
    model.train()
    model[2].eval()
    assert maestro_recalibrate(model, batches) is model
    outputs = [model[0](x).detach() for x in batches]
    assert torch.allclose(model[1].running_mean, torch.stack([y.mean(0) for y in outputs]).mean(0))
    assert torch.allclose(model[1].running_var, torch.stack([y.var(0) for y in outputs]).mean(0))
    assert not torch.allclose(model[1].running_var, spoilt)
    assert model[1].momentum == 0.1
    assert [m.training for m in model] == [True, True, False]
    again = model[1].running_mean.clone()
    maestro_recalibrate(model, [(x, None) for x in batches], lambda m, batch: m(batch[0]))
    assert torch.equal(model[1].running_mean, again)


def test_recalibration_without_anything():
    assert maestro_recalibrate(net(), []) is not None
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        maestro_recalibrate(model, [])
    assert model[0].momentum == 0.1
    assert maestro_recalibrate(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), []) is not None
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        maestro_recalibrate(model.eval(), [torch.zeros(2)])
    assert not model[0].training
    assert model[0].momentum == 0.1


# --- several processes ---------------------------------------------------------------------------------------------------

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
