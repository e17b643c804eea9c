import copy
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

import lowdim
import vectors
from lowdim.adapters import DiffoRA, DiffoRAAdapted, LoRA
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
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


class Blocks(nn.Module):
    """`h <- tanh(q(h)) + v(h)` for each block; a block may lack its v."""

    def __init__(self, weights, dtype=torch.float64):
        super().__init__()
        self.blocks = nn.ModuleList()
        for row in weights:
            block = nn.ModuleDict()
            for name, weight in row.items():
                block[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
                block[name].weight.data.copy_(weight)
            self.blocks.append(block)

    def forward(self, h):
        for block in self.blocks:
            h = torch.tanh(block["q"](h)) + (block["v"](h) if "v" in block else h)
        return h


def loss_fn(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def blocks(rows=3, lacking=(), dim=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: 0.4 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)  # noqa: E731
    return Blocks([{name: draw() for name in "qv" if (i, name) not in lacking} for i in range(rows)], dtype)


def batch(seed, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(8, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def moved(adapted, seed=0):
    """Away from B = 0 and from equal logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.weight_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        noise = torch.randn(adapted.dam.shape, generator=generator, dtype=torch.float64)
        adapted.dam.add_(noise)
    return adapted


def searched(method, lacking=(), rows=3, dtype=torch.float64):
    return moved(lowdim.adapt(blocks(rows, lacking, dtype=dtype), method))


Q_V = {"rank": 2, "alpha": 4, "target_modules": ["q", "v"]}


# The vectors


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


# The search


@pytest.mark.parametrize("lacking", [(), ((1, "v"),)], ids=["full", "absent"])
def test_the_unrolled_gradient_is_the_total_derivative(lacking):
    adapted = searched(DiffoRA(**Q_V, unrolled=True), lacking)
    train, valid, xi, eps = batch(1), batch(2), 0.2, 1e-5
    got = adapted.dam_gradient(loss_fn, train, valid, xi)

    def after_one_step():
        copied = copy.deepcopy(adapted)
        weights = copied.weight_parameters()
        gradients = torch.autograd.grad(loss_fn(copied.model, train), weights)
        with torch.no_grad():
            for p, g in zip(weights, gradients, strict=True):
                p -= xi * g
            return float(loss_fn(copied.model, valid))

    for i, row in enumerate(adapted.grid):
        for j, name in enumerate(row):
            if name is None:
                assert got[i, j] == 0
                continue
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    adapted.dam[i, j] += sign * eps
                values.append(after_one_step())
                with torch.no_grad():
                    adapted.dam[i, j] -= sign * eps
            assert abs((values[0] - values[1]) / (2 * eps) - float(got[i, j])) < 1e-7


def test_the_gradient_of_dam_is_zero_first_and_not_when_unrolled():
    for unrolled in (False, True):
        adapted = lowdim.adapt(blocks(), DiffoRA(**Q_V, unrolled=unrolled))
        assert bool(adapted.dam_gradient(loss_fn, batch(1), batch(2), 0.1).any()) == unrolled


def test_the_virtual_step_has_the_mask_of_the_training_loss_and_leaves_no_trace():
    adapted = searched(DiffoRA(**Q_V, unrolled=True, dropout=0.5))
    optimizer = torch.optim.AdamW(adapted.weight_parameters(), lr=0.1)
    before = copy.deepcopy(adapted.model.state_dict())
    torch.manual_seed(0)
    one = adapted.dam_gradient(loss_fn, batch(1), batch(2), 0.1)
    torch.manual_seed(0)
    assert torch.equal(adapted.dam_gradient(loss_fn, batch(1), batch(2), 0.1), one)
    assert not optimizer.state
    assert all(torch.equal(value, before[key]) for key, value in adapted.model.state_dict().items())


def test_the_virtual_step_takes_the_rate_of_the_moment():
    results = []
    for lr in (0.1, 0.3):
        adapted = searched(DiffoRA(**Q_V, unrolled=True))
        weight_optimizer = torch.optim.SGD(adapted.weight_parameters(), lr=0.1)
        weight_optimizer.param_groups[0]["lr"] = lr  # what a schedule does
        want = adapted.dam_gradient(loss_fn, batch(1), batch(2), lr)
        before = adapted.dam.detach().clone()
        adapted.search_step(loss_fn, batch(1), batch(2), torch.optim.SGD([adapted.dam], lr=1.0), weight_optimizer)
        assert relative_error(before - adapted.dam, want) < 1e-12
        results.append(want)
    assert not torch.allclose(*results)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_absent_cells_never_move(optimizer, decay):
    adapted = searched(DiffoRA(**Q_V), lacking=((1, "v"),))
    dam_optimizer = optimizer([adapted.dam], lr=0.1, weight_decay=decay)
    weight_optimizer = torch.optim.AdamW(adapted.weight_parameters(), lr=0.05)
    before = adapted.dam.detach().clone()
    losses = [adapted.search_step(loss_fn, batch(1), batch(2), dam_optimizer, weight_optimizer) for _ in range(5)]
    absent = torch.tensor([[name is None for name in row] for row in adapted.grid])
    assert absent.tolist() == [[False, False], [False, True], [False, False]]
    assert bool((adapted.dam[absent] == -math.inf).all())
    assert bool((adapted.dam[~absent] != before[~absent]).all())
    assert bool(adapted.dam[~absent].isfinite().all())
    assert adapted.gates()[absent] == 0
    assert losses[-1][0] < losses[0][0]
    assert not adapted.discretize()[absent]


def test_the_logits_are_moved_by_their_optimizer_alone():
    adapted = searched(DiffoRA(**Q_V))
    everything = torch.optim.SGD(adapted.param_groups(0.1))  # holds dam, too
    still = torch.optim.SGD([adapted.dam], lr=0.0)
    before = adapted.dam.detach().clone()
    adapted.search_step(loss_fn, batch(1), batch(2), still, everything)
    assert torch.equal(adapted.dam, before)


def test_a_new_head_is_trained_in_the_search(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, DiffoRA(rank=2, target_modules=["first", "second"]), modules_to_save=["score"])
    before = model.score.weight.detach().clone()
    x, y = torch.randn(8, 8), torch.randn(8, 3)
    adapted.before_training([(x, y)], loss_fn, lr=0.01, steps=5)
    assert not torch.equal(model.score.weight, before)


def test_attention_has_a_second_derivative():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    assert model.config._attn_implementation == "sdpa"
    adapted = lowdim.adapt(model, DiffoRA(rank=2, unrolled=True, target_modules=["q_proj", "v_proj", "down_proj"]))
    ids = torch.arange(12).view(2, 6)
    language = lambda model, batch: model(input_ids=batch, labels=batch).loss  # noqa: E731
    gradient = adapted.dam_gradient(language, ids, ids.flip(0), 0.1)
    assert gradient.shape == (2, 3)
    assert bool(gradient.isfinite().all() and gradient.any())


# The grid


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


# The choice


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


# Files


def train(adapted, steps, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(adapted.param_groups(0.05), weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = loss_fn(adapted.model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adapted.step(optimizer)
        losses.append(float(loss.detach()))
    return losses


def pairing(adapted):
    """For each layer the first one that has the same A."""
    As = [layer.update.A for layer in adapted.layers.values()]
    return [None if A is None else next(i for i, other in enumerate(As) if other is A) for A in As]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("chosen", [False, True])
def test_files_before_and_after_the_choice(tmp_path, share, chosen):
    lacking = ((1, "v"),)
    adapted = searched(DiffoRA(**Q_V, share=share), lacking)
    if chosen:
        adapted.discretize()
    adapted.save(tmp_path)
    tensors = set(read_tensors(tmp_path / "adapter.safetensors")[0])
    assert ("lowdim_shared.dam" in tensors) == (not chosen)
    assert sum(".update." in name for name in tensors) == len(adapted.weight_parameters())
    loaded = lowdim.load_adapter(blocks(3, lacking), tmp_path)
    x, _ = batch(9)
    assert torch.equal(loaded.model(x), adapted.model(x))
    assert torch.equal(loaded.gates(), adapted.gates())
    assert loaded.grid == adapted.grid
    if chosen:
        assert pairing(loaded) == pairing(adapted)
        with pytest.raises(RuntimeError, match="search has ended"):
            loaded.discretize()
        assert train(loaded, 3) == train(adapted, 3)
        loaded.save(tmp_path / "again")
        assert set(read_tensors(tmp_path / "again/adapter.safetensors")[0]) == tensors
    else:
        for a in (adapted, loaded):
            optimizers = torch.optim.Adam([a.dam], lr=0.1), torch.optim.AdamW(a.weight_parameters(), lr=0.05)
            for step in range(3):
                a.search_step(loss_fn, batch(step), batch(10 + step), *optimizers)
        assert torch.equal(loaded.dam, adapted.dam)
        assert torch.equal(loaded.discretize(), adapted.discretize())
    assert torch.equal(loaded.model(x), adapted.model(x))


@pytest.mark.parametrize("share", [True, False])
def test_a_trainers_checkpoint_restores_the_choice_exactly(share):
    adapted = searched(DiffoRA(**Q_V, share=share))
    adapted.discretize()
    optimizer = torch.optim.AdamW(adapted.param_groups(0.05), weight_decay=0.0)
    train(adapted, 3, optimizer)
    state, moments = copy.deepcopy(adapted.model.state_dict()), copy.deepcopy(optimizer.state_dict())
    pointers = [value.data_ptr() for key, value in state.items() if ".update." in key]
    assert len(set(pointers)) == len(pointers)  # no name twice: savers refuse tensors that share their memory
    others = {
        "searching": lowdim.adapt(blocks(), DiffoRA(**Q_V, share=share)),
        "chosen otherwise": moved(lowdim.adapt(blocks(), DiffoRA(**Q_V, share=share)), seed=3),
    }
    others["chosen otherwise"].discretize()
    want = train(adapted, 3, optimizer)
    for fresh in others.values():
        fresh.model.load_state_dict(copy.deepcopy(state))
        assert fresh.dam is None
        resumed = torch.optim.AdamW(fresh.param_groups(0.05), weight_decay=0.0)
        resumed.load_state_dict(copy.deepcopy(moments))
        assert train(fresh, 3, resumed) == want
        assert all(torch.equal(a, b) for a, b in zip(fresh.weight_parameters(), adapted.weight_parameters(), strict=True))


def test_a_checkpoint_of_the_search_can_be_loaded_into_a_model_that_has_chosen():
    adapted, other = searched(DiffoRA(**Q_V)), searched(DiffoRA(**Q_V))
    state = copy.deepcopy(adapted.model.state_dict())
    other.discretize()
    other.model.load_state_dict(state)
    assert torch.equal(other.dam, adapted.dam)
    x, _ = batch(4)
    assert torch.equal(other.model(x), adapted.model(x))
    assert len(other.trainable()) == len(adapted.trainable()) == 13


def test_a_state_dict_that_lacks_parameters_is_refused():
    adapted = searched(DiffoRA(**Q_V))
    searching = adapted.model.state_dict()
    searching = {key: value for key, value in searching.items() if "blocks.0.q.update" not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.q\.update\.A"):
        lowdim.adapt(blocks(), DiffoRA(**Q_V)).model.load_state_dict(searching)
    adapted.discretize()
    owner = next(name for name, layer in adapted.layers.items() if layer.update.own)
    chosen = {key: value for key, value in adapted.model.state_dict().items() if f"{owner}.update" not in key}
    with pytest.raises(RuntimeError, match="Missing key"):
        lowdim.adapt(blocks(), DiffoRA(**Q_V)).model.load_state_dict(chosen)


def test_a_file_of_another_grid_is_refused(tmp_path):
    adapted = searched(DiffoRA(**Q_V))
    adapted.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.q"):
        lowdim.load_adapter(blocks(2), tmp_path)


def test_peft_gets_copies_of_a_shared_pair(tmp_path):
    peft = pytest.importorskip("peft")
    for share in (True, False):
        adapted = searched(DiffoRA(**Q_V, share=share), dtype=torch.float32)
        adapted.discretize()
        assert adapted.export(tmp_path).exact
        tensors, _ = read_tensors(tmp_path / "adapter_model.safetensors")
        assert len(tensors) == 12
        x, _ = batch(5, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(blocks(dtype=torch.float32), tmp_path)
        assert relative_error(loaded(x), adapted.model(x)) < 1e-5


def test_a_deep_copy_shares_among_its_own_layers():
    adapted = searched(DiffoRA(**Q_V))
    adapted.discretize()
    twin = copy.deepcopy(adapted)
    x, _ = batch(4)
    before = adapted.model(x)
    train(twin, 1)
    assert torch.equal(adapted.model(x), before)
    shapes = [len({id(layer.update.A) for layer in a.layers.values()}) for a in (adapted, twin)]
    assert shapes[0] == shapes[1] < 6


def test_two_of_them_on_one_model():
    adapters = lowdim.adapters.AdapterSet(blocks())
    one, two = (adapters.add(name, DiffoRA(**Q_V)) for name in ("one", "two"))
    moved(one)
    one.discretize()
    assert two.dam is not None
    x, _ = batch(1)
    adapters.activate("one", two=0.5)
    assert bool(adapters.model(x).isfinite().all())
    state = copy.deepcopy(adapters.model.state_dict())
    fresh = lowdim.adapters.AdapterSet(blocks())
    fresh.add("one", DiffoRA(**Q_V))
    fresh.add("two", DiffoRA(**Q_V))
    fresh.model.load_state_dict(state)
    fresh.activate("one", two=0.5)
    assert torch.equal(fresh.model(x), adapters.model(x))


# Before a plain training loop


@pytest.mark.parametrize("count", [1, 2, 5])
def test_before_training_searches_and_chooses(count):
    adapted = lowdim.adapt(blocks(), DiffoRA(**Q_V))
    adapted.model.eval()
    adapted.model.blocks[1].train()
    seen = []

    def counting(model, batch):
        seen.append((batch[0].data_ptr(), model.training, model.blocks[0].training))
        return loss_fn(model, batch)

    batches = [batch(i) for i in range(count)]
    before = [p.detach().clone() for p in adapted.weight_parameters()]
    assert adapted.before_training(batches, counting, 0.05, 40) == 8, "a fifth of the steps"
    assert adapted.dam is None
    assert len(seen) == 2 * 8  # a fifth of the steps, a validation and a training batch each
    assert all(training and inner for _, training, inner in seen)
    valid, train = ({pointer for pointer, _, _ in seen[k::2]} for k in (0, 1))
    assert valid | train == {b[0].data_ptr() for b in batches}
    assert bool(valid & train) == (count == 1)
    assert len(valid) == max(1, count // 2)
    assert not any(torch.equal(a, b) for a, b in zip(before, adapted.weight_parameters()))
    assert not adapted.model.training
    assert adapted.model.blocks[1].training
    assert not adapted.model.blocks[0].training
    seen.clear()
    assert adapted.before_training(batches, counting, 0.05, 40) == 0, "a second time there is nothing to do"
    assert not seen


def test_before_training_needs_something_to_search_on():
    adapted = lowdim.adapt(blocks(), DiffoRA(**Q_V))
    for batches, loss in [([], loss_fn), ([batch(0)], None)]:
        with pytest.raises(ValueError, match="needs sample batches and loss_fn"):
            adapted.before_training(batches, loss, 0.05, 10)
    assert adapted.dam is not None


def test_the_search_finds_the_modules_that_matter():
    class Deaf(nn.Module):
        """Of each block only one module is heard."""

        heard = "qvv"

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8) for name in "qv"}) for _ in self.heard)

        def forward(self, h):
            for block, heard in zip(self.blocks, self.heard):
                h = h + sum((name == heard) * torch.tanh(layer(h)) for name, layer in block.items())
            return h

    torch.manual_seed(0)
    model, teacher, x = Deaf(), Deaf(), torch.randn(512, 8)
    y = teacher(x).detach()
    adapted = lowdim.adapt(model, DiffoRA(rank=2, alpha=4, target_modules=["q", "v"]))
    batches = [(x[k : k + 64], y[k : k + 64]) for k in range(0, 512, 64)]
    adapted.before_training(batches, loss_fn, lr=0.005, steps=200)
    assert ["qv"[j] for _, j in adapted.gates().nonzero().tolist()] == list(Deaf.heard)


# Low precision, compilation, bad input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_search_in_low_precision(dtype):
    adapted = lowdim.adapt(blocks(dtype=dtype), DiffoRA(**Q_V), dtype=torch.float32)
    assert adapted.dam.dtype == torch.float32
    optimizers = torch.optim.Adam([adapted.dam], lr=0.05), torch.optim.AdamW(adapted.weight_parameters(), lr=0.05)
    data = batch(1, dtype=dtype), batch(2, dtype=dtype)
    losses = [adapted.search_step(loss_fn, *data, *optimizers)[0] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    adapted.discretize()
    x = data[0][0]
    want = adapted.model(x)
    assert relative_error(adapted.merge()(x), want) < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.slow
def test_the_gates_compile():
    adapted = searched(DiffoRA(**Q_V), dtype=torch.float32)
    x, y = batch(1, dtype=torch.float32)
    compiled = torch.compile(adapted.model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        wanted = [adapted.dam, *adapted.weight_parameters()] if adapted.dam is not None else adapted.weight_parameters()
        got, want = (torch.autograd.grad(loss_fn(run, (x, y)), wanted) for run in (compiled, adapted.model))
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
        if adapted.dam is not None:
            adapted.discretize()


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


def test_bad_input():
    for bad in (0.0, -0.5, 1.5, float("nan"), None):
        with pytest.raises(ValueError, match="select_ratio"):
            DiffoRA(select_ratio=bad)
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="rank"):
            DiffoRA(rank=bad)
    for missing in (None, [], ""):
        model = blocks()
        with pytest.raises(ValueError, match="target_modules"):
            lowdim.adapt(model, DiffoRA(rank=1, target_modules=missing))
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="'query' matches no module"):
        lowdim.adapt(blocks(), DiffoRA(rank=1, target_modules=["q", "query"]))
    with pytest.raises(TypeError, match="Embedding"):
        DiffoRA(rank=1).attach(nn.Embedding(3, 4))

    adapted = searched(DiffoRA(**Q_V))
    dam_optimizer, weight_optimizer = torch.optim.SGD([adapted.dam], 0.1), torch.optim.SGD(adapted.weight_parameters(), 0.1)
    for which, batches in [("training", (1, 0)), ("validation", (0, 1))]:
        spoiled = [(batch(0), tuple(t * float("nan") for t in batch(0)))[k] for k in batches]
        with pytest.raises(ValueError, match=f"{which} loss must be finite; got nan"):
            adapted.search_step(loss_fn, *spoiled, dam_optimizer, weight_optimizer)
    with pytest.raises(ValueError, match=r"must hold adapted\.dam"):
        adapted.search_step(loss_fn, batch(0), batch(1), weight_optimizer, weight_optimizer)
    with pytest.raises(ValueError, match="weight_parameters"):
        adapted.search_step(loss_fn, batch(0), batch(1), dam_optimizer, dam_optimizer)
    with torch.no_grad():
        adapted.dam[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        adapted.discretize()
    with torch.no_grad():
        adapted.dam[0, 0] = 0.0
    adapted.discretize()
    for again in (
        adapted.discretize,
        lambda: adapted.dam_gradient(loss_fn, batch(0), batch(1), 0.1),
        lambda: adapted.search_step(loss_fn, batch(0), batch(1), dam_optimizer, weight_optimizer),
    ):
        with pytest.raises(RuntimeError, match="search has ended"):
            again()
