"""What of a frozen model could still change, or would not be reached: running statistics, and layers that are never called."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowdim
from lowdim.adapters import SAID, FLoRA, LoRA, load_adapter
from lowdim.catalogue import variant
from lowdim.errors import NoMatchingModuleError
from lowdim.layers import LowRankLinear, swap_linear
from lowdim.methods import apply
from lowdim.optim import param_groups
from lowdim.surgery import freeze, freeze_statistics, never_called, release_statistics


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()


def images():
    return 2 + 3 * torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model, parameters, steps=3):
    optimizer = torch.optim.SGD(parameters, 1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("method", [LoRA(rank=2), FLoRA(ranks=2), SAID(dimension=20)], ids=lambda m: type(m).__name__)
def test_a_reloaded_adapter_gives_the_outputs_of_a_model_with_batch_norm(method, tmp_path):
    model = network()
    plain = copy.deepcopy(model)
    adapted = lowdim.adapt(model, method)
    train(model, adapted.trainable().values())
    want = model(images())
    assert torch.equal(model[1].running_mean, plain[1].running_mean)
    assert not torch.equal(want, plain(images()))
    adapted.save(tmp_path)
    twin = copy.deepcopy(plain)
    load_adapter(twin, tmp_path)
    assert torch.equal(twin(images()), want)
    torch.testing.assert_close(adapted.merge()(images()), want, rtol=1e-4, atol=1e-5)
    assert model.train()[1].training, "after merging it is a plain model again"
    adapted.unmerge()
    assert not model.train()[1].training


def test_a_norm_that_is_trained_and_saved_whole_keeps_its_statistics(tmp_path):
    model = network()
    plain = copy.deepcopy(model)
    adapted = lowdim.adapt(model, LoRA(rank=2, target_modules=["4"]), modules_to_save=["1"])
    train(model, adapted.trainable().values())
    assert not torch.equal(model[1].running_mean, plain[1].running_mean)
    want = model(images())
    adapted.save(tmp_path)
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(images()), want)


def test_a_probe_leaves_the_features_as_they_are():
    model = network()
    before = model[:4](images())
    applied = apply(variant("linear-probe"), model, lr=1e-2, steps=3, head=("4",))
    train(applied.model, [p for p in model.parameters() if p.requires_grad])
    assert torch.equal(model[:4](images()), before)


def test_frozen_statistics_survive_copies_and_end():
    model = network()
    freeze(model)
    found = freeze_statistics(model)
    copied = copy.deepcopy(model).train()
    assert copied[0].training
    assert not copied[1].training
    assert model[1] is not copied[1]
    model.train()
    release_statistics(model, found)
    assert model[1].training
    assert "train" not in vars(model[1])
    model[1].weight.requires_grad_(True)
    freeze_statistics(model)
    assert model.train()[1].training, "its own parameters are trained"


class Block(nn.Module):
    """Reads the weight of `steps`, calls `up`, asks `down` for its dtype and calls it, and hands `passed` to a function."""

    def __init__(self):
        super().__init__()
        self.steps, self.up, self.down, self.passed = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x):
        if isinstance(self.down.weight, torch.Tensor) and x.dtype != self.down.weight.dtype:
            x = x.to(self.down.weight.dtype)
        hidden = F.softplus(x @ self.steps.weight.T + self.steps.bias) * self.up(x)
        return self.down(outside(self.passed, hidden))


def outside(layer, x):
    return layer(x)


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def test_a_layer_that_is_read_and_never_called_is_found():
    model = blocks()
    assert never_called(model) == {
        block.steps: "Block reads its weight and never calls it, so an adapter there would not act" for block in model
    }


@pytest.mark.parametrize("name", ["steps", "0.steps"])
def test_it_is_left_out_by_default_and_refused_by_name(name):
    assert set(lowdim.adapt(blocks(), LoRA(rank=2)).layers) == {f"{i}.{n}" for i in range(2) for n in ("up", "down", "passed")}
    with pytest.raises(NoMatchingModuleError, match=rf"'{name}' matches only layers that cannot be adapted.*never calls it"):
        lowdim.adapt(blocks(), LoRA(rank=2, target_modules=[name]))
    with pytest.warns(UserWarning, match=r"also matches 0\.steps .*never calls it"):
        lowdim.adapt(blocks(), LoRA(rank=2, target_modules=r".*\.(steps|up)"))


def test_structured_layers_leave_it_and_projections_take_it():
    x = torch.randn(3, 4)
    model = swap_linear(blocks(), LowRankLinear, rank=2)
    assert type(model[0].steps) is nn.Linear
    assert torch.isfinite(model(x)).all()
    assert "rank 2" in {name: group for name, _, group in param_groups(blocks(), rank=2).rows}["0.steps.weight"]


@pytest.mark.filterwarnings("ignore:not adapted, so these weights stay frozen")
def test_mamba_trains_with_the_default_layers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2)
    model = transformers.MambaForCausalLM(config)
    adapted = lowdim.adapt(model, LoRA())
    assert sorted(name.rpartition(".")[2] for name in adapted.layers) == ["in_proj", "out_proj", "x_proj"]
    ids = torch.randint(3, 32, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    adapted.step()  # every adapted layer has a gradient


def test_sizes_of_an_adapted_layer_can_be_asked_for():
    model = nn.Sequential(nn.Conv1d(3, 8, 3, stride=2, padding=1))
    lowdim.adapt(model, FLoRA(ranks=2))
    assert (model[0].stride, model[0].in_channels, model[0].padding_mode) == ((2,), 3, "zeros")
    with pytest.raises(AttributeError, match="nothing"):
        _ = model[0].nothing
    assert isinstance(copy.deepcopy(model)[0].base, nn.Conv1d)


def test_a_method_without_a_layer_to_adapt_says_which_kinds_it_takes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(NoMatchingModuleError, match="S2FT adapts linear layers, and Sequential has none outside its new head"):
        apply(variant("s2ft"), model, lr=1e-3, steps=3, head=("2",))
