"""The behaviour required of every adapter, tested against the formula of its paper.

    class TestMine(AdapterCase):
        rank, alpha = 2, 4

        def method(self, **changes):
            return MyMethod(**{"rank": self.rank, "alpha": self.alpha, **changes})

        def dense(self, update):
            return self.alpha / self.rank * update.B @ update.A

gives every test of this file and of the three that it joins. Outputs, gradients, merged weights and files are compared with
`dense(update)` in float64; what a method may do differently is a class attribute with its reason in a comment.
"""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import pytest
from torch import nn

from lowdim.testing.adapter_files import AdapterFiles
from lowdim.testing.adapter_formula import AdapterFormula
from lowdim.testing.adapter_training import AdapterTraining
from lowdim.testing.small_model import small_model

__all__ = ["AdapterCase"]


class AdapterCase(AdapterFormula, AdapterTraining, AdapterFiles):
    """Subclass and define `method` and `dense`, and `start` and `taken` if the paper gives them (see `AdapterHooks`)."""

    def test_errors_name_the_layer(self):
        model = small_model()
        for bad in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match="rank"):
                self.method(rank=bad)
        if self.method().bounded_rank:
            with pytest.raises(ValueError, match=r"body\.first.*\(12, 8\).*rank.*8.*9.*cap_rank=True"):
                self.adapt(model, method=self.method(rank=9))
        else:
            self.adapt(model, method=self.method(rank=9))
        with pytest.raises(ValueError, match="dropout"):
            self.method(dropout=1.0)

    def test_layers_without_a_matrix_are_refused(self):
        with pytest.raises(TypeError, match="LayerNorm"):
            self.method().attach(nn.LayerNorm(4))
