import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vectors
from lowdim.errors import CheckpointError
from lowdim.layers import MaestroConv2d, MaestroLinear
from lowdim.testing.layer_case import LayerCase

# --- the shared case -----------------------------------------------------------------------------------------------------


class TestMaestroWide(LayerCase):
    layer_class = MaestroLinear
    lossless = {}  # noqa: RUF012 (typed in the base class)

    # U or V is square: the saving comes with shrinking
    test_backward_keeps_no_dense_matrix = None  # type: ignore[assignment]

    def dense(self, layer):
        return layer.U @ layer.V


class TestMaestroShrunk(TestMaestroWide):
    """Five of twelve components are in use."""

    def make(self, **options):
        layer = super().make(**options)
        layer.rank = 5
        return layer

    def dense(self, layer):
        r = 12 if layer.rank == 12 else 5  # `from_linear` keeps all components
        return layer.U[:, :r] @ layer.V[:r]


class TestMaestroTall(TestMaestroWide):
    in_features, out_features = 20, 12


class TestMaestroSquare(TestMaestroWide):
    in_features, out_features = 9, 9


# --- the authors' numbers ------------------------------------------------------------------------------------------------


def linear_of(v):
    h = v.hyperparameters
    linear = nn.Linear(h["in_features"], h["out_features"], h["bias"], dtype=torch.float64)
    linear.load_state_dict({name: v[name] for name in ("weight", "bias") if name in v})
    return linear


@pytest.mark.parametrize("case", ["linear", "linear_nobias"])
def test_official_linear(case):
    v = vectors.load("maestro", case)
    h, x = v.hyperparameters, v["x"]
    layer = MaestroLinear.from_linear(linear_of(v))
    v.close(layer.dense_weight(), "weight")
    v.close(layer(x), "y_full")
    v.close(layer(x, rank=h["sampled_rank"]), "y_sampled")
    layer.sampled = h["sampled_rank"]
    v.close(layer(x), "y_sampled")
    layer.sampled = None
    for name, hierarchical in (("flat", False), ("hier", True)):
        lasso = layer.group_lasso(hierarchical)
        assert lasso.shape == ()
        v.close(lasso.view(1), f"lasso_{name}")
        v.close(layer.importance(hierarchical), f"importance_{name}")
        (grad,) = torch.autograd.grad(lasso, layer.U)
        v.close(grad @ layer.U.T, f"lasso_{name}_gradU_Ut")
    assert layer.shrink(h["threshold"]) == int(v["shrunk_rank"]) == layer.rank
    v.close(layer(x), "y_shrunk")
    v.close(layer.dense_weight(), "dense_shrunk")
    assert layer.U.shape[1] == min(h["in_features"], h["out_features"])
    assert layer.shrink(h["threshold"], prune=True) == int(v["shrunk_rank"])
    assert layer.U.shape[1] == layer.V.shape[0] == layer.rank
    v.close(layer(x), "y_shrunk")
    v.close(layer.to_linear()(x), "y_shrunk")


def conv_of(v):
    h = v.hyperparameters
    how = {name: h[name] for name in ("stride", "padding")}
    conv = nn.Conv2d(h["in_channels"], h["out_channels"], h["kernel_size"], dtype=torch.float64, **how)
    conv.load_state_dict({"weight": v["weight"], "bias": v["bias"]})
    return conv


def test_official_conv():
    v = vectors.load("maestro", "conv")
    h, x = v.hyperparameters, v["x"]
    layer = MaestroConv2d.from_conv(conv_of(v))
    v.close(layer.dense_weight(), "weight")
    v.close(layer(x), "y_full")
    v.close(layer(x, rank=h["sampled_rank"]), "y_sampled")
    v.close(layer.group_lasso().view(1), "lasso_hier")
    v.close(layer.importance(), "importance_hier")
    assert layer.shrink(h["threshold"]) == int(v["shrunk_rank"])
    v.close(layer(x), "y_shrunk")
    v.close(layer.to_conv()(x), "y_shrunk")
    assert layer.shrink(h["threshold"], prune=True) == layer.V.shape[0] == int(v["shrunk_rank"])
    v.close(layer(x), "y_shrunk")


def test_every_vector_is_used():
    assert vectors.cases("maestro") == ["conv", "linear", "linear_nobias"]


# --- ranks and prefixes --------------------------------------------------------------------------------------------------


def double(in_features=6, out_features=4, seed=0, **how):
    return MaestroLinear(in_features, out_features, dtype=torch.float64, seed=seed, **how)


def test_start_is_the_svd_of_a_dense_draw():
    layer = double(40, 30)
    for factor in (layer.U.T, layer.V):
        gram = factor @ factor.T
        assert torch.allclose(gram, torch.diag(torch.diagonal(gram)), atol=1e-12)  # U √S and √S Vᵀ: orthogonal
        assert bool((torch.diagonal(gram).diff() <= 0).all())
    assert torch.allclose(layer.U.square().sum(0), layer.V.square().sum(1))
    bound = 40**-0.5
    assert 0.95 * bound < float(layer.dense_weight().detach().abs().max()) <= bound * (1 + 1e-12)
    assert 0.5 * bound < float(layer.bias.detach().abs().max()) <= bound


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_a_rank_uses_the_first_components(rank):
    layer, x = double(), torch.randn(5, 6, dtype=torch.float64)
    want = F.linear(x, layer.U[:, :rank] @ layer.V[:rank], layer.bias)
    assert torch.allclose(layer(x, rank=rank), want)
    layer.rank = rank
    assert torch.allclose(layer(x), want)
    assert torch.allclose(layer.dense_weight(), layer.U[:, :rank] @ layer.V[:rank])


def test_rank_zero_gives_the_bias():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for layer, rows in ((double(), x[0, 0, :, :1].expand(5, 6)), (MaestroConv2d(3, 4, 3, dtype=torch.float64), x)):
        for _ in range(2):
            y = layer(rows, rank=0)
            assert torch.equal(y, layer.bias.view(-1, *[1] * (y.ndim - 2 if y.ndim == 4 else 0)).expand_as(y))
            layer.rank = 0
            assert not bool(layer.dense_weight().any())
            layer.prune()  # and with nothing stored
        y.sum().backward()
        assert layer.bias.grad is not None


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("make", [double, lambda: MaestroConv2d(3, 4, 3, dtype=torch.float64)])
def test_cut_components_get_zero_gradients_and_not_none(make, rank):
    layer = make()
    x = torch.randn(*((5, 6) if isinstance(layer, MaestroLinear) else (2, 3, 5, 5)), dtype=torch.float64)
    layer(x, rank=rank).square().sum().backward()
    assert layer.U.grad.shape == layer.U.shape
    assert layer.V.grad.shape == layer.V.shape
    assert not bool(layer.U.grad[:, rank:].any())
    assert not bool(layer.V.grad[rank:].any())
    assert bool(layer.U.grad.any()) is bool(layer.V.grad.any()) is (rank > 0)


@pytest.mark.parametrize("rank", [-1, 3, 2.0, True, "1"])
def test_bad_ranks(rank):
    layer = double()
    layer.rank = 2
    x = torch.zeros(1, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rank must be an int in \[0, 2\]; got"):
        layer(x, rank=rank)
    layer.sampled = rank
    with pytest.raises(ValueError, match=r"rank must be an int in \[0, 2\]; got"):
        layer(x)


@pytest.mark.parametrize("rank", [-1, 5, None])
def test_bad_current_rank(rank):
    with pytest.raises(ValueError, match=r"rank must be an int in \[0, 4\]; got"):
        double().rank = rank


# --- lasso, importance, shrinking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hierarchical", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_lasso_by_its_definition(kind, hierarchical):
    layer = double() if kind == "linear" else MaestroConv2d(3, 5, 3, dtype=torch.float64, seed=0)
    d = layer.U.shape[1]
    parts = [slice(i, None) if hierarchical else slice(i, i + 1) for i in range(d)]
    norms = [(layer.U[:, p].norm(), layer.V[p].norm()) for p in parts]
    want = sum(u + v for u, v in norms)
    assert torch.allclose(layer.group_lasso(hierarchical), want)
    assert torch.allclose(layer.importance(hierarchical), torch.stack([u * v for u, v in norms]))
    got = torch.autograd.grad(layer.group_lasso(hierarchical), (layer.U, layer.V))
    for a, b in zip(got, torch.autograd.grad(want, (layer.U, layer.V)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hierarchical", [True, False])
def test_lasso_gradient_of_an_empty_tail_is_zero(dtype, hierarchical):
    layer = MaestroLinear(6, 4, dtype=dtype, seed=0)
    with torch.no_grad():
        layer.U[:, 2:] = 0
        layer.V[2:] = 0
    lasso = layer.group_lasso(hierarchical)
    assert lasso.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    lasso.backward()
    for grad, inside, outside in (
        (layer.U.grad, (slice(None), 0), (slice(None), slice(2, None))),
        (layer.V.grad, 0, slice(2, None)),
    ):
        assert bool(torch.isfinite(grad).all())
        assert bool(grad[inside].any())
        assert not bool(grad[outside].any())
    with torch.no_grad():
        layer.U.zero_()
        layer.V.zero_()
    layer.U.grad = layer.V.grad = None
    layer.group_lasso(hierarchical).backward()
    assert not bool(layer.U.grad.any())
    assert not bool(layer.V.grad.any())


def test_lasso_runs_over_what_is_cut_off():
    layer = double()
    before = float(layer.group_lasso().detach())
    layer.rank = 1
    assert float(layer.group_lasso().detach()) == before
    layer.group_lasso().backward()
    assert bool(layer.U.grad[:, 1:].any())
    assert layer.importance().shape == (4,)


def test_lasso_keeps_no_copy_of_the_factors():
    layer, kept = double(40, 30), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.group_lasso()
    own = {layer.U.data_ptr(), layer.V.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) <= 20 * 30


def test_importance_falls_and_bounds_the_rank():
    layer = double(9, 7)
    importance = layer.importance()
    assert bool((importance.diff() <= 0).all())
    assert not importance.requires_grad
    for r in range(7):
        copied = copy.deepcopy(layer)
        assert copied.shrink(float(importance[r])) == r + 1  # equal stays
    assert layer.shrink(1e9) == 0


def test_only_hierarchical_importance_shrinks():
    """A component that is small alone, with large ones behind it, stays: what is used is a prefix."""
    layer = double()
    with torch.no_grad():
        layer.U[:, 1] = 1e-9
    assert float(layer.importance(False)[1]) < 1e-6 < float(layer.importance(False)[3])
    assert layer.shrink(1e-6) == 4


def test_shrinking_never_grows():
    layer = double()
    layer.rank = 2
    assert layer.shrink(0.0) == 2


def test_shrink_leaves_parameters_and_prune_cuts_them():
    layer = double()
    layer.bias.requires_grad_(False)
    u, x = layer.U, torch.randn(3, 6, dtype=torch.float64)
    threshold = float(layer.importance()[2])
    assert layer.shrink(threshold) == 3
    assert layer.U is u
    y = layer(x)
    assert layer.shrink(threshold, prune=True) == 3
    assert layer.U.shape == (4, 3)
    assert layer.V.shape == (3, 6)
    assert layer.U.requires_grad
    assert layer.U.is_contiguous()
    assert torch.allclose(layer(x), y)
    assert layer.cost(1).parameters == 3 * (6 + 4) + 4


@pytest.mark.parametrize("threshold", [-1e-9, float("nan"), float("inf"), "0.1", None])
def test_bad_threshold(threshold):
    with pytest.raises(ValueError, match=r"threshold must be a finite number in \[0, inf\]; got"):
        double().shrink(threshold)


# --- the rank in state dicts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruned", [False, True])
def test_state_dict_keeps_the_rank(pruned):
    layer, other = double(), double(seed=1)
    layer.shrink(float(layer.importance()[2]), prune=pruned)
    x = torch.randn(3, 6, dtype=torch.float64)
    state = copy.deepcopy(layer.state_dict())
    assert set(state) == {"U", "V", "bias", "_extra_state"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    nn.ModuleList([other]).load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert other.rank == 3
    assert other.U.shape == layer.U.shape
    assert torch.equal(other(x), layer(x))


def test_state_dict_without_a_rank_means_all_of_it():
    layer, other = double(), double(seed=1)
    other.rank = 1
    state = {name: value for name, value in layer.state_dict().items() if name != "_extra_state"}
    other.load_state_dict(state)
    assert other.rank == 4
    with pytest.raises(RuntimeError, match=r'Missing key.*"V"'):
        other.load_state_dict({"U": state["U"], "bias": state["bias"]})


@pytest.mark.parametrize("bad", [torch.tensor(5), torch.tensor(-1), torch.tensor(1.0), torch.tensor([1, 2]), "x", None])
def test_state_dict_with_an_impossible_rank(bad):
    layer = double()
    with pytest.raises(CheckpointError, match=r"_extra_state must be a rank in \[0, 4\]; got"):
        layer.load_state_dict({**layer.state_dict(), "_extra_state": bad})


def test_state_dict_of_another_shape_is_refused():
    for other in (double(5, 4), double(6, 9)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            double().load_state_dict(other.state_dict())


# --- convolutions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3},
        {"kernel_size": (1, 3), "stride": 2, "padding": (0, 1)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 1, "bias": False},
        {"kernel_size": [3, 2], "stride": [1, 2]},
    ],
)
@pytest.mark.parametrize("channels", [(3, 8), (8, 3), (2, 40)])
def test_convolution_is_the_dense_one(how, channels):
    conv = nn.Conv2d(*channels, dtype=torch.float64, **how).eval()
    layer = MaestroConv2d.from_conv(conv)
    x = torch.randn(2, channels[0], 9, 8, dtype=torch.float64, requires_grad=True)
    kernel = torch.Size(conv.kernel_size)
    assert layer.rank == layer.U.shape[1] == min(channels[1], channels[0] * kernel.numel())
    assert layer.V.shape == (layer.rank, channels[0], *kernel)
    assert not layer.training
    assert torch.allclose(layer(x), conv(x), atol=1e-12)
    fresh = MaestroConv2d(*channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0), **how)
    assert fresh.U.shape == layer.U.shape
    fresh.rank = fresh.rank // 2
    plain = fresh.to_conv()
    assert type(plain) is nn.Conv2d
    assert torch.allclose(plain(x), fresh(x), atol=1e-12)
    half = min(channels[1], channels[0] * kernel.numel()) // 2
    formula = torch.einsum("or,rikl->oikl", fresh.U[:, :half], fresh.V[:half])
    assert torch.allclose(fresh.dense_weight(), formula)
    assert torch.allclose(plain.weight, formula)
    grads = torch.autograd.grad(fresh(x).square().sum(), (x, fresh.U, fresh.V))
    how = {"stride": 1, "padding": 0, "dilation": 1, **how}
    dense = F.conv2d(x, formula, fresh.bias, how["stride"], how["padding"], how["dilation"])
    assert torch.allclose(fresh(x), dense, atol=1e-12)
    for got, want in zip(grads, torch.autograd.grad(dense.square().sum(), (x, fresh.U, fresh.V)), strict=True):
        assert torch.allclose(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_in_lower_precision(dtype):
    layer = MaestroConv2d(3, 8, 3, dtype=dtype, seed=0)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    want = copy.deepcopy(layer).double()(x.double())
    y = layer(x)
    assert y.dtype == dtype
    assert float((y - want).detach().abs().max() / want.detach().abs().max()) < (1e-5 if dtype == torch.float32 else 3e-2)
    again = MaestroConv2d.from_conv(layer.to_conv())
    assert again.U.dtype == again.V.dtype == again.bias.dtype == dtype
    assert copy.deepcopy(layer).to_conv().weight.dtype == dtype
    y.float().sum().backward()
    assert layer.V.grad.dtype == dtype


def test_convolution_on_the_meta_device_and_back():
    layer, filled = MaestroConv2d(3, 4, 3, device="meta"), MaestroConv2d(3, 4, 3, seed=0)
    filled.rank = 2
    assert layer(torch.empty(1, 3, 5, 5, device="meta")).shape == (1, 4, 3, 3)
    layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(layer(x), filled(x))
    assert layer.rank == 2


def test_bad_convolutions():
    with pytest.raises(TypeError, match=r"conv must be nn\.Conv2d; got Linear"):
        MaestroConv2d.from_conv(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="conv must have groups=1; got 2"):
        MaestroConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="padding_mode='zeros'; got 'reflect'"):
        MaestroConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    conv = nn.Conv2d(2, 2, 3)
    nn.init.constant_(conv.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        MaestroConv2d.from_conv(conv)
    for sizes in ((0, 4, 3), (4, 0, 3), (4, 4, 0), (4, 4, (3, 0)), (True, 4, 3)):
        with pytest.raises(ValueError, match=r"(in_channels|out_channels|kernel_size) must be an int >= 1; got"):
            MaestroConv2d(*sizes)
    for how, message in (
        ({"stride": 0}, "stride must be an int >= 1; got 0"),
        ({"dilation": (1, -1)}, "dilation must be an int >= 1; got -1"),
        ({"padding": -1}, "padding must be an int >= 0; got -1"),
        ({"padding": "full"}, "padding must be one of same, valid; got 'full'"),
        ({"stride": (1, 2, 3)}, r"stride must be an int or a pair; got \(1, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            MaestroConv2d(4, 4, 3, **how)


# --- the rest ------------------------------------------------------------------------------------------------------------


def test_cost_follows_the_rank():
    layer = MaestroLinear(8, 16)
    assert layer.cost(3).flops_forward == 2 * 3 * 8 * (8 + 16)
    layer.rank = 2
    assert layer.cost(3).flops_forward == 2 * 3 * 2 * (8 + 16)
    assert layer.cost(3).parameters == 8 * (8 + 16) + 16


def test_seed_and_generator():
    one, two = MaestroLinear(4, 3, seed=5), MaestroLinear(4, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one.U, two.U)
    torch.manual_seed(0)
    assert not torch.equal(MaestroLinear(4, 3).U, MaestroLinear(4, 3).U)


def test_fourth_positional_is_the_dtype():
    assert MaestroLinear(4, 3, False, torch.float64).U.dtype == torch.float64


def test_prints_its_sizes():
    assert "in_features=8, out_features=6, bias=False, rank=6" in repr(MaestroLinear(8, 6, bias=False))
    text = repr(MaestroConv2d(3, 8, 3))
    assert "3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), bias=True, rank=8" in text
