"""Tests of every normalisation: its formula in training and in evaluation, running statistics, and files.

A normalisation's test defines how to make one and a batch, and output and statistics as formulas::

    class TestBatchNorm(NormCase):
        norm_class = nn.BatchNorm1d

        def batch(self, seed=0):
            return torch.randn(8, self.features, generator=stream(seed, "batch"), dtype=torch.float64)

        def expected(self, norm, x, training):
            ...  # the output, and the value of every buffer after this batch

In training mode `norm(x)` normalises by the statistics of the batch and moves the running ones, in evaluation mode by the
running ones, which stay. A check that does not apply is switched off by name, with its reason:
`test_the_output_has_the_dtype_of_the_input = None  # torch's kernel refuses mixed dtypes`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lowdim.files import read_tensors, write_tensors
from lowdim.testing.agreement import Refusal, refuses
from lowdim.testing.new_process import run_in_new_process

__all__ = ["NormCase"]


class NormCase(ABC):
    """Base of a normalisation's test class: define `batch` and `expected`, and set the attributes.

    Attributes:
        norm_class: the class under test, made as `norm_class(features, device=…, dtype=…, **how)`.
        features: its size.
        how: its hyperparameters.
        tolerances: largest error relative to the largest entry, by operation.
    """

    norm_class: ClassVar[type[nn.Module]]
    features: ClassVar[int] = 5
    how: ClassVar[dict[str, Any]] = {}
    tolerances: ClassVar[dict[str, float]] = {"formula": 1e-10, "gradient": 1e-8, "float32": 1e-4}

    @abstractmethod
    def batch(self, seed: int = 0) -> Tensor:
        """Valid inputs in float64, at least four rows; other numbers for another seed."""

    @abstractmethod
    def expected(self, norm: Any, x: Tensor, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The output as a formula of parameters and buffers, differentiable, and the value of each buffer afterwards.

        Written out from the paper: no method of the norm, hyperparameters as the test states them. Statistics that carry no
        gradient by design are detached here, too.
        """

    def refusals(self) -> list[Refusal]:
        """Wrong input: exception type, a word of its message, and the call that raises it."""
        return []

    def make(self, dtype: torch.dtype = torch.float64, device: Any = None) -> Any:
        """A norm whose parameters are not at their neutral start."""
        norm = self.norm_class(self.features, device=device, dtype=dtype, **self.how)
        if device is None:
            self.disturb(norm)
        return norm

    def disturb(self, norm: Any) -> None:
        """Change the parameters a little, so that ignoring one is noticed; override if they must stay in a set."""
        with torch.no_grad():
            for index, p in enumerate(norm.parameters()):
                p.add_(torch.linspace(-0.2, 0.3, p.numel(), dtype=p.dtype).view(p.shape) + 0.1 * index)

    def trained(self, **options: Any) -> Any:
        """A norm after two batches, so that its running statistics are not those of a new one. In training mode."""
        norm = self.make(**options).train()
        for seed in (1, 2):
            norm(self.batch(seed).to(next(norm.parameters()).dtype))
        return norm

    def close(self, got: Tensor, want: Tensor, operation: str) -> None:
        """Compare at the operation's tolerance."""
        assert got.shape == want.shape, f"{operation}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
        got, want = got.detach().double(), want.detach().double()
        error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
        assert error <= self.tolerances[operation], f"{operation}: {error:.3g} > {self.tolerances[operation]:.3g}"

    # The formula.

    def test_training_is_the_formula(self) -> None:
        """Batch after batch: the output, and every buffer."""
        norm = self.make().train()
        for seed in range(3):
            x = self.batch(seed)
            want, buffers = self.expected(norm, x, training=True)
            self.close(norm(x), want, "formula")
            assert buffers.keys() == dict(norm.named_buffers()).keys()
            for name, value in buffers.items():
                self.close(norm.get_buffer(name), value, "formula")

    def test_evaluation_is_the_formula_and_moves_nothing(self) -> None:
        """With the running statistics, on data of another kind."""
        norm = self.trained().eval()
        before = {name: value.clone() for name, value in norm.named_buffers()}
        x = self.batch(3)
        self.close(norm(x), self.expected(norm, x, training=False)[0], "formula")
        assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())

    def test_evaluation_takes_rows_one_by_one(self) -> None:
        """A single row gives the same as in a batch."""
        norm, x = self.trained().eval(), self.batch(3)
        y = norm(x)
        for row in range(len(x)):
            self.close(norm(x[row : row + 1]), y[row : row + 1], "formula")

    def test_training_looks_at_the_batch(self) -> None:
        """The other rows of the batch change the output of a row."""
        norm, x, other = self.make().train(), self.batch(0), self.batch(1)
        mixed = torch.cat([x[:1], other[1:]])
        assert float((norm(mixed)[0] - norm(x)[0]).detach().abs().max()) > 1e-3 * float(x.abs().max())

    @pytest.mark.parametrize("training", [True, False])
    def test_gradients_are_those_of_the_formula(self, training: bool) -> None:
        """Of the input and of every parameter."""
        norm = self.trained().train(training)
        names, parameters = zip(*norm.named_parameters(), strict=True)
        found = []
        for formula in (True, False):  # the formula first: the call moves the statistics
            x = self.batch(3).requires_grad_(True)
            y = self.expected(norm, x, training)[0] if formula else norm(x)
            found.append(torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum(), (x, *parameters)))
        for name, want, got in zip(("x", *names), *found, strict=True):
            assert bool(want.any()), f"{name} gets no gradient: nothing is tested"
            self.close(got, want, "gradient")

    def test_running_statistics_hold_no_graph(self) -> None:
        """Otherwise memory would grow with every batch; they are also updated without autograd."""
        norm, other = self.make().train(), self.make().train()
        for seed in range(2):
            x = self.batch(seed).requires_grad_(True)
            norm(x).sum().backward()
            with torch.no_grad():
                other(self.batch(seed))
        for (name, a), b in zip(norm.named_buffers(), other.buffers(), strict=True):
            assert not a.requires_grad, name
            assert torch.equal(a, b), name

    # Files, dtypes, devices, copies.

    def test_loads_in_another_process(self, tmp_path: Path) -> None:
        """Parameters and running statistics: the same output in evaluation mode, bit by bit."""
        norm, x = self.trained().eval(), self.batch(3)
        write_tensors(tmp_path / "norm.safetensors", {**norm.state_dict(), "_x": x})
        run_in_new_process(_answer, self.norm_class, self.features, self.how, str(tmp_path))
        assert torch.equal(read_tensors(tmp_path / "answer.safetensors")[0]["y"], norm(x).detach())

    def test_training_continues_from_a_state_dict(self) -> None:
        """The same outputs and statistics as without the interruption, bit by bit."""
        norm, again = self.trained(), self.make().train()
        again.load_state_dict(norm.state_dict())
        for seed in (3, 4):
            assert torch.equal(norm(self.batch(seed)), again(self.batch(seed)))
        assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), again.buffers(), strict=True))

    @pytest.mark.parametrize("training", [True, False])
    def test_float32_is_near_the_exact_answer(self, training: bool) -> None:
        """The output has the dtype, and the buffers keep theirs."""
        norm, x = self.trained(dtype=torch.float32).train(training), self.batch(3).float()
        dtypes = {name: value.dtype for name, value in norm.named_buffers()}
        want, buffers = self.expected(copy.deepcopy(norm).double(), x.double(), training)
        y = norm(x)
        assert y.dtype == torch.float32
        self.close(y, want, "float32")
        for name, value in norm.named_buffers():
            assert value.dtype == dtypes[name], name
            self.close(value, buffers[name], "float32")

    @pytest.mark.parametrize("training", [True, False])
    def test_the_output_has_the_dtype_of_the_input(self, training: bool) -> None:
        """Float32 goes into a norm in float64, and comes out."""
        norm, x = self.trained().train(training), self.batch(3).float()
        want = self.expected(norm, x.double(), training)[0]
        y = norm(x)
        assert y.dtype == torch.float32
        self.close(y, want, "float32")
        assert {value.dtype for value in norm.buffers() if value.is_floating_point()} <= {torch.float64}

    def test_meta_device(self) -> None:
        """Shapes without memory; filled later from a state dict."""
        norm, filled = self.make(device="meta"), self.trained()
        assert all(t.is_meta for t in (*norm.parameters(), *norm.buffers()))
        norm.to_empty(device="cpu").load_state_dict(filled.state_dict())
        x = self.batch(3)
        assert torch.equal(norm.eval()(x), filled.eval()(x))

    def test_deepcopy_is_independent(self) -> None:
        """Equal at first; then each has its own statistics."""
        norm, x = self.trained(), self.batch(3)
        other = copy.deepcopy(norm)
        before = [value.clone() for value in other.buffers()]
        norm(x)
        assert all(torch.equal(a, b) for a, b in zip(other.buffers(), before, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(norm.buffers(), before, strict=True))

    # Wrong input.

    def test_wrong_input_is_refused(self) -> None:
        """Each with a helpful message."""
        if not (refusals := self.refusals()):
            pytest.skip("the test names no wrong input")
        refuses(refusals)


def _answer(norm_class: type[nn.Module], features: int, how: dict[str, Any], folder: str) -> None:
    tensors, _ = read_tensors(Path(folder) / "norm.safetensors")
    x = tensors.pop("_x").clone()  # memory of its own: products of some CPUs depend on how the operands are aligned
    norm = norm_class(features, dtype=torch.float64, **how)
    norm.load_state_dict(tensors)
    write_tensors(Path(folder) / "answer.safetensors", {"y": norm.eval()(x).detach()})
