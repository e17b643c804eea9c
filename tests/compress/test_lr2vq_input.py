"""What LR2VQ refuses: settings, sizes that do not divide, and tensors that do not fit."""

import pytest
import torch
from torch import nn

from lowdim.compress import LR2VQConfig, LR2VQLinear, lowrank_subvectors, lr2vq


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"codebook_size": 0}, "codebook_size must be an int >= 1; got 0"),
        ({"subvector_size": 0}, "subvector_size must be an int >= 1"),
        ({"clustering_dim": 9}, r"clustering_dim must be an int in \[1, 8\]; got 9"),
        ({"clustering_dim": 0}, r"clustering_dim must be an int in \[1, 8\]; got 0"),
        ({"temperature": 0.0}, r"temperature must be a finite number in \(0, inf\]; got 0\.0"),
        ({"tolerance": -1.0}, "tolerance must be a finite number"),
        ({"dkm_iterations": 0}, "dkm_iterations must be an int >= 1"),
        ({"pretrain_steps": -1}, "pretrain_steps must be an int >= 0"),
        ({"train_steps": -1}, "train_steps must be an int >= 0"),
        ({"lr": 0.0}, "lr must be a finite number"),
    ],
)
def test_bad_config(options, match):
    with pytest.raises(ValueError, match=match):
        LR2VQConfig(**options)


def test_a_size_that_does_not_divide_names_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(24, 12), nn.Linear(20, 8))
    with pytest.raises(
        ValueError, match=r"subvector_size must divide .*got 8, and layer 0 has 27, layer 2 has 20\. Divisors of 1"
    ):
        lr2vq(model, LR2VQConfig())
    assert [type(m) for m in model] == [nn.Conv2d, nn.Linear, nn.Linear]
    lr2vq(model, LR2VQConfig(target_modules=["1"]))
    with pytest.raises(
        ValueError, match="subvector_size must divide the 10 columns of the weight; got 4; divisors are 2, 5, 10"
    ):
        lowrank_subvectors(torch.ones(3, 10), 4, 2)


def test_wrong_tensors():
    basis, codebook, codes = torch.randn(4, 2), torch.randn(5, 2), torch.randint(5, (6, 5))
    for wrong, match in (
        ({"basis": torch.randn(2, 4)}, "basis must be"),
        ({"codebook": torch.randn(5, 3)}, r"basis must be .* got \(4, 2\) and \(5, 3\)"),
        ({"codes": codes[:, :4]}, r"codes must have shape \(6, 20 / 4\).*got \(6, 4\)"),
        ({"codes": codes + 1}, r"codes must be in \[0, 4\]; got 1 to 5"),
        ({"codes": codes - 1}, r"codes must be in \[0, 4\]; got -1"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(6,\)"),
    ):
        codes[0, 0], codes[0, 1] = 0, 4
        with pytest.raises(ValueError, match=match):
            LR2VQLinear(**{"basis": basis, "codebook": codebook, "codes": codes, "shape": (6, 20), **wrong})
    with pytest.raises(TypeError, match=r"codes must be integers; got torch\.float32"):
        LR2VQLinear(basis, codebook, codes.float(), (6, 20))
    with pytest.raises(TypeError, match=r"linear must be nn\.Linear; got Conv2d"):
        LR2VQLinear.from_linear(nn.Conv2d(4, 4, 1), codebook_size=2, subvector_size=2, clustering_dim=1)
