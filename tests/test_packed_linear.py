"""`PackedLinear`: a quantized layer that is written; its values against the scheme's formula, files, casts."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from lowdim.modules import LowRankLinear, PackedLinear, pack_linear
from lowdim.pretrained import save_compressed, stored_bytes

pytest.importorskip("torchao")
transformers = pytest.importorskip("transformers")


def matrix(out=6, size=64, seed=0):
    """Rows whose largest magnitude is positive: it becomes 127 of int8's codes, however 127.5 is rounded."""
    drawn = torch.randn(out, size, generator=torch.Generator().manual_seed(seed))
    return drawn * drawn.gather(1, drawn.abs().argmax(1, keepdim=True)).sign()


def int8(weight):
    """A scale for each row, such that its largest magnitude is 127.5 steps."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127) * scale


def int4(weight, group):
    """16 steps between the least and the largest of each group, one of them at 0."""
    rows = weight.reshape(-1, group)
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((rows / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).reshape(weight.shape)


@pytest.mark.parametrize(("scheme", "formula"), [("int8", int8), ("int4", lambda w: int4(w, 64))])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_product_is_that_of_the_formula(scheme, formula, kind):
    weight, x = matrix(), torch.randn(3, 64)
    layer = nn.Linear(64, 6) if kind == "linear" else transformers.pytorch_utils.Conv1D(6, 64)
    layer.weight.data = weight if kind == "linear" else weight.T.contiguous()
    packed = PackedLinear.from_linear(layer, scheme)
    want = x @ formula(weight).T + layer.bias
    torch.testing.assert_close(packed(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.to_plain()(x), want, rtol=1e-5, atol=1e-5)
    assert type(packed.to_plain()) is type(layer)
    assert packed.codes.numel() * packed.codes.element_size() == {"int8": 1, "int4": 0.5}[scheme] * weight.numel()


def test_casts_and_gradients():
    layer = nn.Linear(64, 6)
    packed = PackedLinear.from_linear(layer, "int8")
    before = packed.dense_weight()
    half = copy.deepcopy(packed).bfloat16()
    assert torch.equal(half.dense_weight(torch.float32), before), "a cast rounds no scale"
    assert half.dense_weight().dtype == half.bias.dtype == torch.bfloat16
    x = torch.randn(2, 64, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, before.sum(0).expand(2, -1))
    assert packed.bias.grad.tolist() == [2.0] * 6
    assert not [n for n, p in packed.named_parameters() if n != "bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_checkpoint_has_the_same_bits(tmp_path, scheme, dtype):
    """With a factored layer in it, which is left alone; the tied head stays dense."""
    model = tiny.llama(2, tie_word_embeddings=True).eval()
    for parameter in model.parameters():  # as from_pretrained does; .to(dtype) would round the frequencies of positions, too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    mlp = model.model.layers[0].mlp
    mlp.up_proj = LowRankLinear.from_linear(mlp.up_proj, rank=4)
    pack_linear(model, scheme)
    assert isinstance(mlp.up_proj, LowRankLinear)
    assert sum(isinstance(layer, PackedLinear) for layer in model.modules()) == 2 * 7 - 1
    ids = torch.randint(3, 40, (2, 8))
    with torch.no_grad():
        want = model(ids).logits
        assert save_compressed(model, tmp_path) == stored_bytes(model)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        assert torch.equal(again(ids).logits, want)
        plain = again.dequantize()
        assert type(plain.model.layers[0].mlp.down_proj) is nn.Linear
        torch.testing.assert_close(plain(ids).logits, want, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_codes_are_not_named_like_a_weight(tmp_path):
    """Int8 codes have the shape of the weight, and a reader that does not know the layer must not take them for one."""
    save_compressed(pack_linear(tiny.llama(), "int8"), tmp_path)
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    weights = [shape for name, shape in shapes.items() if name.endswith("proj.weight")]
    assert weights == [(0,)], "the one that stops such a reader"


@pytest.mark.slow
def test_a_reader_without_lowdim_gets_no_model(tmp_path):
    save_compressed(pack_linear(tiny.llama(), "int8"), tmp_path)
    code = (
        "import sys; sys.modules['lowdim'] = None\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("RuntimeError", "ValueError")
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert described["model.layers.0.mlp.up_proj"] == {"class": "PackedLinear", "scheme": "int8", "bias": False}


def test_bad_input():
    with pytest.raises(ValueError, match="quantize must be one of int8, int4, nf4"):
        pack_linear(tiny.llama(), "int2")
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.up_proj.*NaN"):
        pack_linear(model, "int8")
    with pytest.raises(ValueError, match="no layer is left"):
        pack_linear(pack_linear(tiny.llama(), "int8"), "int8")
    with pytest.raises(ValueError, match="x must have 64 features"):
        PackedLinear(64, 2, scheme="int8")(torch.zeros(3))
