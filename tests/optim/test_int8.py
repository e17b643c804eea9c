"""8-bit weights: what copies and files keep, the layer against a dense one, and the store."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowdim.layers import densify
from lowdim.linalg import quantize_affine, stream
from lowdim.optim import Int8Linear, Int8Parameter, Int8Store, quantize_linears
from lowdim.plan import PeakMemory
from lowdim.plan.kept import kept_bytes


def dense(dtype=torch.float32, bias=True, shape=(32, 64)):
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    draw = stream(0, "int8", "layer")
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / 8)
    return linear.to(dtype)


def layer(dtype=torch.float32, bias=True, group_size=64, **options):
    return Int8Linear.from_linear(dense(dtype, bias), group_size=group_size, **options)


def inputs(dtype=torch.float32, rows=5, seed=1):
    return torch.randn(rows, 64, generator=stream(seed, "x")).to(dtype)


def with_gradient():
    made = layer(stochastic_round=False)
    made(inputs()).square().sum().backward()
    return made


def same(a, b):
    """Two 8-bit parameters that hold the same and share nothing."""
    assert type(a) is type(b) is Int8Parameter
    assert torch.equal(a, b)
    for name in ("scales", "zeros", "float_grad"):
        left, right = getattr(a, name), getattr(b, name)
        assert torch.equal(left, right), name
        assert left.data_ptr() != right.data_ptr()
    assert (a.group_size, a.stochastic_round, a.trainable) == (b.group_size, b.stochastic_round, b.trainable)
    assert a.anchor is not b.anchor


# --- the parameter ------------------------------------------------------------------------------------------------------


def test_copies_and_files_keep_everything():
    made = with_gradient()
    same(copy.deepcopy(made.weight), made.weight)
    for weights_only in (True, False):
        file = io.BytesIO()
        torch.save(made.weight if weights_only else made, file)
        if not weights_only:
            continue  # a whole module needs its class; that it can be written at all is what is tested here
        file.seek(0)
        same(torch.load(file, weights_only=True), made.weight)
    whole = copy.deepcopy(made)
    same(whole.weight, made.weight)
    assert whole.scales is whole.weight.scales
    assert whole.zeros is whole.weight.zeros
    assert torch.equal(whole(inputs()), made(inputs()))


def test_the_state_dict_is_plain():
    made = layer()
    state = made.state_dict()
    assert set(state) == {"weight", "scales", "zeros", "bias"}
    assert type(state["weight"]) is torch.Tensor
    assert state["weight"].dtype == torch.uint8
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for assign in (False, True):
        other = Int8Linear.from_linear(nn.Linear(64, 32), group_size=64)
        other.load_state_dict(saved, assign=assign)
        assert torch.equal(other(inputs()), made(inputs()))
        assert isinstance(other.weight, Int8Parameter)
        assert other.weight.scales is other.scales
        assert other.weight.group_size == 64


def test_floating_weights_are_not_cast_to_codes():
    with pytest.raises(RuntimeError, match="weight is floating; load it before"):
        layer().load_state_dict({**layer().state_dict(), "weight": dense().weight})


def test_moving_and_casting():
    made = with_gradient()
    weight, codes = made.weight, made.weight.clone()
    made.double()
    assert made.weight is weight  # an optimizer that holds it goes on
    assert made.scales is weight.scales
    assert made.scales.dtype == weight.float_grad.dtype == torch.float64
    made.bfloat16()
    assert made.weight.zeros.dtype == torch.bfloat16
    assert torch.equal(weight, codes)
    assert made(inputs(torch.bfloat16)).dtype == torch.bfloat16
    empty = layer().to("meta")
    assert empty.weight.device.type == empty.scales.device.type == empty.weight.anchor.device.type == "meta"
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer().state_dict())
    assert isinstance(empty.weight, Int8Parameter)
    empty(inputs()).sum().backward()
    assert empty.weight.float_grad is not None


def test_zero_points_are_exact_in_half_precision():
    made = layer()
    before = made.zeros.clone()
    assert torch.equal(made.bfloat16().zeros.float(), before)


def test_freezing():
    """`requires_grad_` acts as on any other parameter, though autograd's flag cannot be set on bytes."""
    made = layer()
    made.requires_grad_(False)
    x = inputs().requires_grad_()
    made(x).sum().backward()
    assert made.weight.float_grad is None
    assert torch.allclose(x.grad, made.dense_weight().sum(0).expand_as(x), atol=1e-5)
    made.requires_grad_(True)
    assert made.weight.trainable
    assert not made.weight.requires_grad
    made(inputs()).sum().backward()
    assert made.weight.float_grad is not None
    frozen = dense()
    frozen.weight.requires_grad_(False)
    assert not Int8Linear.from_linear(frozen, group_size=64).weight.trainable


def test_wrong_parameters():
    codes, scales, zeros = quantize_affine(torch.ones(2, 64), group_size=64)
    with pytest.raises(TypeError, match=r"uint8.*got torch\.int32"):
        Int8Parameter(codes.int(), scales, zeros, 64)
    with pytest.raises(TypeError, match=r"floating; got torch\.uint8, torch\.int64"):
        Int8Parameter(codes, scales.long(), zeros, 64)


# --- the layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (0, 64)])
def test_is_a_dense_layer_with_the_rounded_weight(bias, shape):
    made = layer(torch.float64, bias)
    other = made.to_linear()
    x = torch.randn(shape, generator=stream(0, "x"), dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for _ in range(2):  # the second backward pass adds
        made(x).square().sum().backward()
        other(y).square().sum().backward()
    assert torch.allclose(made(x), other(y), atol=1e-12)
    assert torch.allclose(x.grad, y.grad, atol=1e-12)
    assert torch.allclose(made.weight.float_grad, other.weight.grad, atol=1e-12)
    assert made.weight.grad is None
    if bias:
        assert torch.allclose(made.bias.grad, other.bias.grad, atol=1e-12)


def test_gradient_without_anything_else_to_train():
    """The first layer of a model: its input needs no gradient, it has no bias, and the weight is an integer."""
    made = layer(bias=False)
    made(inputs()).sum().backward()
    assert torch.allclose(made.weight.float_grad, inputs().sum(0).expand(32, -1), atol=1e-5)
    with torch.no_grad():
        assert not made(inputs()).requires_grad


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_precision_of_what_goes_in_and_comes_out(weights, given):
    made = layer(weights)
    x = inputs(given).requires_grad_()
    y = made(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == given
    assert made.weight.float_grad.dtype == torch.promote_types(weights, given)
    assert made.bias.grad.dtype == weights
    want = F.linear(x.double(), made.dense_weight().double(), made.bias.double())
    assert torch.allclose(y.double(), want, atol=0.05 if torch.bfloat16 in (weights, given) else 1e-5)


def test_autocast_as_for_a_dense_layer():
    made = layer()
    other = made.to_linear()
    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = made(x), other(y)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)
    got.sum().backward()
    want.sum().backward()
    assert x.grad.dtype == made.weight.float_grad.dtype == made.bias.grad.dtype == torch.float32
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(made.weight.float_grad, other.weight.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(inputs(torch.float64)).dtype == torch.float64  # as torch has it


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    nets = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), layer(torch.float32)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    counts = []
    for index, net in enumerate(nets):
        calls: list = []
        net[2].weight.anchor.register_post_accumulate_grad_hook(lambda a, c=calls: c.append(1))
        x = inputs().requires_grad_()
        y = net(x) if index == 0 else checkpoint(net, x, use_reentrant=reentrant)
        y.square().sum().backward()
        counts.append(len(calls))
    assert counts == [1, 1]
    assert torch.allclose(nets[0][2].weight.float_grad, nets[1][2].weight.float_grad, atol=1e-5)
    assert torch.allclose(nets[0][0].weight.grad, nets[1][0].weight.grad, atol=1e-5)


def test_keeps_nothing_but_its_input():
    made = layer()
    x = inputs(rows=7)
    assert kept_bytes(made, x) == x.nbytes
    made.requires_grad_(False)
    assert kept_bytes(made, x.clone().requires_grad_()) == 0


def test_one_dense_weight_at_a_time():
    """Forward and backward of four layers: the peak holds one dense weight and the gradients, not four weights."""
    net = nn.Sequential(*[Int8Linear.from_linear(nn.Linear(512, 512, bias=False)) for _ in range(4)])
    x = torch.randn(8, 512)
    size = 512 * 512 * 4
    with PeakMemory(net, tensors=[x]) as memory, torch.no_grad():
        net(x)
    assert memory.bytes - memory.measured.start_bytes < 1.3 * size
    with PeakMemory(net, tensors=[x]) as memory:
        net(x).sum().backward()
    assert memory.bytes - memory.measured.start_bytes < (4 + 1.4) * size


def test_a_layer_used_twice_is_ready_once():
    """And its gradient is the sum over the uses, as a parameter's would be."""
    made = Int8Linear.from_linear(dense(torch.float64, shape=(64, 64)), group_size=64)
    other = made.to_linear()
    ready: list = []
    Int8Store().watch(made.weight, lambda p: ready.append(p.float_grad.clone()))
    x = inputs(torch.float64)
    made(made(x)).square().sum().backward()
    other(other(x)).square().sum().backward()
    assert len(ready) == 1
    assert torch.allclose(ready[0], other.weight.grad, rtol=1e-9)


def test_layers_that_share_a_weight():
    a = nn.Linear(64, 64)
    b = nn.Linear(64, 64)
    b.weight = a.weight
    net = quantize_linears(nn.Sequential(a, nn.Tanh(), b), None, group_size=64)
    assert net[0].weight is net[2].weight
    assert net[0].scales is net[2].scales
    net.double()
    assert net[0].scales is net[2].scales is net[2].weight.scales
    assert net[0].scales.dtype == torch.float64
    ready: list = []
    Int8Store().watch(net[0].weight, ready.append)
    net(inputs(torch.float64)).sum().backward()
    assert len(ready) == 1
    twin = copy.deepcopy(net)
    assert twin[0].weight is twin[2].weight
    assert twin[0].scales is twin[2].scales


def test_a_change_before_the_backward_pass_is_noticed():
    made = layer()
    y = made(inputs())
    Int8Store().write(made.weight, made.dense_weight(), None)
    with pytest.raises(RuntimeError, match="changed between the forward pass"):
        y.sum().backward()


def test_wrong_inputs():
    made = layer()
    with pytest.raises(ValueError, match=r"x must have 64 features.*\(5, 63\)"):
        made(torch.zeros(5, 63))
    with pytest.raises(ValueError, match="features"):
        made(torch.zeros(()))
    with pytest.raises(TypeError, match="floating"):
        made(torch.zeros(5, 64, dtype=torch.long))
    with pytest.raises(TypeError, match=r"nn\.Linear; got Conv2d"):
        Int8Linear.from_linear(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"group_size must divide.*2048; got group_size=96"):
        layer(group_size=96)
    broken = dense()
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Int8Linear.from_linear(broken, group_size=64)


def test_back_to_a_dense_layer():
    for dtype in (torch.float32, torch.bfloat16):
        net = nn.Sequential(layer(dtype), nn.ReLU()).eval()
        want = net(inputs(dtype))
        plain = densify(net)
        assert type(plain[0]) is nn.Linear
        assert plain[0].weight.dtype == dtype
        assert plain[0].weight.requires_grad
        assert not plain[0].training
        assert torch.equal(plain(inputs(dtype)), want)


def test_the_given_layer_is_left_alone():
    linear = dense()
    before = linear.weight.detach().clone()
    made = Int8Linear.from_linear(linear, group_size=64)
    with torch.no_grad():
        made.bias.zero_()
    assert torch.equal(linear.weight, before)
    assert float(linear.bias.detach().abs().max()) > 0
    assert "group_size=64" in repr(made)


def test_without_numbers():
    """Meta device and fake tensors: shapes, dtypes, gradients; a copy of a real layer too."""
    meta = Int8Linear.from_linear(nn.Linear(64, 32, device="meta"), group_size=64)
    assert meta(torch.zeros(3, 64, device="meta")).shape == (3, 32)
    real = layer()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = Int8Linear.from_linear(nn.Linear(64, 32), group_size=64)
        memo: dict = {id(p): nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad) for p in real.parameters()}
        memo |= {id(b): mode.from_tensor(b.detach()) for b in real.buffers()}
        for net in (made, copy.deepcopy(real, memo)):
            ready: list = []
            y = net(torch.zeros(3, 64))
            Int8Store().watch(net.weight, ready.append)
            y.sum().backward()
            assert isinstance(net.weight, Int8Parameter)
            assert net.weight.float_grad.shape == (32, 64)
            assert len(ready) == 1
            assert type(net.to_linear()) is nn.Linear
    assert not isinstance(nn.Parameter(torch.zeros(2)), Int8Parameter)


# --- swapping -----------------------------------------------------------------------------------------------------------


def test_quantize_linears():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.q, self.v = nn.Embedding(16, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.lm_head = nn.Linear(64, 16, bias=False)
            self.lm_head.weight = self.embed.weight

    net = quantize_linears(Net(), ["q"], group_size=64, stochastic_round=False)
    assert isinstance(net.q, Int8Linear)
    assert not net.q.weight.stochastic_round
    assert isinstance(net.v, nn.Linear)
    net = quantize_linears(Net(), None, group_size=64)
    assert isinstance(net.v, Int8Linear)
    assert isinstance(net.lm_head, nn.Linear)  # the head
    with pytest.warns(UserWarning, match="tied: lm_head"):
        quantize_linears(Net(), ["q", "lm_head"], group_size=64)
    with pytest.raises(ValueError, match="nothing"):
        quantize_linears(Net(), ["nothing"])
    net = Net()
    with pytest.raises(ValueError, match=r"layer q: group_size must divide"):
        quantize_linears(net, None, group_size=96)
    assert isinstance(net.q, nn.Linear)


@pytest.mark.models
def test_transformers_conv1d():
    from transformers.pytorch_utils import Conv1D

    net = nn.Sequential(Conv1D(32, 64))
    want = net(inputs())
    quantize_linears(net, None, group_size=64)
    assert net[0].weight.shape == (32, 64)
    assert torch.allclose(net(inputs()), want, atol=0.01)


# --- the store ----------------------------------------------------------------------------------------------------------


def test_store():
    made, store = with_gradient(), Int8Store()
    p = made.weight
    assert store.grad(p) is p.float_grad
    value = store.read(p)
    assert torch.equal(value, made.dense_weight())
    store.write(p, value + 1, stream(0, "noise"))
    assert p.float_grad is None
    assert float((store.read(p) - value - 1).abs().max()) < float(p.scales.max())  # this one rounds to nearest
    assert made.scales is p.scales
    made(inputs()).sum().backward()
    store.drop(p)
    assert store.grad(p) is None
    bare = nn.Parameter(torch.ones(2, 2))
    bare.grad = torch.ones(2, 2)
    assert store.grad(bare) is bare.grad
    assert store.read(bare).data_ptr() == bare.data_ptr()
    store.write(bare, store.read(bare), None)
    store.drop(bare)
    assert bare.grad is None


def test_half_precision_weights_are_updated_in_float32():
    """Else an update of less than the spacing of bfloat16 would be lost before it could be rounded stochastically."""
    made = layer(torch.bfloat16)
    store = Int8Store()
    assert store.read(made.weight).dtype == torch.float32
    assert store.read(layer(torch.float64).weight).dtype == torch.float64
    start = store.read(made.weight).mean()
    for step in range(200):
        value = store.read(made.weight)
        store.write(made.weight, value.add_(1e-5), stream(step, "noise"))
    moved = float(store.read(made.weight).mean() - start)
    assert moved == pytest.approx(200 * 1e-5, rel=0.25)
    assert made.scales.dtype == torch.bfloat16
