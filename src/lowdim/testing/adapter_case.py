"""The behaviour that every adapter owes, tested against the dense matrix it stands for.

    class TestMine(AdapterCase):
        def method(self, **changes):
            return MyMethod(**{"rank": 2, **changes})

gives every test below. Each compares with `dense()`, forward and backward, in float64; what a method may do differently is
a class attribute with its reason beside it.
"""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lowdim
from lowdim.adapters import AdaptedLayer, Method
from lowdim.errors import CheckpointError, NoGradientError
from lowdim.files import read_tensors
from lowdim.surgery import weight_matrix
from lowdim.testing.adapter_dense import DenseCase, make_input, make_layer, relative_error
from lowdim.testing.new_process import run_in_new_process
from lowdim.testing.small_model import output_of_saved, sample_input, small_model

__all__ = ["AdapterCase"]


class AdapterCase(DenseCase):
    """Subclass and define `method`; override an attribute only with a comment that says why."""

    # The model around it

    def test_the_given_layer_is_never_changed(self):
        model = small_model()
        weights = dict(model.named_parameters())
        before = {n: p.detach().clone() for n, p in weights.items()}
        adapted = self.adapt(model)
        self._train(adapted, steps=2)
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
        adapted = self.adapt(small_model(), disturbed=False)
        losses = self._train(adapted, steps=25)
        assert losses[-1] < 0.5 * losses[0]
        assert all(norm > 0 for norm in adapted.check().values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_training_in_low_precision(self, dtype):
        # bfloat16 weights with float32 updates: what the docs advise
        adapted = self.adapt(small_model(dtype=dtype), disturbed=False, dtype=torch.float32)
        losses = self._train(adapted, steps=25, dtype=dtype)
        assert losses[-1] < 0.5 * losses[0]

    def test_merging_the_model_restores_plain_layers(self):
        model = small_model(dtype=torch.float64)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64)
        want = model(x)
        merged = adapted.merge()
        assert merged is model
        assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
        assert relative_error(model(x), want) <= 1e-12
        assert all(change.relative_change > 0 for change in adapted.merge_report.layers)
        with pytest.raises(ValueError, match="merged"):
            adapted.save("nowhere")

    def test_same_seed_same_bits(self):
        states = [self.adapt(small_model(), disturbed=False, seed=seed).state_dict() for seed in (0, 0, 1)]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        if self.random_start:
            assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])

    def test_deepcopy_is_independent(self):
        model = small_model()
        adapted = self.adapt(model)
        twin, x = copy.deepcopy(model), sample_input()
        before = model(x)
        assert torch.equal(twin(x), before)
        self._train(adapted, steps=1)
        assert not torch.equal(model(x), before)
        assert torch.equal(twin(x), before)

    def test_a_trainers_state_dict_restores_the_model(self):
        model, fresh = small_model(), small_model()
        adapted = self.adapt(model)
        self._train(adapted, steps=3)
        self.adapt(fresh, disturbed=False)
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(fresh(sample_input()), model(sample_input()))

    @pytest.mark.parametrize("killed", [1, 4, 8])
    def test_killed_and_resumed_gives_the_same_bits(self, killed):
        last = 10
        whole, optimizer = self._begin()
        losses = self._go(whole, optimizer, 0, last)
        part, optimizer = self._begin()
        self._go(part, optimizer, 0, killed)
        model_state, optimizer_state = copy.deepcopy((part.model.state_dict(), optimizer.state_dict()))
        fresh = self.adapt(small_model(), disturbed=False)
        fresh.model.load_state_dict(model_state)  # a trainer loads the model before it makes the optimizer
        optimizer = torch.optim.AdamW(fresh.param_groups(self.lr), weight_decay=0.0)
        optimizer.load_state_dict(optimizer_state)
        assert self._go(fresh, optimizer, killed, last) == losses[killed:]
        state = whole.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())

    def test_compiled(self):
        model = small_model()
        adapted = self.adapt(model)
        x = sample_input()
        trained = [p for p in adapted.trainable().values() if p.requires_grad]
        want = torch.autograd.grad(model(x).square().sum(), trained)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        got = torch.autograd.grad(compiled(x).square().sum(), trained)
        assert relative_error(compiled(x), model(x)) <= 1e-5
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        model = small_model(dtype=torch.float64)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64).requires_grad_()
        grads = []
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            loss = run(x).square().sum()
            grads.append(torch.autograd.grad(loss, [p for p in adapted.trainable().values() if p.requires_grad]))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_autocast(self):
        model = small_model()
        adapted = self.adapt(model)
        want = model(sample_input())
        with torch.autocast("cpu", torch.bfloat16):
            got = model(sample_input())
        assert relative_error(got, want) <= 5e-2
        got.float().square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapted.trainable().values())

    def test_dropout_acts_while_training_only(self):
        adapted = self.adapt(small_model(), method=self.method(dropout=0.5))
        x = sample_input()
        model = adapted.model.eval()
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))

    def test_tied_query_and_tied_head(self):
        model = _tied_llama()
        names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
        method = self.method(target_modules=names)
        ids = torch.arange(12).view(2, 6)
        loss = lambda model, batch: model(input_ids=batch, labels=batch).loss  # noqa: E731
        embedding = model.get_input_embeddings().weight.detach().clone()
        adapted = self.adapt(model, method=method, **({"batches": [ids], "loss_fn": loss} if method.needs else {}))
        want = model(ids).logits
        adapted.merge()
        assert relative_error(model(ids).logits, want) <= 1e-10
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert not torch.equal(model.get_output_embeddings().weight, embedding)
        assert model.config.tie_word_embeddings is False
        assert set(adapted.merge_report.untied) == set(names)

    # Several adapters, strengths, and back again

    @pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
    def test_strength_is_a_factor_of_the_change(self, layer_name, strength):
        layer = make_layer(layer_name)
        adapted = self.attach(layer)
        x = make_input(layer)
        plain, whole = layer(x), adapted(x)
        adapted.strength = strength
        tolerance = self.forward_tolerance[torch.float64]
        assert relative_error(adapted(x), plain + strength * (whole - plain)) <= 10 * tolerance
        assert relative_error(adapted.merged()(x), adapted(x)) <= 10 * tolerance
        adapted.strength = 0.0
        assert relative_error(adapted(x), plain) <= tolerance
        assert relative_error(adapted.merged()(x), plain) <= tolerance

    def test_an_adapter_beside_another(self, layer_name):
        layer = make_layer(layer_name)
        x = make_input(layer)
        one = self.attach(layer)
        both = self.method().attach(one, stats=self.stats(layer), generator=torch.Generator().manual_seed(3))
        assert relative_error(both.pristine_weight(), weight_matrix(layer)) <= 1e-12
        self.disturb(both.update, seed=5)
        total = one.delta() + both.delta()
        tolerance = self.forward_tolerance[torch.float64]
        assert relative_error(both.effective_weight(), weight_matrix(layer) + total) <= 10 * tolerance
        assert relative_error(both(x), both.merged()(x)) <= 10 * tolerance
        one.strength = 0.0
        assert relative_error(both(x), both.merged()(x)) <= 10 * tolerance
        assert relative_error(both.effective_weight(), weight_matrix(layer) + both.delta()) <= 10 * tolerance

    def test_rows_of_the_batch_that_it_acts_on(self, layer_name):
        layer = make_layer(layer_name)
        x = make_input(layer)
        adapted = self.attach(layer)
        want = torch.cat([layer(x[:1]), adapted(x[1:])])
        adapted.rows = torch.tensor([1])
        assert relative_error(adapted(x), want) <= 10 * self.forward_tolerance[torch.float64]

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
        self._train(adapted, steps=1)
        with pytest.raises(ValueError, match="unmerge"):
            adapted.unmerge()

    def test_over_a_quantized_layer(self):
        torchao = pytest.importorskip("torchao.quantization")
        model: Any = small_model()
        torchao.quantize_(model.body, torchao.Int8WeightOnlyConfig())
        x = sample_input()
        before, weight = model(x), model.body["first"].weight
        adapted = self.adapt(model, disturbed=False)
        if self.starts_unchanged:
            assert relative_error(model(x), before) <= max(1e-5, 10 * self.start_tolerance[torch.float32])
        losses = self._train(adapted, steps=12)
        assert losses[-1] < losses[0]
        assert adapted.layers["body.first"].plain.weight is weight
        want = model(x)
        adapted.merge()
        assert type(model.body["first"]) is nn.Linear
        assert relative_error(model(x), want) <= 1e-5

    def test_a_layer_without_a_gradient_is_named(self):
        adapted = self.adapt(small_model())
        torch.stack([p.sum() for p in adapted.layers["body.first"].update.parameters()]).sum().backward()
        with pytest.raises(NoGradientError, match=r"1 of 2 .*body\.second"):
            adapted.step(torch.optim.SGD(adapted.param_groups(0.1)))

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

    # Files

    def test_another_process_loads_the_same_bits(self, tmp_path):
        model = small_model()
        adapted = self.adapt(model)
        adapted.save(tmp_path)
        file = run_in_new_process(output_of_saved, str(tmp_path), type(self.method()).__module__)
        with torch.no_grad():
            assert torch.equal(read_tensors(file)[0]["y"], model(sample_input()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_save_and_load_keep_dtype_state_and_training(self, tmp_path, dtype):
        model, twin = small_model(dtype=dtype), small_model(dtype=dtype)
        adapted = self.adapt(model)
        self._train(adapted, steps=2, dtype=dtype)
        adapted.save(tmp_path)
        loaded = lowdim.load_adapter(twin, tmp_path)
        assert loaded.method == adapted.method
        state = adapted.state_dict()
        assert all(
            torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in loaded.state_dict().items()
        )
        assert torch.equal(twin(sample_input(dtype=dtype)), model(sample_input(dtype=dtype)))
        assert self._train(loaded, steps=2, dtype=dtype) == self._train(adapted, steps=2, dtype=dtype)

    def test_another_base_model_is_refused(self, tmp_path):
        self.adapt(small_model()).save(tmp_path)
        other = small_model(seed=1)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(CheckpointError, match=r"body\.first differs"):
            lowdim.load_adapter(other, tmp_path)
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
        assert all(p.requires_grad for p in other.parameters())
        lowdim.load_adapter(other, tmp_path, check_base=False)

    @pytest.mark.parametrize("file", ["adapter.safetensors", "adapter.json"])
    def test_damaged_files_are_refused(self, tmp_path, file):
        self.adapt(small_model()).save(tmp_path)
        data = (tmp_path / file).read_bytes()
        for cut in (0, len(data) // 2, len(data) - 1):
            (tmp_path / file).write_bytes(data[:cut])
            if cut == len(data) - 1 and file == "adapter.json":
                continue  # the final newline
            model = small_model()
            with pytest.raises(CheckpointError, match=file):
                lowdim.load_adapter(model, tmp_path)
            assert not any(isinstance(m, AdaptedLayer) for m in model.modules())

    def test_the_configuration_goes_through_json(self):
        method = self.method()
        assert type(method).from_config(json.loads(json.dumps(method.config()))) == method
        assert isinstance(type(method)(), Method)  # every field has a default

    def test_peft_gives_the_same_logits(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = small_model()
        adapted = self.adapt(model)
        report = adapted.export(tmp_path)
        assert report.exact == self.exact_in_peft
        if not self.exact_in_peft:
            assert 0 < max(report.errors.values()) <= 1
            report = adapted.export(tmp_path, rank=8)  # the largest that the layers can have
            assert max(report.errors.values()) <= 1e-3
        loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path)
        x = sample_input(64)
        assert relative_error(loaded(x), model(x)) <= 1e-5

    # Errors

    def test_errors_name_the_layer(self):
        model = small_model()
        for bad in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match="rank"):
                self.method(rank=bad)
        with pytest.raises(ValueError, match=r"body\.first.*\(12, 8\).*rank.*9"):
            self.adapt(model, method=self.method(rank=9))
        with pytest.raises(ValueError, match="dropout"):
            self.method(dropout=1.0)

    def test_layers_without_a_matrix_are_refused(self):
        with pytest.raises(TypeError, match="LayerNorm"):
            self.method().attach(nn.LayerNorm(4))

    def _begin(self) -> tuple[Any, torch.optim.Optimizer]:
        adapted = self.adapt(small_model(), disturbed=False)
        return adapted, torch.optim.AdamW(adapted.param_groups(self.lr), weight_decay=0.0)

    def _go(self, adapted: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
        """Steps `first` to `last` of a run whose batches depend on the step alone."""
        losses = []
        for step in range(first, last):
            x = sample_input(16, seed=100 + step)
            loss = (adapted.model(x) - x[:, :3].sin()).square().mean() + adapted.regularizer()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
        return losses

    def _train(self, adapted: Any, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
        x = sample_input(32, seed=4, dtype=dtype)
        other = self.adapt(small_model(), disturbed=False)
        for layer in other.layers.values():
            self.disturb(layer.update, seed=12)
        target = other.model(x.float()).detach()
        optimizer = torch.optim.AdamW(adapted.param_groups(self.lr), weight_decay=0.0)
        losses = []
        for _ in range(steps):
            loss = (adapted.model(x).float() - target).square().mean() + adapted.regularizer()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
        return losses


def _tied_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double()
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    return model.eval()
