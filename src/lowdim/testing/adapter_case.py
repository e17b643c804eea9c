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
import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lowdim
from lowdim.adapters import AdaptedLayer, Method
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.surgery import is_conv1d, matrix_shape, weight_matrix
from lowdim.testing.elsewhere import run_elsewhere
from lowdim.testing.small_model import output_of_saved, sample_input, small_model

__all__ = ["LAYERS", "AdapterCase", "dense_layer", "make_input", "make_layer", "relative_error"]

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


class AdapterCase:
    """Subclass and define `method`; override an attribute only with a comment that says why."""

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
        file = run_elsewhere(output_of_saved, str(tmp_path), type(self.method()).__module__)
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
            report = adapted.export(tmp_path, rank=6)
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
        with pytest.raises(ValueError, match="already"):
            self.adapt(self.adapt(small_model()).model)

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
            adapted.step()
        return losses


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


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
