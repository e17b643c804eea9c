"""What kernels hide, against the allocator's record."""

import pytest
import torch

from lowdim.linalg import fastfood_draws
from lowdim.plan import measure
from lowdim.plan.kernels import hidden_bytes
from lowdim.plan.tracker import tensors_in

aten = torch.ops.aten
CONV = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def image(*shape):
    return torch.randn(shape)


def draws(out_dim):
    found = fastfood_draws(out_dim)
    return found.signs, found.permutation, found.gaussian


CASES = {
    "fastfood": (torch.ops.lowdim.fastfood.default, lambda: (image(500), *draws(150_000), 150_000, 1.0)),
    "fastfood-transpose": (torch.ops.lowdim.fastfood_transpose.default, lambda: (image(150_000), *draws(150_000), 500, 1.0)),
    "svd-tall": (aten._linalg_svd.default, lambda: (image(768, 192), False)),
    "svd-wide": (aten._linalg_svd.default, lambda: (image(192, 768), False)),
    "eigh": (aten._linalg_eigh.default, lambda: (torch.eye(300), "L", True)),
    "convolution": (aten.convolution.default, lambda: (image(4, 16, 32, 32), image(64, 16, 3, 3), image(64), *CONV)),
    "convolution-backward": (
        aten.convolution_backward.default,
        lambda: (image(4, 64, 32, 32), image(4, 16, 32, 32), image(64, 16, 3, 3), [64], *CONV, [True] * 3),
    ),
    "product": (aten.mm.default, lambda: (image(200, 300), image(300, 100))),
    "softmax": (aten._softmax.default, lambda: (image(200, 300), -1, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_hidden_bytes(name):
    func, make = CASES[name]
    args = make()
    kept = []
    took = measure(lambda: kept.append(func(*args))).bytes
    outputs = sum(t.nbytes for t in tensors_in(kept[0]))
    assert outputs + hidden_bytes(func, args, kept[0]) == pytest.approx(took, rel=0.05)
