"""What every solver owes: the same bits for one seed, numpy or torch as given, a result that says why it stopped."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from lowdim.testing.represent_case import Refusal, refuses

__all__ = ["SolveCase"]


class SolveCase:
    """Subclass in a test file; name the problem and its solution's arrays."""

    def problem(self) -> tuple[Any, ...]:
        """Positional arguments; numpy arrays among them are turned to torch for the torch run."""
        raise NotImplementedError

    def solve(self, *args: Any) -> Any:
        """The result."""
        raise NotImplementedError

    def arrays(self, result: Any) -> list[Any]:
        """The arrays of a result."""
        raise NotImplementedError

    def refusals(self) -> list[Refusal]:
        """Wrong uses."""
        raise NotImplementedError

    def test_one_seed_gives_the_same_bits(self):
        """Runs repeat."""
        first, second = (self.arrays(self.solve(*self.problem())) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second))

    def test_numpy_in_numpy_out_torch_in_torch_out(self):
        """The same numbers in the array library that came in."""
        given = self.problem()
        turned = tuple(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in given)
        ours, theirs = self.arrays(self.solve(*given)), self.arrays(self.solve(*turned))
        assert all(isinstance(a, np.ndarray) and a.dtype == np.float64 for a in ours)
        assert all(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in theirs)
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(ours, theirs))

    def test_the_result_explains_itself(self):
        """The record is JSON and says how many iterations and why it stopped."""
        result = self.solve(*self.problem())
        record = result.to_dict()
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert record["reason"]
        assert record["iterations"] >= 1

    def test_wrong_input_is_refused(self):
        """Each error names what is wrong."""
        refuses(self.refusals())
