"""Tests of compression during training: a step after each optimizer step, and plain layers at the end.

A system's test defines how to prepare a model, and the weight that a layer uses after a number of steps as a formula of the
layer's tensors; it then gets the tests of `CompressCase` and these::

    class TestGradual(ScheduledCompressCase):
        options = {"total_steps": 6, "sparsity": 0.5}
        sparsity = 0.5
        compressed = (GradualLinear,)

        def compress(self, model, batches, **options):
            return gradual(model, GradualConfig(**options))

        def effective(self, layer, step):
            gone = int(layer.weight.numel() * 0.5 * step / 6)
            bound = layer.weight.abs().flatten().sort().values[gone]
            return layer.weight * (layer.weight.abs() >= bound)
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lowdim.compress import SparseTraining, finalize, load_compressed, step
from lowdim.compress.core.schedule import Scheduled, scheduled_layers
from lowdim.errors import LowdimError
from lowdim.modules import describe_layers
from lowdim.testing.compress_case import CompressCase, small_net

__all__ = ["ScheduledCompressCase"]


class ScheduledCompressCase(CompressCase):
    """Base of a test class: define `compress` and `effective`; `options` must hold `total_steps`.

    Attributes:
        sparsity: share of exact zeros in each layer's weight at the end.
    """

    sparsity: ClassVar[float]
    shrinks: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    @abstractmethod
    def effective(self, layer: Any, step: int) -> Tensor:
        """The weight `(out, in)` that `layer` uses after `step` finished steps, as a formula of its tensors."""

    def final(self, layer: Any) -> Tensor:
        """The weight of the plain layer at the end; override if it is not the weight of the last step."""
        return self.effective(layer, self.total_steps)

    def expected(self, layer: nn.Linear, inputs: Tensor, compressed: Any) -> Tensor:
        """The output of a layer before the first step."""
        assert layer.bias is not None
        return inputs @ self.effective(compressed, 0).T + layer.bias

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the schedule."""
        return self.options["total_steps"]

    def prepared(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
        """`small_net`, prepared and without dropout."""
        return self.run(small_net(seed, dtype)).eval()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Plain SGD on the trained parameters."""
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
        """One optimizer step on the batch of this index; the schedule is not advanced."""
        x = self.batches(count=index % 4 + 1, dtype=next(model.parameters()).dtype)[-1]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    def train(self, model: nn.Module, steps: range) -> None:
        """Optimizer steps by hand, each followed by `lowdim.compress.step`."""
        optimizer = self.optimizer(model)
        for index in steps:
            self.update(model, optimizer, index)
            step(model)

    # The schedule

    def test_swaps_in_place(self) -> None:
        """The same object with scheduled layers; the head stays. Outputs may be unchanged before the first step."""
        model = small_net().eval()
        assert self.run(model) is model
        assert isinstance(model.up, self.compressed)
        assert isinstance(model.down, self.compressed)
        assert set(scheduled_layers(model)) == {"up", "down"}
        assert type(model.classifier) is nn.Linear
        assert bool(torch.isfinite(model(self.batches()[0])).all())

    def test_each_step_uses_the_weight_of_its_count(self) -> None:
        """From the first forward to one after the end, while the weights change."""
        model = self.prepared()
        optimizer = self.optimizer(model)
        for index in range(self.total_steps + 2):
            for name in ("up", "down"):
                layer: Any = model.get_submodule(name)
                assert int(layer.count) == layer.finished == index
                x = torch.randn(5, layer.in_features, dtype=torch.float64)
                with torch.no_grad():
                    want = self.effective(layer, min(index, self.total_steps))
                    torch.testing.assert_close(layer.dense_weight(), want, msg=f"layer {name} after {index} steps")
                    torch.testing.assert_close(layer(x), x @ want.T + layer.bias)
            self.update(model, optimizer, index)
            step(model)

    def test_the_weight_moves_with_the_count(self) -> None:
        """A constant schedule would pass any comparison with itself."""
        layer: Any = self.prepared().up
        with torch.no_grad():
            assert not torch.equal(self.effective(layer, 0), self.effective(layer, self.total_steps))

    # The end

    def test_finalize_leaves_plain_layers_with_exact_zeros(self) -> None:
        """Of the original class, with the final weight; a dense model loads their state."""
        model = self.prepared()
        self.train(model, range(self.total_steps))
        with torch.no_grad():
            want = {name: self.final(model.get_submodule(name)) for name in ("up", "down")}
        assert finalize(model) is model
        assert not any(isinstance(module, Scheduled) for module in model.modules())
        for name, weight in want.items():
            layer: Any = model.get_submodule(name)
            assert type(layer) is nn.Linear
            torch.testing.assert_close(layer.weight.detach(), weight)
            assert torch.equal(layer.weight == 0, weight == 0)
            zeros = int((layer.weight == 0).sum())
            assert abs(zeros - self.sparsity * weight.numel()) < 1, f"layer {name} has {zeros} zeros of {weight.numel()}"
        plain = small_net(seed=3, dtype=torch.float64).eval()
        plain.load_state_dict(model.state_dict(), strict=True)
        x = self.batches(dtype=torch.float64)[0]
        assert torch.equal(plain(x), model(x))

    def test_what_is_finalized_has_no_schedule(self) -> None:
        """A second finalize, or a step after it, raises a clear error."""
        model = finalize(self.prepared())
        for call in (finalize, step, SparseTraining):
            with pytest.raises(LowdimError, match="no layer that follows a schedule"):
                call(model)

    def test_finalize_gives_transposed_layers_back(self) -> None:
        """Conv1D of transformers, in its own layout."""
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        plain, model = small_net().eval(), small_net().eval()
        for name in ("up", "down"):
            linear = plain.get_submodule(name)
            layer = conv1d(linear.out_features, linear.in_features)
            layer.load_state_dict({"weight": linear.weight.T, "bias": linear.bias})
            setattr(model, name, layer.eval())
        for net, options in ((plain, {}), (model, self.transposed)):
            self.run(net, **options)
            for _ in range(self.total_steps):
                step(net)
            finalize(net)
        assert type(model.up) is type(model.down) is conv1d
        torch.testing.assert_close(model.up.weight.T, plain.up.weight)
        torch.testing.assert_close(model(self.batches()[0]), plain(self.batches()[0]))

    # Companions and checkpoints

    def test_by_companion_is_by_hand(self) -> None:
        """The same bits."""
        by_hand, model = self.prepared(), self.prepared()
        self.train(by_hand, range(self.total_steps))
        finalize(by_hand)
        optimizer = self.optimizer(model)
        companion = SparseTraining(model, optimizer)
        for index in range(self.total_steps):
            self.update(model, optimizer, index)
            companion.step(optimizer)
        companion.finish()
        _same(by_hand.state_dict(), model.state_dict())

    @pytest.mark.parametrize("companion", [True, False])
    def test_a_checkpoint_resumes_to_the_same_bits(self, companion: bool) -> None:
        """From the model's tensors alone; a companion's state agrees."""
        whole, first = self.prepared(), self.prepared()
        self.train(whole, range(self.total_steps))
        half = self.total_steps // 2
        self.train(first, range(half))
        state, counts = copy.deepcopy(first.state_dict()), SparseTraining(first).state_dict()
        again = self.prepared(seed=7)
        again.load_state_dict(state)
        if companion:
            for layer in scheduled_layers(again).values():
                layer.count.fill_(0)
            SparseTraining(again).load_state_dict(counts)
        self.train(again, range(half, self.total_steps))
        _same(whole.state_dict(), again.state_dict())

    def test_it_is_rebuilt_in_the_middle_of_its_schedule(self) -> None:
        """From a file's tensors and descriptions: the same outputs, the same trained parameters, and the schedule continues."""
        model = self.prepared()
        half = self.total_steps // 2
        self.train(model, range(half))
        again = load_compressed(small_net(seed=9, dtype=torch.float64), model.state_dict(), describe_layers(model)).eval()
        x = self.batches(dtype=torch.float64)[0]
        assert torch.equal(again(x), model(x))
        own = {f"{name}.{path}" for name in ("up", "down") for path, _ in model.get_submodule(name).named_parameters()}
        trained = [{n for n, p in net.named_parameters() if p.requires_grad and n in own} for net in (model, again)]
        assert trained[0] == trained[1]
        for net in (model, again):
            for parameter in net.parameters():
                parameter.grad = None
            self.update(net, self.optimizer(net), half)
            step(net)
        for (name, layer), other in zip(scheduled_layers(model).items(), scheduled_layers(again).values(), strict=True):
            torch.testing.assert_close(_weight(other), _weight(layer), msg=f"layer {name} one step later")


def _weight(layer: Any) -> Tensor:
    return layer.dense_weight().detach()


def _same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
