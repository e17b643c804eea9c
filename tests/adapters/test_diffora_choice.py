"""What DiffoRA chooses: how many modules of a row, which of them share their parameters, and what that costs."""

import copy
from collections import OrderedDict

import torch
from diffora_blocks import Q_V, batch, blocks, loss_fn, searched
from torch import nn

import lowdim
from lowdim.adapters import DiffoRA, LoRA
from lowdim.testing.closeness import relative_error


def test_half_of_four_is_two_and_a_row_keeps_one_at_least():
    for ratio, columns, want in [(0.5, 4, 2), (0.1, 4, 1), (0.3, 10, 3), (1.0, 3, 3), (0.51, 4, 3)]:
        model = nn.ModuleList([nn.ModuleDict({f"m{c}": nn.Linear(2, 2) for c in range(columns)})])
        names = [f"m{c}" for c in range(columns)]
        adapted = lowdim.adapt(model, DiffoRA(rank=1, select_ratio=ratio, target_modules=names))
        assert int(adapted.discretize().sum()) == want


def test_shared_modules_hold_the_same_parameters_and_train_as_one():
    adapted = searched(DiffoRA(**Q_V, select_ratio=0.5))
    with torch.no_grad():
        adapted.dam.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]]))
    update = lambda name: adapted.layers[f"blocks.{name}"].update  # noqa: E731
    values = {name: layer.update.A.detach().clone() for name, layer in adapted.layers.items()}
    adapted.discretize()
    assert adapted.dam is None
    assert update("0.v").A is update("1.v").A
    assert update("0.v").B is update("1.v").B
    assert torch.equal(update("0.v").A, values["blocks.1.v"])  # that of the larger logit
    assert torch.equal(update("2.v").A, values["blocks.2.v"])  # goes on from what the search gave
    assert len({id(update(f"{i}.{c}").A) for i in range(3) for c in "qv"}) == 5
    for layer in adapted.layers.values():
        assert relative_error(layer.delta(), 2.0 * layer.update.B @ layer.update.A) < 1e-12  # gate 1
    trained = adapted.trainable()
    assert len(trained) == 10
    assert not any("dam" in name for name in trained)
    assert len(adapted.weight_parameters()) == 10
    x, y = batch(3)
    loss_fn(adapted.model, (x, y)).backward()
    gradient = update("0.v").A.grad.clone()
    torch.optim.SGD(adapted.param_groups(0.1)).step()
    adapted.step()
    assert bool(gradient.any())
    assert update("0.v").A is update("1.v").A
    model = adapted.model
    want = model(x)
    assert relative_error(adapted.merge()(x), want) < 1e-12


def test_without_sharing_the_rest_gets_no_update():
    adapted = searched(DiffoRA(**Q_V, share=False))
    x, y = batch(3)
    selected = adapted.discretize()
    for i, row in enumerate(adapted.grid):
        for j, name in enumerate(row):
            assert bool(adapted.layers[name].delta().any()) == bool(selected[i, j])
            assert (adapted.layers[name].update.A is None) == (not selected[i, j])
    assert len(adapted.trainable()) == 6
    lost = next(layer for layer in adapted.layers.values() if layer.update.A is None)
    h = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(lost(h), lost.base(h))
    assert not lost.update(h.float()).any()
    loss_fn(adapted.model, (x, y)).backward()
    adapted.step()
    want = adapted.model(x)
    assert relative_error(adapted.merge()(x), want) < 1e-12


def test_only_layers_of_one_shape_share():
    wide = nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 6)})
    thin = nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)})
    model = nn.ModuleList([wide, thin, copy.deepcopy(wide), copy.deepcopy(thin)])
    adapted = lowdim.adapt(model, DiffoRA(rank=1, target_modules=["q", "v"]))
    adapted.discretize()
    pairs = [id(adapted.layers[f"{i}.v"].update.A) for i in range(4)]
    assert pairs[0] == pairs[2] != pairs[1] == pairs[3]


def test_convolutions_are_searched_and_shared_too():
    torch.manual_seed(0)
    parts = lambda: {"wide": nn.Conv2d(4, 4, 3, padding=1), "narrow": nn.Conv2d(4, 4, 1)}  # noqa: E731
    model = nn.Sequential(*[nn.Sequential(OrderedDict(parts())) for _ in range(2)])
    for share in (True, False):
        whole = copy.deepcopy(model)
        adapted = lowdim.adapt(whole, DiffoRA(rank=1, share=share, target_modules=["wide", "narrow"]))
        for layer in adapted.layers.values():
            nn.init.normal_(layer.update.B)
        x = torch.randn(1, 4, 5, 5)
        adapted.discretize()
        a, b = (adapted.layers[f"{i}.narrow"].update.A for i in range(2))
        assert a is b
        assert (a is None) == (not share)
        want = whole(x)
        assert relative_error(adapted.merge()(x), want) < 1e-5


def test_a_chosen_layer_costs_what_lora_costs():
    adapted = lowdim.adapt(blocks(), DiffoRA(**Q_V))
    adapted.discretize()
    lora = lowdim.adapt(blocks(), LoRA(rank=2, alpha=4))
    x, _ = batch(1)
    nodes = []
    for model in (adapted.model, lora.model):
        seen, todo = set(), [model(x).grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        nodes.append(sum(type(node).__name__ != "AccumulateGrad" for node in seen))
    assert nodes[0] == nodes[1]
