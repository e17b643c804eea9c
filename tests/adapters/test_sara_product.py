"""SaRA's forward and backward pass: one product, the merged layer's bits, and the dense gradient at the mask."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trained_values import moved

import lowdim
from lowdim.adapters import SaRA
from lowdim.adapters.sara.entries import EntriesLayer
from lowdim.plan.kept import kept_tensors
from lowdim.surgery import is_conv1d, weight_matrix
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import LAYERS, make_input, make_layer
from lowdim.testing.small_model import sample_input, small_model

ON_LAYERS = [name for name, kind in LAYERS.items() if kind in SaRA.takes]


@pytest.mark.parametrize("name", ON_LAYERS)
def test_the_entries_in_the_weight_and_next_to_it_agree(name, monkeypatch):
    layer = make_layer(name)
    adapted = moved(SaRA(threshold=0.2).attach(layer))
    adapted.update.select(0.15)
    x = make_input(layer).requires_grad_()
    parameters = [adapted.update.values, x]
    got = adapted(x)
    grads = torch.autograd.grad(got.square().sum(), parameters)
    assert isinstance(adapted, EntriesLayer)
    monkeypatch.setattr(EntriesLayer, "_direct", lambda self, x: False)
    want = adapted(x)
    assert relative_error(got, want) < 1e-13
    for a, b in zip(grads, torch.autograd.grad(want.square().sum(), parameters)):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("name", ON_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_that_of_the_merged_layer_to_the_bit(name, dtype):
    layer = make_layer(name, dtype)
    adapted = moved(SaRA(threshold=0.2).attach(layer))
    x = make_input(layer, dtype)
    merged = adapted.merged()
    if getattr(layer, "padding", None) != "same" and not is_conv1d(layer):  # Conv1D multiplies in another order
        assert torch.equal(adapted(x), merged(x))
    update = adapted.update
    matrix = weight_matrix(merged)
    mask = update.mask.view(matrix.shape)
    assert torch.equal(matrix[mask], update.values)
    assert torch.equal(matrix[~mask], weight_matrix(layer)[~mask])


def test_the_backward_pass_keeps_the_input_alone():
    for name in ("linear", "conv2d"):
        layer = make_layer(name)
        adapted = SaRA(threshold=0.2).attach(layer)
        x = make_input(layer)
        kept = kept_tensors(lambda: adapted(x), adapted)  # noqa: B023 (called at once)
        assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_hooks_and_wrapped_bases_are_respected():
    layer = nn.Linear(4, 3)
    adapted = moved(SaRA(threshold=0.3).attach(layer))
    x = torch.randn(2, 4)
    want = adapted(x)
    seen = []
    handle = adapted.base.register_forward_hook(lambda module, args, output: seen.append(output))
    assert relative_error(adapted(x), want) < 1e-6
    assert len(seen) == 1
    handle.remove()
    adapted.base.forward = lambda x: nn.Linear.forward(layer, x) + 1.0
    assert relative_error(adapted(x), want + 1.0) < 1e-6
    del adapted.base.forward
    adapted.base.bias.requires_grad_(True)  # someone trains the bias too
    adapted(x).sum().backward()
    assert torch.equal(adapted.base.bias.grad, torch.full((3,), 2.0))


def test_a_convolution_without_a_batch_and_with_reflection():
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    plain = nn.Conv2d(3, 4, 3, padding=1)
    for layer, x in ((conv, torch.randn(2, 3, 6, 6)), (plain, torch.randn(3, 6, 6))):
        adapted = moved(SaRA(threshold=0.1).attach(layer))
        assert relative_error(adapted(x), adapted.merged()(x)) < 1e-5


def test_float32_values_over_bfloat16_weights_start_at_the_weights_and_keep_small_changes():
    model = small_model(dtype=torch.bfloat16)
    plain = model(sample_input(dtype=torch.bfloat16))
    adapted = lowdim.adapt(model, SaRA(0.15), dtype=torch.float32)
    update = adapted.layers["body.first"].update
    assert update.values.dtype == torch.float32
    assert torch.equal(model(sample_input(dtype=torch.bfloat16)), plain)
    before = update.values.detach().clone()
    with torch.no_grad():
        update.values.mul_(1 + 1e-5)
    assert not torch.equal(update.values, before)
    model(sample_input(dtype=torch.bfloat16)).float().square().sum().backward()
    assert update.values.grad.dtype == torch.float32


def test_relu_networks_learn_as_the_dense_gradient_says():
    # The gradient of the values is the dense gradient of the weight, read at the mask.
    model, plain = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    adapted = lowdim.adapt(model, SaRA(0.15))
    x = sample_input(7, dtype=torch.float64)
    for run in (model, plain):
        F.relu(run(x)).square().sum().backward()
    for name, layer in adapted.layers.items():
        update = layer.update
        assert relative_error(update.values.grad, plain.get_submodule(name).weight.grad[update.mask]) < 1e-13
