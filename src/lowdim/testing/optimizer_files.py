"""An optimizer's state: its content, and resuming from it."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor

from lowdim.errors import CheckpointError
from lowdim.optim import state_bytes
from lowdim.testing.optimizer_hooks import OptimizerHooks, raises

__all__ = ["OptimizerFiles"]


class OptimizerFiles(OptimizerHooks):
    """Checkpoints and copies: the same bits as without the interruption, or a clear error."""

    def test_exact_resume(self) -> None:
        """Through torch.save and torch.load(weights_only=True), in the middle of an interval: the same bits."""
        for dtype in (torch.float32, torch.bfloat16):
            net = self.model(dtype)
            optimizer = self.make(self.groups(net))
            half = self.update_interval + 1
            self.run(net, optimizer, range(half), dtype)
            file = io.BytesIO()
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
            self.run(net, optimizer, range(half, 3 * half), dtype)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            other = self.model(dtype)
            other.load_state_dict(saved["net"])
            again = self.make(self.groups(other))
            again.load_state_dict(saved["optimizer"])
            self.run(other, again, range(half, 3 * half), dtype)
            self.same(self.weights(net), self.weights(other))
            for a, b in zip(optimizer.state.values(), again.state.values(), strict=True):
                assert a.keys() == b.keys()
                for key, value in a.items():
                    assert type(value) is type(b[key]), key
                    if isinstance(value, Tensor):
                        assert value.dtype == b[key].dtype, f"{key} was cast to {b[key].dtype}"

    def test_state_holds_tensors_and_numbers(self) -> None:
        """Nothing else, and as many bytes as the parts forecast."""
        net = self.model()
        optimizer = self.make(self.groups(net))
        self.run(net, optimizer, range(2))
        forecast = 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                parts = optimizer.parts(group, p.ndim)
                layout = parts.layout(tuple(p.shape), p.dtype)
                state = optimizer.state[p]
                assert all(isinstance(v, (Tensor, int, float)) for v in state.values()), state
                for name, (shape, dtype) in layout.items():
                    assert tuple(state[name].shape) == shape, name
                    assert state[name].dtype == dtype, name
                forecast += parts.nbytes(tuple(p.shape), p.dtype)
        assert state_bytes(optimizer) == forecast

    def test_loading_does_not_share_memory(self) -> None:
        """Stepping one optimizer does not change the state of the other."""
        net, other = self.model(), self.model()
        optimizer, again = self.make(self.groups(net)), self.make(self.groups(other))
        self.run(net, optimizer, range(1))
        again.load_state_dict(optimizer.state_dict())
        kept = copy.deepcopy(again.state_dict()["state"])
        self.run(net, optimizer, range(1, 2))
        for a, b in zip(kept.values(), again.state_dict()["state"].values(), strict=True):
            self.same([v for v in a.values() if isinstance(v, Tensor)], [v for v in b.values() if isinstance(v, Tensor)])

    def test_foreign_states_are_refused(self) -> None:
        """Of another rank, of another method, of another shape."""
        net = self.model()
        optimizer = self.make(self.groups(net))
        self.run(net, optimizer, range(1))
        saved = optimizer.state_dict()
        groups = self.groups(net)
        groups[0]["rank"] = optimizer.param_groups[0]["rank"] - 1
        with raises(ValueError, "rank"):
            self.make(groups).load_state_dict(saved)
        plain = torch.optim.AdamW(self.groups(net))
        with raises(ValueError, self.make(self.groups(net)).method):
            self.make(self.groups(net)).load_state_dict(plain.state_dict())
        later = copy.deepcopy(saved)
        later["param_groups"][0]["version"] = 99
        with raises(CheckpointError, "version 99"):
            self.make(self.groups(net)).load_state_dict(later)
        broken = copy.deepcopy(saved)
        broken["state"][0]["exp_avg" if "exp_avg" in broken["state"][0] else "row"] = torch.zeros(1)
        with raises(ValueError, "shape"):
            self.make(self.groups(net)).load_state_dict(broken)

    def test_deepcopy(self) -> None:
        """A copy of model and optimizer trains on as the original does."""
        net = self.model()
        optimizer = self.make(self.groups(net))
        self.run(net, optimizer, range(2))
        net2, optimizer2 = copy.deepcopy((net, optimizer))
        self.run(net, optimizer, range(2, 6))
        self.run(net2, optimizer2, range(2, 6))
        self.same(self.weights(net), self.weights(net2))
