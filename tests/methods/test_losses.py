"""What `Applied.loss` gives: the task's loss, what companions add, and their sum, which alone is differentiated."""

import torch
from torch import nn

from lowdim.catalogue import variant
from lowdim.companion import Companion
from lowdim.methods import Applied


class Penalty(Companion):
    """Half of the weight's square norm; sees to it that a second pass gives the same logits."""

    def __init__(self, model):
        self.model = model

    def loss(self, forward, logits):
        assert torch.equal(forward(), logits)
        return 0.5 * self.model.weight.square().sum()


def mean_square(model, batch):
    return model(batch).square().mean()


def made(companion=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    applied = Applied(model, variant("full"), lambda lr: torch.optim.SGD(model.parameters(), lr=lr))
    applied.companion = companion and companion(model)
    return applied


def test_total_is_the_tasks_loss_and_the_penalty():
    applied, batch = made(Penalty), torch.ones(4, 3)
    losses = applied.loss(batch, mean_square)
    weight = applied.model.weight
    task, penalty = mean_square(applied.model, batch), 0.5 * weight.square().sum()
    torch.testing.assert_close(losses.task, task)
    torch.testing.assert_close(losses.penalty, penalty)
    torch.testing.assert_close(losses.total, task + penalty)
    losses.total.backward()
    (want,) = torch.autograd.grad(mean_square(applied.model, batch), [weight])
    torch.testing.assert_close(weight.grad, want + weight)
    assert not applied.model._forward_hooks


def test_without_a_companion_the_task_is_all():
    losses = made().loss(torch.ones(4, 3), mean_square)
    assert losses.total is losses.task
    assert losses.penalty == 0.0
