"""What GaLore refuses: options, ranks that do not fit, and a first gradient with NaN."""

import pytest
import torch
from torch import nn
from wrong_options import PROJECTED

from lowdim.optim import GaLore


@pytest.mark.parametrize(
    ("options", "match"),
    [
        *PROJECTED,
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"betas": 0.9}, "betas"),
        ({"eps": 1e-8, "inner": "adafactor"}, "eps"),
        ({"scale": float("inf")}, "scale"),
        ({"inner": "adam"}, "inner.*nearest: adamw"),
        ({"svd": "fast"}, "svd"),
        ({"inner_options": {"min_size": 3}}, "inner_options.*min_size"),
        ({"inner": "adamw8bit", "inner_options": {"min_size": -1}}, "min_size"),
        ({"inner": "adafactor", "inner_options": {"beta1": 1.0}}, "beta1"),
        ({"inner": "adafactor", "inner_options": {"decay_rate": 0.5}}, "decay_rate"),
        ({"inner": "adafactor", "inner_options": {"warmup_init": True}}, "relative_step"),
        ({"accumulate": 2}, "layerwise"),
        ({"accumulate": 0, "layerwise": True}, "accumulate"),
    ],
)
def test_wrong_hyperparameters(options, match):
    with pytest.raises(ValueError, match=match):
        GaLore([nn.Parameter(torch.zeros(8, 6))], **{"rank": 2, **options})


def test_rank_on_vectors_is_refused():
    with pytest.raises(ValueError, match="vectors"):
        GaLore([nn.Parameter(torch.zeros(8))], rank=2)
    optimizer = GaLore([nn.Parameter(torch.zeros(8, 6))], rank=2)
    with pytest.raises(ValueError, match="vectors"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(8))]})
    assert len(optimizer.param_groups) == 1


def test_tucker_ranks_are_checked():
    p = nn.Parameter(torch.zeros(4, 3, 2, 2))
    GaLore([p], rank=100)  # one number is cut to each dimension
    for rank in ((4, 3, 2), (5, 3, 2, 2), (0, 1, 1, 1)):
        with pytest.raises(ValueError, match="rank"):
            GaLore([p], rank=rank)


def test_nan_gradient_at_first_is_an_error():
    for shape in ((8, 6), (4, 3, 2, 2)):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = GaLore([p], rank=2)
        p.grad = torch.full(shape, float("nan"))
        with pytest.raises(ValueError, match=r"parameter 0 of group 0.*NaN"):
            optimizer.step()
        assert torch.equal(p, torch.zeros(shape))
