"""The first half of `AdapterCase`: layers of each kind, and the comparison with the dense equivalent."""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import lowdim
from lowdim.adapters import AdaptedLayer, Method
from lowdim.surgery import is_conv1d, matrix_shape, weight_matrix
from lowdim.testing.small_model import sample_input

__all__ = ["LAYERS", "DenseCase", "dense_layer", "make_input", "make_layer", "relative_error"]

#: Name for `make_layer` -> kind in `Method.takes`.
LAYERS = {
    "linear": "linear",
    "tall": "linear",
    "conv1d": "linear",
    "conv2d": "conv2d",
    "conv2d_1x1": "conv2d",
    "conv2d_grouped": "conv2d",
    "embedding": "embedding",
}


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One layer of each kind that surgery knows; the weights are the same in every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if name == "conv1d":
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(9, 12)
            nn.init.normal_(layer.weight)  # type: ignore[arg-type]
        else:
            layer = {
                "linear": lambda: nn.Linear(12, 9),
                "tall": lambda: nn.Linear(7, 11, bias=False),
                "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
                "conv2d_1x1": lambda: nn.Conv2d(8, 10, 1, stride=2),
                "conv2d_grouped": lambda: nn.Conv2d(8, 12, 3, groups=2, padding="same"),
                "embedding": lambda: nn.Embedding(13, 10),
            }[name]()
    return layer.to(dtype)


def make_input(layer: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    """Something that `layer` takes."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (2, 6), generator=generator)
    shape = (2, layer.in_channels, 7, 6) if isinstance(layer, nn.Conv2d) else (2, 5, matrix_shape(layer)[1])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def dense_layer(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """The output with the weight `base + dense()`, differentiable in the update's parameters."""
    base = layer.base
    matrix = weight_matrix(base).detach() + layer.update.dense()
    weight: Tensor = base.weight  # type: ignore[assignment]
    flipped = matrix.T if is_conv1d(base) or isinstance(base, nn.Embedding) else matrix
    return functional_call(base, {"weight": flipped.reshape(weight.shape)}, (x,))


def relative_error(got: Tensor, want: Tensor) -> float:
    """`max |got − want| / max |want|`."""
    return float(
        (got.detach().double() - want.detach().double()).abs().max() / want.detach().double().abs().max().clamp_min(1e-30)
    )


class DenseCase:
    """What a subclass says about its method, and the tests against the dense equivalent. Subclass `AdapterCase`."""

    #: Whether the output is unchanged at attach.
    starts_unchanged: ClassVar[bool] = True
    #: Largest relative error of the output at attach, by dtype of weight and update.
    start_tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
    #: Largest relative error of the output against the dense equivalent in float64, by dtype of weight and update.
    forward_tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
    gradient_tolerance: ClassVar[float] = 1e-11  # float64
    merge_tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
    #: Whether a PEFT checkpoint of linear layers is exact.
    exact_in_peft: ClassVar[bool] = True
    #: Whether the numbers at attach depend on the seed.
    random_start: ClassVar[bool] = True
    #: Rate of the training tests, whose target is a disturbed model's output.
    lr: ClassVar[float] = 0.02

    def method(self, **changes: Any) -> Method:
        """A method of rank 2 or 3 with these fields changed."""
        raise NotImplementedError

    def stats(self, layer: nn.Module) -> dict[str, Tensor]:
        """Statistics for a single attach, for what the method `needs`."""
        out, n = matrix_shape(layer)
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
        every = {
            "gradient": torch.randn(out, n, generator=generator, dtype=torch.float64),
            "covariance": x.T @ x,
            "norms": x.square().sum(0).sqrt(),
        }
        return {need: every[need] for need in self.method().needs}

    def max_delta_rank(self, out_features: int, in_features: int) -> int:
        """The largest rank that ΔW can have at the rank of `method()`."""
        return min(out_features, in_features)

    def disturb(self, update: nn.Module, seed: int = 11) -> None:
        """Move every trained number, as training would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in update.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.2 * noise).to(parameter.dtype))

    # Helpers

    def attach(self, layer: nn.Module, *, disturbed: bool = True, seed: int = 0, **kwargs: Any) -> AdaptedLayer:
        """The method on one layer, away from its start."""
        generator = torch.Generator().manual_seed(seed)
        adapted = self.method().attach(layer, stats=self.stats(layer), generator=generator, **kwargs)
        if disturbed:
            self.disturb(adapted.update)
        return adapted

    def adapt(self, model: nn.Module, *, disturbed: bool = True, method: Method | None = None, **kwargs: Any) -> Any:
        """The method on a model, away from its start."""
        if (method or self.method()).needs:
            dtype = next(model.parameters()).dtype
            kwargs = {"batches": [sample_input(16, seed=2, dtype=dtype)], "loss_fn": _loss, **kwargs}
        adapted = lowdim.adapt(model, method or self.method(), **kwargs)
        if disturbed:
            for layer in adapted.layers.values():
                self.disturb(layer.update)
        return adapted

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Tests that ask for a `layer_name` run for each kind of layer that the method takes."""
        if "layer_name" in metafunc.fixturenames:
            takes = self.method().takes
            metafunc.parametrize("layer_name", [name for name, kind in LAYERS.items() if kind in takes])

    # Against the dense equivalent

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_forward_is_that_of_the_dense_equivalent(self, layer_name, dtype):
        adapted = self.attach(make_layer(layer_name, dtype))
        x = make_input(adapted.base, dtype)
        got = adapted(x)
        exact = copy.deepcopy(adapted).double()
        want = dense_layer(exact, x.double() if x.is_floating_point() else x)
        assert got.dtype == dtype
        assert relative_error(got, want) <= self.forward_tolerance[dtype]
        with torch.no_grad():
            torch.testing.assert_close(
                adapted(x), got, rtol=0, atol=float(got.detach().abs().max()) * self.forward_tolerance[dtype]
            )

    def test_gradients_are_those_of_the_dense_equivalent(self, layer_name):
        adapted = self.attach(make_layer(layer_name))
        x = make_input(adapted.base)
        wanted: dict[str, Tensor] = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        if x.is_floating_point():
            wanted["x"] = x.requires_grad_()
        target = torch.randn(adapted(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        got = torch.autograd.grad((adapted(x) * target).sum(), list(wanted.values()))
        want = torch.autograd.grad((dense_layer(adapted, x) * target).sum(), list(wanted.values()))
        for key, a, b in zip(wanted, got, want, strict=True):
            assert relative_error(a, b) <= self.gradient_tolerance, key

    def test_a_single_row_and_no_rows(self):
        adapted = self.attach(make_layer("linear"))
        x = make_input(adapted.base)[0]
        assert relative_error(adapted(x[0]), adapted(x)[0]) <= self.forward_tolerance[torch.float64]
        assert adapted(x[:0]).shape == (0, 9)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_the_start(self, layer_name, dtype):
        layer = make_layer(layer_name, dtype)
        x = make_input(layer, dtype)
        before = layer(x)
        adapted = self.attach(layer, disturbed=False)
        if not self.starts_unchanged:
            assert bool(adapted.delta().any())
            return
        assert relative_error(adapted(x), before) <= self.start_tolerance[dtype]
        scale = float(weight_matrix(layer).abs().max())
        assert float(adapted.delta().abs().max()) <= self.start_tolerance[dtype] * scale

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_merged_layer_is_plain_and_gives_the_same(self, layer_name, dtype):
        layer = make_layer(layer_name, dtype)
        adapted = self.attach(layer)
        merged = adapted.merged()
        assert type(merged) is type(layer)
        assert (getattr(merged, "bias", None) is None) == (getattr(layer, "bias", None) is None)
        assert weight_matrix(merged).dtype == dtype
        x = make_input(layer, dtype)
        assert relative_error(merged(x), adapted(x)) <= self.merge_tolerance[dtype]
        change = weight_matrix(merged).double() - weight_matrix(layer).double()
        scale = float(weight_matrix(layer).abs().max())
        assert float((change - adapted.delta().double()).abs().max()) <= self.merge_tolerance[dtype] * scale
        assert math.isclose(adapted.delta_norm(), float(adapted.delta().norm()), rel_tol=1e-4)

    def test_exact_low_rank_factors_give_the_delta(self, layer_name):
        adapted = self.attach(make_layer(layer_name))
        factors = adapted.update.low_rank_delta()
        delta = adapted.delta()
        assert torch.linalg.matrix_rank(delta) <= self.max_delta_rank(*delta.shape)
        if factors is not None:
            A, B = factors
            assert relative_error(B @ A, delta) <= 1e-12

    @given(out=st.integers(1, 9), n=st.integers(1, 9), rows=st.integers(1, 4), bias=st.booleans(), seed=st.integers(0, 9))
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors])  # one per subclass
    def test_any_shape(self, out, n, rows, bias, seed):
        layer = nn.Linear(n, out, bias, dtype=torch.float64)
        method = self.method(rank=1)
        adapted = method.attach(layer, stats=self.stats(layer), generator=torch.Generator().manual_seed(seed))
        self.disturb(adapted.update)
        x = torch.randn(rows, n, dtype=torch.float64)
        with torch.no_grad():
            want = dense_layer(adapted, x)
            size = float(want.abs().max()) + 1.0
            assert float((adapted(x) - want).abs().max()) <= 1e-11 * size
            assert float((adapted.merged()(x) - want).abs().max()) <= 1e-11 * size


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()
