"""Layers are taken for what they compute, not for their class or their name."""

import copy
import functools
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowdim.errors import NoMatchingModuleError
from lowdim.surgery import behaviour, find_layers, is_linear, is_matrix_layer, with_matrix


class Tripled(nn.Linear):
    def forward(self, x):
        return 3.0 * super().forward(x)


class InputDivided(nn.Linear):
    def forward(self, x):
        return super().forward(x / 4)


class Spelt(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Masked(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.arange(self.weight.numel()).view_as(self.weight) % 3 != 0).float())
        with torch.no_grad():
            self.weight.mul_(self.mask)  # its weight alone does not show the mask

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Normed(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Reordered(nn.Linear):
    def forward(self, x):
        return super().forward(x).flip(-1)


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores.topk(2).indices, scores


class Asking(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class ScaledWords(nn.Embedding):
    def forward(self, ids):
        return 5.5 * super().forward(ids)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward((ids + 2) % self.num_embeddings)


class Positions(nn.Embedding):
    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[-1], device=ids.device))


class PaddedWithZeros(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * (ids != self.padding_idx)[..., None]


class Halved(nn.Conv2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def patched(factor):
    """A forward method that was replaced on the instance, as libraries do."""
    layer = nn.Linear(6, 5)
    before = layer.forward
    layer.forward = functools.wraps(before)(lambda x: factor * before(x))
    return layer


def bound():
    layer = nn.Linear(6, 5)
    layer.forward = types.MethodType(lambda self, x: 2.0 * F.linear(x, self.weight, self.bias), layer)
    return layer


GAINS = {
    "plain": (lambda: nn.Linear(6, 5), 1.0),
    "spelt out": (lambda: Spelt(6, 5), 1.0),
    "tripled": (lambda: Tripled(6, 5), 3.0),
    "no bias": (lambda: Tripled(6, 5, bias=False), 3.0),
    "one row": (lambda: Tripled(6, 1), 3.0),
    "divided input": (lambda: InputDivided(6, 5), 0.25),
    "patched": (lambda: patched(2.0), 2.0),
    "patched with the same": (lambda: patched(1.0), 1.0),
    "bound": (bound, 2.0),
    "words": (lambda: ScaledWords(9, 4), 5.5),
    "words all zero": (lambda: _zeroed(ScaledWords(9, 4)), 5.5),
    "convolution": (lambda: Halved(3, 4, 2), 0.5),
    "grouped convolution": (lambda: Halved(4, 4, 3, stride=2, padding=1, groups=2), 0.5),
}


def _zeroed(layer):
    nn.init.zeros_(layer.weight)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GAINS)
def test_the_factor_of_the_product_is_found(name, dtype):
    make, want = GAINS[name]
    layer = make().to(dtype)
    before = copy.deepcopy(layer.state_dict())
    found = behaviour(layer)
    assert found.reason == ""
    assert found.gain == pytest.approx(want, rel=1e-6 if dtype != torch.bfloat16 else 2e-3)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


REASONS = {
    "masked": (lambda: Masked(6, 5), "norm, mask"),
    "normed": (lambda: Normed(6, 5), "norm, mask"),
    "reordered": (lambda: Reordered(6, 5), "norm, mask"),
    "router": (lambda: Router(6, 5), "returns a tuple"),
    "asks for more": (lambda: Asking(6, 5), r"arguments beyond the input \(scale\)"),
    "shifted": (lambda: Shifted(9, 4), "more than a lookup"),
    "positions": (lambda: Positions(9, 4), r"not a plain lookup: .* returns \(7, 4\), not \(8, 7, 4\)"),
    "padding": (lambda: PaddedWithZeros(9, 4, padding_idx=3), "more than a lookup"),
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "max_norm=1 rescales its rows"),
    "pads": (lambda: PadsItself(3, 4, 2), "not a plain product"),
    "standardised": (lambda: Standardised(3, 4, 2), "norm, mask"),
    "attention's output": (lambda: nn.MultiheadAttention(4, 2).out_proj, "never calls it"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_layer_that_does_more_is_left_out_by_default_and_refused_by_name(name):
    make, reason = REASONS[name]
    model = nn.ModuleDict({"odd": make(), "plain": nn.Linear(6, 5)})
    assert not is_matrix_layer(model["odd"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(find_layers(model)) == ["plain"]
    with pytest.raises(NoMatchingModuleError, match=f"'odd' matches only layers that cannot be adapted.*{reason}"):
        find_layers(model, ["odd"])
    with pytest.warns(UserWarning, match=f"also matches odd .*left out: .*{reason}"):
        assert list(find_layers(model, "odd|plain")) == ["plain"]


def test_a_scaled_product_is_not_taken_for_a_plain_one():
    model = nn.ModuleDict({"odd": Tripled(4, 4), "plain": nn.Linear(4, 4)})
    assert not is_linear(model["odd"])
    with pytest.raises(NoMatchingModuleError, match="scales the product by 3"):
        find_layers(model, ["odd"])


def test_on_the_meta_device_only_shapes_are_tried():
    assert behaviour(Spelt(6, 5).to("meta")).reason == ""
    assert "tuple" in behaviour(Router(6, 5).to("meta")).reason


def test_a_forward_method_that_reads_another_layer_is_refused():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    layer.forward = lambda x: F.linear(x, other.weight, other.bias)
    assert "more than a product" in behaviour(layer).reason


@pytest.mark.parametrize("make", [lambda: patched(2.0), bound, lambda: patched(1.0)], ids=["closure", "method", "same"])
def test_a_copy_with_another_weight_computes_with_it(make):
    layer, x = make(), torch.randn(3, 6)
    gain = behaviour(layer).gain
    matrix = torch.randn(5, 6)
    before = layer(x)
    torch.testing.assert_close(with_matrix(layer, matrix)(x), gain * (x @ matrix.T + layer.bias))
    assert torch.equal(layer(x), before)


def test_a_shared_counter_of_a_patched_method_stays_shared():
    layer, calls = nn.Linear(2, 2), []
    before = layer.forward
    layer.forward = lambda x: (calls.append(1), before(x))[1]
    with_matrix(layer, torch.eye(2))(torch.ones(1, 2))
    assert calls == [1]
