"""What every module of `lowdim.represent` owes: it saves, repeats, trains in float32 and bfloat16, and refuses wrong input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["RepresentCase", "refuses"]

#: exception type, a word of its message, what raises it
Refusal = tuple[type[Exception], str, Callable[[], Any]]


def refuses(refusals: Iterable[Refusal]) -> None:
    """Check that each call raises that error with that word in its message, and that the message says what came."""
    for kind, word, call in refusals:
        try:
            call()
            message = None
        except kind as error:
            message = str(error)
        assert message is not None, f"no {kind.__name__} about {word!r}"
        assert word in message, f"message lacks {word!r}: {message}"


class RepresentCase:
    """Subclass in a test file; name how to make the module and how to reduce it to one number."""

    tolerances: ClassVar[dict[str, float]] = {"bfloat16": 0.05}

    def make(self) -> nn.Module:
        """A module; the same numbers at each call."""
        raise NotImplementedError

    def loss(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """A scalar that depends on every parameter, from fixed inputs in `dtype`."""
        raise NotImplementedError

    def refusals(self) -> list[Refusal]:
        """Wrong uses."""
        raise NotImplementedError

    def test_state_dict_restores_the_function(self):
        """Loading the state gives the same numbers."""
        module = self.make()
        other = copy.deepcopy(module)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        if any(True for _ in module.parameters()):
            assert not torch.equal(self.loss(other, torch.float32), self.loss(module, torch.float32))
        other.load_state_dict(module.state_dict())
        assert torch.equal(self.loss(other, torch.float32), self.loss(module, torch.float32))

    def test_every_parameter_gets_a_finite_gradient(self):
        """No parameter is dead, none explodes."""
        module = self.make()
        loss = self.loss(module, torch.float32)
        assert loss.ndim == 0
        assert torch.isfinite(loss)
        if loss.requires_grad:
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
