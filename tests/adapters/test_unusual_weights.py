"""Weights in few bits: read with their scales, or refused where the scales are not known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unusual_models import disturb, told

import lowdim
from lowdim.adapters import LaMDA, LoRA
from lowdim.errors import NoMatchingModuleError
from lowdim.layers import Monarch, swap_linear


def coded(dense, rows, columns, dtype=torch.float8_e4m3fn, most=448.0):
    """Codes and scales of blocks `(rows, columns)`, and the values that they stand for."""
    blocks = dense.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = blocks.abs().amax((1, 3), keepdim=True) / most
    codes = (blocks / scale).to(torch.float32)
    codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
    values = (codes.float() * scale).flatten(2).flatten(0, 1)
    return codes.flatten(2).flatten(0, 1), scale[:, 0, :, 0], values


def fine_grained(out, inputs, block):
    FP8Linear = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear
    torch.manual_seed(0)
    layer = FP8Linear(inputs, out, block_size=block)
    codes, scale, values = coded(torch.randn(out, inputs) * 0.05, *(block or (out, inputs)))
    layer.weight.data, layer.weight_scale_inv.data = codes, scale if block else scale.reshape(())
    return layer, values


class EightBits(nn.Linear):
    """A layer of the user's own: codes of `dtype`, one scale a row, multiplied or divided by."""

    def __init__(self, out, inputs, dtype, divided=False):
        super().__init__(inputs, out)
        torch.manual_seed(0)
        codes, scale, self.values = coded(torch.randn(out, inputs), 1, inputs, dtype, 127.0 if dtype == torch.int8 else 448.0)
        self.weight, self.divided = nn.Parameter(codes, requires_grad=False), divided
        self.register_buffer("s", 1 / scale if divided else scale)

    def forward(self, x):
        codes = self.weight.to(x.dtype)
        return F.linear(x, codes / self.s if self.divided else codes * self.s, self.bias)


QUANTIZED = {
    "blocks": lambda: fine_grained(8, 12, (4, 6)),
    "one scale": lambda: fine_grained(8, 12, None),
    "float8": lambda: (layer := EightBits(8, 12, torch.float8_e4m3fn), layer.values),
    "float8 divided": lambda: (layer := EightBits(8, 12, torch.float8_e4m3fn, divided=True), layer.values),
    "float8_e5m2": lambda: (layer := EightBits(8, 12, torch.float8_e5m2), layer.values),
    "int8": lambda: (layer := EightBits(8, 12, torch.int8), layer.values),
}


@pytest.mark.parametrize("method", [LoRA(rank=2), LaMDA(rank=2)], ids=["LoRA", "LaMDA"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_weight_in_few_bits_is_read_with_its_scales(name, method):
    layer, values = QUANTIZED[name]()
    adapted = lowdim.adapt(nn.Sequential(layer), method)
    found = adapted.layers["0"]
    torch.testing.assert_close(found.pristine_weight(), values, rtol=1e-5, atol=1e-6)
    disturb(adapted)
    want = values + found.delta()
    merged = adapted.merge()[0]
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged.weight.detach(), want, rtol=1e-5, atol=1e-6)


def test_a_layer_that_does_not_tell_its_dtype_is_merged_in_the_models():
    layer, _ = fine_grained(8, 12, (4, 6))
    model = nn.Sequential(nn.Linear(12, 12).bfloat16(), layer)
    assert lowdim.adapt(model, LoRA(rank=2)).merge()[1].weight.dtype == torch.bfloat16
    model = nn.Sequential(nn.Linear(12, 12).bfloat16(), fine_grained(8, 12, (4, 6))[0])
    swapped = swap_linear(model, Monarch, ["1"], nblocks=2)
    assert next(swapped[1].parameters()).dtype == torch.bfloat16


def test_conversions_read_a_weight_in_few_bits_with_its_scales():
    layer, values = QUANTIZED["int8"]()
    plain = nn.Linear(12, 8)
    plain.weight.data, plain.bias.data = values.clone(), layer.bias.detach().clone()
    x = torch.randn(3, 12)
    got, want = (swap_linear(nn.Sequential(m), Monarch, nblocks=2)(x) for m in (layer, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_codes_without_known_scales_are_refused():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer 0.*not floating point but float8_e4m3fn.*load the model without quantization"):
        lowdim.adapt(nn.Sequential(layer), LoRA(rank=2))


class Packed(nn.Module):
    """A quantized layer that is no nn.Linear, as GPTQ's and AWQ's are."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 8))


def test_quantized_layers_of_other_classes_are_named():
    with pytest.raises(NoMatchingModuleError, match=r"0 .Packed.* is left out: it keeps its weight quantized"):
        lowdim.adapt(nn.Sequential(Packed()), LoRA(rank=2))
    notes, adapted = told(lambda: lowdim.adapt(nn.Sequential(Packed(), nn.Linear(8, 8)), LoRA(rank=2)))
    assert list(adapted.layers) == ["1"]
    assert any("Packed" in note for note in notes)
