"""Every way to train, on a device other than the CPU, gives the CPU's losses."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowdim
import tiny
from lowdim.adapters import ATLAS, LoRA
from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.layer import kind_of
from lowdim.catalogue import variants
from lowdim.layers import densify
from lowdim.methods import Applied, apply
from lowdim.optim import GaLore
from methods import busy
from second_device import FakeTensorDeviceMismatchError, LazyTensor, second_device, to_lazy

METHODS = variants()
STEPS = 3
#: Methods whose random numbers on other devices are not the CPU's: INT8 weights are rounded at random there.
OTHER_NUMBERS = {"q-galore"}


class Mixed(nn.Module):
    """An embedding, a convolution and linear layers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.first = nn.Linear(32, 24)
        self.second = nn.Linear(24, 12)
        self.score = nn.Linear(12, 3)

    def forward(self, input_ids, labels):
        x = self.words(input_ids).unflatten(-1, (4, 4)).movedim(2, 1)  # (batch, 4, length, 4)
        x = torch.tanh(self.first(F.gelu(self.conv(x)).movedim(1, 2).flatten(2)))
        logits = self.score(torch.tanh(self.second(x)).mean(1))
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def subject(kind):
    """A model, the name of its head, and a batch, all on the CPU."""
    torch.manual_seed(0)
    ids = torch.randint(3, 20, (9, 8))
    if kind == "llama":
        return tiny.llama(), (), {"input_ids": ids, "labels": ids}
    return Mixed(), ("score",), {"input_ids": ids, "labels": torch.arange(9) % 3}


def loss_of(model, batch):
    return model(**batch).loss


def small(chosen, model, head):
    """The method with small sizes, on every layer of the model that it takes."""
    options = {**chosen.options, **busy(chosen.name)}
    if "update_interval" in options:
        options["update_interval"] = 2  # within three steps
    takes = getattr(chosen.build(), "takes", None) if chosen.target else None
    if takes:
        names = [name for name, layer in model.named_modules() if kind_of(layer) in takes and name not in (*head, "lm_head")]
        options["target_modules"] = names
    return dataclasses.replace(chosen, options=options)


@dataclasses.dataclass
class Run:
    """A model trained for some steps, and what trained it."""

    applied: Applied
    optimizer: torch.optim.Optimizer
    batch: dict
    losses: list

    def step(self):
        losses = self.applied.loss(self.batch, loss_of)
        losses.total.backward()
        self.optimizer.step()
        self.applied.after_step(self.optimizer)
        self.optimizer.zero_grad()
        self.losses += [losses.task.item(), (losses.total - losses.task).item()]

    def logits(self):
        with torch.no_grad():
            return self.applied.model.eval()(**self.batch).logits


def trained(chosen, model, head, batch) -> Run:
    torch.manual_seed(7)
    rate = chosen.rates[0]
    applied = apply(chosen, model.train(), lr=rate, steps=STEPS, head=head, batches=[batch], loss_fn=loss_of)
    applied.model.train()
    run = Run(applied, applied.start(rate), batch, [])
    for _ in range(STEPS):
        run.step()
    return run


def left_on_the_cpu(thing, name=""):
    """Names of the tensors within that are on the CPU; single numbers, such as a count of steps, may be."""
    if isinstance(thing, torch.Tensor):
        return [name] if thing.ndim and not isinstance(thing, LazyTensor) else []
    if isinstance(thing, dict):
        return [found for key, value in thing.items() for found in left_on_the_cpu(value, f"{name}.{key}")]
    if isinstance(thing, (list, tuple)):
        return [found for i, value in enumerate(thing) for found in left_on_the_cpu(value, f"{name}.{i}")]
    return []


def kept(run):
    """All tensors that a run keeps between steps."""
    model = run.applied.model
    yield "parameters", dict(model.named_parameters())
    yield "buffers", dict(model.named_buffers())
    yield "optimizer", dict(enumerate(run.optimizer.state.values()))
    yield "companions", [companion.state_dict() for companion in run.applied.companions]


CASES = [(kind, name) for name in METHODS for kind in ("llama", "mixed") if (kind, name) != ("llama", "linear-probe")]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{name}-{kind}" for kind, name in CASES])
def test_every_method_trains_there_as_on_the_cpu(kind, name, tmp_path):
    """It is attached, trained for a few steps with what acts beside them, stored, taken back and merged there."""
    model, head, batch = subject(kind)
    chosen = small(METHODS[name], model, head)
    base = copy.deepcopy(model)
    want = trained(chosen, copy.deepcopy(model), head, batch)
    with second_device():
        run = trained(chosen, to_lazy(model), head, to_lazy(batch))
        assert {what: left_on_the_cpu(tensors) for what, tensors in kept(run)} == {what: [] for what, _ in kept(run)}
        tolerance = 1e-2 if name in OTHER_NUMBERS else 1e-4
        assert run.losses == pytest.approx(want.losses, rel=tolerance, abs=1e-6)
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        if run.applied.companion is not None:
            run.applied.companion.load_state_dict(copy.deepcopy(run.applied.companion.state_dict()))
        run.step()
        assert {what: left_on_the_cpu(tensors) for what, tensors in kept(run)} == {what: [] for what, _ in kept(run)}
        run.applied.finish()
        said = run.logits()
        assert isinstance(said, LazyTensor)
        if run.applied.adapted is not None:
            folder = run.applied.adapted.save(tmp_path / "adapter")
            loaded = to_lazy(base)
            lowdim.load_adapter(loaded, folder)
            assert torch.allclose(loaded.eval()(**run.batch).logits, said, atol=1e-5)
            plain = run.applied.adapted.merge()
            assert torch.allclose(plain.eval()(**run.batch).logits, said, atol=1e-4)
        elif run.applied.kind == "layer":
            assert torch.allclose(densify(run.applied.model)(**run.batch).logits, said, atol=1e-4)


def test_task_vectors_train_there_as_on_the_cpu():
    """aTLAS, which is trained through its own `adapt` and has no row among the methods."""
    model, _, batch = subject("mixed")
    vectors = [{name: 0.1 * torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]

    def losses(model, vectors, batch):
        adapted = lowdim.adapt(model, ATLAS(vectors))
        optimizer = torch.optim.AdamW(adapted.param_groups(0.1))
        found = []
        for _ in range(STEPS):
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
            optimizer.zero_grad()
            found.append(loss.item())
        assert not isinstance(batch["labels"], LazyTensor) or not left_on_the_cpu(dict(model.named_parameters()))
        return [*found, loss_of(adapted.merge(), batch).item()]

    want = losses(copy.deepcopy(model), vectors, batch)
    with second_device():
        assert losses(to_lazy(model), to_lazy(vectors), to_lazy(batch)) == pytest.approx(want, rel=1e-4)


@pytest.mark.skip(reason="torch asks for a module named after the device, torch.lazy, which does not exist")
def test_gradient_checkpointing(): ...


@pytest.mark.skip(reason="tensors of torchao and layers of bitsandbytes need the kernels of a real device")
def test_adapters_over_quantized_weights(): ...


@pytest.mark.skip(reason="FSDP2 shards over processes with a backend for their device; tests/test_two_processes.py has gloo")
def test_sharded_parameters(): ...


class TestATensorLeftOnTheCPUIsFound:
    """Faults planted in a method, one at a time: the comparison above must fail with each."""

    def run(self, name):
        """The names of tensors left on the CPU, if the run gets that far."""
        model, head, batch = subject("mixed")
        with second_device():
            run = trained(small(METHODS[name], model, head), to_lazy(model), head, to_lazy(batch))
            return [found for _, tensors in kept(run) for found in left_on_the_cpu(tensors)]

    def test_nothing_is_found_without_a_fault(self):
        assert self.run("lora") == self.run("galore") == []

    def test_a_parameter_of_an_adapter(self, monkeypatch):
        blank = LoRA.blank
        monkeypatch.setattr(LoRA, "blank", lambda *args, device, **keywords: blank(*args, device="cpu", **keywords))
        with pytest.raises(FakeTensorDeviceMismatchError):
            self.run("lora")

    def test_a_buffer_that_is_drawn_without_a_device(self, monkeypatch):
        def initialise(method, update, weight, stats, generator):
            update.register_buffer("noise", torch.randn(4))
            update.A.normal_()
            update.B.zero_()

        monkeypatch.setattr(LoRA, "initialise", initialise)
        assert {".words.update.noise", ".conv.update.noise", ".first.update.noise"} <= set(self.run("lora"))

    def test_a_generator_of_the_cpu(self, monkeypatch):
        monkeypatch.setattr(
            LoRA, "initialise", lambda method, update, weight, stats, generator: update.A.normal_(generator=generator)
        )
        with pytest.raises(FakeTensorDeviceMismatchError):
            self.run("lora")

    def test_what_acts_between_the_steps(self, monkeypatch):
        def step(adapted, optimizer=None):
            for p in adapted.trainable().values():
                p.data.mul_(torch.full(p.shape, 0.5))

        monkeypatch.setattr(Adapted, "step", step)
        with pytest.raises(FakeTensorDeviceMismatchError):
            self.run("lora")

    def test_the_state_of_an_optimizer(self, monkeypatch):
        step = GaLore.step

        def forgetful(optimizer, closure=None):
            step(optimizer, closure)
            for state in optimizer.state.values():
                state["mean"] = torch.zeros(3)

        monkeypatch.setattr(GaLore, "step", forgetful)
        assert len(self.run("galore")) == len(list(Mixed().parameters()))
