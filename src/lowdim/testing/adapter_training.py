"""A model with adapted layers: what is trained, what stays, seeds, resuming, compiling, low precision."""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lowdim
from lowdim.adapters import AdaptedLayer
from lowdim.errors import NoGradientError
from lowdim.surgery import dense_matrix, with_matrix
from lowdim.testing.adapter_hooks import AdapterHooks
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model, tied_llama

__all__ = ["AdapterTraining"]


class AdapterTraining(AdapterHooks):
    """A small model, adapted and trained; its output is that of the plain model at `W₀ + dense(update)`."""

    def test_the_given_layer_is_never_changed(self):
        model = small_model()
        weights = dict(model.named_parameters())
        before = {n: p.detach().clone() for n, p in weights.items()}
        adapted = self.adapt(model)
        self.train(adapted, steps=2)
        adapted.merge()
        assert all(torch.equal(weights[n], before[n]) for n in before)

    def test_only_the_update_is_trained(self):
        adapted = self.adapt(small_model())
        assert list(adapted.layers) == ["body.first", "body.second"]
        trained = adapted.trainable()
        assert trained
        assert all(".update." in name for name in trained)
        grouped = [p for group in adapted.param_groups(0.1) for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, trained.values()))

    def test_training_lowers_the_loss(self):
        model = small_model()
        plain = copy.deepcopy(model)
        adapted = self.adapt(model, disturbed=False)
        losses = self.train(adapted, steps=25)
        assert losses[-1] < 0.5 * losses[0]
        norms = {name: float(self.change(layer).norm()) for name, layer in adapted.layers.items()}
        assert all(norm > 0 for norm in norms.values())
        assert adapted.check() == pytest.approx(norms, rel=1e-4)
        x = sample_input()
        assert relative_error(model(x), self.wanted_model(plain, adapted)(x.double())) <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_training_in_low_precision(self, dtype):
        # bfloat16 weights with float32 updates: what the docs advise
        adapted = self.adapt(small_model(dtype=dtype), disturbed=False, dtype=torch.float32)
        losses = self.train(adapted, steps=25, dtype=dtype)
        assert losses[-1] < 0.5 * losses[0]

    def test_a_layer_without_a_gradient_is_named(self):
        adapted = self.adapt(small_model())
        torch.stack([p.sum() for p in adapted.layers["body.first"].update.parameters()]).sum().backward()
        with pytest.raises(NoGradientError, match=r"1 of 2 .*body\.second"):
            adapted.step(torch.optim.SGD(adapted.param_groups(0.1)))

    def test_same_seed_same_bits(self):
        states = [self.adapt(small_model(), disturbed=False, seed=seed).state_dict() for seed in (0, 0, 1)]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0]) is self.random_start

    def test_deepcopy_is_independent(self):
        model = small_model()
        adapted = self.adapt(model)
        twin, x = copy.deepcopy(model), sample_input()
        before = model(x)
        assert torch.equal(twin(x), before)
        self.train(adapted, steps=1)
        assert not torch.equal(model(x), before)
        assert torch.equal(twin(x), before)

    # Trainers

    def test_a_trainers_state_dict_restores_the_model(self):
        model, fresh = small_model(), small_model()
        adapted = self.adapt(model)
        self.train(adapted, steps=3)
        self.adapt(fresh, disturbed=False)
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(fresh(sample_input()), model(sample_input()))

    @pytest.mark.parametrize("killed", [1, 4, 8])
    def test_killed_and_resumed_gives_the_same_bits(self, killed):
        last = 10
        whole, optimizer = self.begin()
        losses = self.run_steps(whole, optimizer, 0, last)
        part, optimizer = self.begin()
        self.run_steps(part, optimizer, 0, killed)
        model_state, optimizer_state = copy.deepcopy((part.model.state_dict(), optimizer.state_dict()))
        fresh = self.adapt(small_model(), disturbed=False)
        fresh.model.load_state_dict(model_state)  # a trainer loads the model before it makes the optimizer
        optimizer = torch.optim.AdamW(fresh.param_groups(self.lr), weight_decay=0.0)
        optimizer.load_state_dict(optimizer_state)
        assert self.run_steps(fresh, optimizer, killed, last) == losses[killed:]
        state = whole.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())

    def test_compiled(self):
        model = small_model()
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        x = sample_input()
        trained = [p for p in adapted.trainable().values() if p.requires_grad]
        want = torch.autograd.grad(model(x).square().sum(), trained)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        got = torch.autograd.grad(compiled(x).square().sum(), trained)
        assert relative_error(compiled(x), self.wanted_model(plain, adapted)(x.double())) <= 1e-5
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        model = small_model(dtype=torch.float64)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64).requires_grad_()
        grads = []
        for run in (model, functools.partial(checkpoint, model, use_reentrant=False)):
            loss = run(x).square().sum()
            grads.append(torch.autograd.grad(loss, [p for p in adapted.trainable().values() if p.requires_grad]))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_autocast(self):
        model = small_model()
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(sample_input())
        assert relative_error(got, self.wanted_model(plain, adapted)(sample_input().double())) <= 5e-2
        got.float().square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapted.trainable().values())

    def test_dropout_acts_while_training_only(self):
        model = small_model()
        plain, x = copy.deepcopy(model), sample_input()
        adapted = self.adapt(model, method=self.method(dropout=0.5))
        want = self.wanted_model(plain, adapted)(x.double())
        assert relative_error(model.eval()(x), want) <= 1e-5
        model.train()
        assert not torch.equal(model(x), model(x))

    # Merging

    def test_merging_the_model_restores_plain_layers(self):
        model = small_model(dtype=torch.float64)
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64)
        want = self.wanted_model(plain, adapted)(x)
        assert relative_error(model(x), want) <= 1e-12
        merged = adapted.merge()
        assert merged is model
        assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
        assert relative_error(model(x), want) <= 1e-12
        assert all(change.relative_change > 0 for change in adapted.merge_report.layers)
        with pytest.raises(ValueError, match="merged"):
            adapted.save("nowhere")

    def test_unmerging_brings_the_same_bits_back(self):
        model = small_model()
        adapted = self.adapt(model)
        x = sample_input()
        before, state = model(x), copy.deepcopy(model.state_dict())
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        adapted.merge()
        adapted.unmerge()
        assert torch.equal(model(x), before)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        self.train(adapted, steps=1)
        with pytest.raises(ValueError, match="unmerge"):
            adapted.unmerge()

    def test_tied_query_and_tied_head(self):
        model = tied_llama()
        plain = copy.deepcopy(model)
        names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
        method = self.method(target_modules=names)
        ids = torch.arange(12).view(2, 6)
        embedding = model.get_input_embeddings().weight.detach().clone()
        adapted = self.adapt(model, method=method, **({"batches": [ids], "loss_fn": _next_token} if method.needs else {}))
        want = self.wanted_model(plain, adapted)(ids).logits
        assert relative_error(model(ids).logits, want) <= 1e-10
        adapted.merge()
        assert relative_error(model(ids).logits, want) <= 1e-10
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert not torch.equal(model.get_output_embeddings().weight, embedding)
        assert model.config.tie_word_embeddings is False
        assert set(adapted.merge_report.untied) == set(names)

    def test_over_a_quantized_layer(self):
        torchao = pytest.importorskip("torchao.quantization")
        model: Any = small_model()
        torchao.quantize_(model.body, torchao.Int8WeightOnlyConfig())
        plain: Any = small_model()
        for name in ("first", "second"):
            plain.body[name] = with_matrix(plain.body[name], dense_matrix(model.body[name]))
        x, weight = sample_input(), model.body["first"].weight
        adapted = self.adapt(model, disturbed=False)
        want = plain if self.starts_unchanged else self.wanted_model(plain, adapted).float()
        assert relative_error(model(x), want(x)) <= max(1e-5, 10 * self.start_tolerance[torch.float32])
        losses = self.train(adapted, steps=12)
        assert losses[-1] < losses[0]
        assert adapted.layers["body.first"].plain.weight is weight
        want = self.wanted_model(plain, adapted)(x.double())
        assert relative_error(model(x), want) <= 1e-5
        adapted.merge()
        assert type(model.body["first"]) is nn.Linear
        assert relative_error(model(x), want) <= 1e-5

    # Shapes alone

    def test_shapes_are_known_without_numbers(self):
        real = self.adapt(small_model(), disturbed=False).model.state_dict()
        with torch.device("meta"):
            model = small_model()
        on_meta = lowdim.adapt(model, self.method(), initialise=False).model.state_dict()
        with FakeTensorMode():
            faked = lowdim.adapt(small_model(), self.method(), initialise=False).model.state_dict()
        shapes = {key: value.shape for key, value in real.items()}
        assert {key: value.shape for key, value in on_meta.items()} == shapes
        assert {key: value.shape for key, value in faked.items()} == shapes


def _next_token(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch, labels=batch).loss
