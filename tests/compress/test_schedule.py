"""What runs beside training, shown on magnitude pruning whose sparsity grows linearly: the smallest scheduled system."""

import copy

import pytest
import torch
from torch import nn

from lowdim.companion import Companion
from lowdim.compress import Scheduled, SparseTraining, finalize, step
from lowdim.errors import CheckpointError, LowdimError
from lowdim.linalg import smallest_mask
from lowdim.modules import MaskedLinear
from lowdim.surgery import find_layers, is_linear, swap_layers, without_tied
from lowdim.testing.scheduled_compress_case import ScheduledCompressCase


class GradualLinear(MaskedLinear, Scheduled):
    """The share `sparsity · t / total_steps` of smallest magnitudes is masked after t steps."""

    def __init__(self, layer, sparsity, total_steps):
        super().__init__(layer)
        self.sparsity, self.total_steps = sparsity, total_steps
        self.start_counting()

    def mask(self):
        share = self.sparsity * min(1.0, self.finished / self.total_steps)
        return (~smallest_mask(self.matrix.abs(), int(share * self.weight.numel()))).to(self.weight.dtype)

    def description(self):
        return {"sparsity": self.sparsity, "total_steps": self.total_steps}


def gradual(model, *, sparsity, total_steps, target_modules=None):
    found = find_layers(model, target_modules, accept=is_linear)
    layers, _ = without_tied(model, found, named=target_modules is not None)
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"layer {name}: the weight has NaN or infinite entries")
    swap_layers(model, layers, lambda _, layer: GradualLinear(layer, sparsity, total_steps))
    return model


class TestGradual(ScheduledCompressCase):
    options = {"sparsity": 0.75, "total_steps": 6}  # noqa: RUF012 (typed in the base class)
    lossless = {"sparsity": 0.0, "total_steps": 6}  # noqa: RUF012
    sparsity = 0.75
    compressed = (GradualLinear,)

    def compress(self, model, batches, **options):
        return gradual(model, **options)

    def effective(self, layer, step):
        W = layer.weight.T if layer.transposed else layer.weight
        gone = int(0.75 * step / 6 * W.numel())
        order = W.abs().flatten().argsort()
        kept = torch.ones(W.numel(), dtype=W.dtype)
        kept[order[:gone]] = 0
        return W * kept.view(W.shape)


def prepared(total_steps=4):
    return gradual(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), sparsity=0.5, total_steps=total_steps)


def test_it_is_a_companion():
    assert issubclass(SparseTraining, Companion)
    assert SparseTraining(prepared()).loss(lambda: 0, torch.zeros(1)) == 0


def test_the_optimizer_must_hold_what_is_trained():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    gradual(model, sparsity=0.5, total_steps=4)
    SparseTraining(model, before)  # the layers share their parameters, so it still holds them
    with pytest.raises(ValueError, match="does not hold weight, bias of layer 2; build it after preparing the model"):
        SparseTraining(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="does not hold bias of layer 2"):
        SparseTraining(model, torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_counts_of_other_layers_are_refused():
    with pytest.raises(CheckpointError, match="schedule is for other layers than the model's: 2"):
        SparseTraining(prepared()).load_state_dict({"counts": {"0": 3}})


def test_models_without_a_schedule_are_refused():
    for call in (step, finalize, SparseTraining):
        with pytest.raises(LowdimError, match="Linear has no layer that follows a schedule"):
            call(nn.Linear(2, 2))


def test_a_layer_alone_is_finalized_to_a_new_one():
    layer = GradualLinear(nn.Linear(4, 3), 0.5, 1)
    step(layer)
    plain = finalize(layer)
    assert type(plain) is nn.Linear
    assert int((plain.weight == 0).sum()) == 6


def test_the_count_is_read_again_when_it_changes_from_outside():
    layer = GradualLinear(nn.Linear(4, 3), 0.5, 4)
    layer.step()
    layer.step()
    assert layer.finished == 2
    layer.load_state_dict({**layer.state_dict(), "count": torch.tensor(7)})
    assert layer.finished == 7
    layer.count = torch.tensor(9)
    assert layer.finished == 9
    other = copy.deepcopy(layer)
    other.step()
    assert (other.finished, layer.finished) == (10, 9)
    assert layer.to(torch.bfloat16).count.dtype == torch.int64
    assert layer.finished == 9


def test_layers_without_numbers_count_from_zero():
    layer = GradualLinear(nn.Linear(4, 3, device="meta"), 0.5, 4)
    layer.step()
    assert layer.finished == 0
    assert layer(torch.empty(2, 4, device="meta")).shape == (2, 3)


def test_layers_that_share_a_weight_share_it_afterwards():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    finalize(gradual(model, sparsity=0.5, total_steps=1))
    assert model[0].weight is model[1].weight
