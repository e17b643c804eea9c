"""An adapted layer against the formula of its test: output, gradient, start, merge, factors."""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowdim.surgery import weight_matrix
from lowdim.testing.adapter_hooks import DTYPES, AdapterHooks
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_input, make_layer, moved_output

__all__ = ["AdapterFormula"]


class AdapterFormula(AdapterHooks):
    """One layer at a time, of each kind that the method adapts."""

    @DTYPES
    def test_forward_is_that_of_the_formula(self, layer_name, dtype):
        layer = make_layer(layer_name, dtype)
        adapted = self.attach(layer)
        x = make_input(layer, dtype)
        got, want = adapted(x), self.wanted(layer, adapted, x)
        assert got.dtype == dtype
        assert relative_error(got, want) <= self.forward_tolerance[dtype]
        with torch.no_grad():  # another path, which may write the output in place
            assert relative_error(adapted(x), want) <= self.forward_tolerance[dtype]

    def test_gradients_are_those_of_the_formula(self, layer_name):
        layer = make_layer(layer_name)
        adapted = self.attach(layer)
        x = make_input(layer)
        wanted: dict[str, Tensor] = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert wanted
        if x.is_floating_point():
            wanted["x"] = x.requires_grad_()
        target = torch.randn(adapted(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        got = torch.autograd.grad((adapted(x) * target).sum(), list(wanted.values()))
        output = moved_output(layer, self.dense(adapted.update), x)
        want = torch.autograd.grad((output * target).sum(), list(wanted.values()))
        for key, a, b in zip(wanted, got, want, strict=True):
            assert relative_error(a, b) <= self.gradient_tolerance, key

    @DTYPES
    def test_its_own_matrices_are_the_formula(self, layer_name, dtype):
        layer = make_layer(layer_name, dtype)
        adapted = self.attach(layer)
        want, update, start = self.change(adapted), adapted.update, adapted.update.start()
        size = float(weight_matrix(layer).abs().max())
        before = 0.0 if start is None else start.double()
        found = {
            "dense": update.dense().double() - before,
            "exact": update.exact().double() - before,
            "delta": update.delta().double(),
            "the layer's delta": adapted.delta().double(),
            "effective weight": adapted.effective_weight().double() - weight_matrix(layer).double(),
        }
        assert dtype.itemsize == 2 or float(want.abs().max()) > 1e-3 * size  # else a wrong one could be within the tolerance
        size = max(size, float(want.abs().max()))  # a drawn start may be larger than the weight
        for name, got in found.items():
            assert got.shape == want.shape, name
            assert float((got - want).detach().abs().max()) <= self.merge_tolerance[dtype] * size, name
        assert math.isclose(adapted.delta_norm(), float(want.norm()), rel_tol=1e-4 if dtype.itemsize > 2 else 3e-2)

    def test_a_single_row_and_no_rows(self):
        layer = make_layer("linear")
        adapted = self.attach(layer)
        x = make_input(layer)[0]
        assert relative_error(adapted(x[0]), self.wanted(layer, adapted, x[0])) <= self.forward_tolerance[torch.float64]
        assert adapted(x[:0]).shape == (0, 9)

    # The start

    @DTYPES
    def test_the_start(self, layer_name, dtype):
        layer = make_layer(layer_name, dtype)
        x = make_input(layer, dtype)
        before = layer(x)
        adapted = self.attach(layer, disturbed=False)
        want = before if self.starts_unchanged else self.wanted(layer, adapted, x)
        assert relative_error(adapted(x), want) <= self.start_tolerance[dtype]
        size = float(weight_matrix(layer).abs().max())
        for change in (adapted.delta(), self.change(adapted)):
            moved = float(change.abs().max())
            assert moved <= self.start_tolerance[dtype] * size if self.starts_unchanged else moved > 0

    def test_the_numbers_at_the_start(self, layer_name):
        layer = make_layer(layer_name)
        weight, stats = weight_matrix(layer).detach().clone(), self.stats(layer)
        update = self.attach(layer, disturbed=False).update
        held: dict[str, Tensor] = {**dict(update.named_parameters()), **dict(update.named_buffers())}
        wanted = self.start(weight, stats)
        if not wanted:
            pytest.skip("the test class gives no formula for the numbers at the start")
        for name, value in wanted.items():
            want = value if isinstance(value, Tensor) else torch.full_like(held[name], value)
            assert held[name].shape == want.shape, name
            size = float(want.double().abs().max()) or 1.0
            assert float((held[name].detach().double() - want.double()).abs().max()) <= 1e-10 * size, name

    def test_what_the_base_keeps(self, layer_name):
        layer = make_layer(layer_name)
        weight = weight_matrix(layer).detach().clone()
        taken = self.taken(weight, self.stats(layer))
        adapted = self.attach(layer, disturbed=False)
        kept = weight_matrix(adapted.base)
        if taken is None:
            assert torch.equal(kept, weight)
            assert adapted.update.start() is None
        else:
            assert relative_error(kept - weight, -taken) <= 1e-10
            assert relative_error(adapted.update.start(), taken) <= 1e-10  # type: ignore[arg-type]
        assert relative_error(adapted.original_weight(), weight) <= 1e-12

    # Merging

    @DTYPES
    def test_merged_layer_is_plain_and_holds_the_formula(self, layer_name, dtype):
        layer = make_layer(layer_name, dtype)
        adapted = self.attach(layer)
        merged = adapted.merged()
        assert type(merged) is type(layer)
        assert (getattr(merged, "bias", None) is None) == (getattr(layer, "bias", None) is None)
        assert weight_matrix(merged).dtype == dtype
        x = make_input(layer, dtype)
        assert relative_error(merged(x), self.wanted(layer, adapted, x)) <= self.merge_tolerance[dtype]
        assert relative_error(merged(x), adapted(x)) <= self.merge_tolerance[dtype]
        change = weight_matrix(merged).double() - weight_matrix(layer).double()
        size = max(float(weight_matrix(each).abs().max()) for each in (layer, merged))
        assert float((change - self.change(adapted)).abs().max()) <= self.merge_tolerance[dtype] * size

    def test_exact_low_rank_factors_give_the_formula(self, layer_name):
        adapted = self.attach(make_layer(layer_name))
        factors, want = adapted.update.low_rank_delta(), self.change(adapted)
        assert torch.linalg.matrix_rank(want) <= self.max_delta_rank(*want.shape)
        assert (factors is not None) is self.has_factors
        if factors is None:
            pytest.skip("ΔW has full rank: it has no thin factors")
        A, B = factors
        assert relative_error(B @ A, want) <= 1e-12

    @given(out=st.integers(1, 9), n=st.integers(1, 9), rows=st.integers(1, 4), bias=st.booleans(), seed=st.integers(0, 9))
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors])  # one per subclass
    def test_any_shape(self, out, n, rows, bias, seed):
        self.rank = self.smallest_rank
        layer = nn.Linear(n, out, bias, dtype=torch.float64)
        adapted = self.attach(layer, seed=seed)
        x = torch.randn(rows, n, dtype=torch.float64)
        with torch.no_grad():
            want = self.wanted(layer, adapted, x)
            size = float(want.abs().max()) + 1.0
            assert float((adapted(x) - want).abs().max()) <= 1e-11 * size
            assert float((adapted.merged()(x) - want).abs().max()) <= 1e-11 * size

    # Strength, several adapters, rows

    @pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
    def test_strength_is_a_factor_of_the_change(self, layer_name, strength):
        layer = make_layer(layer_name)
        adapted = self.attach(layer)
        x = make_input(layer)
        want = moved_output(layer, strength * self.change(adapted), x)
        adapted.strength = strength
        tolerance = self.forward_tolerance[torch.float64]
        assert relative_error(adapted(x), want) <= 10 * tolerance
        assert relative_error(adapted.merged()(x), want) <= 10 * tolerance
        adapted.strength = 0.0
        assert relative_error(adapted(x), layer(x)) <= tolerance
        assert relative_error(adapted.merged()(x), layer(x)) <= tolerance

    def test_an_adapter_over_another(self, layer_name):
        layer = make_layer(layer_name)
        x = make_input(layer)
        one = self.attach(layer)
        both = self.method().attach(one, stats=self.stats(layer), generator=torch.Generator().manual_seed(3))
        assert relative_error(both.pristine_weight(), weight_matrix(layer)) <= 1e-12
        self.disturb(both.update, seed=5)
        first, second = self.change(one), self.change(both)
        tolerance = self.forward_tolerance[torch.float64]
        for strength in (1.0, 0.0):
            one.strength = strength
            want = moved_output(layer, strength * first + second, x)
            assert relative_error(both(x), want) <= 10 * tolerance
            assert relative_error(both.merged()(x), want) <= 10 * tolerance

    def test_rows_of_the_batch_that_it_acts_on(self, layer_name):
        layer = make_layer(layer_name)
        x = make_input(layer)
        adapted = self.attach(layer)
        want = torch.cat([layer(x[:1]), self.wanted(layer, adapted, x)[1:]])
        adapted.rows = torch.tensor([1])
        assert relative_error(adapted(x), want) <= 10 * self.forward_tolerance[torch.float64]
