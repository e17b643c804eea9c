"""Adapters over weights of few bits: dequantized for the start, trained over as they are, merged into plain layers."""

import copy

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import AdapterSet, LaMDA, LoRA, LoRAXS, RandLoRA, SVFit
from lowdim.surgery import dense_matrix, is_quantized, matrix_shape, weight_matrix
from lowdim.testing.closeness import relative_error


def plain():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))


def torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    quantization.quantize_(model, config(quantization))
    return model


def bitsandbytes(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = plain()
    for name in ("0", "2"):
        old = model.get_submodule(name)
        sizes = old.in_features, old.out_features
        if kind == "4bit":
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        model._modules[name] = new.to("cpu")
    return model


FORMATS = {
    "torchao-int8": lambda: torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao-int4": lambda: torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "bitsandbytes-nf4": lambda: bitsandbytes("4bit"),
    "bitsandbytes-int8": lambda: bitsandbytes("8bit"),
}
#: How far a kernel's own arithmetic is from its dequantized weight: bitsandbytes' int8 product rounds the input, too.
ROUNDING = {"bitsandbytes-int8": 3e-2}
X = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))

formats = pytest.mark.parametrize("name", list(FORMATS))


@formats
def test_the_dense_matrix_is_what_the_layer_applies(name):
    model = FORMATS[name]()
    layer = model[0]
    assert is_quantized(layer)
    assert not is_quantized(plain()[0])
    assert matrix_shape(layer) == (96, 64)
    matrix = dense_matrix(layer)
    assert matrix.dtype == torch.float32
    assert type(matrix) is torch.Tensor
    assert relative_error(X @ matrix.T + layer.bias, layer(X)) < ROUNDING.get(name, 1e-5)
    error = float((matrix - plain()[0].weight).detach().abs().max())
    assert 0 < error < 0.03


@formats
@pytest.mark.parametrize("method", [LoRA(rank=4), LaMDA(rank=4), SVFit(rank=8), LoRAXS(rank=4), RandLoRA(rank=16)], ids=str)
def test_training_over_it_and_merging(name, method):
    model = FORMATS[name]()
    before = model(X)
    bits = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("weight")}
    adapted = lowdim.adapt(model, method)
    assert relative_error(model(X), before) < 1e-4
    rate = 3e-1 if isinstance(method, SVFit) else 2e-2  # singular values want more
    optimizer = torch.optim.AdamW(adapted.param_groups(rate), weight_decay=0.0)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(X) - 1.5 * before.detach()).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        adapted.step(optimizer)
    assert losses[-1] < 0.9 * losses[0]
    for key, value in bits.items():
        layer = adapted.layers[key.removesuffix(".weight")].plain
        assert torch.equal(_raw(layer.weight), _raw(value)), "the quantized weight has moved"
    want = model(X)
    report = adapted.merge()
    assert report is model
    assert all(type(model[i]) is nn.Linear for i in (0, 2))
    assert relative_error(model(X), want) < ROUNDING.get(name, 1e-4)
    adapted.unmerge()
    assert is_quantized(adapted.layers["0"].plain)
    assert torch.equal(model(X), want)


def _raw(weight):
    return weight.dequantize() if hasattr(weight, "dequantize") and weight.is_floating_point() else weight.data


@formats
def test_saved_over_a_quantized_base_and_loaded_over_it(name, tmp_path):
    model = FORMATS[name]()
    adapted = lowdim.adapt(model, LaMDA(rank=4))
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.S.mul_(1.5)
    adapted.save(tmp_path)
    twin = FORMATS[name]()
    lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(X), model(X))
    with pytest.raises(lowdim.errors.CheckpointError, match="differs"):
        lowdim.load_adapter(plain(), tmp_path)


@formats
def test_several_over_one_quantized_base(name):
    adapters = AdapterSet(FORMATS[name]())
    before = adapters.model(X)
    for key, method in {"a": LaMDA(rank=4), "b": LoRA(rank=2)}.items():
        adapted = adapters.add(key, method)
        with torch.no_grad():
            for parameter in adapted.trainable_here().values():
                parameter.add_(0.05)
    with adapters.disabled() as model:
        assert relative_error(model(X), before) < 1e-4
    adapters.delete("a")
    adapters.delete("b")
    assert torch.equal(adapters.model(X), before)


def test_peft_folder_of_an_adapter_over_a_quantized_base(tmp_path):
    model = FORMATS["torchao-int8"]()
    adapted = lowdim.adapt(model, SVFit(rank=6))
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.s.mul_(1.2)
    assert adapted.export(tmp_path).exact
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(_dequantized(FORMATS["torchao-int8"]()), tmp_path)
    assert relative_error(loaded(X), model(X)) < 1e-4


def _dequantized(model):
    copied = plain()
    with torch.no_grad():
        for i in (0, 2):
            weight_matrix(copied[i]).copy_(dense_matrix(model[i]))
            copied[i].bias.copy_(model[i].bias)
    return copied


def test_an_integer_weight_of_unknown_make_is_refused():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer 0.*floating point"):
        lowdim.adapt(nn.Sequential(copy.copy(layer)), LoRA(rank=1))


@formats
def test_the_gradient_of_a_weight_that_cannot_have_one(name):
    from lowdim.calibrate import collect

    model = FORMATS[name]()
    dense = _dequantized(model)
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    got = collect(model, {"0": model[0], "2": model[2]}, {"gradient"}, [X, X[:3]], loss)
    want = collect(dense, {"0": dense[0], "2": dense[2]}, {"gradient"}, [X, X[:3]], loss)
    # Where no input needs a gradient, bitsandbytes' nf4 multiplies in bfloat16 on CPUs that have instructions for it.
    rounding = {**ROUNDING, "bitsandbytes-nf4": 5e-3}.get(name, 1e-4)
    for place in ("0", "2"):
        assert relative_error(got[place]["gradient"], want[place]["gradient"]) < rounding
    assert not any(p.requires_grad for p in model.parameters() if not p.is_floating_point())
