"""DiffoRA: the shared case, the vectors of the search and of the choice, and which modules form the grid."""

import copy
import math

import pytest
import torch
from diffora_blocks import Blocks, blocks, loss_fn
from torch import nn

import lowdim
import vectors
from lowdim.adapters import DiffoRA, DiffoRAAdapted
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.small_model import small_model


class TestDiffoRA(AdapterCase):
    rank, alpha = 2, 5

    def method(self, **changes):
        return DiffoRA(**{"rank": self.rank, "alpha": self.alpha, "target_modules": ["first", "second"], **changes})

    def dense(self, update):
        gate = 1.0  # of a layer by itself
        if update.matrix is not None:
            matrix, row, column = update.matrix
            gate = torch.sigmoid(matrix.dam[row, column].double())
        return self.alpha / self.rank * gate * update.B @ update.A

    def start(self, weight, stats):
        return {"B": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return 2

    def test_only_the_update_is_trained(self):
        # the logits stand in the shared module and not in an update
        adapted = self.adapt(small_model())
        assert list(adapted.layers) == ["body.first", "body.second"]
        trained = adapted.trainable()
        assert sum(".update." in name for name in trained) == 4
        assert {name for name in trained if ".update." not in name} == {"lowdim_shared.dam"}
        grouped = [p for group in adapted.param_groups(0.1) for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, trained.values()))


def of_case(case):
    how = case.hyperparameters
    names = [(i, c) for i in range(how["rows"]) for c in how["columns"]]
    model = Blocks([{c: case[f"W_{i}_{c}"] for c in how["columns"]} for i in range(how["rows"])])
    method = DiffoRA(rank=how["rank"], alpha=how["alpha"], unrolled=how["unrolled"], target_modules=how["columns"])
    adapted = lowdim.adapt(model, method)
    with torch.no_grad():
        adapted.dam.copy_(case["dam0"])
        for i, c in names:
            update = adapted.layers[f"blocks.{i}.{c}"].update
            update.A.copy_(case[f"A_{i}_{c}"])
            update.B.copy_(case[f"B_{i}_{c}"])
    return adapted, names


@pytest.mark.parametrize("name", ["search", "first_order"])
def test_vectors_of_the_search(name):
    case = vectors.load("diffora", name)
    how = case.hyperparameters
    adapted, names = of_case(case)
    dam_optimizer = torch.optim.SGD([adapted.dam], lr=how["lr_dam"])
    weight_optimizer = torch.optim.SGD(adapted.weight_parameters(), lr=how["lr_weights"])
    for step in range(how["steps"]):
        train, valid = ((case["x" + part][step], case["y" + part][step]) for part in "tv")
        state = copy.deepcopy(adapted.model.state_dict())
        case.close(adapted.dam_gradient(loss_fn, train, valid, how["lr_weights"]), case["dam_grads"][step])
        assert all(torch.equal(value, state[key]) for key, value in adapted.model.state_dict().items())
        assert all(p.grad is None for p in adapted.model.parameters())
        losses = adapted.search_step(loss_fn, train, valid, dam_optimizer, weight_optimizer)
        case.close(torch.tensor(losses[0], dtype=torch.float64), case["train_losses"][step])
        case.close(torch.tensor(losses[1], dtype=torch.float64), case["valid_losses"][step])
        case.close(adapted.dam, case["dams"][step])
    for i, c in names:
        update = adapted.layers[f"blocks.{i}.{c}"].update
        case.close(update.A, f"A_{i}_{c}_end")
        case.close(update.B, f"B_{i}_{c}_end")


def test_vectors_of_the_choice():
    case = vectors.load("diffora", "discretize")
    rows, columns = case["dam"].shape
    for k, ratio in enumerate(case.hyperparameters["ratios"]):
        model = nn.ModuleList(nn.ModuleDict({c: nn.Linear(3, 3) for c in "abc"}) for _ in range(rows))
        adapted = lowdim.adapt(model, DiffoRA(rank=1, select_ratio=ratio, target_modules=list("abc")))
        with torch.no_grad():
            adapted.dam.copy_(case["dam"])
        before = {name: layer.update.A for name, layer in adapted.layers.items()}
        selected = adapted.discretize()
        assert torch.equal(selected, case["selected"][k].bool())
        assert torch.equal(adapted.gates(), selected.float())
        for j in range(columns):
            source = int(case["shared_from"][k][j])
            for i in range(rows):
                name = adapted.grid[i][j]
                kept = i if selected[i, j] else source
                assert adapted.layers[name].update.A is before[adapted.grid[kept][j]]
            assert (source == -1) == bool(selected[:, j].all())


def test_every_vector_is_looked_at():
    assert set(vectors.cases("diffora")) == {"search", "first_order", "discretize"}


def test_rows_are_blocks_and_columns_are_the_entries_in_their_order():
    adapted = lowdim.adapt(blocks(2, lacking=((0, "v"),)), DiffoRA(rank=1, target_modules=["v", "q"]))
    assert isinstance(adapted, DiffoRAAdapted)
    assert adapted.grid == [[None, "blocks.0.q"], ["blocks.1.v", "blocks.1.q"]]
    assert adapted.dam.tolist() == [[-math.inf, 0.0], [0.0, 0.0]]
    assert adapted.gates().tolist() == [[0.0, 0.5], [0.5, 0.5]]
    sizes = [tuple(p.shape) for p in adapted.weight_parameters()]
    assert sizes == [(1, 5), (5, 1)] * 3


def test_modules_outside_all_blocks_are_the_first_row():
    model = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(2, 2)})]), "q": nn.Linear(2, 2)})
    assert lowdim.adapt(model, DiffoRA(rank=1, target_modules=["q"])).grid == [["q"], ["layer.0.q"]]


def bert_like():
    def block():
        inner = nn.ModuleDict({"query": nn.Linear(2, 2), "dense": nn.Linear(2, 2)})
        return nn.ModuleDict({"attention": inner, "dense": nn.Linear(2, 2)})

    return nn.ModuleDict({"layer": nn.ModuleList([block(), block()])})


INSIDE = ("attention.query", "attention.dense", "dense")
NAMES = [f"layer.{i}.{column}" for i in range(2) for column in INSIDE]


@pytest.mark.parametrize("targets", ["all-linear", r"layer\.\d+\..*", NAMES], ids=["all", "expression", "names"])
def test_columns_are_paths_inside_a_block_where_no_entry_names_them(targets):
    adapted = lowdim.adapt(bert_like(), DiffoRA(rank=1, target_modules=targets))
    assert adapted.grid == [NAMES[:3], NAMES[3:]]


def test_the_longer_entry_takes_a_module_that_two_name():
    grid = lowdim.adapt(bert_like(), DiffoRA(rank=1, target_modules=["dense", "attention.dense"])).grid
    assert grid == [[f"layer.{i}.dense", f"layer.{i}.attention.dense"] for i in range(2)]


def test_an_entry_that_names_several_modules_of_a_block_is_several_columns():
    adapted = lowdim.adapt(bert_like(), DiffoRA(rank=1, target_modules=["dense", "query"]))
    assert adapted.grid == [[f"layer.{i}.{c}" for c in ("attention.dense", "dense", "attention.query")] for i in range(2)]
