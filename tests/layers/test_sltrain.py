import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import vectors
from lowdim.files import read_tensors, write_tensors
from lowdim.layers import SLTrainLinear, densify, swap_linear
from lowdim.layers.sltrain import _sample, _thin
from lowdim.linalg import stream
from lowdim.optim import Restart
from lowdim.plan.kept import kept_bytes
from lowdim.testing.layer_case import LayerCase
from lowdim.testing.sharded_case import Subject

ROWS = 100  # more than enough that W itself is built


class TestSLTrain(LayerCase):
    layer_class = SLTrainLinear
    how = {"rank": 3, "density": 0.1, "alpha": 6.0}  # noqa: RUF012 (typed in the base class)
    lossless = {"rank": 12, "density": 0.01}  # noqa: RUF012

    # the product is fitted first and the sparse part second, not both together
    test_from_linear_keeps_what_it_can = None  # type: ignore[assignment]
    test_from_linear_is_stationary = None  # type: ignore[assignment]

    def dense(self, layer):
        """`alpha / rank · B A`, and the values at their flat row-major positions."""
        sparse = torch.zeros(self.out_features * self.in_features, dtype=layer.values.dtype)
        sparse = sparse.index_put((layer.indices.long(),), layer.values).view(self.out_features, self.in_features)
        return self.how["alpha"] / self.how["rank"] * (layer.B @ layer.A) + sparse

    def make(self, **how):
        layer = super().make(**how)
        if not layer.B.is_meta:  # a fresh one is zero, and then A has no gradient
            with torch.no_grad():
                layer.B.copy_(torch.randn(layer.B.shape, generator=stream(how.get("seed", 0), "B")) / 2)
        return layer

    def test_cost_is_what_runs(self):
        """For few rows, where it grows with them, and for many, where `B A` comes once."""
        layer = self.make(dtype=torch.float32)
        assert [_thin(rows, self.in_features, self.out_features) for rows in (3, ROWS)] == [True, False]
        for rows in (0, 3, 7, 8, ROWS):
            x = LayerCase.rows(self, rows, dtype=torch.float32).requires_grad_(True)
            cost = layer.cost(rows)
            assert all(type(number) is int for number in cost)
            assert cost.parameters == sum(p.numel() for p in layer.parameters())
            with FlopCounterMode(display=False) as counter:
                y = layer(x)
            assert counter.get_total_flops() == cost.flops_forward
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
            assert counter.get_total_flops() == cost.flops_backward
        support = layer.indices.nbytes
        full, half = layer.cost(ROWS), layer.cost(ROWS, itemsize=2)
        assert full.bytes_forward - support == 2 * (half.bytes_forward - support)
        assert full.bytes_backward - 2 * support == 2 * (half.bytes_backward - 2 * support)


class TestSLTrainTall(TestSLTrain):
    in_features, out_features = 20, 12


class TestSLTrainManyRows(TestSLTrain):
    """The same with inputs of so many rows that the other way of computing is taken."""

    def rows(self, *lead, dtype=torch.float64):
        lead = tuple(ROWS if n == 3 else n for n in lead)
        return super().rows(*lead, dtype=dtype)

    def test_backward_keeps_no_dense_matrix(self):
        layer, kept = self.make(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            layer(self.rows(3).requires_grad_(True))
        assert sorted(kept) == sorted([(ROWS, 12), (3, 12), (20, 3), (24,), (24,)])


class TestSLTrainHalfIndices(TestSLTrain):
    how = {"rank": 2, "density": 0.3, "alpha": 2.0, "index_dtype": torch.int32}  # noqa: RUF012


def official(case, **more):
    v = vectors.load("sltrain", case)
    how = {name: v.hyperparameters[name] for name in ("in_features", "out_features", "rank", "alpha", "density", "bias")}
    layer = SLTrainLinear(**how, indices=v["indices"], dtype=torch.float64, **more)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(v[name])
    return v, layer


@pytest.mark.parametrize("repeat", [1, 20])
@pytest.mark.parametrize("case", vectors.cases("sltrain"))
def test_official_pass(case, repeat):
    """With so many copies of the rows that W is built, and as it is."""
    v, layer = official(case)
    assert layer.values.numel() == int(layer.density * layer.in_features * layer.out_features)
    assert layer.scaling == v.hyperparameters["alpha"] / v.hyperparameters["rank"]
    v.close(layer.dense_weight(), "dense_weight")
    x = v["x"].repeat(repeat, 1, 1).requires_grad_(True)
    assert _thin(10 * repeat, layer.in_features, layer.out_features) is (case == "basic" and repeat == 1 and 10 * 17 < 70)
    y = layer(x)
    v.close(y[:2], "y")
    F.mse_loss(y, v["target"].repeat(repeat, 1, 1)).backward()
    v.close(x.grad[:2] * repeat, "grad_x")
    for name, parameter in layer.named_parameters():
        v.close(parameter.grad, f"grad_{name}")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", vectors.cases("sltrain"))
def test_official_training(case, split):
    """Also row by row: gradients of ten passes of one row are those of one pass of ten."""
    v, layer = official(case)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=v.hyperparameters["lr"], weight_decay=0.0)
    for _ in range(v.hyperparameters["steps"]):
        parts = zip(v["x"].flatten(0, 1), v["target"].flatten(0, 1), strict=True) if split else [(v["x"], v["target"])]
        for x, target in parts:
            (F.mse_loss(layer(x), target) / (10 if split else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("A", "B", "values"):
        v.close(getattr(layer, name), f"{name}_after")


def test_fresh_numbers():
    layer = SLTrainLinear(400, 300, rank=8)
    for tensor in (layer.A, layer.values, layer.bias):
        assert 0.95 / 20 < float(tensor.detach().abs().max()) <= 1 / 20
        assert abs(float(tensor.detach().mean())) < 0.005
    assert not bool(layer.B.any())
    assert layer.values.shape == layer.indices.shape == (3600,)
    assert layer.scaling == 4.0
    assert layer.indices.dtype == torch.int64


def test_the_weight_has_full_rank():
    assert int(torch.linalg.matrix_rank(SLTrainLinear(40, 40, rank=1, density=0.2).dense_weight().detach())) == 40


@pytest.mark.parametrize(
    ("total", "count"), [(1000, 30), (1000, 249), (1000, 251), (1000, 999), (7, 1), (7, 0), (100_000, 3000)]
)
def test_support_is_ascending_and_distinct(total, count):
    drawn = _sample(total, count, stream(0, "test"))
    assert drawn.shape == (count,)
    assert drawn.dtype == torch.int64
    assert bool((drawn[1:] > drawn[:-1]).all())
    assert count == 0 or 0 <= int(drawn[0]) <= int(drawn[-1]) < total


@pytest.mark.parametrize("count", [2, 5])
def test_every_support_is_as_likely(count):
    """Chi-square over single positions and over neighbouring pairs of 12, by both ways of drawing."""
    generator, single, pairs, draws = stream(1, "test"), torch.zeros(12), torch.zeros(12), 3000
    for _ in range(draws):
        taken = torch.zeros(12)
        taken[_sample(12, count, generator)] = 1
        single += taken
        pairs += taken * taken.roll(1)
    for found, p in ((single, count / 12), (pairs, count * (count - 1) / (12 * 11))):
        deviation = (found - draws * p) / (draws * p * (1 - p)) ** 0.5
        assert float(deviation.abs().max()) < 4


def test_seed_decides_support_and_numbers():
    one, two, three = (SLTrainLinear(30, 20, rank=2, seed=s) for s in (5, 5, 6))
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.values, two.values)
    assert not torch.equal(one.indices, three.indices)
    assert not torch.equal(one.A, three.A)
    half = SLTrainLinear(30, 20, rank=2, seed=5, dtype=torch.bfloat16, index_dtype=torch.int32)
    assert torch.equal(half.indices.long(), one.indices)
    assert torch.equal(half.A, one.A.bfloat16())
    with torch.no_grad():
        two.values.zero_()
    two.reset_parameters()
    assert torch.equal(one.values, two.values)


def test_no_seed_draws_one():
    torch.manual_seed(0)
    layers = [SLTrainLinear(30, 20, rank=2, seed=None) for _ in range(2)]
    assert not torch.equal(layers[0].indices, layers[1].indices)
    torch.manual_seed(0)
    assert torch.equal(SLTrainLinear(30, 20, rank=2, seed=None).indices, layers[0].indices)


def test_layers_of_a_model_differ():
    model = swap_linear(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), SLTrainLinear, fresh=True, rank=2, seed=0)
    assert not torch.equal(model[0].A, model[1].A)


# Checkpoints.


def test_checkpoint_holds_the_seed_and_not_the_support():
    layer = SLTrainLinear(30, 20, rank=2, seed=7)
    state = layer.state_dict()
    assert set(state) == {"A", "B", "values", "bias", "_extra_state"}
    assert state["_extra_state"].nbytes == 8
    other = SLTrainLinear(30, 20, rank=2, seed=8)
    other.load_state_dict(state)
    assert torch.equal(other.indices, layer.indices)
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    other.reset_parameters()
    assert torch.equal(other.values, layer.values)


@pytest.mark.parametrize("given", [False, True])
def test_given_support_is_saved(given, tmp_path):
    """Through a file, into a layer of either kind, and back."""
    v, layer = official("basic")
    write_tensors(tmp_path / "layer.safetensors", layer.state_dict())
    assert "indices" in layer.state_dict()
    indices = torch.arange(10) if given else None
    other = SLTrainLinear(10, 7, rank=3, density=0.15, alpha=6, indices=indices, dtype=torch.float64)
    before = copy.deepcopy(other)
    assert ("indices" in other.state_dict()) is given
    other.load_state_dict(read_tensors(tmp_path / "layer.safetensors")[0])
    assert torch.equal(other.indices, v["indices"])
    v.close(other.dense_weight(), "dense_weight")
    assert "indices" in other.state_dict()
    other.load_state_dict(before.state_dict())
    assert torch.equal(other.indices, before.indices)
    assert set(other.state_dict()) == set(before.state_dict())
    other.reset_parameters()
    assert torch.equal(other.indices, before.indices)


def test_numbers_alone_load_where_the_support_was_given():
    v, layer = official("basic")
    numbers = {name: v[name] for name in ("A", "B", "values", "bias")}
    layer.load_state_dict(numbers)
    assert torch.equal(layer.indices, v["indices"])
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        SLTrainLinear(10, 7, rank=3, density=0.15, dtype=torch.float64).load_state_dict(numbers)
    del numbers["values"]
    with pytest.raises(RuntimeError, match=r"Missing key.*values"):
        layer.load_state_dict(numbers)


def test_a_damaged_support_is_refused():
    _, layer = official("basic")
    before, state = copy.deepcopy(layer.state_dict()), layer.state_dict()
    state["indices"] = state["indices"].flip(0)
    with pytest.raises(RuntimeError, match="indices must be strictly increasing"):
        layer.load_state_dict(state)
    assert torch.equal(layer.indices, before["indices"])
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        layer.load_state_dict(SLTrainLinear(10, 7, rank=3, density=0.3).state_dict())


def test_a_model_built_without_memory_is_filled_from_a_checkpoint():
    layer = SLTrainLinear(30, 20, rank=2, seed=3)
    with torch.device("meta"):
        blank = SLTrainLinear(30, 20, rank=2)
    blank.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(4, 30)
    assert torch.equal(blank(x), layer(x))


# Training.


def test_values_alone_move_in_the_first_step():
    """B = 0: A has no gradient at first; then everything moves."""
    layer, x = SLTrainLinear(12, 8, rank=2, density=0.2), torch.randn(30, 12)
    layer(x).square().mean().backward()
    assert not bool(layer.A.grad.any())
    assert bool(layer.values.grad.any())
    assert bool(layer.B.grad.any())
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.zero_grad()
    layer(x).square().mean().backward()
    assert bool(layer.A.grad.any())


def test_the_scale_acts_on_the_product_alone():
    layer = SLTrainLinear(6, 5, rank=2, density=0.3, alpha=2, bias=False)
    other = SLTrainLinear(6, 5, rank=2, density=0.3, alpha=8, bias=False)
    assert torch.equal(layer.dense_weight(), other.dense_weight())  # B is zero
    x = torch.randn(50, 6)
    layer(x).sum().backward()
    other(x).sum().backward()
    torch.testing.assert_close(other.B.grad, 4 * layer.B.grad)
    torch.testing.assert_close(other.values.grad, layer.values.grad)


@pytest.mark.parametrize("rows", [2, ROWS])
@pytest.mark.parametrize("frozen", [(), ("values",), ("A", "B"), ("A",), ("B", "values", "bias"), ("A", "B", "values", "bias")])
def test_frozen_parts(frozen, rows):
    layer = SLTrainLinear(12, 8, rank=2, density=0.2, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
    x = torch.randn(rows, 12, dtype=torch.float64)
    want = torch.autograd.grad(F.linear(x, layer.dense_weight(), layer.bias).square().sum(), list(layer.parameters()))
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    if len(frozen) == 4:
        assert not layer(x).requires_grad
        x.requires_grad_(True)
        assert kept_bytes(layer, x) == 0  # nothing but the layer's own numbers
        assert torch.autograd.grad(layer(x).sum(), x)[0].shape == x.shape
        return
    layer(x).square().sum().backward()
    for (name, parameter), grad in zip(layer.named_parameters(), want, strict=True):
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reentrant", [False, True])
def test_used_twice_and_checkpointed(reentrant):
    layer = SLTrainLinear(10, 10, rank=2, density=0.2, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
    x = torch.randn(30, 10, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(layer(x).tanh()).square().sum(), (x, *layer.parameters()))
    layer(checkpoint(lambda t: layer(t).tanh(), x, use_reentrant=reentrant)).square().sum().backward()
    for got, want in zip((x, *layer.parameters()), plain, strict=True):
        torch.testing.assert_close(got.grad, want)


def test_backward_under_autocast_stays_in_the_layers_dtype():
    layer, x = SLTrainLinear(12, 8, rank=2, density=0.2), torch.randn(ROWS, 12)
    want = torch.autograd.grad(layer(x).square().sum(), layer.values)[0]
    y = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward()
    assert torch.equal(layer.values.grad, want)


def test_autocast_leaves_float64():
    layer, x = SLTrainLinear(12, 8, rank=2, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float64


def test_keeps_the_input_and_its_own_numbers():
    layer, x = SLTrainLinear(64, 64, rank=2, density=0.05), torch.randn(ROWS, 64, requires_grad=True)
    assert kept_bytes(layer, x) == x.nbytes


def test_fake_tensors():
    with FakeTensorMode():
        layer = SLTrainLinear(4096, 11008, rank=8, generator=torch.Generator())
        y = layer(torch.empty(2, 4096, requires_grad=True))
        y.sum().backward()
        assert layer.values.grad.shape == layer.indices.shape == (int(0.03 * 4096 * 11008),)
        assert SLTrainLinear.from_linear(nn.Linear(30, 20), rank=2).values.shape == (18,)


def test_functional_gradients_and_compiling():
    layer, x = SLTrainLinear(12, 8, rank=2, density=0.2), torch.randn(5, 12)
    numbers = dict(layer.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(numbers)
    y = torch.compile(layer, backend="aot_eager")(x)
    assert torch.equal(y, layer(x))
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_a_second_derivative_is_refused():
    layer = SLTrainLinear(6, 5, rank=2, density=0.3)
    grads = torch.autograd.grad(layer(torch.randn(3, 6)).square().sum(), layer.values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


# From trained layers, and refactorizing.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_from_linear_fits_the_product_and_then_the_support(dtype):
    linear = nn.Linear(14, 11, dtype=dtype)
    layer = SLTrainLinear.from_linear(linear, rank=3, density=0.2, alpha=6, seed=4)
    weight, product = linear.weight.detach().double(), 2 * (layer.B.double() @ layer.A.double()).detach()
    u, s, vh = torch.linalg.svd(weight)
    near = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(product, u[:, :3] * s[:3] @ vh[:3], atol=near, rtol=0)
    for gram in (layer.A.double() @ layer.A.double().mT, layer.B.double().mT @ layer.B.double()):
        torch.testing.assert_close(gram.detach(), torch.diag(s[:3] / 2), atol=near, rtol=0)
    exact = layer.dense_weight().detach().double().flatten()[layer.indices]
    torch.testing.assert_close(exact, weight.flatten()[layer.indices], atol=near / 5, rtol=0)
    assert torch.equal(layer.indices, SLTrainLinear(14, 11, rank=3, density=0.2, seed=4).indices)
    assert torch.equal(layer.bias, linear.bias)


def test_refactorize_touches_the_product_alone():
    layer = SLTrainLinear(14, 11, rank=3, density=0.2, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
    before, parameters = copy.deepcopy(layer), list(layer.parameters())
    layer.refactorize()
    torch.testing.assert_close(layer.dense_weight(), before.dense_weight(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.A @ layer.A.mT, layer.B.mT @ layer.B, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.values, before.values)
    assert not torch.equal(layer.A, before.A)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))


def test_refactorize_leaves_a_fresh_layer():
    """B = 0: with √0 in both factors neither would ever move again."""
    layer = SLTrainLinear(14, 11, rank=3)
    before = copy.deepcopy(layer)
    layer.refactorize()
    assert torch.equal(layer.A, before.A)
    assert not bool(layer.B.any())


def test_densify_gives_the_same_function():
    model = nn.Sequential(SLTrainLinear(12, 8, rank=2, density=0.2))
    x = torch.randn(3, 12)
    y = model(x)
    torch.testing.assert_close(densify(model)(x), y)
    assert type(model[0]) is nn.Linear


# Sizes and bad input.


@pytest.mark.parametrize("rows", [2, ROWS])
def test_no_entry_on_the_support(rows):
    layer = SLTrainLinear(5, 4, rank=2, density=0.01)  # int(0.2) = 0 entries
    assert layer.values.shape == (0,)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        layer(torch.randn(rows, 5)).square().sum().backward()
        optimizer.step()
    assert layer.values.grad.shape == (0,)
    assert bool(layer.B.any())


def test_cost_by_hand():
    layer = SLTrainLinear(8, 16, rank=2, density=0.25)  # P = 48, nnz = 32, 128 entries
    few, many = layer.cost(3), layer.cost(100)
    assert few.parameters == many.parameters == 48 + 32 + 16
    assert few.flops_forward == 2 * 3 * (48 + 128)
    assert many.flops_forward == 2 * 128 * 2 + 2 * 100 * 128
    assert many.flops_backward == 3 * (2 * 128 * 2) + 2 * (2 * 100 * 128)
    assert many.bytes_forward == 4 * (100 * 24 + 48 + 3 * 32 + 2 * 128) + 8 * 32


def test_prints_its_sizes():
    assert "in_features=8, out_features=6, bias=False, rank=2, density=0.2, alpha=32" in repr(
        SLTrainLinear(8, 6, bias=False, rank=2, density=0.2)
    )


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rank": 0}, r"rank must be an int in \[1, 4\]; got 0"),
        ({"rank": 5}, r"rank must be an int in \[1, 4\]; got 5"),
        ({"rank": 2.0}, r"rank must be an int in \[1, 4\]; got 2.0"),
        ({"density": 0.0}, r"density must be a finite number in \(0, 1\); got 0.0"),
        ({"density": 1.0}, r"density must be a finite number in \(0, 1\); got 1.0"),
        ({"density": float("nan")}, "density must be a finite number"),
        ({"alpha": 0.0}, "alpha must be a finite number"),
        ({"seed": -1}, "seed must be an int"),
        ({"seed": 0.5}, "seed must be an int"),
        ({"seed": 2**63}, "seed must be an int"),
        ({"index_dtype": torch.int16}, "index_dtype must be torch.int64, or torch.int32 .* got torch.int16"),
        ({"indices": torch.tensor([1, 2, 2])}, r"indices must be strictly increasing in .* entry 2 is not above"),
        ({"indices": torch.tensor([3, 1])}, r"indices must be strictly increasing in .* entry 1 is not above"),
        ({"indices": torch.tensor([-1, 1])}, r"= \[0, 24\); got -1 … 1"),
        ({"indices": torch.tensor([3, 24])}, r"= \[0, 24\); got 3 … 24"),
    ],
)
def test_bad_hyperparameters(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SLTrainLinear(6, 4, **{"rank": 2, **kwargs})


def test_int32_cannot_count_so_far():
    how = {"rank": 1, "density": 1e-9, "device": "meta"}
    with pytest.raises(ValueError, match="where out · in < 2"):
        SLTrainLinear(2**16, 2**15, index_dtype=torch.int32, **how)
    assert SLTrainLinear(2**16, 2**15 - 1, index_dtype=torch.int32, **how).indices.dtype == torch.int32


@pytest.mark.parametrize("indices", [[1, 2], torch.tensor([[1, 2]]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])])
def test_what_is_no_support(indices):
    with pytest.raises(TypeError, match=r"indices must be a tensor \(nnz,\) of int64 or int32; got"):
        SLTrainLinear(6, 4, rank=2, indices=indices)


def test_the_given_support_is_not_shared():
    indices = torch.tensor([1, 5])
    layer = SLTrainLinear(6, 4, rank=2, indices=indices)
    indices.zero_()
    assert layer.indices.tolist() == [1, 5]
    assert layer.density == 2 / 24


# FSDP2.


def sharded_net():
    """Supports by seed and given, sides that two does not divide."""
    first = SLTrainLinear(7, 18, rank=3, density=0.2, alpha=3, seed=1, dtype=torch.float64)
    second = SLTrainLinear(18, 9, rank=3, alpha=3, indices=torch.arange(0, 160, 5), seed=2, dtype=torch.float64)
    return nn.Sequential(first, nn.Tanh(), second)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.05)


SHARDED = {
    "sltrain": Subject(net=sharded_net, optimizer=adamw),
    "sltrain with restarts": Subject(
        net=sharded_net, optimizer=adamw, companion=lambda net, optimizer: Restart(optimizer, net, interval=4)
    ),
}
