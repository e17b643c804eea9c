"""Tests of every optimizer of `lowdim.optim`, as one test case: plain asserts, no test framework needed.

    class TestMine(OptimizerCase):
        def make(self, params, **options):
            return Mine(params, **{"lr": 0.05, "rank": 2, "update_interval": 3, **options})

        def reference_step(self, weight, grad, state, step, projected):
            state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad  # … the paper's formula, with the numbers of `make`
            return (1 - 0.05 * self.decay) * (weight - 0.05 * state["m"])

A check that an optimizer cannot pass is switched off by name, with the reason: `test_closure = None  # why`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowdim.optim import state_bytes
from lowdim.testing.optimizer_files import OptimizerFiles
from lowdim.testing.optimizer_hooks import raises

__all__ = ["OptimizerCase"]


class OptimizerCase(OptimizerFiles):
    """Subclass it, define `make` and `reference_step`, and every test here runs for the new optimizer.

    See `OptimizerHooks` for the attributes.
    """

    # Training.

    def test_steps_are_those_of_the_formula(self) -> None:
        """Tall, square and wide matrices and vectors, with weight decay, across two more choices of a subspace."""
        net = self.model(torch.float64)
        optimizer = self.make(self.groups(net), weight_decay=self.decay)
        start = self.weights(net)
        want, states = self.weights(net), [{} for _ in start]  # type: ignore[var-annotated]
        for step in range(2 * self.update_interval + 2):
            self.loss(net, step, torch.float64).backward()
            for i, p in enumerate(net.parameters()):
                assert p.grad is not None
                want[i] = self.reference_step(want[i], p.grad.clone(), states[i], step, p.ndim == 2)
            optimizer.step()
            optimizer.zero_grad()
            for got, right, old in zip(net.parameters(), want, start, strict=True):
                error = float((got.detach() - right).norm() / (right - old).norm())
                assert error <= self.formula, f"step {step}, shape {tuple(got.shape)}: {error:.3g} > {self.formula:.3g}"

    def test_brings_the_loss_down(self) -> None:
        """To a fifth in 120 steps."""
        net = self.model()
        losses = self.run(net, self.make(self.groups(net)), range(120))
        assert sum(losses[-10:]) < 0.2 * sum(losses[:10]), losses[::10]

    def test_brings_the_loss_down_in_bfloat16(self) -> None:
        """To a third; weights stay bfloat16, moments are better than that or bytes (bases need not be)."""
        net = self.model(torch.bfloat16)
        optimizer = self.make(self.groups(net))
        losses = self.run(net, optimizer, range(120), torch.bfloat16)
        assert sum(losses[-10:]) < 0.33 * sum(losses[:10]), losses[::10]
        assert all(p.dtype == torch.bfloat16 for p in net.parameters())
        kept = [item for state in optimizer.state.values() for item in state.items() if isinstance(item[1], Tensor)]
        kinds = {value.dtype for name, value in kept if not name.endswith("basis")}
        assert torch.bfloat16 not in kinds, kinds

    def test_same_bits_twice(self) -> None:
        """No hidden randomness: the global generator's state does not matter."""
        ends = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            net = self.model()
            self.run(net, self.make(self.groups(net)), range(2 * self.update_interval + 1))
            ends.append(self.weights(net))
        self.same(*ends)

    def test_gradient_is_left_alone(self) -> None:
        """The optimizer reads `.grad` and never writes to it."""
        net = self.model()
        optimizer = self.make(self.groups(net))
        self.loss(net, 0).backward()
        before = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
        optimizer.step()
        self.same(before, [p.grad for p in net.parameters()])  # type: ignore[misc]

    def test_update_lies_in_the_subspace(self) -> None:
        """One step changes each matrix by a matrix whose rank is at most the group's."""
        net = self.model(torch.float64)
        optimizer = self.make(self.groups(net), weight_decay=0.0)
        rank = optimizer.param_groups[0]["rank"]
        before = self.weights(net)
        self.run(net, optimizer, range(1), torch.float64)
        for old, p in zip(before, net.parameters()):
            if p.ndim == 2:
                values = torch.linalg.svdvals(p.detach() - old)
                assert float(values[0]) > 0
                assert float(values[rank:].max() if len(values) > rank else 0) <= 1e-9 * float(values[0])

    def test_zero_rate_changes_nothing(self) -> None:
        """Not even through weight decay."""
        net = self.model()
        optimizer = self.make(self.groups(net), weight_decay=0.1)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = self.weights(net)
        self.run(net, optimizer, range(2))
        self.same(before, self.weights(net))

    def test_weight_decay_shrinks(self) -> None:
        """With a zero gradient only decay is left: the weights shrink by `1 - lr * weight_decay`."""
        net = self.model(torch.float64)
        optimizer = self.make(self.groups(net), weight_decay=0.1)
        lr = optimizer.param_groups[0]["lr"]
        before = self.weights(net)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        self.close(self.weights(net), [w * (1 - lr * 0.1) for w in before], 1e-9)

    def test_parameters_without_gradient_wait(self) -> None:
        """They keep weight and step count."""
        net = self.model()
        optimizer = self.make(self.groups(net))
        frozen = net[0].weight
        before = frozen.detach().clone()  # type: ignore[union-attr]
        for index in range(2):
            self.loss(net, index).backward()
            frozen.grad = None  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(frozen, before)  # type: ignore[arg-type]
        assert optimizer.state[net[2].weight]["step"] == 2  # type: ignore[index]
        assert "step" not in optimizer.state[frozen]  # type: ignore[index]

    # torch's protocol.

    def test_closure(self) -> None:
        """`step(closure)` runs it with gradients on and returns its loss."""
        net = self.model()
        optimizer = self.make(self.groups(net))

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.loss(net, 0)
            value.backward()
            return value

        first = optimizer.step(closure).item()
        for _ in range(30):
            last = optimizer.step(closure).item()
        assert last < 0.5 * first

    def test_schedulers_work_through_groups(self) -> None:
        """A rate of zero from the second step on: the second step changes nothing."""
        net = self.model()
        optimizer = self.make(self.groups(net))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
        after: list[list[Tensor]] = []

        def advance() -> None:
            schedule.step()
            after.append(self.weights(net))

        self.run(net, optimizer, range(3), each=advance)
        self.same(after[0], after[2])

    def test_named_parameters(self) -> None:
        """Pairs `(name, parameter)` are accepted as in torch; errors then include the name."""
        net = self.model()
        pairs = [(name, p) for name, p in net.named_parameters() if p.ndim == 2]
        optimizer = self.make(pairs)
        net[2].weight.grad = torch.full_like(net[2].weight, float("nan"))  # type: ignore[union-attr, arg-type]
        with raises(ValueError, r"2\.weight"):
            optimizer.step()

    def test_sparse_gradients_are_refused(self) -> None:
        """TypeError, not a wrong update."""
        table = nn.Embedding(16, 8, sparse=True)
        optimizer = self.make([table.weight])
        table(torch.tensor([1, 2])).sum().backward()
        with raises(TypeError, "dense"):
            optimizer.step()

    # In the backward pass.

    def test_layerwise_equals_step(self) -> None:
        """The same updates, gradients gone, `step()` only calls the closure."""
        net, other = self.model(torch.float64), self.model(torch.float64)
        self.run(net, self.make(self.groups(net)), range(2 * self.update_interval), torch.float64)
        optimizer = self.make(self.groups(other), layerwise=True)
        for index in range(2 * self.update_interval):
            value = optimizer.step(lambda i=index: self._backward(other, i))
            assert value.item() > 0
            assert all(p.grad is None for p in other.parameters())
        self.close(self.weights(other), self.weights(net), self.rounding)

    def _backward(self, net: nn.Module, index: int) -> Tensor:
        value = self.loss(net, index, torch.float64)
        value.backward()
        return value

    def test_layerwise_follows_schedulers_after_loading(self) -> None:
        """Loading replaces torch's groups; the hooks must see the new ones."""
        net = self.model(torch.float64)
        optimizer = self.make(self.groups(net), layerwise=True)
        self._backward(net, 0)
        optimizer.load_state_dict(optimizer.state_dict())
        before = self.weights(net)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._backward(net, 1)
        self.same(before, self.weights(net))

    def test_removed_hooks_rest(self) -> None:
        """After `remove_hooks` a backward pass leaves gradients and weights."""
        net = self.model(torch.float64)
        optimizer = self.make(self.groups(net), layerwise=True)
        optimizer.remove_hooks()
        before = self.weights(net)
        self._backward(net, 0)
        self.same(before, self.weights(net))
        assert all(p.grad is not None for p in net.parameters())

    # Forecasts.

    def test_runs_on_fake_tensors(self) -> None:
        """`lowdim plan` steps the optimizer without numbers: no value may be read, and the state has its true size."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        net = self.model()
        optimizer = self.make(self.groups(net))
        self.run(net, optimizer, range(1))
        with FakeTensorMode():
            fake = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))
            forecast = self.make(self.groups(fake))
            for _ in range(self.update_interval + 1):
                for p in fake.parameters():
                    p.grad = torch.zeros_like(p)
                forecast.step()
        assert state_bytes(forecast) == state_bytes(optimizer)
        self.run(net, optimizer, range(1, 2 + self.update_interval))  # and nothing fake was left behind
