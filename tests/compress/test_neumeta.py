import itertools
import math

import pytest
import torch
from torch import nn

import vectors
from lowdim.compress import (
    NeuMetaConfig,
    NeuMetaField,
    neumeta_coordinates,
    neumeta_reconstruction_loss,
    neumeta_weights,
    permute_channels,
    smooth_order,
    total_variation,
)
from lowdim.linalg import stream

CONFIG = {"hidden_dim": 6, "num_layers": 3, "num_freqs": 2, "norm": 5.0}


def field(tensors, outputs, **changes):
    return NeuMetaField(tensors, outputs, NeuMetaConfig(**{**CONFIG, **changes})).double()


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=stream(seed, "test"))


# Vectors


@pytest.mark.parametrize("case", ["field", "field_small"])
def test_reference_field(case):
    v = vectors.load("neumeta", case)
    h = v.hyperparameters
    w = h["width"]
    net = nn.ModuleDict({"conv1": nn.Conv2d(2, w, 3), "conv2": nn.Conv2d(w, 2 * w, 1), "head": nn.Linear(2 * w, 4)}).double()
    made = field(6, 9, **{name: h[name] for name in CONFIG})
    made.load_state_dict({name: t for name, t in v.tensors.items() if name.startswith("mlps.")})
    coords, tensor_id = neumeta_coordinates(net)
    v.close(coords, "coords")
    assert torch.equal(tensor_id, coords[:, 0].long())
    weights = neumeta_weights(made, net)
    for name in dict(net.named_parameters()):
        v.close(weights[name], f"weights.{name}")
    reference = {name.removeprefix("reference."): t for name, t in v.tensors.items() if name.startswith("reference.")}
    v.close(neumeta_reconstruction_loss(weights, reference), "recon_loss")
    net.load_state_dict(weights)
    v.close(torch.tensor(total_variation(net), dtype=torch.float64), "total_variation")


def test_reference_order():
    v = vectors.load("neumeta", "order")
    order = smooth_order(v["features"])
    v.close(v["features"][order].diff(dim=0).abs().sum(), "best_length")


# The field


def one_weight(state, c, tensor, fan_in, config):
    """The outputs at one coordinate, number by number."""
    u = [x / config["norm"] for x in c]
    u = [u[0] / u[3], u[1] / u[4], u[2] / u[5], u[3], u[4], u[5]]
    phi = list(u)
    for power in range(config["num_freqs"]):
        for x in u:
            phi += [math.sin(2**power * math.pi * x), math.cos(2**power * math.pi * x)]
    part = {name.removeprefix(f"mlps.{tensor}."): t for name, t in state.items() if name.startswith(f"mlps.{tensor}.")}
    h = (part["input.weight"] @ torch.tensor(phi, dtype=torch.float64) + part["input.bias"]).clamp_min(0)
    for block in range(config["num_layers"] - 1):
        inner = part[f"blocks.{block}.weight"] @ h + part[f"blocks.{block}.bias"]
        h = h + part["scales"][block] * inner.clamp_min(0)
    return (part["output.weight"] @ h + part["output.bias"]) / fan_in


def test_noise_moves_coordinates_and_neither_the_tensor_nor_the_fan_in():
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 3, bias=False))
    made = field(3, 9)
    coords, _ = neumeta_coordinates(net)
    noise = torch.rand(coords.shape, dtype=torch.float64, generator=stream(1, "test")) - 0.5
    weights = neumeta_weights(made, net, noise)
    state, row = made.state_dict(), 0
    for tensor, (name, p) in enumerate(net.named_parameters()):
        i = p.shape[1] if p.ndim > 1 else 1
        for a, b in itertools.product(range(p.shape[0]), range(i)):
            want = one_weight(state, (coords[row] + noise[row]).tolist(), tensor, i, CONFIG)
            kernel = want.view(3, 3) if name == "1.weight" else want[4]  # 1 x 1 takes the middle one of 9 outputs
            got = weights[name][a, b].squeeze() if p.ndim > 1 else weights[name][a]
            torch.testing.assert_close(got, kernel if p.ndim > 1 else want[0], rtol=1e-12, atol=1e-14)
            row += 1
    assert row == len(coords)


def test_inputs_are_left_alone_and_rows_may_come_in_any_order():
    made = field(2, 1)
    coords, tensor_id = neumeta_coordinates(nn.Linear(3, 4))
    before = coords.clone()
    want = made(coords, tensor_id, coords[:, 5])
    assert torch.equal(coords, before)
    mixed = torch.randperm(len(coords), generator=stream(0, "test"))
    torch.testing.assert_close(made(coords[mixed], tensor_id[mixed], coords[mixed, 5]), want[mixed], rtol=1e-12, atol=1e-14)


def test_a_tensor_without_rows_is_no_error():
    made = field(3, 1)
    coords = torch.tensor([[2.0, 0, 0, 3, 4, 5]])
    want = one_weight(made.state_dict(), coords[0].tolist(), 2, 5.0, CONFIG)
    torch.testing.assert_close(made(coords, torch.tensor([2]), torch.tensor([5.0]))[0], want, rtol=1e-6, atol=1e-7)


def test_the_start_is_that_of_torch_and_of_the_seed():
    made = NeuMetaField(2, 9, NeuMetaConfig(hidden_dim=64, num_layers=3, num_freqs=1, residual_scale=0.3))
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            bound, weight, bias = layer.in_features**-0.5, layer.weight.detach(), layer.bias.detach()
            assert 0.95 * bound < float(weight.abs().max()) <= bound
            assert abs(float(weight.mean())) < 0.15 * bound
            assert 0.5 * bound < float(bias.abs().max()) <= bound
    assert made.mlps[1].scales.tolist() == pytest.approx([0.3, 0.3])
    state = torch.get_rng_state()
    again, other = (NeuMetaField(2, 9, NeuMetaConfig(hidden_dim=64, num_layers=3, num_freqs=1, seed=s)) for s in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.mlps[0].input.weight, made.mlps[0].input.weight)
    assert not torch.equal(other.mlps[0].input.weight, made.mlps[0].input.weight)
    assert not torch.equal(made.mlps[1].input.weight, made.mlps[0].input.weight)


def test_bfloat16_fields_compute_their_features_in_float32():
    """Rounded to bfloat16 first, the frequency 2¹⁵ has no phase left."""
    net = nn.Linear(3, 2)
    made = NeuMetaField(2, 1, NeuMetaConfig(hidden_dim=4, num_layers=1, num_freqs=16, norm=7.0))
    coords, _ = neumeta_coordinates(net)
    want = made.double().features(coords)
    assert float((made.bfloat16().features(coords).double() - want).abs().max()) < 0.03


def test_a_field_has_the_gradient_of_its_formula():
    made, net = field(2, 1), nn.Linear(2, 2)
    names = [name for name, _ in made.named_parameters()]

    def generated(*values):
        return torch.func.functional_call(_Weights(made, net), {f"field.{n}": v for n, v in zip(names, values)}, ())

    assert torch.autograd.gradcheck(generated, [p.detach().clone().requires_grad_() for p in made.parameters()])


class _Weights(nn.Module):
    def __init__(self, made, net):
        super().__init__()
        self.field, self.net = made, [net]

    def forward(self):
        return torch.cat([w.flatten() for w in neumeta_weights(self.field, self.net[0]).values()])


def test_tied_weights_are_one_tensor():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    net[1].weight = net[0].weight
    coords, _ = neumeta_coordinates(net)
    assert coords.shape == (12, 6)
    assert coords[-1].tolist() == [0, 3, 2, 1, 4, 3]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.BatchNorm1d(3), "buffers that no field generates: running_mean.*fold"),
        (nn.Conv1d(2, 3, 2), r"weight has shape \(3, 2, 2\)"),
        (nn.Conv3d(2, 3, 2), r"weight has shape \(3, 2, 2, 2, 2\)"),
        (nn.PReLU(), "field has 2 tensors and model 1: weight"),
        (nn.Conv2d(2, 3, 5), r"at most output_dim=9 entries; weight has \(5, 5\)"),
        (nn.ReLU(), "no parameters"),
    ],
)
def test_networks_that_no_field_generates(net, message):
    with pytest.raises(ValueError, match=message):
        neumeta_weights(field(2, 9), net)


def test_bad_input_of_the_field_is_named():
    made, net = field(2, 1), nn.Linear(3, 2)
    coords, tensor_id = neumeta_coordinates(net)
    with pytest.raises(ValueError, match=r"coords must have shape \(n, 6\); got \(8, 5\)"):
        made(coords[:, :5], tensor_id, coords[:, 5])
    with pytest.raises(ValueError, match=r"fan_in must have shape \(8,\).*got \(7,\)"):
        made(coords, tensor_id, coords[:7, 5])
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=rf"tensor_id must lie in 0 to 1; got \[{wrong}\]"):
            made(coords, torch.full_like(tensor_id, wrong), coords[:, 5])
    with pytest.raises(ValueError, match=r"noise must have the coordinates' shape \(8, 6\); got \(8, 5\)"):
        neumeta_weights(made, net, coords[:, :5])
    with pytest.raises(ValueError, match="num_tensors must be an int >= 1; got 0"):
        NeuMetaField(0, 1, NeuMetaConfig())
    with pytest.raises(ValueError, match=r"coordinate_noise must be .*; got 2\.0"):
        NeuMetaConfig(coordinate_noise=2.0)
    with pytest.raises(TypeError, match=r"no option 'hidden'.*hidden_dim"):
        NeuMetaConfig(hidden=3)


def test_reconstruction_weighs_large_entries():
    target = {"a": torch.tensor([4.0, -1.0]), "b": torch.tensor([[2.0]])}
    weights = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([[5.0]])}
    want = ((1 * 1 + 4 * 0.25) / 2 + 9 * 1) / 2  # each tensor by its own largest entry, each tensor once
    assert float(neumeta_reconstruction_loss(weights, target)) == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="only one has b"):
        neumeta_reconstruction_loss({"a": weights["a"]}, target)
    with pytest.raises(ValueError, match=r"a has shape \(1,\), and \(2,\)"):
        neumeta_reconstruction_loss({**weights, "a": weights["a"][:1]}, target)
    with pytest.raises(ValueError, match="epsilon"):
        neumeta_reconstruction_loss(weights, target, epsilon=0.0)


# The order of channels


def length(rows):
    return float(rows.diff(dim=0).abs().sum())


@pytest.mark.parametrize("n", [3, 4, 7])
def test_a_short_list_gets_the_best_order(n):
    rows = normal(n, 2, seed=n)
    best = min(length(rows[list(order)]) for order in itertools.permutations(range(n)))
    order = smooth_order(rows)
    assert sorted(order.tolist()) == list(range(n))
    assert length(rows[order]) == pytest.approx(best, rel=1e-12)


def test_a_long_list_gets_a_good_order():
    rows = normal(60, 4)
    found = length(rows[smooth_order(rows)])
    assert found < 0.75 * length(rows)
    line = torch.randperm(300, generator=stream(0, "test")).double()[:, None] * torch.tensor([[1.0, -2.0]])
    assert length(line[smooth_order(line)]) == pytest.approx(3 * 299)  # up or down, without a jump


def test_two_opt_leaves_no_stretch_that_is_better_reversed():
    rows = normal(14, 3, seed=2)
    path = smooth_order(rows)
    for i, j in itertools.combinations(range(15), 2):
        turned = torch.cat([path[:i], path[i:j].flip(0), path[j:]])
        assert length(rows[turned]) >= length(rows[path]) - 1e-9


@pytest.mark.parametrize("n", [0, 1, 2, 6, 20])
def test_an_order_that_cannot_be_better_stays(n):
    rows = torch.arange(float(n))[:, None].expand(n, 3)
    assert smooth_order(rows).tolist() == list(range(n))
    assert smooth_order(torch.ones(n, 2)).tolist() == list(range(n))


def test_features_that_have_no_order_are_refused():
    with pytest.raises(ValueError, match=r"shape \(n, f\); got \(3,\)"):
        smooth_order(torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        smooth_order(torch.full((3, 2), float("nan")))


class Residual(nn.Module):
    """A stream of 12 channels that two layers write and two read; `up` and `down` are inner."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.first(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x + torch.relu(self.mix(x)))


STREAM = [
    ("first.weight", 0), ("first.bias", 0), ("up.weight", 1), ("down.weight", 0), ("down.bias", -1),
    ("mix.weight", 0), ("mix.weight", 1), ("mix.bias", 0), ("head.weight", 1),
]  # fmt: skip
INNER = [("up.weight", 0), ("up.bias", 0), ("down.weight", 1)]


def test_channels_in_a_smooth_order_compute_the_same():
    torch.manual_seed(0)
    net, x = Residual().double(), normal(4, 3)
    before, outputs, head = total_variation(net), net(x), net.head.weight.detach().clone()
    orders = permute_channels(net, [STREAM, INNER])
    torch.testing.assert_close(net(x), outputs, rtol=1e-12, atol=1e-12)
    assert total_variation(net) < before
    assert [len(order) for order in orders] == [12, 20]
    assert torch.equal(net.head.weight, head[:, orders[0]])


def test_a_tied_weight_is_moved_once():
    net = nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 7, bias=False))
    net[1].weight = net[0].weight
    rows = net[0].weight.detach().clone()
    (order,) = permute_channels(net, [[("0.weight", 1), ("1.weight", 1)]])
    assert order.tolist() != list(range(12))
    assert torch.equal(net[0].weight, rows[:, order])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([INNER, []], r"groups\[1\] is empty"),
        ([INNER, [("up.wieght", 0)]], r"groups\[1\] names 'up.wieght', which is no parameter"),
        ([INNER, [("head.bias", 1)]], r"axis 1 of head.bias, whose shape is \(5,\)"),
        ([INNER, [("down.weight", -1)]], r"groups\[1\] has an axis that is in an earlier group"),
        ([INNER, [("first.weight", 0), ("head.weight", 0)]], r"one size; got .*'head.weight axis 0': 5"),
    ],
)
def test_groups_that_are_no_groups_change_nothing(groups, message):
    net = Residual()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=message):
        permute_channels(net, groups)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))


def test_total_variation_by_hand():
    net = nn.Conv2d(2, 2, (1, 2))
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[[[1.0, 0.0]], [[2.0, 5.0]]], [[[1.0, 1.0]], [[0.0, 5.0]]]]))
        net.bias.copy_(torch.tensor([1.0, -3.0]))
    along_out = 0 + 1 + 2 + 0
    along_in = (1 + 5) + (1 + 4)
    assert total_variation(net) == pytest.approx((along_out + along_in + 4) / 2)
