"""Tests of every module of `lowdim.represent`: its formula, saving, repeating, training in float32 and bfloat16, and errors.

A test defines how to make the module, how to reduce it to one number, and that number as a formula of the parameters::

    class TestScaledHead(RepresentCase):
        def make(self):
            return ScaledHead(8, 3, scale=2.0)

        def loss(self, module, dtype):
            x, y = batch(dtype)
            return F.cross_entropy(module(x).float(), y)

        def expected(self, module):
            x, y = batch(torch.float64)
            logits = 2.0 * x @ module.weight.T
            return (logits.logsumexp(1) - logits[range(len(y)), y]).mean()

A system that is not a module uses `ResultCase`, `ValueCase` or, for a scikit-learn estimator, `EstimatorCase`. A check that
does not apply is switched off by name, with its reason: `test_bfloat16_is_close_and_the_loss_is_wide = None  # float64`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lowdim.testing.agreement import Refusal, agrees, refuses

__all__ = ["RepresentCase"]


class RepresentCase(ABC):
    """Subclass in a test file; define how to make the module, how to reduce it to one number, and that number's formula.

    Attributes:
        tolerances: largest relative error, by operation.
    """

    tolerances: ClassVar[dict[str, float]] = {"formula": 1e-10, "gradient": 1e-9, "bfloat16": 0.05}

    @abstractmethod
    def make(self) -> nn.Module:
        """A module; the same numbers at each call."""

    @abstractmethod
    def loss(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """A scalar that depends on every parameter, from fixed inputs in `dtype`."""

    @abstractmethod
    def expected(self, module: nn.Module) -> Tensor:
        """That scalar in float64 as a formula of the module's parameters, differentiable.

        Written out from the paper: no method of the module, hyperparameters as the test states them.
        """

    @abstractmethod
    def refusals(self) -> list[Refusal]:
        """Wrong uses: the error, a word of its message, the call."""

    def test_it_is_what_the_formula_says(self):
        """The number and its gradient, in float64."""
        module = self.make().double()
        loss, want = self.loss(module, torch.float64), self.expected(module)
        assert loss.dtype == want.dtype == torch.float64
        agrees(loss, want, self.tolerances["formula"])
        parameters = dict(module.named_parameters())
        if parameters:
            grads = zip(*(torch.autograd.grad(value, list(parameters.values())) for value in (loss, want)), strict=True)
            for name, (got, formula) in zip(parameters, grads, strict=True):
                agrees({name: got}, {name: formula}, self.tolerances["gradient"])

    def test_state_dict_restores_the_function(self):
        """Loading the state gives the same numbers."""
        module = self.make()
        if not any(True for _ in module.parameters()):
            pytest.skip("it has no parameters to restore")
        other = copy.deepcopy(module)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        assert not torch.equal(self.loss(other, torch.float32), self.loss(module, torch.float32))
        other.load_state_dict(module.state_dict())
        assert torch.equal(self.loss(other, torch.float32), self.loss(module, torch.float32))

    def test_every_parameter_gets_a_finite_gradient(self):
        """No parameter is dead, none explodes."""
        module = self.make()
        loss = self.loss(module, torch.float32)
        assert loss.ndim == 0
        assert torch.isfinite(loss)
        if not any(True for _ in module.parameters()):
            pytest.skip("it has no parameters")
        loss.backward()
        for name, p in module.named_parameters():
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
            assert p.grad.any(), name

    def test_bfloat16_is_close_and_the_loss_is_wide(self):
        """Half precision inside, float32 in the loss."""
        wide = self.loss(self.make(), torch.float32)
        narrow = self.loss(self.make().to(torch.bfloat16), torch.bfloat16)
        assert narrow.dtype == torch.float32
        assert abs((narrow - wide).item()) <= self.tolerances["bfloat16"] * max(abs(wide.item()), 1.0)

    def test_wrong_input_is_refused(self):
        """Each error names what is wrong."""
        refuses(self.refusals())
