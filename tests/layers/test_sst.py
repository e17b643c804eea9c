import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vectors
from lowdim.files import read_tensors, write_tensors
from lowdim.layers import SSTLinear, SSTScheduler, densify, swap_linear
from lowdim.linalg import stream
from lowdim.plan.kept import kept_tensors
from lowdim.testing.layer_case import LayerCase
from lowdim.testing.sharded_case import Subject


class TestSSTTall(LayerCase):
    layer_class = SSTLinear
    how = {"rank": 3}  # noqa: RUF012 (typed in the base class)
    lossless = {"rank": 5}  # noqa: RUF012

    # it keeps the frozen singular vectors, which are the layer's own; see test_keeps_input_and_hidden
    test_backward_keeps_no_dense_matrix = None  # type: ignore[assignment]

    def random(self, seed):
        return {**self.how, "seed": seed}

    def make(self, **options):
        """In the middle of training: the last directions are active, and the buffers are stale there."""
        layer = super().make(**options)
        if not layer.S.is_meta:
            layer.resample(indices=range(len(layer.S) - layer.rank, len(layer.S)))
            with torch.no_grad():
                for p in (layer.U_active, layer.Vh_active):
                    p.add_(torch.randn(p.shape, generator=stream(0, "moved", *p.shape)) / 10)
        return layer

    def dense(self, layer):
        """`U diag(S) Vh`, the active vectors in their columns and rows."""
        U = layer.U.index_copy(1, layer.active, layer.U_active)
        Vh = layer.Vh.index_copy(0, layer.active, layer.Vh_active)
        return U @ torch.diag(layer.S) @ Vh

    def exact(self, layer, x):
        """The enhanced gradient: `G v` for u and `uᵀ G` for v, without the factor S that the product's own would have."""
        u, v = layer.U_active, layer.Vh_active
        U, Vh = layer.U.index_copy(1, layer.active, u.detach()), layer.Vh.index_copy(0, layer.active, v.detach())
        only_gradient = (u - u.detach()) @ v.detach() + u.detach() @ (v - v.detach())  # its value is zero
        return F.linear(x, U @ torch.diag(layer.S) @ Vh + only_gradient, layer.bias)


class TestSSTWide(TestSSTTall):
    in_features, out_features = 20, 12


class TestSSTSquareAllActive(TestSSTTall):
    in_features, out_features = 8, 8
    how = {"rank": 8}  # noqa: RUF012


def gradients(layer, x, exact=False):
    x = x.clone().requires_grad_(True)
    y = F.linear(x, layer.dense_weight(), layer.bias) if exact else layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    loss = (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum()
    return dict(zip(("x", *names), torch.autograd.grad(loss, (x, *parameters)), strict=True))


# --- vectors ----------------------------------------------------------------------------------------------------------


def from_vectors(v):
    linear = nn.Linear(v.hyperparameters["in_features"], v.hyperparameters["out_features"], dtype=torch.float64)
    linear.load_state_dict({"weight": v["weight"], "bias": v["bias"]})
    layer = SSTLinear.from_linear(linear, rank=v.hyperparameters["rank"])
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize("case", ["tall", "wide"])
def test_vectors_at_the_start(case):
    v = vectors.load("sst", case)
    layer = from_vectors(v)
    v.close(layer.S, "singular_values")
    v.close(layer.sampling_probabilities(), "probabilities")
    layer.resample(indices=v["indices1"])
    v.close(layer.dense_weight(), "weight")
    x = v["x"].clone().requires_grad_(True)
    y = layer(x)
    v.close(y, "y")
    F.mse_loss(y, v["target"]).backward()
    v.close(x.grad, "grad_x")
    v.close(layer.S.grad, "grad_S")
    v.close(layer.U_active.grad @ layer.Vh_active, "grad_U_times_Vh")
    v.close(layer.U_active @ layer.Vh_active.grad, "grad_U_outer")


@pytest.mark.parametrize("case", ["tall", "wide"])
def test_vectors_after_each_step(case):
    v = vectors.load("sst", case)
    layer = from_vectors(v)
    optimizer = torch.optim.SGD([layer.S, layer.U_active, layer.Vh_active], lr=v.hyperparameters["lr"])
    weights = iter(v["weights_after"])
    for indices in (v["indices1"], v["indices2"]):
        layer.resample(indices=indices)
        for _ in range(v.hyperparameters["steps"]):
            optimizer.zero_grad()
            F.mse_loss(layer(v["x"]), v["target"]).backward()
            optimizer.step()
            layer.post_step()
            v.close(layer.dense_weight(), next(weights))
    before = layer.dense_weight().detach()
    layer.reinitialize()
    v.close(layer.S, "reinit_singular_values")
    v.close(layer.dense_weight(), before)
    assert layer.active.tolist() == sorted(v["indices2"].tolist())


def test_every_vector_is_checked():
    assert vectors.cases("sst") == ["lorentz", "tall", "wide"]  # the first in test_lorentz.py


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradcheck_passes_but_for_the_active_vectors():
    layer = SSTLinear(5, 4, rank=2, dtype=torch.float64)
    layer.resample(indices=[1, 3])
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def check(chosen):
        def run(x, *values):
            return torch.func.functional_call(layer, dict(zip(chosen, values, strict=True)), (x,))

        values = [layer.get_parameter(name).detach().clone().requires_grad_(True) for name in chosen]
        for name in set(names) - set(chosen):
            layer.get_parameter(name).requires_grad_(False)
        return torch.autograd.gradcheck(run, (x, *values), raise_exception=False)

    assert check(["S", "bias"])
    assert not check(["U_active"])
    assert not check(["Vh_active"])


def test_small_singular_values_learn_as_fast_as_large_ones():
    """A direction without any weight gets the same gradient as if it had some."""
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    want = torch.ones(4, 5, dtype=torch.float64)
    layer(x).backward(want)
    first = {name: p.grad for name, p in layer.named_parameters() if name != "S"}
    layer.zero_grad()
    with torch.no_grad():
        layer.S[:2] = 0
    layer(x).backward(want)
    for name, grad in first.items():
        assert torch.equal(layer.get_parameter(name).grad, grad), name
    assert bool(first["U_active"].any())


@pytest.mark.parametrize("frozen", ["S", "U_active", "Vh_active", "bias", "x"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    want = gradients(layer, x)
    if frozen != "x":
        layer.get_parameter(frozen).requires_grad_(False)
    x.requires_grad_(frozen != "x")
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert (tensor.grad is None) if name == frozen else torch.equal(tensor.grad, want[name]), name


def test_keeps_input_and_hidden():
    """Nothing else, and only what the trained parameters need; under autocast the rounded ones."""
    layer, x = SSTLinear(8, 6, rank=2), torch.randn(3, 5, 8)

    def kept():
        return sorted((tuple(t.shape), t.dtype) for t in kept_tensors(lambda: layer(x), layer))

    assert kept() == [((15, 6), torch.float32), ((15, 8), torch.float32)]
    assert any(t.data_ptr() == x.data_ptr() for t in kept_tensors(lambda: layer(x), layer)), "the input is copied"
    with torch.autocast("cpu", torch.bfloat16):
        assert kept() == [((15, 6), torch.bfloat16), ((15, 8), torch.bfloat16)]
    layer.Vh_active.requires_grad_(False)
    assert kept() == [((15, 6), torch.float32)]
    layer.S.requires_grad_(False)
    layer.U_active.requires_grad_(False)
    assert kept() == []


def test_a_step_between_forward_and_backward_is_noticed():
    layer = SSTLinear(6, 5, rank=2)
    for change in (layer.post_step, layer.reinitialize, layer.resample):
        y = layer(torch.ones(2, 6, requires_grad=True))
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_bits(reentrant):
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x.grad = None
        layer.zero_grad()
        run(x.requires_grad_(True)).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_gradients_are_near_the_exact_ones():
    layer, x = SSTLinear(12, 20, rank=3), torch.randn(6, 12)
    layer.resample(indices=[0, 4, 9])
    want = gradients(layer, x)
    x = x.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()  # as some loops do: inside
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert float((tensor.grad - want[name]).norm() / want[name].norm()) < 0.02, name


def test_parameters_in_lower_precision_than_the_buffers():
    """As FSDP2's mixed precision hands them over."""
    layer, x = SSTLinear(12, 20, rank=3), torch.randn(6, 12)
    want, y = gradients(layer, x), layer(x).detach()
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach().bfloat16()))
    low = layer(x.bfloat16()).detach()
    assert low.dtype == torch.bfloat16
    assert float((low - y).norm() / y.norm()) < 0.02
    for name, grad in gradients(layer, x.bfloat16()).items():
        assert grad.dtype == torch.bfloat16
        assert float((grad - want[name]).norm() / want[name].norm()) < 0.02, name


def test_inference_is_the_same_product():
    layer, x = SSTLinear(6, 5, rank=2), torch.randn(4, 6)
    layer.resample(indices=[0, 3])
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone().requires_grad_(True)))
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x))


def test_compiles_to_the_same_gradients():
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    want = gradients(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x.requires_grad_(True)
    y = compiled(x)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert float((tensor.grad - want[name]).abs().max()) < 1e-12, name


# --- parameters and buffers -------------------------------------------------------------------------------------------


def spoil(layer):
    """The buffers' active columns hold something else, as after optimizer steps."""
    with torch.no_grad():
        layer.U.index_fill_(1, layer.active, 7.0)
        layer.Vh.index_fill_(0, layer.active, -3.0)


def test_the_parameters_are_the_truth():
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    layer.resample(indices=[1, 4])
    y, weight, grads = layer(x), layer.dense_weight(), gradients(layer, x)
    spoil(layer)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.dense_weight(), weight)
    assert all(torch.equal(value, grads[name]) for name, value in gradients(layer, x).items())
    layer.write_back()
    assert torch.equal(layer.U[:, layer.active], layer.U_active)
    assert torch.equal(layer.Vh[layer.active], layer.Vh_active)


@pytest.mark.parametrize("change", ["write_back", "resample", "reinitialize"])
def test_the_dense_weight_does_not_change(change):
    layer = trained(SSTLinear(9, 7, rank=3, dtype=torch.float64))
    spoil(layer)
    weight = layer.dense_weight().detach()
    getattr(layer, change)()
    assert torch.allclose(layer.dense_weight(), weight, rtol=0, atol=1e-13)


def trained(layer, steps=6):
    """Far enough for the vectors to lose their orthogonality."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(steps):
        x = torch.randn(8, layer.in_features, generator=stream(0, "trained", step), dtype=torch.float64).to(layer.S.dtype)
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        layer.post_step()
    return layer


def orthogonality(layer):
    layer.write_back()
    eye = torch.eye(layer.S.numel(), dtype=torch.float64)
    return max(
        float((layer.U.double().mT @ layer.U.double() - eye).abs().max()), float((layer.Vh @ layer.Vh.mT - eye).abs().max())
    )


def test_orthogonality_is_lost_in_training_and_restored():
    layer = trained(SSTLinear(9, 7, rank=3, dtype=torch.float64))
    assert orthogonality(layer) > 1e-3
    assert not torch.allclose(layer.S.sort(descending=True).values, torch.linalg.svdvals(layer.dense_weight()), atol=1e-3)
    layer.resample(indices=[1, 2, 5])
    layer.reinitialize()
    assert orthogonality(layer) < 1e-13
    assert torch.allclose(layer.S, torch.linalg.svdvals(layer.dense_weight()), atol=1e-13)
    assert layer.active.tolist() == [1, 2, 5]


def test_post_step_clips_and_normalises_what_is_active():
    layer = SSTLinear(6, 5, rank=2, dtype=torch.float64)
    layer.resample(indices=[1, 3])
    with torch.no_grad():
        layer.S[2] = -0.5
        layer.S[1] = -0.1
        layer.U_active *= 3
        layer.Vh_active[0] *= 0.2
        layer.Vh_active[1] = 0
        layer.U[:, 0] *= 2
    S, U = layer.S.detach().clone(), layer.U.clone()
    layer.post_step()
    assert torch.equal(layer.S, S.clamp(min=0))
    assert torch.allclose(layer.U_active.norm(dim=0), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(layer.Vh_active.norm(dim=1), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.equal(layer.U, U), "frozen vectors are not touched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_through_a_round(dtype):
    """The decomposition runs in float32, and the round trip loses no more than rounding its factors does."""
    layer = SSTLinear(24, 16, rank=4, dtype=dtype)
    weight = layer.dense_weight().detach().float()
    for index in range(3):
        layer.resample(indices=range(index, index + 4))
        layer.post_step()
        layer.reinitialize()
    assert {t.dtype for t in layer.state_dict().values()} == {dtype, torch.int64}
    error = float((layer.dense_weight().detach().float() - weight).norm() / weight.norm())
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    layer.post_step()
    length = layer.U_active.detach().float().norm(dim=0)
    assert float((length - 1).abs().max()) < 4 * torch.finfo(dtype).eps


def test_state_dict_carries_all(tmp_path):
    layer = trained(SSTLinear(9, 7, rank=3, dtype=torch.float32, seed=1))
    layer.resample(indices=[0, 4, 6])
    trained(layer)
    assert set(layer.state_dict()) == {"S", "U_active", "Vh_active", "bias", "U", "Vh", "active"}
    write_tensors(tmp_path / "layer.safetensors", layer.state_dict())
    other = SSTLinear(9, 7, rank=3, seed=2)
    other.load_state_dict(read_tensors(tmp_path / "layer.safetensors")[0])
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    for one in (layer, other):
        one.resample(generator=torch.Generator().manual_seed(5))
        one.reinitialize()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())


def test_shapes_and_first_active():
    layer = SSTLinear(6, 9, rank=2)
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    want = {"S": (6,), "U_active": (9, 2), "Vh_active": (2, 6), "bias": (9,), "U": (9, 6), "Vh": (6, 6), "active": (2,)}
    assert shapes == want
    assert layer.active.tolist() == [0, 1]
    assert "rank=2" in repr(layer)
    trainable = sum(p.numel() for p in layer.parameters()) - 9
    assert trainable == 2 * (6 + 9) + 6


def test_fresh_weight_is_that_of_a_plain_layer():
    layer = SSTLinear(400, 60, rank=4, seed=3)
    weight = layer.dense_weight().detach()
    assert 0.99 / 20 < float(weight.abs().max()) <= 1 / 20 + 1e-6
    assert abs(float(weight.std()) * 20 * 3**0.5 - 1) < 0.02
    assert 0.9 / 20 < float(layer.bias.detach().abs().max()) <= 1 / 20
    assert torch.linalg.matrix_rank(weight) == 60


def test_seeds():
    one, two, other = (SSTLinear(6, 5, rank=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.dense_weight(), two.dense_weight())
    assert not torch.equal(one.dense_weight(), other.dense_weight())
    first = []
    for layer in (one, two):
        draws = []
        for _ in range(6):
            layer.resample()
            draws.append(layer.active.tolist())
        first.append(draws)
    assert first[0] == first[1]
    assert len({tuple(draw) for draw in first[0]}) > 1
    unseeded = [SSTLinear(6, 5, rank=2, seed=None) for _ in range(2)]
    assert not torch.equal(unseeded[0].dense_weight(), unseeded[1].dense_weight())
    torch.manual_seed(0)
    unseeded[0].resample()
    assert len(unseeded[0].active.unique()) == 2


def test_layers_of_a_model_start_differently():
    model = swap_linear(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), SSTLinear, ["0", "2"], fresh=True, rank=2, seed=0
    )
    assert not torch.equal(model[0].dense_weight(), model[2].dense_weight())
    x = torch.randn(3, 6)
    y = model(x).detach()
    assert torch.allclose(densify(model)(x), y, atol=1e-5)


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


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_probabilities_by_hand():
    layer = SSTLinear(3, 4, rank=1, dtype=torch.float64)
    with torch.no_grad():
        layer.S.copy_(torch.tensor([3.0, 1.0, 0.0]))
    assert torch.allclose(layer.sampling_probabilities(), torch.tensor([13 / 24, 7 / 24, 4 / 24], dtype=torch.float64))
    with torch.no_grad():
        layer.S.copy_(torch.tensor([3.0, 1.0, -1.0]))  # before post_step
    assert torch.allclose(layer.sampling_probabilities(), torch.tensor([13 / 24, 7 / 24, 4 / 24], dtype=torch.float64))


def test_all_clipped_means_uniform():
    layer = SSTLinear(3, 4, rank=2)
    with torch.no_grad():
        layer.S.zero_()
    assert torch.allclose(layer.sampling_probabilities(), torch.full((3,), 1 / 3))
    layer.resample()
    layer.reinitialize()
    assert float(layer.dense_weight().detach().abs().max()) == 0


def test_draws_follow_the_probabilities():
    layer = SSTLinear(4, 4, rank=1)
    with torch.no_grad():
        layer.S.copy_(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(2000):
        layer.resample(generator)
        counts[layer.active] += 1
    assert float((counts / 2000 - layer.sampling_probabilities()).abs().max()) < 0.04


def test_draws_are_distinct_and_ascending():
    layer = SSTLinear(7, 9, rank=5)
    for seed in range(20):
        layer.resample(torch.Generator().manual_seed(seed))
        assert bool((layer.active.diff() > 0).all())
    layer.resample(indices=torch.tensor([6, 0, 3, 2, 1]))
    assert layer.active.tolist() == [0, 1, 2, 3, 6]
    assert torch.equal(layer.U_active, layer.U[:, layer.active])


# --- scheduler --------------------------------------------------------------------------------------------------------


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


# --- spread over processes --------------------------------------------------------------------------------------------


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


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 6, 2.0, True, None])
def test_bad_rank(rank):
    for make in (lambda: SSTLinear(6, 5, rank=rank), lambda: SSTLinear.from_linear(nn.Linear(6, 5), rank=rank)):
        with pytest.raises(ValueError, match=r"rank must be an int in \[1, 5\]; got"):
            make()


@pytest.mark.parametrize("indices", [[1], [1, 1], [0, 5], [-1, 0], [0, 1, 2], [0.0, 1.0], [True, 0], torch.tensor([0.5, 1.0])])
def test_bad_indices(indices):
    layer = SSTLinear(6, 5, rank=2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"indices must be 2 distinct ints in \[0, 5\); got"):
        layer.resample(indices=indices)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("seed", [-1, 1.5, "0"])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed must be an int >= 0; got"):
        SSTLinear(6, 5, rank=2, seed=seed)


@pytest.mark.parametrize(
    ("name", "value"), [("steps_per_iteration", 0), ("iterations_per_round", 0), ("warmup", -1), ("warmup", 0.5), ("seed", "a")]
)
def test_bad_scheduler_settings(name, value):
    layer = SSTLinear(6, 5, rank=2)
    with pytest.raises(ValueError, match=f"{name} must be an int >= .; got"):
        SSTScheduler(layer, torch.optim.SGD(layer.parameters()), **{name: value})


def test_bad_scheduler_state_and_model():
    layer = SSTLinear(6, 5, rank=2)
    turn = SSTScheduler(layer, torch.optim.SGD(layer.parameters()))
    for state in ({}, {"steps": -1}, {"steps": "3"}):
        with pytest.raises(ValueError, match="steps must be an int >= 0; got"):
            turn.load_state_dict(state)
    plain = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="model must have a layer of type SSTLinear; Linear has none"):
        SSTScheduler(plain, torch.optim.SGD(plain.parameters()))


def test_reinitialize_refuses_nan():
    layer = SSTLinear(6, 5, rank=2)
    with torch.no_grad():
        layer.S[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.reinitialize()
