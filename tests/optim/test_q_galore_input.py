"""What Q-GaLore is given: which layers become 8-bit, the defaults, and what is refused."""

import pytest
import torch
from eight_bit_problem import EIGHT
from torch import nn

from lowdim.optim import Int8Linear, QGaLore, param_groups


def test_param_groups_take_8bit_weights():
    net = EIGHT.model()
    groups = param_groups(net, rank=3)
    assert [len(g["params"]) for g in groups] == [3, 3]
    assert groups[0]["rank"] == 3
    assert [g["rank"] for g in param_groups(net, rank=5)] == [5, None]  # the last matrix has five rows
    net[0].requires_grad_(False)
    assert [len(g["params"]) for g in param_groups(net, rank=3)] == [2, 2]


def test_prepare_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 64)
            self.attention = nn.MultiheadAttention(64, 2)
            self.q, self.odd, self.tiny, self.prime = nn.Linear(64, 64), nn.Linear(60, 33), nn.Linear(64, 4), nn.Linear(257, 35)
            self.lm_head = nn.Linear(64, 16)

    net = QGaLore.prepare_model(Net(), rank=8, scale=0.5)
    assert isinstance(net.q, Int8Linear)
    assert net.q.weight.group_size == 256
    assert net.odd.weight.group_size == 60  # the largest divisor of its inputs
    for name in ("tiny", "prime", "lm_head"):
        assert type(net.get_submodule(name)) is nn.Linear, name
    assert net.attention.out_proj.weight.dtype == torch.float32  # attention reads it and never calls the layer
    rows = {name: group for name, _, group in param_groups(net, rank=8).rows}
    assert rows["q.weight"] == rows["odd.weight"] == rows["prime.weight"] == "rank 8"
    assert rows["tiny.weight"].startswith("smaller side")
    net = QGaLore.prepare_model(Net(), rank=8, target_modules=["q"], stochastic_round=False)
    assert not net.q.weight.stochastic_round
    assert type(net.odd) is nn.Linear


def test_defaults_are_those_of_the_papers_code():
    group = QGaLore([torch.nn.Parameter(torch.zeros(8, 6))], rank=2).param_groups[0]
    wanted = {
        "cos_threshold": 0.4,
        "gamma": 2,
        "queue_size": 5,
        "projector_bits": 4,
        "projector_group_size": 256,
        "scale": 0.25,
    }
    assert {name: group[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 7}, "rank.*smaller side.*7"),
        ({"rank": (2, 2)}, "rank"),
        ({"update_interval": 0}, "update_interval"),
        ({"lr": -1.0}, "lr"),
        ({"scale": float("nan")}, "scale"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"eps": -1e-8}, "eps"),
        ({"eps": None}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"projector_bits": 9}, "projector_bits"),
        ({"projector_bits": 0}, "projector_bits"),
        ({"projector_group_size": 0}, "projector_group_size"),
        ({"cos_threshold": float("nan")}, "cos_threshold"),
        ({"gamma": 0.5}, "gamma.*0.5"),
        ({"queue_size": 0}, "queue_size"),
        ({"inner": "adafactor"}, "inner.*nearest"),
        ({"min_8bit_size": -1}, "min_8bit_size"),
        ({"svd": "fast"}, "svd"),
    ],
)
def test_wrong_hyperparameters(options, match):
    with pytest.raises(ValueError, match=match):
        QGaLore([nn.Parameter(torch.zeros(8, 6))], **{"rank": 2, **options})


def test_wrong_parameters():
    with pytest.raises(ValueError, match="vectors"):
        QGaLore([nn.Parameter(torch.zeros(8))], rank=2)
    with pytest.raises(ValueError, match=r"matrices; got shape \(4, 3, 2, 2\)"):
        QGaLore([nn.Parameter(torch.zeros(4, 3, 2, 2))], rank=2)
    with pytest.raises(TypeError, match="Int8Parameter"):
        QGaLore([nn.Parameter(torch.zeros(8, 6, dtype=torch.uint8), requires_grad=False)], rank=2)
