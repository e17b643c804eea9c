import copy

import pytest
import torch
from torch import nn

from lowdim.compress import LowRankLinear, load_compressed, load_low_rank
from lowdim.errors import CheckpointError
from lowdim.modules import describe_layers


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mid = nn.Linear(4, 4)
        self.twice = nn.ModuleDict({"mid": self.mid})
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.mid(self.embed(ids)))


def compressed():
    model = Tied()
    model.mid = model.twice["mid"] = LowRankLinear(4, 4, rank=2, dtype=torch.float64)
    return model


@pytest.mark.parametrize("drop", [(), ("out.weight",), ("embed.weight",)])
def test_ties_survive_also_where_the_file_holds_one_of_them(drop):
    small = compressed()
    tensors = {name: value.clone() for name, value in small.state_dict().items() if name not in drop}
    model = load_low_rank(Tied(), tensors)
    assert model.twice["mid"] is model.mid
    assert model.out.weight is model.embed.weight
    assert torch.equal(model.embed.weight, small.embed.weight)
    assert torch.equal(model.mid.A, small.mid.A)
    assert model.mid.A.dtype == torch.float64  # the file's


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_is_the_files(bias):
    small = nn.Sequential(LowRankLinear(6, 4, bias, rank=2))
    model = load_low_rank(nn.Sequential(nn.Linear(6, 4, bias=not bias)), small.state_dict())
    assert torch.equal(model(torch.ones(6)), small(torch.ones(6)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("embed.weight") is t.pop("out.weight"), "embed.weight, out.weight missing"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "extra.weight missing, unexpected"),
        (lambda t: t.update({"embed.weight": torch.zeros(7, 5)}), "embed.weight missing, unexpected or of the wrong shape"),
        (
            lambda t: t.update({"mid.A": torch.zeros(2, 5)}),
            r"layer mid is a Linear with weight \(4, 4\), and its tensors in the file do not fit: A \(2, 5\), B \(4, 2\)",
        ),
        (lambda t: t.update({"mid.B": torch.zeros(4, 3)}), r"layer mid is a Linear .* B \(4, 3\)"),
    ],
)
def test_another_models_file_changes_nothing(change, match):
    tensors, model = dict(compressed().state_dict()), Tied()
    change(tensors)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=match):
        load_low_rank(model, tensors)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_without_an_entry_for_it_the_bias_is_that_of_the_place(bias):
    layer = LowRankLinear.from_linear(nn.Linear(6, 4, bias=bias), rank=2)
    tensors = {f"0.{name}": t for name, t in layer.state_dict().items()}
    model = load_compressed(nn.Sequential(nn.Linear(6, 4, bias=bias)), tensors, {"0": {"class": "LowRankLinear", "rank": 2}})
    x = torch.randn(3, 6)
    assert torch.equal(model(x), layer(x))
    assert (model[0].bias is not None) == bias


def test_descriptions_say_what_tensors_cannot():
    small = nn.Sequential(LowRankLinear(6, 4, rank=2, alpha=5.0), nn.ReLU())
    tensors, layers = small.state_dict(), describe_layers(small)
    x = torch.randn(3, 6)
    assert torch.equal(load_compressed(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), tensors, layers)(x), small(x))
    assert not torch.equal(load_compressed(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), tensors)(x), small(x))


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ({"9": {"class": "LowRankLinear", "rank": 2, "bias": True}}, "layers describes '9', which Sequential does not have"),
        ({"0": {"class": "LowRankLinear", "rank": 3, "bias": True}}, r"layer 0 is a Linear with weight \(4, 6\).*A \(2, 6\)"),
        ({"1": {"class": "LowRankLinear", "rank": 3, "bias": True}}, "layer 1 is a ReLU, .*do not fit: none"),
        ({"0": {"rank": 2, "bias": True}}, "layer 0 is a Linear.*'class'"),
        ({}, r"do not fit Sequential: 0\.A, 0\.B, 0\.weight missing, unexpected or of the wrong shape"),
    ],
)
def test_wrong_descriptions_change_nothing(layers, match):
    tensors = nn.Sequential(LowRankLinear(6, 4, rank=2), nn.ReLU()).state_dict()
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    linear = model[0]
    with pytest.raises(CheckpointError, match=match):
        load_compressed(model, tensors, layers)
    assert model[0] is linear
