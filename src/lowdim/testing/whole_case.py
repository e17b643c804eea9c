"""The behaviour that every method owes which acts on the model as a whole, tested against the parameters it stands for.

    class TestMine(WholeModelCase):
        def method(self, model, **changes):
            return MyMethod(**changes)

Each test compares with the plain model at `θ⁰ + offsets()`.
"""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lowdim
from lowdim.adapters import LoRA
from lowdim.adapters.core.composed import is_composed
from lowdim.errors import CheckpointError, NoGradientError
from lowdim.files import read_tensors
from lowdim.plan.kept import kept_bytes
from lowdim.testing.adapter_case import _tied_llama
from lowdim.testing.adapter_dense import relative_error
from lowdim.testing.new_process import run_in_new_process
from lowdim.testing.small_model import output_of_saved, sample_input
from lowdim.testing.small_model import small_model as _small_model

__all__ = ["WholeModelCase"]

small_model: Callable[..., Any] = _small_model  # its parts are read by name
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


class WholeModelCase:
    """Subclass and define `method`; override an attribute only with a comment that says why."""

    #: Rate of the training tests, whose target is a disturbed model's output.
    lr: ClassVar[float] = 0.05
    #: Whether what is computed depends on the seed of `lowdim.adapt`.
    random: ClassVar[bool] = True
    #: Largest relative error of the output against the plain model at the same parameters, by dtype.
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}

    def method(self, model: nn.Module, **changes: Any) -> Any:
        """The method for this model with these fields changed."""
        raise NotImplementedError

    def disturb(self, adapted: Any, seed: int = 11) -> None:
        """Move every trained number, as training would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.composition.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.3 * noise).to(parameter.dtype))

    def adapt(self, model: nn.Module, *, disturbed: bool = True, **options: Any) -> Any:
        """The method on a model, away from its start."""
        adapted = lowdim.adapt(model, self.method(model), **options)
        if disturbed:
            self.disturb(adapted)
        return adapted

    # Against the plain model

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
    def test_output_is_that_of_the_plain_model(self, dtype):
        model = small_model(dtype=dtype)
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        x = sample_input(dtype=dtype)
        got = model(x)
        assert got.dtype == dtype
        assert relative_error(got, self.plain(plain.double(), adapted, x.double())) <= self.tolerance[dtype]
        with torch.no_grad():
            assert torch.equal(model(x), got)

    def test_gradients_are_those_of_the_plain_model(self):
        model = small_model(dtype=torch.float64)
        plain = copy.deepcopy(model)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64).requires_grad_()
        wanted = [*adapted.trainable().values(), x]
        got = torch.autograd.grad(model(x).sin().sum(), wanted)
        want = torch.autograd.grad(self.plain(plain, adapted, x).sin().sum(), wanted)
        assert all(relative_error(a, b) <= 1e-11 for a, b in zip(got, want, strict=True))

    def plain(self, model: nn.Module, adapted: Any, *args: Any, **kwargs: Any) -> Any:
        """The output of `model`, an untouched copy, at `θ⁰ + offsets()`."""
        moved = {name: p.detach() + adapted.offsets()[name] for name, p in model.named_parameters() if name in adapted.names}
        return functional_call(model, moved, args, kwargs)

    def test_tied_parameters_are_moved_once_and_stay_tied(self):
        model = _tied_llama()
        plain = copy.deepcopy(model)
        ids = torch.arange(12).view(2, 6)
        adapted = self.adapt(model)
        assert "lm_head.weight" not in adapted.names
        got = model(ids).logits
        assert relative_error(got, self.plain(plain, adapted, ids).logits) <= 1e-11
        trained = list(adapted.trainable().values())
        grads = torch.autograd.grad(got.square().sum(), trained)
        want = torch.autograd.grad(self.plain(plain, adapted, ids).logits.square().sum(), trained)
        assert all(relative_error(a, b) <= 1e-10 for a, b in zip(grads, want, strict=True))
        adapted.merge()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.config.tie_word_embeddings is True
        assert relative_error(model(ids).logits, got) <= 1e-11

    # Training

    def test_only_the_few_numbers_are_trained(self):
        model = small_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        adapted = self.adapt(model, disturbed=False)
        trained = adapted.trainable()
        assert trained
        assert all(name.startswith("lowdim_shared.") for name in trained)
        grouped = [p for group in adapted.param_groups(0.1) for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, trained.values()))
        self._train(adapted, steps=3)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in before.items())
        assert set(state) == {*before, *trained}  # the names of the pre-trained model, and nothing else that is large
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_training_lowers_the_loss(self, dtype):
        # bfloat16 weights with float32 numbers: what the docs advise
        adapted = self.adapt(small_model(dtype=dtype), disturbed=False, dtype=torch.float32)
        losses = self._train(adapted, steps=40, dtype=dtype)
        assert losses[-1] < 0.5 * losses[0]
        assert any(norm > 0 for norm in adapted.check().values())

    def test_modules_to_save_are_trained_whole(self, tmp_path):
        model, twin = small_model(), small_model()
        adapted = self.adapt(model, disturbed=False, modules_to_save=["score"])
        assert not any(name.startswith("score") for name in adapted.names)
        before = model.score.weight.detach().clone()
        self._train(adapted, steps=2)
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
        whole, optimizer = self._begin()
        losses = self._go(whole, optimizer, 0, 8)
        part, optimizer = self._begin()
        self._go(part, optimizer, 0, 3)
        model_state, optimizer_state = copy.deepcopy((part.model.state_dict(), optimizer.state_dict()))
        fresh = self.adapt(small_model(), disturbed=False)
        fresh.model.load_state_dict(model_state)
        optimizer = torch.optim.AdamW(fresh.param_groups(self.lr), weight_decay=0.0)
        optimizer.load_state_dict(optimizer_state)
        assert self._go(fresh, optimizer, 3, 8) == losses[3:]
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
        self._train(adapted, steps=1)
        assert not torch.equal(model(x), before)
        assert all(torch.equal(twin(x), before) for twin in twins)

    def test_compiled(self):
        model = small_model()
        adapted = self.adapt(model)
        x = sample_input()
        trained = list(adapted.trainable().values())
        want = torch.autograd.grad(model(x).square().sum(), trained)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(x).square().sum(), trained)
        assert relative_error(compiled(x), model(x)) <= 1e-5
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients(self, reentrant):
        model = small_model(dtype=torch.float64)
        adapted = self.adapt(model)
        x = sample_input(dtype=torch.float64).requires_grad_()
        grads = []
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
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
            inner = model.body[name].forward
            model.body[name].forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
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
        adapted = self.adapt(model)
        want = model(sample_input())
        with torch.autocast("cpu", torch.bfloat16):
            got = model(sample_input())
        assert relative_error(got, want) <= 5e-2
        got.float().square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapted.trainable().values())

    def test_moving_the_model_to_another_dtype_moves_the_numbers(self):
        model = small_model()
        self.adapt(model)
        x = sample_input()
        want = model(x)
        assert relative_error(model.double()(x.double()), want) <= 1e-5
        assert relative_error(model.to(torch.bfloat16)(x.bfloat16()), want) <= 5e-2

    # Merging

    @DTYPES
    def test_merging_gives_a_plain_model_and_unmerging_the_same_bits(self, dtype):
        model = small_model(dtype=dtype)
        classes = [type(module) for module in model.modules()]
        parameters = dict(model.named_parameters())
        adapted = self.adapt(model)
        x = sample_input(dtype=dtype)
        want, state = model(x), copy.deepcopy(model.state_dict())
        norms = adapted.check()
        merged = adapted.merge()
        assert merged is model
        assert [type(module) for module in model.modules()] == classes
        assert list(dict(model.named_parameters())) == list(parameters)
        assert all(p.requires_grad for p in model.parameters())
        assert relative_error(model(x), want) <= self.tolerance[dtype]
        changed = {change.layer for change in adapted.merge_report.layers if change.relative_change > 0}
        assert changed == {name for name, norm in norms.items() if norm > 0}
        for call in (adapted.merge, lambda: adapted.save("nowhere")):
            with pytest.raises(ValueError, match="merged"):
                call()
        adapted.unmerge()
        assert torch.equal(model(x), want)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(p is parameters[name] for name, p in model.named_parameters() if name in parameters)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapted.trainable())
        self._train(adapted, steps=1, dtype=dtype)
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
        with pytest.raises(ValueError, match="adapted already"):
            lowdim.adapt(model, method)
        model = small_model()
        lowdim.adapt(model, method)
        with pytest.raises(ValueError, match="adapted already"):
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

    # Files

    def test_another_process_loads_the_same_bits(self, tmp_path):
        model = small_model()
        adapted = self.adapt(model)
        adapted.save(tmp_path)
        file = run_in_new_process(output_of_saved, str(tmp_path), type(adapted.method).__module__)
        with torch.no_grad():
            assert torch.equal(read_tensors(file)[0]["y"], model(sample_input()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_save_and_load_keep_dtype_state_and_training(self, tmp_path, dtype):
        model, twin = small_model(dtype=dtype), small_model(dtype=dtype)
        adapted = self.adapt(model, seed=3)
        self._train(adapted, steps=2, dtype=dtype)
        adapted.save(tmp_path)
        loaded = lowdim.load_adapter(twin, tmp_path)
        assert loaded.method == adapted.method
        assert type(loaded) is type(adapted)
        state = adapted.state_dict()
        assert all(
            torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in loaded.state_dict().items()
        )
        assert torch.equal(twin(sample_input(dtype=dtype)), model(sample_input(dtype=dtype)))
        assert self._train(loaded, steps=2, dtype=dtype) == self._train(adapted, steps=2, dtype=dtype)

    def test_another_base_model_is_refused(self, tmp_path):
        adapted = self.adapt(small_model())
        adapted.save(tmp_path)
        other = small_model(seed=1)
        with pytest.raises(CheckpointError, match=r"parameter body\.first\.weight differs"):
            lowdim.load_adapter(other, tmp_path)
        self._untouched(other)
        with pytest.raises(CheckpointError, match=r"body\.first\.weight, which the model lacks"):
            lowdim.load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path)
        odd = small_model()
        odd.body["first"] = nn.Linear(8, 13)
        with pytest.raises(CheckpointError, match=r"body\.first\.weight of shape \(12, 8\); the model's is \(13, 8\)"):
            lowdim.load_adapter(odd, tmp_path)
        loaded = lowdim.load_adapter(other, tmp_path, check_base=False)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), adapted.state_dict().values(), strict=True))

    @pytest.mark.parametrize("file", ["adapter.safetensors", "adapter.json"])
    def test_damaged_files_are_refused(self, tmp_path, file):
        self.adapt(small_model()).save(tmp_path)
        data = (tmp_path / file).read_bytes()
        for cut in (0, len(data) // 2, len(data) - 2):
            (tmp_path / file).write_bytes(data[:cut])
            model = small_model()
            with pytest.raises(CheckpointError, match=file):
                lowdim.load_adapter(model, tmp_path)
            self._untouched(model)

    def test_a_file_on_an_adapted_model_is_refused(self, tmp_path):
        model = small_model()
        self.adapt(model).save(tmp_path / "mine")
        with pytest.raises(ValueError, match="adapted already"):
            lowdim.load_adapter(model, tmp_path / "mine")
        lowdim.adapt(small_model(), LoRA(rank=1)).save(tmp_path / "lora")
        with pytest.raises(CheckpointError, match="composed by another adapter"):
            lowdim.load_adapter(model, tmp_path / "lora")

    def test_it_describes_itself(self):
        model = small_model()
        adapted = self.adapt(model)
        text = repr(adapted)
        assert type(adapted.method).__name__ in text
        assert f"trained={sum(p.numel() for p in adapted.trainable().values())}" in text
        json.dumps(adapted.method.config())

    def _untouched(self, model: nn.Module) -> None:
        assert not is_composed(model)
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "lowdim_shared")

    def _begin(self) -> tuple[Any, torch.optim.Optimizer]:
        adapted = self.adapt(small_model(), disturbed=False)
        return adapted, torch.optim.AdamW(adapted.param_groups(self.lr), weight_decay=0.0)

    def _go(self, adapted: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
        """Steps `first` to `last` of a run whose batches depend on the step alone."""
        losses = []
        for step in range(first, last):
            x = sample_input(16, seed=100 + step)
            loss = (adapted.model(x) - x[:, :3].sin()).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
        return losses

    def _train(self, adapted: Any, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
        x = sample_input(32, seed=4, dtype=dtype)
        other = self.adapt(small_model(), disturbed=False)
        self.disturb(other, seed=12)
        target = other.model(x.float()).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = torch.optim.AdamW(adapted.param_groups(self.lr), weight_decay=0.0)
        losses = []
        for _ in range(steps):
            loss = (adapted.model(x).float() - target).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
        return losses
