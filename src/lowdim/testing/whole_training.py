"""A model with composed parameters: trained numbers, seeds, resuming, compiling, copies, low precision."""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import copy
import functools
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lowdim
from lowdim.errors import NoGradientError
from lowdim.plan.kept import kept_bytes
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model
from lowdim.testing.whole_hooks import WholeHooks

__all__ = ["WholeTraining"]


class WholeTraining(WholeHooks):
    """A small model, composed and trained."""

    def test_only_the_few_numbers_are_trained(self):
        model = small_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        adapted = self.adapt(model, disturbed=False)
        trained = adapted.trainable()
        assert trained
        assert all(name.startswith("lowdim_shared.") for name in trained)
        grouped = [p for group in adapted.param_groups(0.1) for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, trained.values()))
        self.train(adapted, steps=3)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in before.items())
        assert set(state) == {*before, *trained}  # the names of the pre-trained model, and nothing else that is large
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_training_lowers_the_loss(self, dtype):
        # bfloat16 weights with float32 numbers: what the docs advise
        adapted = self.adapt(small_model(dtype=dtype), disturbed=False, dtype=torch.float32)
        losses = self.train(adapted, steps=40, dtype=dtype)
        assert losses[-1] < 0.5 * losses[0]
        assert any(norm > 0 for norm in adapted.check().values())

    def test_modules_to_save_are_trained_whole(self, tmp_path):
        model, twin = small_model(), small_model()
        adapted = self.adapt(model, disturbed=False, modules_to_save=["score"])
        assert not any(name.startswith("score") for name in adapted.names)
        before = model.score.weight.detach().clone()
        self.train(adapted, steps=2)
        assert not torch.equal(model.score.weight, before)
        adapted.save(tmp_path)
        loaded = lowdim.load_adapter(twin, tmp_path)
        assert torch.equal(twin(sample_input()), model(sample_input()))
        assert twin.score.weight.requires_grad
        assert loaded.modules_to_save == ("score",)

    def test_no_gradient_is_noticed(self):
        adapted = self.adapt(small_model(), modules_to_save=["score"])
        small_model()(sample_input()).sum().backward()
        adapted.model.score.weight.grad = torch.ones(3, 6)
        with pytest.raises(NoGradientError, match="got no gradient"):
            adapted.step(torch.optim.SGD(adapted.param_groups(0.1)))

    def test_same_seed_same_bits(self):
        outputs = [self.adapt(small_model(), seed=seed)(sample_input()) for seed in (0, 0, 1)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2]) is not self.random

    def test_killed_and_resumed_gives_the_same_bits(self):
        whole, optimizer = self.begin()
        losses = self.run_steps(whole, optimizer, 0, 8)
        part, optimizer = self.begin()
        self.run_steps(part, optimizer, 0, 3)
        model_state, optimizer_state = copy.deepcopy((part.model.state_dict(), optimizer.state_dict()))
        fresh = self.adapt(small_model(), disturbed=False)
        fresh.model.load_state_dict(model_state)
        optimizer = torch.optim.AdamW(fresh.param_groups(self.lr), weight_decay=0.0)
        optimizer.load_state_dict(optimizer_state)
        assert self.run_steps(fresh, optimizer, 3, 8) == losses[3:]
        state = whole.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())

    def test_another_process_can_be_handed_the_model(self):
        model = small_model()
        self.adapt(model)
        pickler: Any = ForkingPickler
        handed = pickler.loads(pickler.dumps(model))
        assert torch.equal(handed(sample_input()), model(sample_input()))
        assert set(handed.state_dict()) == set(model.state_dict())

    def test_copies_are_independent(self):
        model = small_model()
        adapted = self.adapt(model)
        x = sample_input()
        before = model(x)
        twins = [copy.deepcopy(model), copy.deepcopy(adapted).model]
        assert all(torch.equal(twin(x), before) for twin in twins)
        self.train(adapted, steps=1)
        assert not torch.equal(model(x), before)
        assert all(torch.equal(twin(x), before) for twin in twins)

    def test_compiled(self):
        model = small_model()
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        x = sample_input()
        trained = list(adapted.trainable().values())
        want = torch.autograd.grad(model(x).square().sum(), trained)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(x).square().sum(), trained)
        assert relative_error(compiled(x), self.wanted(plain, adapted, x)) <= 1e-5
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients(self, reentrant):
        model = small_model(dtype=torch.float64)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64).requires_grad_()
        grads = []
        for run in (model, functools.partial(checkpoint, model, use_reentrant=reentrant)):
            model.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad for p in adapted.trainable().values()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_checkpointed_parts_compute_their_parameters_again(self):
        model = small_model(dtype=torch.float64)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64)
        trained = list(adapted.trainable().values())
        want = torch.autograd.grad(model(x).square().sum(), trained)
        for name in ("first", "second"):
            part = model.body[name]
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
        got = torch.autograd.grad(model(x).square().sum(), trained)
        assert all(relative_error(a, b) <= 1e-12 for a, b in zip(got, want, strict=True))

    def test_autograd_keeps_the_composed_parameters_and_no_more(self):
        model = small_model()
        x = sample_input(64)
        full = kept_bytes(model, x)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        adapted = self.adapt(model)
        small = sum(p.numel() * 4 for p in adapted.composition.parameters()) * (len(adapted.names) + 1)
        assert kept_bytes(model, x) <= full + size + small

    def test_autocast(self):
        model = small_model()
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(sample_input())
        assert relative_error(got, self.wanted(plain, adapted, sample_input())) <= 5e-2
        got.float().square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapted.trainable().values())

    def test_moving_the_model_to_another_dtype_moves_the_numbers(self):
        model = small_model()
        self.adapt(model)
        x = sample_input()
        want = model(x)
        assert relative_error(model.double()(x.double()), want) <= 1e-5
        assert relative_error(model.to(torch.bfloat16)(x.bfloat16()), want) <= 5e-2
