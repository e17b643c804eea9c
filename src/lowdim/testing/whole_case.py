"""The behaviour required of every method that acts on the whole model, tested against the formula of its paper.

    class TestMine(WholeModelCase):
        def method(self, model, **changes):
            return MyMethod(**changes)

        def dense(self, adapted):
            return {name: ... for name in adapted.names}  # θ_i − θ_i⁰ as a formula of the trained numbers

gives every test of this file and of the two that it joins. Each compares with the plain model at `θ⁰ + dense(adapted)`.
"""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lowdim
from lowdim.adapters import LoRA
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model, tied_llama
from lowdim.testing.whole_files import WholeFiles
from lowdim.testing.whole_hooks import DTYPES
from lowdim.testing.whole_training import WholeTraining

__all__ = ["WholeModelCase"]


class WholeModelCase(WholeTraining, WholeFiles):
    """Subclass and define `method` and `dense` (see `WholeHooks`)."""

    @DTYPES
    def test_the_start_is_the_pre_trained_model(self, dtype):
        model = small_model(dtype=dtype)
        x = sample_input(dtype=dtype)
        want = model(x)
        adapted = self.adapt(model, disturbed=False)
        assert adapted.model is model
        assert torch.equal(model(x), want)
        assert torch.equal(adapted(x), want)
        with pytest.warns(UserWarning, match="offset is zero"):
            assert not any(adapted.check().values())

    @DTYPES
    def test_output_is_that_of_the_formula(self, dtype):
        model = small_model(dtype=dtype)
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        x = sample_input(dtype=dtype)
        got = model(x)
        assert got.dtype == dtype
        assert relative_error(got, self.wanted(plain, adapted, x)) <= self.tolerance[dtype]
        with torch.no_grad():
            assert torch.equal(model(x), got)

    def test_gradients_are_those_of_the_formula(self):
        model = small_model(dtype=torch.float64)
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64).requires_grad_()
        wanted = [*adapted.trainable().values(), x]
        assert len(wanted) > 1
        got = torch.autograd.grad(model(x).sin().sum(), wanted)
        want = torch.autograd.grad(self.wanted(plain, adapted, x).sin().sum(), wanted)
        assert all(relative_error(a, b) <= 1e-11 for a, b in zip(got, want, strict=True))

    @DTYPES
    def test_its_own_offsets_are_the_formula(self, dtype):
        adapted = self.adapt(small_model(dtype=dtype))
        with torch.no_grad():
            wanted, offsets, norms = self.dense(adapted), adapted.offsets(), adapted.check()
        assert wanted
        assert set(offsets) == set(adapted.names)
        for name, offset in offsets.items():
            want = wanted.get(name, torch.zeros(offset.shape, dtype=torch.float64))
            assert float((offset - want).abs().max()) <= self.tolerance[dtype] * max(1.0, float(want.abs().max())), name
            assert norms.get(name, 0.0) == pytest.approx(float(want.norm()), rel=10 * self.tolerance[dtype]), name

    def test_tied_parameters_are_moved_once_and_stay_tied(self):
        model = tied_llama()
        plain = copy.deepcopy(model)
        ids = torch.arange(12).view(2, 6)
        adapted = self.adapt(model)
        assert "lm_head.weight" not in adapted.names
        got = model(ids).logits
        assert relative_error(got, self.wanted(plain, adapted, ids).logits) <= 1e-11
        trained = list(adapted.trainable().values())
        grads = torch.autograd.grad(got.square().sum(), trained)
        want = torch.autograd.grad(self.wanted(plain, adapted, ids).logits.square().sum(), trained)
        assert all(relative_error(a, b) <= 1e-10 for a, b in zip(grads, want, strict=True))
        adapted.merge()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.config.tie_word_embeddings is True
        assert relative_error(model(ids).logits, got) <= 1e-11

    # Merging

    @DTYPES
    def test_merging_gives_a_plain_model_and_unmerging_the_same_bits(self, dtype):
        model = small_model(dtype=dtype)
        classes = [type(module) for module in model.modules()]
        parameters = dict(model.named_parameters())
        adapted = self.adapt(model)
        x = sample_input(dtype=dtype)
        plain = small_model(dtype=dtype)
        want, state = model(x), copy.deepcopy(model.state_dict())
        norms = adapted.check()
        merged = adapted.merge()
        assert merged is model
        assert [type(module) for module in model.modules()] == classes
        assert list(dict(model.named_parameters())) == list(parameters)
        assert all(p.requires_grad for p in model.parameters())
        assert relative_error(model(x), self.wanted(plain, adapted, x)) <= self.tolerance[dtype]
        changed = {change.layer for change in adapted.merge_report.layers if change.relative_change > 0}
        assert changed == {name for name, norm in norms.items() if norm > 0}
        with pytest.raises(ValueError, match="merged"):
            adapted.merge()
        with pytest.raises(ValueError, match="merged"):
            adapted.save("nowhere")
        adapted.unmerge()
        assert torch.equal(model(x), want)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(p is parameters[name] for name, p in model.named_parameters() if name in parameters)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapted.trainable())
        self.train(adapted, steps=1, dtype=dtype)
        with pytest.raises(ValueError, match="unmerge"):
            adapted.unmerge()

    def test_a_merged_model_can_be_adapted_again(self):
        model = small_model()
        self.adapt(model).merge()
        want = model(sample_input())
        assert torch.equal(self.adapt(model, disturbed=False)(sample_input()), want)

    def test_peft_is_refused_with_what_to_do(self, tmp_path):
        with pytest.raises(ValueError, match=r"PEFT .* merge"):
            self.adapt(small_model()).export(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_model_with_an_adapter_is_refused(self):
        model = small_model()
        method = self.method(model)
        lowdim.adapt(model, LoRA(rank=1))
        with pytest.raises(ValueError, match="already adapted"):
            lowdim.adapt(model, method)
        model = small_model()
        lowdim.adapt(model, method)
        with pytest.raises(ValueError, match="already adapted"):
            lowdim.adapt(model, method)

    # Shapes alone

    def test_shapes_are_known_without_numbers(self):
        real = self.adapt(small_model(), disturbed=False).model.state_dict()
        method = self.method(small_model())
        with torch.device("meta"):
            model = small_model()
        on_meta: Any = lowdim.adapt(model, method, initialise=False)
        assert on_meta(sample_input().to("meta")).shape == (5, 3)
        with FakeTensorMode():
            model = small_model()
            faked = lowdim.adapt(model, method, initialise=False).model.state_dict()
            model(sample_input()).sum().backward()
        shapes = {key: value.shape for key, value in real.items()}
        assert {key: value.shape for key, value in on_meta.model.state_dict().items()} == shapes
        assert {key: value.shape for key, value in faked.items()} == shapes

    def test_it_describes_itself(self):
        model = small_model()
        adapted = self.adapt(model)
        text = repr(adapted)
        assert type(adapted.method).__name__ in text
        assert f"trained={sum(p.numel() for p in adapted.trainable().values())}" in text
        json.dumps(adapted.method.config())
