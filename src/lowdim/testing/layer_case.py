"""Tests of every structured linear layer, against its equivalent dense matrix.

A layer's test defines how to make one and the dense weight as a formula of its parameters; it then gets all tests::

    class TestLowRank(LayerCase):
        layer_class = LowRankLinear
        how = {"rank": 3, "alpha": 6.0}

        def dense(self, layer):
            return 6.0 / 3 * layer.B @ layer.A

    class TestLowRankTall(TestLowRank):
        in_features, out_features = 20, 12

A check that a layer cannot pass is switched off by name, with the reason: `test_learns = None  # why`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowdim.files import read_tensors, write_tensors
from lowdim.testing.new_process import run_in_new_process

__all__ = ["LayerCase"]


class LayerCase(ABC):
    """Base of a layer's test class: define `dense`, set the attributes, override methods where a layer differs.

    Attributes:
        layer_class: the class under test.
        how: its hyperparameters.
        lossless: hyperparameters with which `from_linear` is exact; None if there are none.
        tolerances: largest error relative to the largest entry, by operation.
    """

    layer_class: ClassVar[type[nn.Module]]
    in_features: ClassVar[int] = 12
    out_features: ClassVar[int] = 20
    how: ClassVar[dict[str, Any]] = {}
    lossless: ClassVar[dict[str, Any] | None] = None
    tolerances: ClassVar[dict[str, float]] = {
        "forward": 1e-12,
        "gradient": 1e-11,
        "project": 1e-9,
        "float32": 1e-5,
        "bfloat16": 3e-2,
    }

    @abstractmethod
    def dense(self, layer: Any) -> Tensor:
        """The weight `(out, in)` as the formula of the layer's parameters, differentiable.

        Written out from the paper: no method or property of the layer, hyperparameters as the test states them.
        """

    def make(self, *, bias: bool = True, dtype: torch.dtype = torch.float64, device: Any = None, seed: int = 0) -> Any:
        """A fresh layer."""
        return self.layer_class(self.in_features, self.out_features, bias, dtype=dtype, device=device, **self.random(seed))

    def random(self, seed: int) -> dict[str, Any]:
        """The hyperparameters, and the source of the layer's random numbers."""
        return {**self.how, "generator": torch.Generator().manual_seed(seed)}

    def from_linear(self, linear: Any, **how: Any) -> Any:
        """A layer that approximates a trained one."""
        return self.layer_class.from_linear(linear, **(how or self.how))  # type: ignore[attr-defined]

    def linear(self, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
        """A trained layer, as far as the tests go."""
        return nn.Linear(self.in_features, self.out_features, bias, dtype=dtype)

    def rows(self, *lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Inputs `(*lead, in_features)`."""
        return torch.randn(*lead, self.in_features, dtype=dtype)

    def exact(self, layer: Any, x: Tensor) -> Tensor:
        """The required output and gradients; override if they differ from the formula by design."""
        return F.linear(x, self.dense(layer), layer.bias)

    def close(self, got: Tensor, want: Tensor, operation: str) -> None:
        """Compare at the operation's tolerance."""
        assert got.shape == want.shape, f"{operation}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
        if want.numel():
            got, want = got.detach(), want.detach()
            error = float((got.double() - want.double()).abs().max()) / max(float(want.abs().max()), 1e-30)
            assert error <= self.tolerances[operation], f"{operation}: {error:.3g} > {self.tolerances[operation]:.3g}"

    # Forward and backward

    @pytest.mark.parametrize("bias", [True, False])
    def test_forward_is_the_dense_product(self, bias: bool) -> None:
        """Any leading dimensions, also none and empty ones."""
        layer = self.make(bias=bias)
        assert (layer.bias is None) is not bias
        for lead in ((), (3,), (2, 3), (0,), (2, 0)):
            x = self.rows(*lead)
            y = layer(x)
            self.close(y, F.linear(x, self.dense(layer), layer.bias), "forward")
            assert y.is_contiguous()

    def test_dense_weight_is_the_formula(self) -> None:
        """Values, and the gradient of every parameter."""
        layer = self.make()
        names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if n != "bias"), strict=True)
        self.close(layer.dense_weight(), self.dense(layer), "forward")
        weights = torch.linspace(-1, 2, self.out_features * self.in_features, dtype=torch.float64)
        weights = weights.view(self.out_features, self.in_features)
        got, want = (torch.autograd.grad((w * weights).sum(), parameters) for w in (layer.dense_weight(), self.dense(layer)))
        for name, a, b in zip(names, got, want, strict=True):
            assert bool(b.any()), f"{name} gets no gradient: nothing is tested"
            self.close(a, b, "gradient")

    def test_forward_accepts_strided_rows(self) -> None:
        """Transposed and sliced inputs give the same output."""
        layer = self.make()
        x = self.rows(4, 6)
        for view in (x.transpose(0, 1), x[:, ::2]):
            self.close(layer(view), layer(view.contiguous()), "forward")

    def test_gradients_are_those_of_the_dense_product(self) -> None:
        """Of the input and of every parameter."""
        layer, weight = self.make(), self.rows(2, 3)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        grads = []
        for forward in (layer, lambda x: self.exact(layer, x)):
            x = weight.clone().requires_grad_(True)
            y = forward(x)
            grads.append(torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum(), (x, *parameters)))
        for name, got, want in zip(("x", *names), *grads, strict=True):
            assert bool(want.any()), f"{name} gets no gradient: nothing is tested"
            self.close(got, want, "gradient")

    def test_backward_keeps_no_dense_matrix(self) -> None:
        """The memory saved in weights is not lost in tensors kept for the backward pass."""
        layer, kept = self.make(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            layer(self.rows(3).requires_grad_(True))
        size = self.in_features * self.out_features
        assert kept
        assert not [shape for shape in kept if shape.numel() >= size and len(shape) > 1 and 3 not in shape]

    def test_learns(self) -> None:
        """Plain training brings the loss down."""
        layer, x = self.make(dtype=torch.float32), self.rows(64, dtype=torch.float32)
        target = self.make(dtype=torch.float32, seed=1)(x).detach()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        losses = []
        for _ in range(60):
            loss = F.mse_loss(layer(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.5 * losses[0]

    # To and from plain layers

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_to_linear_is_the_same_function(self, dtype: torch.dtype) -> None:
        """In the layer's dtype, rounded once."""
        layer = self.make(dtype=dtype).eval()
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert linear.weight.dtype == dtype
        assert not linear.training
        want = self.dense(copy.deepcopy(layer).double()).detach()
        if dtype == torch.float64:
            self.close(linear.weight, want, "forward")
        else:  # half of the last bit, plus float32 rounding: a product rounded in between would be further off
            error = (linear.weight.detach().double() - want).abs()
            assert bool((error <= 2**-8 * want.abs() + 1e-6 * want.abs().max()).all())
        assert torch.equal(linear.bias, layer.bias)
        linear.bias.data.zero_()
        assert bool(layer.bias.any()) or not bool(self.make().bias.any()), "the bias must be copied, not shared"

    def test_weight_is_the_dense_equivalent(self) -> None:
        """Code that reads any linear layer's weight finds one."""
        layer = self.make()
        self.close(layer.weight, self.dense(layer), "forward")
        assert "weight" not in layer.state_dict()

    def test_from_linear_keeps_what_it_can(self) -> None:
        """A layer of this class is its own best approximation."""
        layer = self.make()
        again = self.from_linear(layer.to_linear())
        self.close(self.dense(again), self.dense(layer), "project")
        assert torch.equal(again.bias, layer.bias)

    def test_from_linear_is_stationary(self) -> None:
        """No small change of any factor brings it nearer to the trained weight."""
        linear = self.linear()
        layer = self.from_linear(linear)
        remainder = (linear.weight.detach() - self.dense(layer)).square().sum()
        assert float(remainder.detach()) < float(linear.weight.detach().square().sum())
        parameters = [p for name, p in layer.named_parameters() if name != "bias"]
        for grad in torch.autograd.grad(remainder, parameters):
            assert float(grad.abs().max()) < 1e-9

    def test_from_linear_can_be_exact(self) -> None:
        """With enough freedom nothing is lost."""
        if self.lossless is None:
            pytest.skip("no hyperparameters of this layer reach every matrix")
        linear, x = self.linear(), self.rows(3)
        self.close(self.from_linear(linear, **self.lossless)(x), linear(x), "project")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bias", [True, False])
    def test_from_linear_leaves_the_given_layer(self, bias: bool, dtype: torch.dtype) -> None:
        """Its tensors are not shared; dtype and mode are copied."""
        linear = self.linear(bias=bias, dtype=dtype).eval()
        before = copy.deepcopy(linear.state_dict())
        layer = self.from_linear(linear)
        assert not layer.training
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert (layer.bias is None) is not bias
        with torch.no_grad():
            for parameter in layer.parameters():
                assert parameter.requires_grad
                parameter.add_(1)
        assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())

    def test_from_linear_refuses_other_layers(self) -> None:
        """The message names the given class."""
        with pytest.raises(TypeError, match="Conv2d"):
            self.from_linear(nn.Conv2d(2, 2, 1))

    # Files, dtypes, devices, copies

    def test_loads_in_another_process(self, tmp_path: Path) -> None:
        """The saved tensors and the constructor's arguments give the same output, bit by bit."""
        layer, x = self.make(dtype=torch.float32), self.rows(3, dtype=torch.float32)
        y = layer(x).detach()
        write_tensors(tmp_path / "layer.safetensors", {**layer.state_dict(), "_x": x})
        arguments = self.in_features, self.out_features, True
        run_in_new_process(_answer, self.layer_class, arguments, self.how, str(tmp_path))
        assert torch.equal(read_tensors(tmp_path / "answer.safetensors")[0]["y"], y)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precision(self, dtype: torch.dtype) -> None:
        """Output and gradients in the layer's dtype, near the exact ones."""
        layer, x = self.make(dtype=dtype), self.rows(5, dtype=dtype)
        exact = copy.deepcopy(layer).double()
        y, want = layer(x), self.exact(exact, x.double())
        assert y.dtype == dtype
        name = str(dtype).removeprefix("torch.")
        self.close(y.detach(), want.detach(), name)
        y.float().square().sum().backward()
        want.square().sum().backward()
        for got, ref in zip(layer.parameters(), exact.parameters(), strict=True):
            assert got.grad.dtype == dtype
            assert float((got.grad - ref.grad).norm() / ref.grad.norm()) < 2 * self.tolerances[name]

    def test_autocast(self) -> None:
        """Under autocast it behaves like nn.Linear: output in the lower dtype, gradients in the parameters'."""
        layer, x = self.make(dtype=torch.float32), self.rows(5, dtype=torch.float32).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        self.close(y.detach(), layer(x).detach(), "bfloat16")
        y.float().sum().backward()
        assert x.grad is not None
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())

    def test_deepcopy_is_independent(self) -> None:
        """Equal at first, independent afterwards."""
        layer, x = self.make(), self.rows(2)
        other = copy.deepcopy(layer)
        y = layer(x)
        assert torch.equal(other(x), y)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert torch.equal(layer(x), y)

    def test_meta_device(self) -> None:
        """Shapes without memory; filled later from a state dict."""
        layer, filled = self.make(device="meta", dtype=torch.float32), self.make(dtype=torch.float32)
        assert all(p.is_meta for p in layer.parameters())
        assert layer(torch.empty(3, self.in_features, device="meta")).shape == (3, self.out_features)
        layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
        x = self.rows(2, dtype=torch.float32)
        assert torch.equal(layer(x), filled(x))

    def test_same_generator_same_numbers(self) -> None:
        """On the same machine, bit by bit; and another seed gives others."""
        one, two, three = self.make(), self.make(), self.make(seed=1)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True))

    # Cost and wrong input

    def test_cost_is_what_runs(self) -> None:
        """The stated operations are those that torch counts, forward and backward."""
        layer, x = self.make(dtype=torch.float32), self.rows(7, dtype=torch.float32).requires_grad_(True)
        cost = layer.cost(7)
        assert all(type(number) is int for number in cost)
        assert cost.parameters == sum(p.numel() for p in layer.parameters())
        assert layer.cost(14).flops_forward == 2 * cost.flops_forward
        assert layer.cost(7, itemsize=2).bytes_forward * 2 == cost.bytes_forward
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        assert counter.get_total_flops() == cost.flops_forward
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == cost.flops_backward

    @pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (4.0, 4), (True, 4)])
    def test_bad_sizes(self, sizes: tuple[Any, Any]) -> None:
        """Each is named."""
        with pytest.raises(ValueError, match=r"(in|out)_features must be an int >= 1; got"):
            self.layer_class(*sizes, **self.how)

    def test_bad_input(self) -> None:
        """Another number of features is an error that names both numbers."""
        layer = self.make()
        for x in (torch.zeros(2, self.in_features + 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)):
            with pytest.raises(ValueError, match=f"x must have {self.in_features} features"):
                layer(x)

    def test_from_linear_refuses_nan(self) -> None:
        """A decomposition of NaN would be silent nonsense."""
        linear = self.linear()
        with torch.no_grad():
            linear.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            self.from_linear(linear)


def _answer(layer_class: type[nn.Module], arguments: tuple[Any, ...], how: dict[str, Any], folder: str) -> None:
    torch.manual_seed(12345)  # other numbers than the saved ones, should they not be loaded
    tensors, _ = read_tensors(Path(folder) / "layer.safetensors")
    x = tensors.pop("_x").clone()  # memory of its own: products of some CPUs depend on how the operands are aligned
    layer = layer_class(*arguments, **how)
    layer.load_state_dict(tensors)
    write_tensors(Path(folder) / "answer.safetensors", {"y": layer(x).detach()})
