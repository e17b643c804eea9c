import copy

import pytest
import torch
from torch import nn

from lowdim.errors import NoMatchingModuleError
from lowdim.modules import LowRankLinear
from lowdim.surgery import (
    describe,
    find_layers,
    freeze,
    is_conv1d,
    is_matrix_layer,
    matrix_shape,
    model_device,
    parent_and_child,
    replace_layer,
    tied_parameters,
    weight_matrix,
    with_matrix,
)
from lowdim.testing.sample_layers import LAYERS, make_input, make_layer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(1, 2, 3)
        self.lm_head = nn.Linear(4, 7, bias=False)

    def get_output_embeddings(self):
        return self.lm_head


ALL = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.k_proj"]


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        (None, [*ALL, "conv"]),
        ("all-linear", [*ALL, "conv"]),
        (["q_proj"], ALL[::2]),
        (["1.q_proj", "layers.0.k_proj"], [ALL[1], ALL[2]]),
        (["k_proj", "q_proj"], ALL),
        ("q_proj", ALL[::2]),
        (r".*\.0\..*_proj", ALL[:2]),
        (r"layers\.\d+\.(q|k)_proj", ALL),
        (["lm_head"], ["lm_head"]),
        ((n for n in ["conv"]), ["conv"]),
    ],
)
def test_patterns(pattern, want):
    assert list(find_layers(Model(), pattern)) == want


def test_a_name_in_a_list_is_not_a_regular_expression():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    assert list(find_layers(model, ["1"])) == ["1"]
    with pytest.raises(NoMatchingModuleError):
        find_layers(model, ["1."])
    assert list(find_layers(model, "1.")) == ["10", "11"]
    with pytest.raises(NoMatchingModuleError, match="not a valid regular expression"):
        find_layers(model, "*.q")


def test_a_suffix_ends_at_a_dot():
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "xq": nn.Linear(2, 2)})
    assert list(find_layers(model, ["q"])) == ["q"]


def test_accept_and_exclude():
    assert list(find_layers(Model(), None, accept=lambda m: isinstance(m, nn.Embedding))) == ["embed"]
    assert list(find_layers(Model(), None, exclude=["layers.0", "conv"])) == ALL[2:]
    with pytest.raises(NoMatchingModuleError, match="no layer is left"):
        find_layers(Model(), ["conv"], exclude=["conv"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (["q_porj"], r"'q_porj' matches no module; nearest names: q_proj"),
        (["q_proj", "v"], r"'v' matches no module"),
        (["norm"], r"'norm' matches only layers that cannot be adapted, e.g. layers.0.norm \(LayerNorm with weight \(4,\)\)"),
        ([], r"must name at least one module"),
    ],
)
def test_no_match_is_an_error_with_a_hint(pattern, message):
    with pytest.raises(NoMatchingModuleError, match=message):
        find_layers(Model(), pattern)
    with pytest.raises(NoMatchingModuleError, match="no matrix layer"):
        find_layers(nn.Sequential(nn.ReLU()), ["x"])


def test_heads_are_left_alone_by_name_and_by_role():
    model = Model()
    model.output = model.lm_head
    assert "output" not in find_layers(model)
    plain = nn.ModuleDict({"body": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    assert list(find_layers(plain)) == ["body"]
    headless = Model()
    headless.get_output_embeddings = lambda: (_ for _ in ()).throw(NotImplementedError())
    assert "conv" in find_layers(headless)


def test_a_module_with_two_names_is_listed_once():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(3, 3)})
    assert list(find_layers(model)) == ["a", "c"]
    assert find_layers(model, ["b.0"]) == {"a": shared}
    new = nn.Linear(3, 3)
    replace_layer(model, "a", new)
    assert model["a"] is new
    assert model["b"][0] is new


def test_attention_reads_the_weight_of_its_output_projection():
    attention = nn.MultiheadAttention(4, 2)
    assert not is_matrix_layer(attention.out_proj)
    with pytest.raises(NoMatchingModuleError, match="cannot be adapted"):
        find_layers(nn.ModuleDict({"a": attention}), ["out_proj"])


def test_replacing_goes_everywhere_and_may_wrap_the_old_layer():
    model = Model()
    old = model.layers[1].q_proj
    wrapper = nn.Sequential(old)
    replace_layer(model, "layers.1.q_proj", wrapper)
    assert model.layers[1].q_proj is wrapper
    assert wrapper[0] is old
    parent, child = parent_and_child(model, "layers.1.k_proj")
    assert parent is model.layers[1]
    assert child == "k_proj"
    assert parent_and_child(model, "conv") == (model, "conv")
    with pytest.raises(AttributeError):
        replace_layer(model, "layers.7.q_proj", wrapper)


@pytest.mark.parametrize("name", LAYERS)
def test_with_matrix_makes_an_equal_layer_and_leaves_the_old_one(name):
    layer = make_layer(name)
    x = make_input(layer)
    before, weight = layer(x), layer.weight
    matrix = weight_matrix(layer).detach()
    assert matrix.shape == matrix_shape(layer)
    copy_ = with_matrix(layer, matrix.clone())
    assert type(copy_) is type(layer)
    assert torch.equal(copy_(x), before)
    doubled = with_matrix(layer, 2 * matrix)
    assert doubled.weight.shape == weight.shape
    assert torch.equal(doubled.weight, 2 * weight)
    assert layer.weight is weight
    assert torch.equal(layer(x), before)
    assert getattr(doubled, "bias", None) is getattr(layer, "bias", None)


def test_with_matrix_keeps_dtype_hooks_and_gradient_flag():
    layer = nn.Linear(3, 2, dtype=torch.bfloat16).requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    new = with_matrix(layer, torch.ones(2, 3, dtype=torch.float64))
    assert new.weight.dtype == torch.bfloat16
    assert not new.weight.requires_grad
    new(torch.ones(1, 3, dtype=torch.bfloat16))
    assert calls == [1]
    new.extra = nn.ReLU()
    assert not hasattr(layer, "extra")


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_refused_and_left_alone(wrap):
    layer = wrap(nn.Linear(3, 2))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match="computed"):
        with_matrix(layer, torch.zeros(2, 3))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_matrices_are_views_in_the_layers_own_layout():
    from transformers.pytorch_utils import Conv1D

    conv1d = Conv1D(5, 3)
    assert is_conv1d(conv1d)
    assert matrix_shape(conv1d) == (5, 3)
    assert matrix_shape(nn.Conv2d(4, 6, (3, 2), groups=2)) == (6, 12)
    assert matrix_shape(nn.Embedding(9, 4)) == (4, 9)
    for layer in (conv1d, nn.Conv1d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.Conv3d(1, 2, 3), nn.Embedding(3, 2), nn.Linear(2, 3)):
        weight = layer.weight
        assert weight_matrix(layer).untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()

    class Conv1D(nn.Module):  # another library's
        weight = nn.Parameter(torch.ones(3, 4))

    assert not is_conv1d(Conv1D())


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(3), nn.ReLU(), nn.Bilinear(2, 2, 2), nn.ConvTranspose1d(2, 2, 3), nn.LSTM(2, 2)]
)
def test_no_matrix_no_layer(layer):
    assert not is_matrix_layer(layer)
    with pytest.raises(TypeError, match=type(layer).__name__):
        weight_matrix(layer)


def test_ties_are_found():
    model = Model()
    assert tied_parameters(model) == []
    model.lm_head.weight = model.embed.weight
    assert tied_parameters(model) == [["embed.weight", "lm_head.weight"]]


def test_small_helpers():
    assert describe(nn.Linear(2, 3)) == "Linear with weight (3, 2)"
    assert describe(nn.ReLU()) == "ReLU"
    model = Model()
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert model_device(model).type == "cpu"
    assert model_device(nn.ReLU()).type == "cpu"
    with torch.device("meta"):
        assert model_device(nn.BatchNorm1d(2, affine=False)).type == "meta"


def test_compressed_layers_are_named_where_no_other_is_left():
    model = nn.Sequential(LowRankLinear(4, 4, rank=1), nn.ReLU())
    with pytest.raises(
        NoMatchingModuleError, match=r"no layer is left.*; 0 is a LowRankLinear already: lowdim\.layers\.densify"
    ):
        find_layers(model)
