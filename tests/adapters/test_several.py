"""Several adapters on one model."""

import copy

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import SAID, AdapterSet, LaMDA, LoRA, LoRASB, RandLoRA, SVFit, to_peft
from lowdim.errors import UnknownNameError
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model

METHODS = {"lora": LoRA(rank=2), "lamda": LaMDA(rank=2), "rand": RandLoRA(rank=3), "svfit": SVFit(rank=3)}


def moved(adapted, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted.layers.values():
            for parameter in layer.update.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype))
    return adapted


def alone(method, seed, dtype=torch.float64):
    model = small_model(dtype=dtype)
    moved(lowdim.adapt(model, method), seed)
    return model


@pytest.fixture
def adapters():
    found = AdapterSet(small_model(dtype=torch.float64))
    for seed, (name, method) in enumerate(METHODS.items()):
        moved(found.add(name, method), seed)
    return found


X = sample_input(dtype=torch.float64)


def test_each_is_what_it_is_alone(adapters):
    for seed, (name, method) in enumerate(METHODS.items()):
        adapters.activate(name)
        assert adapters.active == {name: 1.0}
        assert relative_error(adapters.model(X), alone(method, seed)(X)) < 1e-11, name


def test_only_the_active_one_is_trained(adapters):
    adapters.activate("lamda")
    trained = {id(p) for p in adapters.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapters["lamda"].trainable().values()}
    adapters.activate("lamda", train=False)
    assert not any(p.requires_grad for p in adapters.model.parameters())
    adapters.activate(lora=0.5)
    assert not any(p.requires_grad for p in adapters.model.parameters())


def test_disabled_is_the_pretrained_model(adapters):
    adapters.activate("lamda", svfit=0.5)
    before = adapters.model(X)
    with adapters.disabled() as model:
        assert relative_error(model(X), small_model(dtype=torch.float64)(X)) < 1e-12
    assert torch.equal(adapters.model(X), before)
    with pytest.raises(KeyError, match="mine"), adapters.disabled():
        raise KeyError("mine")
    assert torch.equal(adapters.model(X), before)


def test_a_weighted_sum_of_changes(adapters):
    adapters.activate("lora", lamda=0.5, rand=-1.0)
    deltas = {n: {p: layer.update.delta() for p, layer in adapters[n].layers.items()} for n in METHODS}
    model = small_model(dtype=torch.float64)
    with torch.no_grad():
        for place in deltas["lora"]:
            weight = model.get_submodule(place).weight
            weight += deltas["lora"][place] + 0.5 * deltas["lamda"][place] - deltas["rand"][place]
    assert relative_error(adapters.model(X), model(X)) < 1e-11


@pytest.mark.parametrize("gone", list(METHODS))
def test_deleting_leaves_the_others(adapters, gone):
    adapters.delete(gone)
    assert gone not in adapters
    for seed, (name, method) in enumerate(METHODS.items()):
        if name != gone:
            adapters.activate(name)
            assert relative_error(adapters.model(X), alone(method, seed)(X)) < 1e-11
    for name in adapters.names:
        adapters.delete(name)
    assert type(adapters.model.body["first"]) is nn.Linear
    assert relative_error(adapters.model(X), small_model(dtype=torch.float64)(X)) < 1e-12


def test_rows_of_one_batch_take_different_adapters(adapters):
    choice = ["lora", None, "lamda", "lora", "svfit"]
    with adapters.rows(choice) as model:
        got = model(X)
        with pytest.raises(IndexError):
            model(X[:2])
    assert adapters.active == {"svfit": 1.0}
    for i, name in enumerate(choice):
        model = small_model(dtype=torch.float64) if name is None else alone(METHODS[name], list(METHODS).index(name))
        assert relative_error(got[i], model(X)[i]) < 1e-11, name


def test_training_one_leaves_the_others_bits(adapters):
    adapters.activate("lora")
    others = {n: copy.deepcopy(adapters[n].state_dict()) for n in METHODS if n != "lora"}
    optimizer = torch.optim.AdamW(adapters["lora"].param_groups(1e-2))
    adapters.model(X).square().sum().backward()
    optimizer.step()
    adapters["lora"].step()
    for name, state in others.items():
        assert all(torch.equal(value, state[key]) for key, value in adapters[name].state_dict().items())


def test_a_low_rank_combination_is_exact(adapters):
    want = adapters.active
    adapters.activate(lora=0.7, lamda=0.3)
    want = adapters.model(X)
    made = adapters.combine("mix", {"lora": 0.7, "lamda": 0.3})
    assert made.exact
    assert set(made.ranks.values()) == {4}
    assert adapters.active == {"mix": 1.0}
    assert relative_error(adapters.model(X), want) < 1e-11


def test_a_truncated_combination_states_its_error(adapters):
    made = adapters.combine("cut", {"lora": 1.0, "lamda": 1.0}, rank=2)
    dense = adapters.combine("dense", {"rand": 1.0, "lora": 0.5}, rank=3)
    for made_as, parts, rank in ((made, {"lora": 1.0, "lamda": 1.0}, 2), (dense, {"rand": 1.0, "lora": 0.5}, 3)):
        name = "cut" if rank == 2 else "dense"
        for place in made_as.errors:
            total = sum(w * adapters[n].layers[place].update.delta() for n, w in parts.items())
            got = adapters[name].layers[place].update.delta()
            assert torch.linalg.matrix_rank(got) == rank == made_as.ranks[place]
            error = float((total - got).norm() / total.norm())
            assert error == pytest.approx(made_as.errors[place], rel=1e-6)
            best = float(torch.linalg.svdvals(total)[rank:].norm() / total.norm())
            assert error == pytest.approx(best, rel=1e-4)
    assert not made.exact


def test_swapping_keeps_parameters_and_optimizer(adapters, tmp_path):
    other = small_model(dtype=torch.float64)
    moved(lowdim.adapt(other, LaMDA(rank=2)), 9).save(tmp_path)
    adapters.activate("lamda")
    parameters = list(adapters["lamda"].trainable().values())
    adapters.swap("lamda", tmp_path)
    assert all(a is b for a, b in zip(parameters, adapters["lamda"].trainable().values(), strict=True))
    assert relative_error(adapters.model(X), other(X)) < 1e-11
    before = copy.deepcopy(adapters["lora"].state_dict())
    with pytest.raises(ValueError, match=r"'lora' is LoRA.*LaMDA"):
        adapters.swap("lora", tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in adapters["lora"].state_dict().items())
    moved(lowdim.adapt(small_model(dtype=torch.float64), LoRA(rank=3)), 9).save(tmp_path / "three")
    with pytest.raises(ValueError, match="cannot load the tensors"):
        adapters.swap("lora", tmp_path / "three")


def test_saved_and_loaded_together_with_others(adapters, tmp_path):
    for name in METHODS:
        adapters[name].save(tmp_path / name)
    again = AdapterSet(small_model(dtype=torch.float64))
    for name in reversed(METHODS):
        again.add(name, tmp_path / name)
    for name in METHODS:
        adapters.activate(name)
        again.activate(name)
        assert relative_error(again.model(X), adapters.model(X)) < 1e-11


def test_merging_the_active_ones_and_back(adapters):
    adapters.activate("svfit", lora=0.5)
    want, state = adapters.model(X), copy.deepcopy(adapters.model.state_dict())
    report = adapters.merge()
    assert {change.layer for change in report.layers} == {"body.first", "body.second"}
    assert type(adapters.model.body["first"]) is nn.Linear
    assert relative_error(adapters.model(X), want) < 1e-11
    with pytest.raises(ValueError, match="merged"):
        adapters.activate("lora")
    with pytest.raises(ValueError, match="merged"):
        adapters.merge()
    adapters.unmerge()
    assert torch.equal(adapters.model(X), want)
    assert all(torch.equal(value, state[key]) for key, value in adapters.model.state_dict().items())
    with pytest.raises(ValueError, match="nothing"):
        adapters.unmerge()


def test_one_of_several_cannot_be_merged_alone(adapters):
    for name in ("lora", "svfit"):
        with pytest.raises(ValueError, match=r"body\.first has several adapters"):
            adapters[name].merge()


def test_adapting_other_layers_trains_both():
    model = small_model(dtype=torch.float64)
    one = lowdim.adapt(model, LoRA(rank=2, target_modules=["first"]), modules_to_save=["score"])
    two = lowdim.adapt(model, SVFit(rank=2, target_modules=["second"]))
    assert all(p.requires_grad for p in [*one.trainable().values(), *two.trainable().values()])
    assert not set(map(id, one.trainable_here().values())) & set(map(id, two.trainable_here().values()))
    with pytest.raises(ValueError, match="adapted or saved whole"):
        lowdim.adapt(model, LoRA(rank=2), modules_to_save=["body"])
    moved(one, 0)
    moved(two, 1)
    want = model(X)
    one.merge()
    two.merge()
    assert relative_error(model(X), want) < 1e-11
    assert type(model.body["second"]) is nn.Linear


def test_statistics_come_from_the_model_as_it_is():
    model = small_model()
    moved(lowdim.adapt(model, LoRA(rank=2)), 0)
    batches = [sample_input(8)]
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    adapted = lowdim.adapt(model, LoRASB(rank=2), batches=batches, loss_fn=loss)
    assert all(norm > 0 for norm in adapted.check().values())


def test_bad_input(adapters):
    with pytest.raises(UnknownNameError, match="lroa"):
        adapters.activate("lroa")
    with pytest.raises(UnknownNameError, match="nobody"), adapters.rows(["nobody"]):
        pass
    with pytest.raises(ValueError, match="already"):
        adapters.add("lora", LoRA(rank=1))
    with pytest.raises(ValueError, match="non-empty"):
        adapters.add("", LoRA(rank=1))
    with pytest.raises(ValueError, match="strength"):
        adapters.activate(lora=float("nan"))
    with pytest.raises(ValueError, match="at least one"):
        adapters.combine("new", {})
    with pytest.raises(ValueError, match="rank"):
        adapters.combine("new", {"lora": 1.0}, rank=0)
    with pytest.raises(ValueError, match="already adapted"):
        AdapterSet(adapters.model)


def test_a_set_over_adapters_that_are_there():
    model = small_model(dtype=torch.float64)
    one = moved(lowdim.adapt(model, LoRA(rank=2)), 0)
    two = moved(lowdim.adapt(model, SVFit(rank=3)), 3)
    found = AdapterSet.of(lora=one, svfit=two)
    assert found.active == {"svfit": 1.0}
    assert relative_error(model(X), alone(METHODS["svfit"], 3)(X)) < 1e-11
    found.activate("lora")
    assert relative_error(model(X), alone(METHODS["lora"], 0)(X)) < 1e-11
    with pytest.raises(ValueError, match="other adapters as well"):
        AdapterSet.of(lora=one)
    with pytest.raises(ValueError, match="one model"):
        AdapterSet.of(lora=one, other=lowdim.adapt(small_model(), LoRA(rank=1)))


def test_methods_on_the_whole_model_do_not_share_it(tmp_path):
    whole = lowdim.adapt(small_model(), SAID(dimension=40))
    with pytest.raises(ValueError, match="whole model"):
        lowdim.adapt(whole.model, LoRA(rank=1))
    with pytest.raises(ValueError, match=r"SAID changes .* merge"):
        to_peft(whole, tmp_path / "peft")
    whole.save(tmp_path / "said")
    for source in (SAID(dimension=40), tmp_path / "said"):
        found = AdapterSet(small_model())
        with pytest.raises(ValueError, match="SAID acts on the model as a whole"):
            found.add("said", source)
