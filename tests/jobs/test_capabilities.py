"""Each capability is tried on each method that is said to have it; where the others can be asked at all, they refuse."""

import pytest
import torch
from torch import nn

import lowdim
from lowdim.catalogue import variants
from lowdim.errors import UnknownNameError
from lowdim.jobs.capabilities import CAPABILITIES, abilities, parse_capabilities
from lowdim.methods import apply, strategy_for, with_options
from lowdim.surgery import is_quantized

SMALLER = {
    "rank": 2, "num_bases": 8, "dimension": 20, "rank_choices": [1, 2], "nblocks": 2, "blocks": 2, "ranks": 2,
    "target_rank": 3, "dropout": 0.0, "ratio": 0.5,
}  # fmt: skip
X = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))


def small(name):
    """The method with hyperparameters for layers of width 16."""
    variant = variants()[name]
    return with_options(variant, {key: SMALLER[key] for key in variant.options if key in SMALLER})


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


def loss_fn(model, x):
    return model(x).square().mean()


def applied(name, model=None):
    return apply(small(name), model or net(), lr=1e-3, steps=10, batches=[X, X], loss_fn=loss_fn)


def kind(name):
    target = variants()[name].target
    return target.partition(":")[0].split(".")[1] if target else ""


def can_merge(name):
    if kind(name) == "adapters":
        plain = applied(name).adapted.merge()
        assert [type(m) for m in plain] == [nn.Linear, nn.Tanh, nn.Linear]
    else:
        from lowdim.layers import densify

        model = applied(name).model
        before = model(X)
        assert any(type(m) is not nn.Linear for m in model if not isinstance(m, nn.Tanh)), "nothing was replaced"
        densify(model)
        assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)


def _takes(name, layer, x):
    """An adapter, or a layer's twin, in place of a layer of this kind."""
    model = nn.ModuleDict({"only": layer})
    if kind(name) == "adapters":
        variant = small(name)
        lowdim.adapt(model, variant.build()(**{**variant.options, "target_modules": ["only"]}), initialise=False)
    else:
        from lowdim.layers import swap_linear

        swap_linear(model, variants()[name].build(), ["only"], **small(name).options)
    assert type(model["only"]) is not type(layer)
    assert model["only"](x).shape == layer(x).shape


def can_conv(name):
    if name == "maestro":  # its schedule finds the layers, convolutions among them
        from lowdim.layers import MaestroConv2d, maestro_decompose

        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
        assert isinstance(maestro_decompose(model)[0], MaestroConv2d)
        return
    _takes(name, nn.Conv2d(4, 8, 3), torch.randn(2, 4, 5, 5))


def can_embedding(name):
    _takes(name, nn.Embedding(20, 16), torch.tensor([[1, 2, 3]]))


def _quantized(name, config):
    quantization = pytest.importorskip("torchao.quantization")
    model = net()
    quantization.quantize_(model, config(quantization))
    done = applied(name, model)
    assert is_quantized(done.adapted.layers["0"].plain), "the base keeps its few bits"
    loss_fn(done.model, X).backward()
    assert any(p.grad is not None for p in done.model.parameters() if p.requires_grad)


def can_int8(name):
    if kind(name) == "optim":
        from lowdim.optim import Int8Linear

        assert any(isinstance(module, Int8Linear) for module in applied(name).model.modules())
        return
    _quantized(name, lambda q: q.Int8WeightOnlyConfig())


def can_int4(name):
    _quantized(name, lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4))


def can_peft(name, tmp_path):
    applied(name).adapted.export(tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


def can_layerwise(name):
    strategy_for(small(name)).check_layerwise(True)
    done = apply(small(name), net(), lr=1e-3, steps=10, layerwise=True)
    optimizer = done.make_optimizer(1e-3)
    loss_fn(done.model, X).backward()
    assert all(p.grad is None for p in done.model.parameters()), "updated and freed in the backward pass"
    optimizer.remove_hooks()


TRIED = {
    "merge": can_merge, "conv": can_conv, "embedding": can_embedding, "int8": can_int8, "int4": can_int4, "peft": can_peft,
    "layerwise": can_layerwise,
}  # fmt: skip
METHODS = {name: variant for name, variant in variants().items() if variant.target}
ABLE = [(capability, name) for capability in TRIED for name in METHODS if capability in abilities(METHODS[name])]
#: Adapters are asked about layers and exports, everything about layer-wise updates; the rest makes no sense to ask.
UNABLE = [
    (capability, name)
    for capability in ("conv", "embedding", "peft", "layerwise")
    for name in METHODS
    if capability not in abilities(METHODS[name]) and (capability == "layerwise" or kind(name) == "adapters")
]


def _named(pairs):
    return {"argvalues": pairs, "ids": [f"{capability}-{name}" for capability, name in pairs]}


def _try(capability, name, tmp_path):
    TRIED[capability](*((name, tmp_path) if capability == "peft" else (name,)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of layers as small as these
@pytest.mark.parametrize(("capability", "name"), **_named(ABLE))
def test_who_can_does(capability, name, tmp_path):
    _try(capability, name, tmp_path)


@pytest.mark.parametrize(("capability", "name"), **_named(UNABLE))
def test_who_cannot_refuses(capability, name, tmp_path):
    with pytest.raises((ValueError, TypeError)):
        _try(capability, name, tmp_path)


def test_each_capability_is_tried():
    assert set(TRIED) == set(CAPABILITIES)
    assert {capability for capability, _ in ABLE} == set(CAPABILITIES)


def test_names_of_capabilities():
    assert parse_capabilities("merge, conv,") == ["merge", "conv"]
    for wrong in ("merge,con", "", ","):
        with pytest.raises(UnknownNameError, match="--can must be one of merge, conv"):
            parse_capabilities(wrong)
