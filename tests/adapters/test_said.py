import copy
import json

import pytest
import torch
from torch import nn

import lowdim
import vectors
from lowdim.adapters import SAID, SubspaceModel, said
from lowdim.errors import CheckpointError, NoMatchingModuleError
from lowdim.files import read_tensors
from lowdim.linalg import FastfoodDraws, fastfood, fastfood_draws
from lowdim.plan.kept import kept_tensors
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model
from lowdim.testing.whole_case import WholeModelCase


class TestSAID(WholeModelCase):
    def method(self, model, **changes):
        return SAID(**{"dimension": 40, **changes})

    def dense(self, adapted):
        """`λ_i · F_i θ`."""
        return {name: scale.double() * offset for scale, (name, offset) in zip(adapted.scales, projected(adapted), strict=True)}


class TestDID(WholeModelCase):
    def method(self, model, **changes):
        return SAID(**{"dimension": 30, "structure_aware": False, **changes})

    def dense(self, adapted):
        """`F_i θ`."""
        return dict(projected(adapted))


def projected(adapted):
    """Name and `F_i θ = (H (G ⊙ (H (B ⊙ pad θ))[Π]))[:D] / √(D ΣG²)` of each parameter, with dense Hadamard matrices."""
    shapes = {name: p.shape for name, p in adapted.model.named_parameters()}
    for name, draws in zip(adapted.names, adapted.draws, strict=True):
        length, count = len(draws), shapes[name].numel()
        theta = adapted.theta.double()[:length]  # a short parameter reads only as many coordinates as it has
        padded = torch.cat([theta, theta.new_zeros(length - len(theta))])
        H, G = hadamard(length), draws.gaussian.double()
        mixed = H @ (G * (H @ (draws.signs * padded))[draws.permutation.long()])
        yield name, (mixed[:count] / (count * G.square().sum()).sqrt()).view(shapes[name])


def hadamard(size):
    """`H_1 = [1]`, `H_2n = [[H_n, H_n], [H_n, −H_n]]`."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class Net(nn.Module):
    def __init__(self, n, hidden, out):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(n, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))


def from_case(case):
    how = case.hyperparameters
    net = Net(how["in_features"], how["hidden"], how["classes"]).double()
    net.load_state_dict({name: case[f"base.{name}"] for name in how["parameters"]})
    return net, how["dimension"], how["structure_aware"]


def set_numbers(case, subspace):
    for index, name in enumerate(subspace.names):
        parts = (case[f"{kind}.{name}"] for kind in ("signs", "permutation", "gaussian"))
        subspace.draws[index] = FastfoodDraws(*parts)
    with torch.no_grad():
        subspace.theta.copy_(case["theta"])
        if subspace.scales is not None:
            subspace.scales.copy_(case["scales"])


@pytest.mark.parametrize("through", ["said", "adapt"])
@pytest.mark.parametrize("name", ["did", "said"])
def test_vectors(name, through):
    case = vectors.load("said", name)
    net, dimension, aware = from_case(case)
    if through == "said":
        subspace = said(net, dimension, structure_aware=aware)
    else:
        subspace = lowdim.adapt(net, SAID(dimension, aware))
    assert subspace.names == case.hyperparameters["parameters"]
    set_numbers(case, subspace)
    for key, offset in subspace.offsets().items():
        case.close(offset, f"offset.{key}")
    y = subspace(case["x"])
    case.close(y, "y")
    y.square().sum().backward()
    case.close(subspace.theta.grad, "grad_theta")
    if aware:
        case.close(subspace.scales.grad, "grad_scales")
    else:
        assert subspace.scales is None
    case.close(subspace.merge()(case["x"]), "y")


def test_the_surface_of_a_subspace_model():
    model = small_model()
    m, total = len(list(model.parameters())), sum(p.numel() for p in model.parameters())
    sub = said(model, 40, seed=7)
    assert isinstance(sub, SubspaceModel)
    assert (sub.dimension, sub.total, sub.seed, sub.projection) == (40, total, 7, "fastfood")
    assert [name for name, p in sub.named_parameters() if p.requires_grad] == ["theta", "scales"]
    assert (tuple(sub.theta.shape), tuple(sub.scales.shape)) == ((40 - m,), (m,))
    assert not bool(sub.theta.any())
    assert bool((sub.scales == 1).all())
    assert set(sub.state_dict()) == {"theta", "scales", *(f"model.{name}" for name in model.state_dict())}
    assert [len(draws) for draws in sub.draws] == [128, 16, 128, 8, 32, 4]
    shapes = {name: tuple(offset.shape) for name, offset in sub.offsets().items()}
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    twin, x = copy.deepcopy(sub), sample_input()
    with torch.no_grad():
        sub.theta.fill_(0.3)
    assert torch.equal(twin(x), small_model()(x))
    twin.load_state_dict(sub.state_dict())
    assert torch.equal(twin(x), sub(x))
    plain = sub.merge()
    assert plain is model
    with pytest.raises(ValueError, match="merged"):
        sub.merge()


def test_both_entries_are_the_same_and_draw_from_one_generator():
    sub, adapted = said(small_model(), 30, seed=5), lowdim.adapt(small_model(), SAID(30), seed=5)
    generator = torch.Generator().manual_seed(5)
    for index, shape in enumerate(sub.shapes):
        want = fastfood_draws(int(torch.tensor(shape).prod()), generator)
        for got in (sub.draws[index], adapted.draws[index]):
            assert torch.equal(got.signs, want.signs)
            assert torch.equal(got.permutation, want.permutation)
            assert torch.equal(got.gaussian, want.gaussian)
    with torch.no_grad():
        for one in (sub, adapted):
            one.theta.copy_(torch.linspace(-1, 1, 24))
    assert torch.equal(sub(sample_input()), adapted(sample_input()))
    want = fastfood(adapted.theta[:16], 12, adapted.draws[1])  # the bias takes the first L = 16 numbers
    assert torch.equal(adapted.offsets()["body.first.bias"], want)


def test_scales_move_their_tensor_alone():
    adapted = lowdim.adapt(small_model(), SAID(30))
    with torch.no_grad():
        adapted.theta.fill_(0.5)
    before = adapted.offsets()
    with torch.no_grad():
        adapted.scales[2] *= -2.0
    for index, (name, offset) in enumerate(adapted.offsets().items()):
        torch.testing.assert_close(offset, -2.0 * before[name] if index == 2 else before[name])


def test_parameters_by_name():
    model = small_model()
    adapted = lowdim.adapt(model, SAID(12, parameters=["first", "score.bias"]))
    assert adapted.names == ["body.first.weight", "body.first.bias", "score.bias"]
    assert adapted.total == 96 + 12 + 3
    model = small_model()
    model.body.requires_grad_(False)
    assert lowdim.adapt(model, SAID(12)).names == ["score.weight", "score.bias"]
    model = small_model().requires_grad_(False)
    assert lowdim.adapt(model, SAID(12, parameters="score")).names == ["score.weight", "score.bias"]


def test_a_file_holds_only_the_numbers_and_the_seed(tmp_path):
    adapted = lowdim.adapt(small_model(), SAID(30), seed=9)
    adapted.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "lowdim_shared.theta": (24,),
        "lowdim_shared.scales": (6,),
    }
    about = json.loads((tmp_path / "adapter.json").read_text())
    assert about["seed"] == 9
    assert about["config"] == {"dimension": 30, "structure_aware": True, "parameters": None}
    assert all(len(entry["fingerprint"].split(":")[0]) == 24 for entry in about["parameters"].values())
    loaded = lowdim.load_adapter(small_model(), tmp_path)
    assert torch.equal(loaded.draws[0].permutation, adapted.draws[0].permutation)


def test_a_file_whose_draws_cannot_be_made_again_is_refused(tmp_path):
    adapted = lowdim.adapt(small_model(), SAID(30))
    adapted.draws[2] = fastfood_draws(72, torch.Generator().manual_seed(77))
    adapted.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"projection of body\.second\.weight is not the one"):
        lowdim.load_adapter(small_model(), tmp_path)


def test_a_float32_file_on_a_bfloat16_model_moves_it_alike(tmp_path):
    adapted = lowdim.adapt(small_model(), SAID(30))
    with torch.no_grad():
        adapted.theta.fill_(0.2)
    adapted.save(tmp_path)
    half = lowdim.load_adapter(small_model(dtype=torch.bfloat16), tmp_path)
    assert half.theta.dtype == torch.float32
    for name, offset in half.offsets().items():
        assert torch.equal(offset, adapted.offsets()[name])


def test_half_precision_projects_in_float32_and_rounds_the_sum_once():
    model = small_model(dtype=torch.bfloat16)
    base = model.body["first"].weight.detach().clone()
    adapted = lowdim.adapt(model, SAID(30))
    assert adapted.theta.dtype == torch.bfloat16
    with torch.no_grad():
        adapted.theta.fill_(0.25)
    want = fastfood(adapted.theta.detach().float(), 96, adapted.draws[0]).view(12, 8)
    assert torch.equal(model.body["first"].weight, (base.float() + want).bfloat16())
    assert torch.equal(model.to(torch.bfloat16).body["first"].weight, (base.float() + want).bfloat16())


def test_autograd_keeps_nothing_for_the_projection():
    adapted = lowdim.adapt(nn.Linear(64, 64), SAID(30))
    assert kept_tensors(adapted.offsets, adapted.model) == []


def test_numbers_that_are_allocated_only_get_their_draws_with_the_state():
    adapted = lowdim.adapt(small_model(), SAID(30))
    with torch.no_grad():
        adapted.theta.fill_(0.3)
    state = adapted.model.state_dict()
    with torch.device("meta"):
        model = small_model()
    lowdim.adapt(model, SAID(30), initialise=False)
    model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(sample_input()), adapted(sample_input()))


def test_no_weight_decay_unless_asked_for():
    adapted = lowdim.adapt(small_model(), SAID(30), modules_to_save=["score"])
    assert {group["weight_decay"] for group in adapted.param_groups(0.1)} == {0.0}
    assert {group["weight_decay"] for group in adapted.param_groups(0.1, weight_decay=0.2)} == {0.2}


def test_quantized_parameters_are_refused_by_name():
    torchao = pytest.importorskip("torchao.quantization")
    model = small_model()
    torchao.quantize_(model.body, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"body\.first\.weight is quantized"):
        lowdim.adapt(model, SAID(10, parameters=["weight"]))
    adapted = lowdim.adapt(model, SAID(10, parameters=["bias", "score"]))
    assert adapted(sample_input()).shape == (5, 3)


def test_bad_input():
    model = small_model()
    total = sum(p.numel() for p in model.parameters())
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="dimension"):
            SAID(dimension=bad)
        with pytest.raises(ValueError, match="dimension"):
            said(small_model(), bad)
    with pytest.raises(ValueError, match=r"dimension must be above 6.*got 6"):
        said(model, 6)
    with pytest.raises(ValueError, match=rf"dimension must be in \[1, {total}\].*got {total + 1}"):
        lowdim.adapt(model, SAID(total + 1))
    said(small_model(), 7)
    said(small_model(), total, structure_aware=False)
    with pytest.raises(ValueError, match="no parameter of _Small is selected"):
        said(small_model().requires_grad_(False), 20)
    with pytest.raises(NoMatchingModuleError, match=r"'frist'.*nearest: .*body\.first"):
        lowdim.adapt(model, SAID(20, parameters=["frist"]))
    with pytest.raises(ValueError, match=r"no parameter of _Small"):
        lowdim.adapt(model, SAID(20, parameters=()))
    sub = said(small_model(), 20)
    with pytest.raises(ValueError, match=r"body\.first\.bias must have length 16; got 8"):
        sub.draws[1] = fastfood_draws(8)
    with pytest.raises(IndexError):
        sub.draws[6]
    with pytest.raises(ValueError, match="already adapted"):
        said(sub.model, 20)
    assert all(p.requires_grad for p in model.parameters())  # every refusal left it alone


def test_a_linear_layer_at_a_known_point():
    # one parameter, theta of one number: F is the first column, of norm about 1
    layer = nn.Linear(50, 40, bias=False)
    base = layer.weight.detach().clone()
    adapted = lowdim.adapt(layer, SAID(1, structure_aware=False))
    with torch.no_grad():
        adapted.theta.fill_(3.0)
    assert abs(float((layer.weight - base).detach().norm()) - 3.0) < 0.2
    x = torch.randn(3, 50)
    assert relative_error(layer(x), x @ (base + adapted.offsets()["weight"]).T) < 1e-6
