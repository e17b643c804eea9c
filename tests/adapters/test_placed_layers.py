"""Layers that accelerate has placed, and layers with hooks: adapted, merged and loaded models agree."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lowdim
from lowdim.adapters import SAID, AdapterSet, LaMDA, LoLDU, LoRA, SaRA, SVFit
from lowdim.compress import LoRDConfig, WeLoreConfig, lord, welore
from lowdim.layers import Monarch, densify, swap_linear

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_submodules  # noqa: E402

METHODS = {
    "LoRA": LoRA(rank=2),
    "LaMDA": LaMDA(rank=2),
    "SVFit": SVFit(rank=2),
    "LoLDU": LoLDU(rank=2),
    "SaRA": SaRA(threshold=0.1),
}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


class Counting(ModelHook):
    """A hook that changes nothing and counts its calls, by the module that it was called for."""

    def __init__(self):
        self.seen = []

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(module)
        return args, kwargs


def placed():
    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def hooks_removed():
    model = placed()
    remove_hook_from_submodules(model)  # which leaves a bound method on the instance
    return model


def copied():
    return copy.deepcopy(placed())


def doubled():
    model = net()
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda module, args, out: 2.0 * out)
    return model


def input_shifted():
    model = net()
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
    return model


MODELS = {"placed": placed, "removed": hooks_removed, "copied": copied, "doubled": doubled, "shifted": input_shifted}


def disturb(adapted):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapted.layers.values():
            for p in layer.update.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_start_merge_and_reload_agree(name, method, tmp_path):
    model = MODELS[name]()
    want = model(X)
    adapted = lowdim.adapt(model, METHODS[method])
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=2e-6)
    disturb(adapted)
    trained = model(X)
    assert (trained - want).abs().max() > 1e-2
    adapted.save(tmp_path)
    twin = MODELS[name]()
    lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(X), trained)
    plain = adapted.merge()
    assert not any(isinstance(m, lowdim.adapters.AdaptedLayer) for m in plain.modules())
    torch.testing.assert_close(plain(X), trained, rtol=1e-5, atol=2e-6)
    adapted.unmerge()
    assert torch.equal(model(X), trained)


def test_a_merged_layer_keeps_its_hook_and_runs_it_for_itself():
    model, hook = net(), Counting()
    add_hook_to_module(model[2], hook)
    adapted = lowdim.adapt(model, SVFit(rank=2, target_modules=["2"]))
    disturb(adapted)
    adapted.merge()
    hook.seen.clear()
    model(X)
    assert hook.seen == [model[2]]


@pytest.mark.parametrize("method", [LoRA(rank=2), LaMDA(rank=2)], ids=["LoRA", "LaMDA"])
@pytest.mark.parametrize("back", [True, False])
def test_inputs_on_another_device_are_moved_for_the_update_too(method, back):
    """`device_map` over several devices: a hook moves the input of the base layer, and its output back if asked."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 4, device="lazy"))
        add_hook_to_module(model[0], AlignDevicesHook(execution_device=torch.device("lazy"), io_same_device=back))
        lowdim.adapt(model, method, initialise=False)
        y = model(torch.ones(2, 4))
        assert y.device.type == ("cpu" if back else "lazy")
        y.sum().backward()


def test_an_adapter_set_gives_hooks_back():
    model = doubled()
    want, calls = model(X), []
    model[0].register_forward_hook(lambda module, args, out: calls.append(out.detach()))
    adapters = AdapterSet(model)
    adapters.add("one", LaMDA(rank=2))
    adapters.add("two", LoRA(rank=2))
    disturb(adapters["two"])
    adapters.activate("one", "two")
    both = model(X)
    adapters.merge()
    torch.testing.assert_close(model(X), both, rtol=1e-5, atol=2e-6)
    adapters.unmerge()
    adapters.delete("one")
    adapters.delete("two")
    calls.clear()
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=2e-6)
    assert len(calls) == 1
    assert type(model[0]) is nn.Linear


def test_a_hook_that_is_removed_later_no_longer_acts():
    model = net()
    plain = copy.deepcopy(model)
    handle = model[0].register_forward_hook(lambda module, args, out: 2.0 * out)
    adapted = lowdim.adapt(model, LoRA(rank=2))
    handle.remove()
    assert torch.equal(model(X), plain(X))
    adapted.merge()
    torch.testing.assert_close(model(X), plain(X))


def test_a_layer_keeps_its_hooks_if_attaching_fails():
    model = doubled()
    want = model(X)
    with pytest.raises(ValueError, match="layer 4"):
        lowdim.adapt(model, LaMDA(rank=6))
    assert torch.equal(model(X), want)
    assert len(model[0]._forward_hooks) == 1


def offloaded(tmp_path, kind):
    model = net()
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "off", execution_device=torch.device("cpu"))
    return model


WHAT = {
    "lora": lambda model: lowdim.adapt(model, LoRA(rank=2)),
    "lora, named": lambda model: lowdim.adapt(model, LoRA(rank=2, target_modules=["0"])),
    "svfit": lambda model: lowdim.adapt(model, SVFit(rank=2)),
    "said": lambda model: lowdim.adapt(model, SAID(dimension=4)),
    "forecast": lambda model: lowdim.adapt(model, LoRA(rank=2), initialise=False),
    "monarch": lambda model: swap_linear(model, Monarch, nblocks=2),
    "lord": lambda model: lord(model, LoRDConfig(param_ratio=0.5), [X]),
    "welore": lambda model: welore(model, WeLoreConfig(target=0.6, min_reduction=0)),
}


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("name", WHAT)
def test_an_offloaded_model_is_refused_with_the_remedy(name, kind, tmp_path):
    model = offloaded(tmp_path, kind)
    want = model(X)
    with pytest.raises(ValueError, match=r"layer 0.*accelerate has offloaded it.*remove_hook_from_submodules") as caught:
        WHAT[name](model)
    assert len(str(caught.value)) < 500
    assert torch.equal(model(X), want)


def test_an_adapter_is_not_loaded_onto_offloaded_layers_until_they_are_back(tmp_path):
    lowdim.adapt(net(), LoRA(rank=2)).save(tmp_path / "a")
    model = offloaded(tmp_path, "cpu")
    with pytest.raises(ValueError, match=r"layer 0.*has offloaded it"):
        lowdim.load_adapter(model, tmp_path / "a")
    remove_hook_from_submodules(model)
    assert list(lowdim.load_adapter(model, tmp_path / "a").layers) == ["0", "2", "4"]


def test_an_adapted_model_that_is_offloaded_later_computes_the_same():
    model = net()
    disturb(lowdim.adapt(model, LoRA(rank=2)))
    want = model(X)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(X), want)


def test_weights_without_values_are_refused():
    with pytest.raises(ValueError, match=r"layer 0 .* has no values, only a shape"):
        lowdim.adapt(net().to("meta"), LoRA(rank=2))
    assert lowdim.adapt(net().to("meta"), LoRA(rank=2), initialise=False).layers


@pytest.mark.parametrize(
    "swap",
    [
        lambda model: swap_linear(model, Monarch, nblocks=2),
        lambda model: lord(model, LoRDConfig(param_ratio=0.6), [X.repeat(30, 1)]),
        lambda model: welore(model, WeLoreConfig(target=0.6, min_reduction=0)),
    ],
    ids=["monarch", "lord", "welore"],
)
def test_compressed_layers_keep_accelerates_hooks(swap):
    hooked, free = placed(), net()
    swap(hooked), swap(free)
    assert [type(m) for m in hooked] == [type(m) for m in free]
    assert torch.equal(hooked(X), free(X))
    assert all("_hf_hook" in layer.__dict__ for layer in (hooked[0], hooked[2], hooked[4]))
    densify(hooked), densify(free)
    assert torch.equal(hooked(X), free(X))
    assert type(hooked[0]) is nn.Linear
    assert "_hf_hook" in hooked[0].__dict__
