import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowdim
import vectors
from lowdim.adapters import AdapterSet, IncreLoRA, increlora_lr_lambda
from lowdim.plan.kept import kept_tensors
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_input, make_layer
from lowdim.testing.small_model import sample_input, small_model


class TestIncreLoRA(AdapterCase):
    alpha = 16

    def method(self, **changes):
        rank = changes.get("rank", self.rank)
        # Grows at calls 2 and 4 of `step`, and reaches its target there.
        options = {"rank": rank, "target_rank": rank + 1 if type(rank) is int and rank > 0 else 3, "rank_step": 1}
        options |= {"alpha": self.alpha, "top_h": 1, "init_warmup": 0, "update_interval": 2}
        # Factors that are held orthonormal would be most of the losses that the shared tests measure.
        return IncreLoRA(**{**options, "orth_weight": 0.0, **changes})

    def dense(self, update):
        """`alpha / (ranknum + 1e-5) · Σ_i B_i diag(E_i) A_i`; the newest part is a reserve, which `ranknum` does not count."""
        active = self.rank + max(0, len(update.A) - 2)
        total = sum(B @ (E * A) for A, E, B in zip(update.A, update.E, update.B, strict=True))
        return self.alpha / (active + 1e-5) * total

    def start(self, weight, stats):
        return {"E.0": 0.0, "ranknum": float(self.rank)}

    def max_delta_rank(self, out_features, in_features):
        return 2


@pytest.mark.parametrize("name", ["growth", "no_advance"])
def test_vectors(name):
    case = vectors.load("increlora", name)
    how = case.hyperparameters
    dims = how["dims"]
    model = nn.Sequential()
    for j, (n, out) in enumerate(itertools.pairwise(dims)):
        layer = nn.Linear(n, out, bias=False, dtype=torch.float64)
        layer.weight.data.copy_(case[f"W{j}"])
        if j:
            model.append(nn.Tanh())
        model.append(layer)
    options = "rank target_rank rank_step top_h init_warmup update_interval alpha advance_learn beta1 beta2 weight_decay"
    adapted = lowdim.adapt(model, IncreLoRA(**{key: how[key] for key in options.split()}))
    updates = [layer.update for layer in adapted.layers.values()]
    with torch.no_grad():
        for j, update in enumerate(updates):
            update.A[0].copy_(case[f"A0_{j}"])
            update.B[0].copy_(case[f"B0_{j}"])
    optimizer = torch.optim.AdamW(adapted.param_groups(how["lr"], how["weight_decay"]), lr=how["lr"])
    losses, ranks, importance = [], [], []
    for _ in range(how["steps"]):
        loss = (model(case["x"]) - case["y"]).square().mean()
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        before = [len(update.A) for update in updates]
        adapted.regularizer()  # the vectors' loss is without it
        adapted.step(optimizer)
        for j, update in enumerate(updates):
            with torch.no_grad():
                for i in range(before[j], len(update.A)):
                    update.A[i].copy_(case[f"RA_{j}"][i - 1 : i])
                    update.B[i].copy_(case[f"RB_{j}"][:, i - 1 : i])
        ranks.append(torch.stack([update.ranknum for update in updates]).double())
        importance.append(torch.tensor(list(adapted.importance().values()), dtype=torch.float64))
        assert list(adapted.ranks().values()) == ranks[-1].tolist()
    case.close(torch.stack(losses), "losses")
    case.close(torch.stack(ranks), "ranknum")
    case.close(torch.stack(importance), "importance")
    for j, layer in enumerate(adapted.layers.values()):
        case.close(layer.delta(), f"delta_{j}")
    case.close(adapted.regularizer() / 0.1, "orth")


def test_vectors_of_the_learning_rate():
    case = vectors.load("increlora", "lr")
    how = case.hyperparameters
    factors = [increlora_lr_lambda(how["warmup"], how["total"], start) for start in how["starts"]]
    got = [[factor(step) for step in range(how["total"])] for factor in factors]
    case.close(torch.tensor(got, dtype=torch.float64), "factors")


def line(sizes=(6, 7, 5), **options):
    """A small network whose every layer is adapted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(n, out, dtype=torch.float64) for n, out in itertools.pairwise(sizes)]
    options = {"alpha": 4, "top_h": 1, "init_warmup": 0, "update_interval": 2, **options}
    return lowdim.adapt(nn.Sequential(*layers), IncreLoRA(**options))


def run(adapted, optimizer, steps, first=0, scheduler=None, **follow):
    n = adapted.layers["0"].in_features
    dtype = adapted.layers["0"].weight.dtype
    for step in range(first, first + steps):
        x = torch.randn(9, n, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        loss = (adapted.model(x).double() - x.double()[:, :1].sin()).square().mean() + adapted.regularizer()
        loss.backward()
        optimizer.step()
        adapted.step(optimizer)
        if scheduler is not None:
            adapted.follow(scheduler, **follow)
            scheduler.step()


def optimizer_of(adapted, lr=0.02):
    return torch.optim.AdamW(adapted.param_groups(lr), lr=lr)


def dense_score(adapted, x, target):
    """The score from the dense matrix and its gradient."""
    delta = adapted.update.dense().detach().requires_grad_()
    y = adapted.base(x) + torch.nn.functional.linear(x, delta)
    (gradient,) = torch.autograd.grad((y * target).sum(), delta)
    return (delta * gradient).abs().sum().detach() / delta.numel() ** 0.5


def disturbed_layer(**options):
    adapted = IncreLoRA(rank=2, **options).attach(make_layer("linear"), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted.update.E[0].fill_(0.7)
    return adapted


@pytest.mark.parametrize("chunk", [2**20, 40])  # all rows of the gradient at once, or a few
def test_the_score_is_that_of_the_dense_gradient(chunk, monkeypatch):
    monkeypatch.setattr("lowdim.adapters.increlora.update._CHUNK", chunk)
    adapted = disturbed_layer()
    x = make_input(adapted.base)
    target = torch.randn(2, 5, 9, dtype=torch.float64)
    assert adapted.update.score is None
    (adapted(x) * target).sum().backward()
    torch.testing.assert_close(adapted.update.score, dense_score(adapted, x, target), rtol=1e-12, atol=0)


def test_the_score_is_that_of_the_last_backward_pass():
    adapted = disturbed_layer()
    x = make_input(adapted.base)
    for factor in (1.0, 3.0):  # as when gradients are accumulated
        adapted(x).sum().mul(factor).backward()
    torch.testing.assert_close(adapted.update.score, dense_score(adapted, x, torch.full((2, 5, 9), 3.0)), rtol=1e-12, atol=0)


def test_the_score_under_checkpointing_compiling_and_copying():
    adapted = disturbed_layer()
    x = make_input(adapted.base)
    want = dense_score(adapted, x, torch.ones(2, 5, 9))
    twin = copy.deepcopy(adapted)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    for forward in (compiled, lambda x: checkpoint(adapted, x, use_reentrant=False)):
        adapted.update.score = None
        forward(x).sum().backward()
        torch.testing.assert_close(adapted.update.score, want, rtol=1e-12, atol=0)
    assert twin.update.score is None
    adapted.update.grow(0, torch.Generator())
    adapted.update.grow(1, torch.Generator())
    adapted.update.score = None
    compiled(x).sum().backward()
    torch.testing.assert_close(adapted.update.score, dense_score(adapted, x, torch.ones(2, 5, 9)), rtol=1e-12, atol=0)
    adapted.update.score = None
    twin(x).sum().backward()
    torch.testing.assert_close(twin.update.score, want, rtol=1e-12, atol=0)
    assert adapted.update.score is None


def test_no_dense_matrix_is_kept_for_the_score():
    adapted = lowdim.adapt(nn.Sequential(nn.Linear(64, 48)), IncreLoRA(rank=2))
    x = torch.randn(10, 64)
    kept = kept_tensors(lambda: adapted.model(x), adapted.model)
    assert sum(tensor.numel() for tensor in kept) <= 10 * (64 + 2) + 2 * (64 + 48) + 48 * 2


def test_an_activation_in_place_may_follow():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    adapted = lowdim.adapt(model, IncreLoRA(rank=1))
    model(torch.randn(2, 4, 6)).sum().backward()
    assert all(layer.update.score is not None for layer in adapted.layers.values())


def test_growth_keeps_the_books():
    adapted = line(rank_step=1)
    optimizer = optimizer_of(adapted)
    assert adapted.importance() == {"0": 0.0, "1": 0.0}
    assert [len(layer.update.A) for layer in adapted.layers.values()] == [1, 1]
    run(adapted, optimizer, 1)
    assert adapted.ranks() == {"0": 1, "1": 1}  # the reserve does not count
    updates = [layer.update for layer in adapted.layers.values()]
    assert [e.item() for u in updates for e in u.E[1:]] == pytest.approx([1e-5] * 2)
    assert not any(e.requires_grad for u in updates for e in u.E[1:])
    assert all(p.requires_grad for u in updates for p in (u.A[1], u.B[1]))
    before = [update.scaling for update in updates]
    run(adapted, optimizer, 2, first=1)
    assert adapted.total_rank == 3
    (grown,) = [j for j, update in enumerate(updates) if update.ranknum == 2]
    assert updates[grown].scaling == pytest.approx(before[grown] / 2, rel=1e-4)  # what was learnt is halved: not a bug
    assert updates[grown].E[1].requires_grad
    assert float(updates[grown].E[1].detach()) == pytest.approx(1e-5)
    assert [update.scoring for update in updates] == [True, True]
    run(adapted, optimizer, 6, first=3)
    assert adapted.total_rank == 4
    assert adapted.ranks() == {name: int(layer.update.ranknum) for name, layer in adapted.layers.items()}
    assert all(float(update.E[-1].detach()) == 0 for update in updates)  # a silent reserve
    assert not any(update.scoring for update in updates)
    still = adapted.importance()
    run(adapted, optimizer, 1, first=9)
    assert adapted.importance() == still
    assert [group.get("added_at") for group in optimizer.param_groups] == [None, 0, 2, 4]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(p) for p in group["params"]] for group in adapted.param_groups(0.02)]
    everything = {id(p) for update in updates for p in update.parameters()} - {id(u.E[-1]) for u in updates}
    assert sorted(everything) == sorted(itertools.chain(*groups)) == sorted(map(id, adapted.trainable().values()))


def test_ties_all_grow_and_an_overshoot_ends_the_growth():
    adapted = line((6, 6, 6, 6), target_total=4, rank_step=2, top_h=1)
    optimizer = optimizer_of(adapted)
    run(adapted, optimizer, 2)
    adapted.shared.I.fill_(1.0)
    adapted.shared.U.fill_(1.0)
    for layer in adapted.layers.values():
        layer.update.score = torch.ones((), dtype=torch.float64)
    adapted.regularizer()
    adapted.step(optimizer)
    assert set(adapted.ranks().values()) == {3}  # 9 in all, beyond 4
    assert all(float(layer.update.E[-1].detach()) == 0 for layer in adapted.layers.values())
    run(adapted, optimizer, 4, first=2)
    assert adapted.total_rank == 9


def test_top_h_counts_layers_and_not_ranks():
    adapted = line((6, 6, 6, 6), target_rank=5, rank_step=3, top_h=2)
    run(adapted, optimizer_of(adapted), 3)
    assert sorted(adapted.ranks().values()) == [1, 4, 4]


def test_a_target_that_is_met_from_the_start_needs_no_scores():
    adapted = line(rank=2, target_rank=2)
    run(adapted, optimizer_of(adapted), 4)
    assert adapted.total_rank == 4
    assert all(layer.update.score is None for layer in adapted.layers.values())
    assert all(layer.delta().isfinite().all() for layer in adapted.layers.values())


def test_the_step_needs_the_optimizer():
    adapted = line()
    with pytest.raises(ValueError, match="optimizer"):
        adapted.step()
    adapted.merge()
    assert adapted.regularizer() == 0.0
    assert adapted.importance() == adapted.ranks() == {}


def test_the_regularizer_counts_the_reserve():
    adapted = line(orth_weight=0.5)
    run(adapted, optimizer_of(adapted), 1)
    want = 0.0
    for layer in adapted.layers.values():
        A, B = torch.cat(list(layer.update.A)).detach(), torch.cat(list(layer.update.B), 1).detach()
        assert A.shape[0] == 2
        want += float((A @ A.T - torch.eye(2)).norm() + (B.T @ B - torch.eye(2)).norm())
    assert float(adapted.regularizer().detach()) == pytest.approx(0.5 * want / 4)
    assert line(orth_weight=0.0).regularizer() == 0.0


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_saved_adapter_keeps_growing(advance, cut, tmp_path):
    options = {"target_rank": 3, "rank_step": 1, "advance_learn": advance}
    whole, part = line(**options), line(**options)
    base = {name: layer.base.state_dict() for name, layer in part.layers.items()}
    before = torch.random.get_rng_state()
    run(whole, (optimizer := optimizer_of(whole)), 10)
    run(part, (first := optimizer_of(part)), cut)
    part.save(tmp_path)
    with torch.random.fork_rng(devices=[]):
        plain = nn.Sequential(*(nn.Linear(n, out, dtype=torch.float64) for n, out in itertools.pairwise((6, 7, 5))))
    for name, state in base.items():
        plain[int(name)].load_state_dict(state)
    loaded = lowdim.load_adapter(plain, tmp_path)
    second = optimizer_of(loaded)
    second.load_state_dict(first.state_dict())
    run(loaded, second, 10 - cut, first=cut)
    want, got = whole.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())
    assert [g.get("added_at") for g in optimizer.param_groups] == [g.get("added_at") for g in second.param_groups]
    assert loaded.total_rank == 6
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_earlier_state_shrinks_the_lists_again():
    adapted = line(target_rank=3, rank_step=1)
    optimizer = optimizer_of(adapted)
    run(adapted, optimizer, 2)
    earlier, x = copy.deepcopy(adapted.model.state_dict()), torch.randn(3, 6, dtype=torch.float64)
    want, trained = adapted.model(x), list(adapted.trainable())
    run(adapted, optimizer, 6, first=2)
    assert adapted.total_rank > 2
    adapted.model.load_state_dict(earlier)  # as a trainer does that goes back to its best checkpoint
    assert torch.equal(adapted.model(x), want)
    assert adapted.total_rank == 2
    assert list(adapted.trainable()) == trained


def test_new_rows_come_from_the_seed_and_the_layer():
    rows = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        adapted = lowdim.adapt(model, IncreLoRA(), seed=seed)
        adapted.step(optimizer_of(adapted))
        rows.append([layer.update.A[-1].detach() for layer in adapted.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(rows[0], rows[1]))
    assert not torch.equal(rows[0][0], rows[2][0])
    assert not torch.equal(rows[0][0], rows[0][1])


def test_switching_adapters_leaves_the_reserve_frozen():
    adapters = AdapterSet(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    adapted = adapters.add("one", IncreLoRA())
    adapted.step(optimizer_of(adapted))
    adapters.activate("one", train=False)
    assert not any(p.requires_grad for p in adapters.model.parameters())
    adapters.activate("one")
    trained = [[p.requires_grad for p in update.E] for update in (layer.update for layer in adapted.layers.values())]
    assert trained == [[True, False]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_growth_in_other_dtypes(dtype):
    model = small_model(dtype=dtype)
    adapted = lowdim.adapt(model, IncreLoRA(rank_step=1, init_warmup=0, update_interval=1, top_h=1, alpha=8, orth_weight=0.0))
    optimizer = optimizer_of(adapted)
    for step in range(6):
        optimizer.zero_grad()
        model(sample_input(dtype=dtype, seed=step)).float().square().mean().backward()
        optimizer.step()
        adapted.step(optimizer)
    assert adapted.total_rank == 4
    assert {p.dtype for layer in adapted.layers.values() for p in layer.update.parameters()} == {dtype}
    assert all(value > 0 for value in adapted.importance().values())
    merged = copy.deepcopy(adapted.layers["body.first"]).merged()
    x = sample_input(dtype=dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2
    assert relative_error(merged(x), adapted.layers["body.first"](x)) <= tolerance


def test_a_grown_adapter_goes_to_peft_exactly(tmp_path):
    peft = pytest.importorskip("peft")
    model = small_model()
    adapted = lowdim.adapt(model, IncreLoRA(rank_step=1, init_warmup=0, update_interval=1, top_h=1, alpha=8, orth_weight=0.0))
    optimizer = optimizer_of(adapted)
    for step in range(6):
        optimizer.zero_grad()
        model(sample_input(seed=step)).square().mean().backward()
        optimizer.step()
        adapted.step(optimizer)
    report = adapted.export(tmp_path)
    assert report.exact
    assert report.ranks == adapted.ranks()  # without the silent reserve
    loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path)
    assert relative_error(loaded(sample_input()), model(sample_input())) <= 1e-5


def test_each_later_group_follows_its_own_schedule():
    adapted = line(target_rank=3, rank_step=1)
    optimizer = optimizer_of(adapted, lr=0.5)
    main = increlora_lr_lambda(2, 12, 0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, main)
    run(adapted, optimizer, 8, scheduler=scheduler, warmup=2, total=12)
    starts = [group.get("added_at", 0) for group in optimizer.param_groups]
    assert starts == [0, 0, 2, 4, 6]
    want = [0.5 * increlora_lr_lambda(2, 12, start)(8) for start in starts]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(want)
    assert want[-1] == 0.5
    resumed = line(target_rank=3, rank_step=1)
    resumed.model.load_state_dict(adapted.model.state_dict())
    fresh = optimizer_of(resumed, lr=0.5)
    follower = torch.optim.lr_scheduler.LambdaLR(fresh, main)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    follower.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    resumed.follow(follower, warmup=2, total=12)
    for each, how in ((adapted, (optimizer, scheduler)), (resumed, (fresh, follower))):
        run(each, how[0], 3, first=8, scheduler=how[1], warmup=2, total=12)
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in adapted.state_dict().items())


def test_other_schedulers_carry_later_groups_along():
    adapted = line()
    optimizer = optimizer_of(adapted, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    run(adapted, optimizer, 5, scheduler=scheduler, warmup=1, total=12)
    assert [g["lr"] for g in optimizer.param_groups][:2] == [0.125, 0.125]
    assert len(scheduler.base_lrs) == len(optimizer.param_groups) > 2


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "rank": [0, 1.0],
        "target_rank": [0, 2.5],
        "alpha": [float("nan")],
        "rank_step": [0],
        "top_h": [0],
        "init_warmup": [-1],
        "update_interval": [0],
        "beta1": [0.0, 1.0],
        "beta2": [0.0, 1.5],
        "orth_weight": [-0.1],
        "target_total": [0],
        "weight_decay": [-1.0],
    }.items(),
)
def test_bad_input(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            IncreLoRA(**{name: value})


def test_more_bad_input():
    with pytest.raises(ValueError, match="target_rank"):
        IncreLoRA(rank=3, target_rank=2)
    with pytest.raises(TypeError, match="Conv2d"):
        IncreLoRA().attach(nn.Conv2d(2, 2, 1))
    for bad in ((-1, 10, 0), (1, 0, 0), (1, 10, -1)):
        with pytest.raises(ValueError, match="must be"):
            increlora_lr_lambda(*bad)


def test_no_alpha_takes_the_rank():
    layer = nn.Linear(6, 6)
    assert IncreLoRA(rank=3, target_rank=3, alpha=0).attach(layer).update.scaling == pytest.approx(1.0, rel=1e-5)
    assert IncreLoRA(target_rank=6).attach(layer).update.rank_step == 3
    assert IncreLoRA(target_rank=1).attach(layer).update.rank_step == 1


def test_uncertainty_is_an_absolute_distance():
    """`U ← β2 U + (1−β2) |S − I|` with the new I: a score that falls is as uncertain as one that rises."""
    shared = line().shared
    I, U = [0.0, 0.0], [0.0, 0.0]
    for scores in ([4.0, 1.0], [1.0, 2.0], [0.5, 0.0]):
        shared.observe(torch.tensor(scores, dtype=torch.float64), 0.8, 0.6)
        I = [0.8 * i + 0.2 * s for i, s in zip(I, scores, strict=True)]
        U = [0.6 * u + 0.4 * abs(s - i) for u, i, s in zip(U, I, scores, strict=True)]
    assert shared.I.tolist() == pytest.approx(I)
    assert shared.U.tolist() == pytest.approx(U)
