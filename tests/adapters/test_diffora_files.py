"""DiffoRA in files and copies: before and after the choice, in a trainer's checkpoint, for peft, and two on one model."""

import copy

import pytest
import torch
from diffora_blocks import Q_V, batch, blocks, loss_fn, moved, searched

import lowdim
from lowdim.adapters import DiffoRA
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.testing.closeness import relative_error


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
