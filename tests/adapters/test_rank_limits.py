"""A rank above a layer's smaller side: taken, capped where that is asked for, or refused with the remedy, by every method."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import CorDA, FLoRA, LaMDA, LoRA, RandLoRA, SVFit, load_adapter, registered_methods
from lowdim.calibrate import has_statistics
from lowdim.surgery import matrix_shape

HIGH = 24  # above a side of every odd layer
ODD = {
    "one output": lambda: nn.Linear(6, 1),
    "one input": lambda: nn.Linear(1, 5, bias=False),
    "tall": lambda: nn.Linear(40, 3),
    "conv_1x1": lambda: nn.Conv2d(3, 8, 1),
    "stem": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "tiny vocabulary": lambda: nn.Embedding(5, 8),
}
#: What a method needs besides a rank to be tried here.
OTHER = {
    "BlockLoRA": {"blocks": 2},
    "IncreLoRA": {"init_warmup": 0, "update_interval": 1},
    "NOLA": {"num_bases": 4},
    "LoRASB": {"lr": 0.1},
}
pytestmark = pytest.mark.filterwarnings("ignore:layer 0 with 40 inputs saw")

RANKED = sorted(
    name
    for name, cls in registered_methods().items()
    if cls.at_rank({}, 1) is not None and cls.__module__.startswith("lowdim.")
)


def method(name, rank=HIGH, **changes):
    cls = registered_methods()[name]
    return cls(**{**cls.at_rank({}, rank), "target_modules": ["0"], **OTHER.get(name, {}), **changes})


def wrapped(layer):
    torch.manual_seed(0)
    return nn.Sequential(layer()).double()


def inputs(layer, rows=7):
    g = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (rows, 3), generator=g)
    shape = (rows, layer.in_channels, 6, 6) if isinstance(layer, nn.Conv2d) else (rows, layer.in_features)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def loss_of(model, x):
    return (model(x) - 1).square().mean()


def adapt(model, chosen, x, **how):
    return lowdim.adapt(model, chosen, batches=[x], loss_fn=loss_of, **how)


def pairs():
    """Every method with a rank, and each odd layer that it takes."""
    made = [(name, odd, method(name), ODD[odd]()) for name in RANKED for odd in ODD]
    return [(name, odd) for name, odd, m, layer in made if m.accepts(layer) and has_statistics(layer, m.needs)]


def test_every_method_with_a_rank_is_tried():
    assert {"LoRA", "SoRA", "LaMDA", "LoRASB", "LoRAXS", "SVFit", "CorDA", "LoLDU", "RandLoRA", "FLoRA"} <= set(RANKED)
    assert {name for name, _ in pairs()} == set(RANKED)


@pytest.mark.parametrize(("name", "odd"), pairs())
def test_it_trains_merges_and_reloads(name, odd, tmp_path):
    model = wrapped(ODD[odd])
    x, plain = inputs(model[0]), copy.deepcopy(model)
    adapted = adapt(model, method(name), x, cap_rank=True)
    optimizer = torch.optim.SGD(adapted.param_groups(1e-3))
    (loss_of(model, x) + adapted.regularizer()).backward()
    optimizer.step()
    adapted.step(optimizer)
    want = model.eval()(x)
    adapted.save(tmp_path)
    twin = copy.deepcopy(plain)
    again = load_adapter(twin, tmp_path)
    assert torch.equal(twin.eval()(x), want)
    assert again.capped_ranks == adapted.capped_ranks
    assert sum(p.numel() for p in again.trainable().values()) == sum(p.numel() for p in adapted.trainable().values())
    torch.testing.assert_close(adapted.merge()(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "odd"), [pair for pair in pairs() if method(pair[0]).bounded_rank])
def test_a_capped_layer_is_what_the_method_gives_at_the_limit(name, odd):
    model, twin = wrapped(ODD[odd]), wrapped(ODD[odd])
    x, chosen = inputs(model[0]), method(name)
    limit = chosen.capped_rank(model[0], {})
    capped = adapt(model, chosen, x, cap_rank=True)
    assert capped.capped_ranks == {"0": limit}
    largest = {"ranks": limit} if name == "FLoRA" else {"rank": min(matrix_shape(twin[0]))}
    direct = adapt(twin, method(name, **largest), x)
    assert direct.capped_ranks == {}
    for key, value in direct.layers["0"].update.state_dict().items():
        assert torch.equal(capped.layers["0"].update.state_dict()[key], value), key
    assert torch.equal(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("name", [name for name in RANKED if method(name).bounded_rank])
def test_without_cap_rank_the_layer_its_limit_and_the_remedy_are_named(name):
    model = wrapped(ODD["tall"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=rf"{name} on layer 0 \(Linear with weight \(3, 40\)\): .*3\]?; got 24; .*cap_rank=True"
    ):
        adapt(model, method(name), inputs(model[0]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("name", [name for name in RANKED if not method(name).bounded_rank])
def test_thin_random_factors_are_taken_as_they_are(name):
    sizes = []
    for cap_rank in (False, True):
        model = wrapped(ODD["tall"])
        adapted = adapt(model, method(name), inputs(model[0]), cap_rank=cap_rank)
        assert adapted.capped_ranks == {}
        sizes.append(adapted.layers["0"].update.rank)
    assert sizes[0] == sizes[1] == (HIGH // 2 if name == "BlockLoRA" else HIGH)


def test_a_random_start_of_lamda_takes_any_rank_and_a_spectral_one_does_not():
    model = wrapped(ODD["tall"])
    assert lowdim.adapt(model, LaMDA(rank=HIGH, init="random")).layers["0"].update.S.shape == (HIGH, HIGH)
    assert not LaMDA(init="random").bounded_rank
    assert LaMDA().bounded_rank


def test_only_the_layers_below_the_rank_are_capped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 32), nn.Linear(32, 5), nn.Linear(5, 30))
    adapted = lowdim.adapt(model, LaMDA(rank=HIGH), cap_rank=True)
    assert adapted.capped_ranks == {"1": 5, "2": 5}
    assert [layer.update.rank for layer in adapted.layers.values()] == [HIGH, 5, 5]


def test_the_ranks_that_lamda_chooses_are_capped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 32), nn.Linear(32, 5), nn.Linear(5, 30))
    method = LaMDA(rank=8, rank_choices=(4, 8, 16))
    with pytest.raises(ValueError, match="cap_rank=True"):
        lowdim.adapt(copy.deepcopy(model), method)
    adapted = lowdim.adapt(model, method, cap_rank=True)
    chosen = [layer.update.rank for layer in adapted.layers.values()]
    assert all(rank <= min(matrix_shape(layer)) for rank, layer in zip(chosen, adapted.layers.values()))
    assert set(adapted.capped_ranks.values()) == {5}


def test_shared_bases_are_sliced_for_capped_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 32), nn.Linear(32, 5)).double()
    adapted = lowdim.adapt(model, RandLoRA(rank=8, alpha=16), cap_rank=True)
    large, small = (layer.update for layer in adapted.layers.values())
    assert (small.A.shape, small.B.shape, small.lam.shape) == ((5, 5), (32, 1, 5), (5, 1))
    assert torch.equal(small.A, large.A[:5, :5])
    with torch.no_grad():
        small.lam.normal_()
    # c Σ_k lam_k B[:, 0, k] (A[k] ∘ gamma), transposed where in > out; c = alpha / rank / √n: this layer's rank is 5, its n 1
    product = sum(small.lam[k, 0] * torch.outer(small.B[:, 0, k], small.A[k] * small.gamma[0]) for k in range(5))
    torch.testing.assert_close(small.dense(), 16 / 5 * product.T)


@pytest.mark.parametrize("chosen", [LoRA(rank=HIGH), LaMDA(rank=HIGH), RandLoRA(rank=HIGH), SVFit(rank=HIGH)])
def test_exported_for_peft_it_gives_the_same_outputs(chosen, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 26), nn.Tanh(), nn.Linear(26, 5), nn.Tanh(), nn.Linear(5, 1))
    plain, x = copy.deepcopy(model), torch.randn(4, 30)
    adapted = lowdim.adapt(model, chosen, cap_rank=True)
    with torch.no_grad():
        for layer in adapted.layers.values():
            for parameter in layer.update.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    report = adapted.export(tmp_path)
    assert report.exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_ranks_of_a_convolution_are_capped_axis_by_axis():
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    assert lowdim.adapt(model, FLoRA(ranks=8), cap_rank=True).capped_ranks == {"0": [3, 8, 2, 2]}
    with pytest.raises(ValueError, match="ranks must have 4 entries"):
        lowdim.adapt(nn.Sequential(nn.Conv2d(3, 16, 3)), FLoRA(ranks=(8, 8)), cap_rank=True)


def test_layers_whose_inputs_have_no_statistics_are_left_out_by_default():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.Conv2d(4, 6, 1))
    adapted = lowdim.adapt(model, CorDA(rank=2), batches=[torch.randn(3, 4, 6, 6)])
    assert list(adapted.layers) == ["1"]
    with pytest.raises(ValueError, match="input statistics of a grouped convolution are not defined"):
        lowdim.adapt(model, CorDA(rank=2, target_modules=["0"]), batches=[torch.randn(3, 4, 6, 6)])
