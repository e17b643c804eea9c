"""Merging into a sparse model: its zeros stay if asked, with the price by layer; else a warning says that they are lost."""

import warnings

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import SAID, AdapterSet, LoRA
from lowdim.compress import NMDecayConfig, finalize, nm_decay
from methods import ADAPTERS, LAYERED, tiny


def sparse():
    """Two linear layers at 2:4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    return finalize(nm_decay(model, NMDecayConfig(total_steps=1)))


def groups(layer):
    return set((layer.weight.view(-1, 4) != 0).sum(1).tolist())


def disturbed(adapted):
    """With an update in every layer, as after training."""
    with torch.no_grad():
        for i, parameter in enumerate(adapted.trainable().values()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return adapted


def test_the_zeros_stay_and_the_report_says_what_is_dropped():
    model = sparse()
    before = {name: model[int(name)].weight.detach().clone() for name in "01"}
    adapted = disturbed(lowdim.adapt(model, LoRA(rank=2, target_modules=["0", "1"])))
    exact = {name: layer.effective_weight().detach().clone() for name, layer in adapted.layers.items()}
    merged = adapted.merge(keep_mask=True)
    for change in adapted.merge_report.layers:
        weight, old = merged[int(change.layer)].weight, before[change.layer]
        assert groups(merged[int(change.layer)]) == {2}
        torch.testing.assert_close(weight[old != 0], exact[change.layer][old != 0])
        update = exact[change.layer] - old
        assert change.dropped == pytest.approx(float(update[old == 0].norm() / update.norm()), rel=1e-5)
        assert (change.sparsity_before, change.sparsity_after) == (0.5, 0.5)
        kept = (update * (old != 0)).norm() / old.norm()
        assert change.relative_change == pytest.approx(float(kept), rel=1e-5)
    adapted.unmerge()
    assert torch.equal(model[0].base.weight, before["0"])


def test_a_merge_that_fills_them_in_warns():
    adapted = disturbed(lowdim.adapt(sparse(), LoRA(rank=2, target_modules=["0"])))
    with pytest.warns(UserWarning, match=r"layer 0 had 50.0% exact zeros and has 0.0%; merge\(keep_mask=True\) keeps"):
        adapted.merge()
    (change,) = adapted.merge_report.layers
    assert (change.sparsity_before, change.sparsity_after, change.dropped) == (0.5, 0.0, 0.0)


def test_a_dense_model_gives_no_warning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight[:4] = 0  # a quarter
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disturbed(lowdim.adapt(model, LoRA(rank=2, target_modules=["0"]))).merge()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LAYERED)
def test_every_adapter_keeps_them(name):
    torch.manual_seed(0)
    x = torch.randn(40, 16)
    model = sparse()
    data = {"batches": [x], "loss_fn": lambda net, batch: net(batch).square().mean()}
    adapted = lowdim.adapt(model, tiny(name, target_modules=["0", "1"]), **data)
    merged = disturbed(adapted).merge(keep_mask=True)
    assert adapted.merge_report.layers, ADAPTERS[name]
    assert all(max(groups(merged[int(change.layer)])) <= 2 for change in adapted.merge_report.layers)


def test_a_method_of_the_whole_model_keeps_them():
    adapted = disturbed(lowdim.adapt(sparse(), SAID(dimension=20)))
    merged = adapted.merge(keep_mask=True)
    assert groups(merged[0]) == groups(merged[1]) == {2}
    assert {change.dropped > 0 for change in adapted.merge_report.layers if "weight" in change.layer} == {True}


def test_several_adapters():
    adapters = AdapterSet(sparse())
    for name in ("one", "two"):
        disturbed(adapters.add(name, LoRA(rank=2, target_modules=["0"])))
    adapters.activate("one", "two")
    report = adapters.merge(keep_mask=True)
    assert [change.sparsity_after for change in report.layers] == [0.5]
    assert groups(adapters.model[0]) == {2}
