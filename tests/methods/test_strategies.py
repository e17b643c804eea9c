"""Every method of the catalogue makes a small Llama and a small BERT ready, and trains them."""

import copy
import dataclasses
import inspect

import pytest
import torch

import tiny
from lowdim import models
from lowdim.catalogue import BASELINES, variant
from lowdim.errors import NoMatchingModuleError, UnknownNameError
from lowdim.methods import STRATEGIES, Companion, Setup, apply, strategy_for, with_options
from methods import ADAPTERS, METHODS, TABLE, row, small


def subject(kind: str):
    """A model, its head and a batch."""
    torch.manual_seed(0)
    ids = torch.randint(3, 29, (6, 10))
    if kind == "llama":
        return tiny.llama(), (), {"input_ids": ids, "labels": ids}
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=29, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.mean_pooled = kind == "pooled"
    return models.build(config, "classify"), ("classifier",), {"input_ids": ids, "labels": torch.tensor([0, 1] * 3)}


def loss_of(model, batch):
    return model(**batch).loss


def train(applied, batch, lr, steps):
    optimizer = applied.start(lr)
    losses = []
    for _ in range(steps):
        loss = applied.loss(batch, loss_of).total
        loss.backward()
        optimizer.step()
        applied.after_step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, loss_of(applied.model, batch).item()]


def ready(chosen, kind, **keywords):
    model, head, batch = subject(kind)
    keywords = {"lr": chosen.rates[0], "steps": 10, "batches": [batch], "loss_fn": loss_of, "head": head, **keywords}
    return apply(chosen, model.train(), **keywords), batch


@pytest.mark.parametrize("kind", ["llama", "bert", "pooled"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name, kind):
    if name == "linear-probe" and kind == "llama":
        with pytest.raises(ValueError, match="linear-probe needs a head"):
            ready(variant(name), kind)
        return
    chosen = small(name)
    applied, batch = ready(chosen, kind)
    assert applied.kind == chosen.kind
    assert (applied.adapted is not None) == (applied.kind == "adapter")
    trained = [p for p in applied.model.parameters() if p.requires_grad or getattr(p, "trainable", False)]  # INT8 has no grad
    assert applied.trained() == sum(p.numel() for p in trained) > 0
    before = {name: p.detach().clone() for name, p in applied.model.named_parameters()}
    grads = {name for name, p in applied.model.named_parameters() if p.requires_grad or getattr(p, "trainable", False)}
    losses = train(applied, batch, chosen.rates[0], 4)
    assert losses[-1] < losses[0], "four steps on one batch"
    trained = dict(applied.model.named_parameters())
    if applied.companion is not None:
        applied.companion.finish()  # parameters that only trained along are gone again
    after = dict(applied.model.named_parameters())
    assert all(bool(torch.isfinite(p).all()) for p in after.values())
    moved = {name for name, p in before.items() if not torch.equal(p, {**after, **trained}[name])}
    assert moved <= grads
    assert moved
    assert before.keys() - after.keys() <= (grads if name == "pst" else set())  # what it trained is in plain weights at the end
    assert after.keys() <= before.keys() or name == "increlora"  # which adds ranks


@pytest.mark.parametrize("name", METHODS)
def test_the_start_is_the_model_itself(name):
    """Nothing but structured layers that approximate, and a search, changes what the model says before it is trained."""
    model, head, batch = subject("pooled")
    with torch.no_grad():
        want = model.eval()(**batch).logits
    applied = apply(small(name), model, lr=1e-3, steps=10, head=head, batches=[batch], loss_fn=loss_of)
    with torch.no_grad():
        got = applied.model.eval()(**batch).logits
    if row(name).start is None:
        assert not torch.allclose(got, want, atol=1e-5)
    else:
        assert torch.allclose(got, want, atol=row(name).start), (got - want).abs().max()


@pytest.mark.parametrize("name", [name for name in METHODS if row(name).shapes])
def test_a_forecast_allocates_what_is_trained(name):
    chosen = small(name)
    real, _ = ready(chosen, "pooled")
    model, head, _ = subject("pooled")
    forecast = apply(chosen, model, lr=1e-3, steps=10, head=head, initialise=False)
    shapes = [sorted((n, tuple(p.shape)) for n, p in a.model.named_parameters() if p.requires_grad) for a in (real, forecast)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_start(name):
    first, second = (ready(small(name), "pooled", seed=4)[0] for _ in range(2))
    state = second.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.model.state_dict().items())


def test_the_baselines_train_what_they_say():
    sizes = {}
    for chosen in BASELINES:
        applied, _ = ready(chosen, "pooled")
        sizes[chosen.name] = applied.trained()
        trained = {name for name, p in applied.model.named_parameters() if p.requires_grad}
        if chosen.name == "linear-probe":
            assert trained == {"classifier.weight", "classifier.bias"}
        if chosen.name == "lora":
            assert all(".update." in name or name.startswith("classifier.") for name in trained)
    assert sizes["full"] == sum(p.numel() for p in subject("pooled")[0].parameters())
    assert sizes["linear-probe"] < sizes["lora"] < sizes["full"]


def test_decay_is_off_unless_the_options_say_so():
    for name in METHODS:
        applied, _ = ready(small(name), "pooled")
        assert all(group["weight_decay"] == 0.0 for group in applied.make_optimizer(1e-3).param_groups), name
    applied, _ = ready(with_options(variant("galore"), {"rank": 4, "weight_decay": 0.1}), "pooled")
    assert all(group["weight_decay"] == 0.1 for group in applied.make_optimizer(1e-3).param_groups)


def test_rates_reach_the_optimizer():
    for name in METHODS:
        applied, _ = ready(small(name), "pooled")
        rates = [group["lr"] for group in applied.make_optimizer(0.125).param_groups]
        assert min(rates) <= 0.125 <= max(rates), name


def test_open_schedules_are_filled_in_and_given_ones_kept():
    def filled(chosen):
        return strategy_for(chosen).filled(Setup(lr=0.1, steps=70))

    assert filled(variant("lamda"))["total_steps"] == 70
    assert filled(with_options(variant("lamda"), {"total_steps": 5}))["total_steps"] == 5
    assert filled(dataclasses.replace(variant("lora-sb"), options={}))["lr"] == 0.1
    assert filled(with_options(variant("lora-sb"), {"lr": 0.5}))["lr"] == 0.5


def test_a_method_for_every_layer_leaves_a_head_of_several_layers_alone():
    model, _, batch = subject("bert")
    head = ("classifier", "bert.pooler")
    for name in ("lora", "svfit"):
        applied = apply(variant(name), copy.deepcopy(model), lr=1e-3, steps=2, head=head)
        assert not any("pooler" in layer for layer in applied.adapted.layers)
        trained = {n for n, p in applied.model.named_parameters() if p.requires_grad}
        assert {"bert.pooler.dense.weight", "classifier.weight"} <= trained
        assert train(applied, batch, 1e-3, 2)
    asked = with_options(variant("lora"), {"target_modules": ["query"]})
    assert len(apply(asked, copy.deepcopy(model), lr=1e-3, steps=2, head=head).adapted.layers) == 2
    wrong = with_options(variant("lora"), {"target_modules": ["query", "pooler.dense"]})
    with pytest.raises(ValueError, match=r"'bert\.pooler' holds the adapted layer bert\.pooler\.dense"):
        apply(wrong, model, lr=1e-3, steps=2, head=head)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("lora", {"rnak": 3}, UnknownNameError, "method lora has no option 'rnak'; nearest: rank"),
        ("full", {"rank": 3}, UnknownNameError, r"method full has no option 'rank' \(it has none\)"),
        ("linear-probe", {"rank": 3}, UnknownNameError, "linear-probe has no option 'rank'"),
        ("galore", {"lr": 3}, UnknownNameError, "method galore has no option 'lr'"),
        ("galore", {"params": 3}, UnknownNameError, "method galore has no option 'params'"),
        ("monarch", {"in_features": 3}, UnknownNameError, "method monarch has no option 'in_features'; nearest: "),
        ("lora", {3: 4}, UnknownNameError, "method lora has no option 3"),
        ("lora", {"rank": 0}, ValueError, "rank must be an int >= 1; got 0"),
        ("lora", {"alpha": "1e-3"}, ValueError, "alpha must be a finite number .*; got '1e-3'"),
        ("lamda", {"init": "spectrl"}, UnknownNameError, r"init must be one of .* \(nearest: spectral"),
        ("galore", {"rank": "many"}, ValueError, "rank must be an int >= 1; got 'many'"),
        ("galore", {"svd": "exat"}, ValueError, "svd must be .*exact"),
    ],
)
def test_options_are_checked_before_a_model_is_there(name, options, error, message):
    with pytest.raises(error, match=message):
        with_options(variant(name), options)


def test_options_are_added_and_the_catalogue_is_left_as_it_was():
    chosen = with_options(variant("lora"), {"rank": 2})
    assert dict(chosen.options) == {"rank": 2, "alpha": 16}
    assert dict(variant("lora").options) == {"rank": 8, "alpha": 16}
    assert with_options(variant("lora"), {}) is not None
    with pytest.raises(TypeError):
        chosen.options["rank"] = 3


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "lora",
            {"target_modules": ["model.norm"]},
            NoMatchingModuleError,
            r"'model.norm' matches",
        ),
        ("lora", {"target_modules": ["q_prj"]}, NoMatchingModuleError, r"'q_prj' matches no module.*q_proj"),
        ("lora", {"target_modules": []}, NoMatchingModuleError, "at least one module; got an empty list"),
        ("monarch", {"nblocks": 0}, ValueError, "nblocks must be an int >= 1; got 0"),
        ("monarch", {"target_modules": ["nothing"]}, NoMatchingModuleError, "'nothing' matches no module"),
    ],
)
def test_what_does_not_fit_the_model_names_the_layer(name, options, error, message):
    chosen = dataclasses.replace(variant(name), options={**variant(name).options, **options})
    model, _, batch = subject("llama")
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(error, match=message):
        apply(chosen, model, lr=1e-3, steps=2, batches=[batch], loss_fn=loss_of)
    assert [(n, type(m)) for n, m in model.named_modules()] == before


def test_an_optimizers_options_are_refused_before_the_training():
    chosen = dataclasses.replace(variant("galore"), options={"rank": 4, "update_interval": 0})
    with pytest.raises(ValueError, match="update_interval must be an int >= 1; got 0"):
        apply(chosen, subject("llama")[0], lr=1e-3, steps=2)


def test_the_table_names_methods_only():
    assert set(TABLE) <= set(METHODS)
    for name, entry in TABLE.items():
        if name not in ADAPTERS.values():
            unread = (entry.tiny, entry.large, entry.decomposes, entry.slow_by_formula)
            assert not any(unread), f"{name}: only the first method of an adapter's class is read"


def test_a_kind_fits_its_class():
    """A row whose kind does not fit would be trained in another way than its class is made for."""
    from lowdim.adapters import Method
    from lowdim.optim import ProjectedOptimizer

    fits = {
        "adapter": lambda cls: issubclass(cls, Method),
        "optimizer": lambda cls: issubclass(cls, ProjectedOptimizer),
        "layer": lambda cls: issubclass(cls, torch.nn.Module) and callable(cls.from_linear),
        "compress": lambda function: "config" in inspect.signature(function).parameters,
    }
    assert set(STRATEGIES) == {"probe", "full", *fits}
    for name in METHODS:
        chosen = variant(name)
        if chosen.kind in ("probe", "full"):
            assert not chosen.target, name
        else:
            assert fits[chosen.kind](chosen.build()), name
        assert type(strategy_for(chosen)) is STRATEGIES[chosen.kind]
    with pytest.raises(UnknownNameError, match=r"kind of method lora must be one of .*; got 'adaptor'"):
        strategy_for(dataclasses.replace(variant("lora"), kind="adaptor"))


def test_what_acts_between_the_steps_is_a_companion_with_a_state():
    for name in METHODS:
        if variant(name).kind == "probe":
            continue
        applied, _ = ready(small(name), "pooled")
        applied.start(1e-3)
        scheduled = variant(name).kind == "compress"  # its companion is the schedule of its layers
        assert (applied.companion is not None) == (bool(variant(name).companion) or scheduled)
        for each in applied.companions:
            assert isinstance(each, Companion), name
            own = [attribute for cls in type(each).__mro__ if cls is not Companion for attribute in vars(cls)]
            assert {"step", "state_dict", "load_state_dict"} <= set(own), name


def test_a_state_of_an_adapter_is_restored():
    for name in METHODS:
        if variant(name).kind != "adapter":
            continue
        applied, batch = ready(small(name), "pooled")
        train(applied, batch, 1e-3, 2)
        state = {key: value.detach().clone() for key, value in applied.adapted.state_dict().items()}
        want = loss_of(applied.model.eval(), batch)
        train(applied, batch, 1e-2, 2)
        assert not torch.allclose(loss_of(applied.model, batch), want, atol=1e-4), name
        applied.adapted.load_state_dict(state)
        # The pre-trained weight is known up to the rounding of a base that the update took a part of.
        torch.testing.assert_close(loss_of(applied.model, batch), want, atol=1e-6, rtol=0.0, msg=name)
