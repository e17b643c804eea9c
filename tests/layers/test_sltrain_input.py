"""What SLTrain refuses: sizes, seeds, and supports that are none."""

import pytest
import torch

from lowdim.layers import SLTrainLinear


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rank": 0}, r"rank must be an int in \[1, 4\]; got 0"),
        ({"rank": 5}, r"rank must be an int in \[1, 4\]; got 5"),
        ({"rank": 2.0}, r"rank must be an int in \[1, 4\]; got 2.0"),
        ({"density": 0.0}, r"density must be a finite number in \(0, 1\); got 0.0"),
        ({"density": 1.0}, r"density must be a finite number in \(0, 1\); got 1.0"),
        ({"density": float("nan")}, "density must be a finite number"),
        ({"alpha": 0.0}, "alpha must be a finite number"),
        ({"seed": -1}, "seed must be an int"),
        ({"seed": 0.5}, "seed must be an int"),
        ({"seed": 2**63}, "seed must be an int"),
        ({"index_dtype": torch.int16}, "index_dtype must be torch.int64, or torch.int32 .* got torch.int16"),
        ({"indices": torch.tensor([1, 2, 2])}, r"indices must be strictly increasing in .* entry 2 is not above"),
        ({"indices": torch.tensor([3, 1])}, r"indices must be strictly increasing in .* entry 1 is not above"),
        ({"indices": torch.tensor([-1, 1])}, r"= \[0, 24\); got -1 … 1"),
        ({"indices": torch.tensor([3, 24])}, r"= \[0, 24\); got 3 … 24"),
    ],
)
def test_bad_hyperparameters(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SLTrainLinear(6, 4, **{"rank": 2, **kwargs})


def test_int32_cannot_count_so_far():
    how = {"rank": 1, "density": 1e-9, "device": "meta"}
    with pytest.raises(ValueError, match="where out · in < 2"):
        SLTrainLinear(2**16, 2**15, index_dtype=torch.int32, **how)
    assert SLTrainLinear(2**16, 2**15 - 1, index_dtype=torch.int32, **how).indices.dtype == torch.int32


@pytest.mark.parametrize("indices", [[1, 2], torch.tensor([[1, 2]]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])])
def test_what_is_no_support(indices):
    with pytest.raises(TypeError, match=r"indices must be a tensor \(nnz,\) of int64 or int32; got"):
        SLTrainLinear(6, 4, rank=2, indices=indices)
