"""Every way to train, and what is done with trained models, on a device other than the CPU.

`second_device` says what that device is and what it has stand-ins for. Each method is attached, trained for a few steps with
what acts beside them, stored, taken back and merged there, and must give the CPU's losses.
"""

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
from second_device import LAZY, FakeTensorDeviceMismatchError, LazyTensor, numbers, second_device, to_lazy

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


# What is done with weights and tensors


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))


def rows():
    return torch.randn(80, 12, generator=torch.Generator().manual_seed(5))


def of_lord(model, x):
    from lowdim.compress import LoRDConfig, lord

    return lord(model, LoRDConfig(rank_ratio=0.4), [x])(x)


def of_welore(model, x):
    from lowdim.compress import WeLoreConfig, welore, welore_freeze

    model = welore(model, WeLoreConfig(threshold=0.5, min_reduction=0.0))
    loss = model(x).square().mean()
    return torch.autograd.grad(loss, welore_freeze(model))


def of_spectra(model, x):
    from lowdim.compress import lord_spectra

    return lord_spectra(model, [x])


def of_intruders(model, x):
    from lowdim.diagnose import intruder_dimensions

    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight[0] += 5.0
    return [layer.similarity for layer in intruder_dimensions(model, tuned, k=4).layers.values()]


def of_reduction(model, x):
    from lowdim.diagnose import reduce_intruders

    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight[0] += 5.0
    reduce_intruders(model, tuned, k=4)
    return tuned(x)


def of_scaled_factors(model, x):
    from lowdim.diagnose import scale_intruders_lora

    weight = model[0].weight.detach()
    return scale_intruders_lora(weight, 3 * x[:2], x[:20, :2].contiguous(), scaling=2.0, k=4)


def of_quantized_coordinates(model, x):
    from lowdim.diagnose import quantize_subspace

    return quantize_subspace(x.flatten(), bits=4)


def of_matryoshka_heads(model, x):
    from lowdim.represent import MatryoshkaCrossEntropy, MatryoshkaHead

    found = []
    for efficient in (False, True):
        torch.manual_seed(4)
        head = MatryoshkaHead(12, 5, (3, 6, 12), efficient=efficient).to(x.device)
        target = torch.arange(len(x), device=x.device) % 5
        loss = MatryoshkaCrossEntropy([1.0, 0.5, 2.0])(head(x), target)
        found += [loss, *torch.autograd.grad(loss, head.parameters())]
    return found


def of_matryoshka_embeddings(model, x):
    from lowdim.represent import MatryoshkaEmbeddingLoss

    y = x.detach().requires_grad_()
    loss = MatryoshkaEmbeddingLoss(nn.CosineEmbeddingLoss(), [4, 8, 12])(
        y, x.flip(0), target=torch.ones(len(x), device=x.device)
    )
    return [loss, *torch.autograd.grad(loss, y)]


def of_retrieval(model, x):
    from lowdim.represent import adaptive_retrieve, funnel_retrieve

    two = adaptive_retrieve(x[:9], x, retrieval_dim=4, rerank_dim=12, shortlist=20, k=5)
    many = funnel_retrieve(x[:9], x, retrieval_dim=4, rerank_dims=(8, 12), shortlists=(20, 10))
    return [two.indices, two.distances, many.indices]


def of_cascade(model, x):
    from lowdim.represent import MatryoshkaCascade

    probabilities = x.unflatten(1, (3, 4)).movedim(1, 0).softmax(-1)
    cascade = MatryoshkaCascade((2, 4, 8)).fit(probabilities, torch.arange(len(x), device=x.device) % 4)
    return cascade.predict(probabilities).predictions


def of_compressed_factors(model, x):
    from lowdim.linalg import compress_factors

    A, B, error = compress_factors(x[:6], x[:20, :6].contiguous(), 3)
    return [A, B, error]


FUNCTIONS = [value for name, value in list(globals().items()) if name.startswith("of_")]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__.removeprefix("of_"))
def test_functions_answer_there_as_on_the_cpu(function):
    want = function(net(), rows())
    with second_device():
        got = function(to_lazy(net()), to_lazy(rows()))
    torch.testing.assert_close(numbers(got), want, rtol=1e-4, atol=1e-5)


def test_matrix_completion_says_that_it_uses_the_cpu():
    from lowdim.solve import complete_matrix

    index = torch.arange(6)
    with second_device(), pytest.raises(ValueError, match=r"values must .* on the CPU; got lazy:0"):
        complete_matrix(index % 3, index % 2, to_lazy(torch.ones(6)), (3, 2), 1)


@pytest.mark.skip(reason="torch asks for a module named after the device, torch.lazy, which does not exist")
def test_gradient_checkpointing(): ...


@pytest.mark.skip(reason="tensors of torchao and layers of bitsandbytes need the kernels of a real device")
def test_adapters_over_quantized_weights(): ...


@pytest.mark.skip(reason="FSDP2 shards over processes with a backend for their device; tests/test_two_processes.py has gloo")
def test_sharded_parameters(): ...


# The device itself


def test_it_refuses_what_a_gpu_refuses():
    with second_device():
        there, here = torch.ones(3, 3, device=LAZY), torch.ones(3, 3)
        for mix in (
            lambda: there @ here,
            lambda: torch.cat([there, here]),
            lambda: torch.equal(there, here),
            lambda: torch.where(here > 0, there, 0.0),
            lambda: there.masked_select(here > 0),
            lambda: here.add_(there),
            lambda: torch.zeros(()).add_(there.sum()),
            lambda: F.embedding(torch.tensor([0, 1]), there),
            lambda: setattr(nn.Parameter(there), "data", here),
            lambda: torch.randn(3, device=LAZY, generator=torch.Generator()),
            lambda: here.normal_(generator=torch.Generator(LAZY)),
        ):
            with pytest.raises(FakeTensorDeviceMismatchError):
                mix()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()


def test_it_takes_what_a_gpu_takes():
    with second_device():
        there, here = torch.ones(3, 3, device=LAZY), torch.arange(9.0).view(3, 3)
        assert (there * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 3, "one number on the CPU"
        assert there.copy_(here).tolist() == here.tolist(), "copies across"
        assert there[torch.tensor([2, 0])].tolist() == here[[2, 0]].tolist(), "an index on the CPU"
        assert type(there.cpu()) is torch.Tensor
        assert torch.equal(there.cpu(), here)
        there[0].zero_()  # a view
        assert there.tolist() == [[0.0] * 3, *here[1:].tolist()]
        drawn = [
            torch.randn(3, device=place, generator=torch.Generator(place).manual_seed(1)).tolist() for place in (LAZY, "cpu")
        ]
        assert drawn[0] == drawn[1]


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
