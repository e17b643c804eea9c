import copy

import pytest
import torch
from torch import nn

from lowdim.layers import LowRank, LowRankLinear, Monarch, densify, swap_linear


class Net(nn.Module):
    """Two projections, a projection used twice under two names, and an output tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.first = nn.ModuleDict({"proj": nn.Linear(8, 8, bias=False)})
        self.second = nn.ModuleDict({"proj": self.first["proj"]})
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(x)))
        return self.out(self.second["proj"](torch.relu(self.first["proj"](x))))


IDS = torch.arange(10).view(2, 5)


def test_swap_takes_every_free_layer_and_keeps_ties():
    model = swap_linear(Net(), Monarch, nblocks=2)
    assert {n: type(m).__name__ for n, m in model.named_modules() if hasattr(m, "to_linear")} == {
        "up": "Monarch",
        "down": "Monarch",
        "first.proj": "Monarch",
    }
    assert model.second["proj"] is model.first["proj"]
    assert model.out.weight is model.embed.weight
    assert model(IDS).shape == (2, 5, 11)


def test_swap_by_name_and_exclusion():
    model = swap_linear(Net(), LowRank, ["proj"], rank=2)
    assert isinstance(model.first["proj"], LowRankLinear)
    assert type(model.up) is nn.Linear
    model = swap_linear(Net(), LowRank, exclude=["proj", "up"], rank=2)
    assert type(model.up) is type(model.first["proj"]) is nn.Linear
    assert isinstance(model.down, LowRankLinear)


def test_a_tied_layer_asked_for_by_name_is_left_with_a_warning():
    with pytest.warns(UserWarning, match=r"left unchanged .*out shares its weight with embed\.weight"):
        model = swap_linear(Net(), LowRank, ["out", "up"], rank=2)
    assert type(model.out) is nn.Linear
    assert isinstance(model.up, LowRankLinear)
    with pytest.raises(ValueError, match=r"no layer is left: out shares its weight with embed\.weight"):
        swap_linear(Net(), LowRank, ["out"], rank=2)


def test_layers_that_share_a_weight_share_it_afterwards():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    swap_linear(model, Monarch, nblocks=2)
    assert model[0] is not model[2]
    assert model[0].blkdiag1 is model[2].blkdiag1
    assert model[0].blkdiag2 is model[2].blkdiag2
    assert model[0].bias is not model[2].bias
    densify(model)
    assert model[0].weight is model[2].weight
    assert model[0].bias is not model[2].bias


def test_lossless_swap_and_densify_keep_the_function():
    model = Net().double().eval()
    want = model(IDS)
    swap_linear(model, Monarch, nblocks=1)
    assert not model.up.training
    torch.testing.assert_close(model(IDS), want)
    assert densify(model) is model
    assert [type(model.get_submodule(n)) for n in ("up", "down", "first.proj")] == [nn.Linear] * 3
    assert model.second["proj"] is model.first["proj"]
    torch.testing.assert_close(model(IDS), want)


def test_reverse_sparsification_continues_where_it_was():
    torch.manual_seed(1)
    model = nn.Sequential(Monarch(6, 8, nblocks=2), nn.Tanh(), Monarch(8, 3, nblocks=2))
    x, target = torch.randn(32, 6), torch.randn(32, 3)

    def train(steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(steps):
            loss = nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(nn.functional.mse_loss(model(x), target).detach())

    before = train(20)
    densify(model)
    assert float(nn.functional.mse_loss(model(x), target).detach()) == pytest.approx(before, rel=1e-5)
    assert train(20) < before


def test_densify_of_a_layer_and_of_a_plain_model():
    layer = Monarch(6, 8)
    linear = densify(layer)
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear(torch.ones(6)), layer(torch.ones(6)))
    plain = nn.Sequential(nn.Linear(2, 2))
    assert densify(plain) is plain


def test_densify_takes_the_outermost():
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def to_linear(self):
            return self.layer.to_linear()

    model = densify(nn.Sequential(Wrapper(Monarch(4, 4)), Monarch(4, 4)))
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


def test_fresh_layers_draw_new_weights():
    torch.manual_seed(3)
    linear = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    layer = swap_linear(nn.Sequential(linear), Monarch, nblocks=2, fresh=True)[0]
    assert layer.bias is None
    assert layer.blkdiag1.dtype == torch.bfloat16
    assert not torch.allclose(layer.dense_weight(), Monarch.from_linear(linear, nblocks=2).dense_weight())
    with torch.device("meta"):
        planned = swap_linear(nn.Sequential(nn.Linear(8, 8)), LowRank, fresh=True, rank=2)
    assert planned[0].A.is_meta


def test_an_error_names_the_layer_and_changes_nothing():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer up: rank must be an int in \[1, 8\]; got 9"):
        swap_linear(model, LowRank, rank=9)
    with torch.no_grad():
        model.first["proj"].weight[0, 0] = before["first.proj.weight"][0, 0] = before["second.proj.weight"][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer first\.proj: matrix has NaN or infinite"):
        swap_linear(model, Monarch)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrong_calls():
    with pytest.raises(TypeError, match=r"layer_class must have from_linear.*Linear"):
        swap_linear(Net(), nn.Linear)
    with pytest.raises(ValueError, match=r"'upp' matches no module; nearest names: up"):
        swap_linear(Net(), Monarch, ["upp"])
    with pytest.raises(ValueError, match="no layer is left"):
        swap_linear(nn.Sequential(nn.ReLU()), Monarch)


def test_inside_torchs_own_transformer_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        want = layer.eval()(x)
        swap_linear(layer, Monarch, nblocks=1)
        assert isinstance(layer.linear1, Monarch)
        assert not isinstance(layer.self_attn.out_proj, Monarch)
        torch.testing.assert_close(layer.train()(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.eval()(x), want, rtol=1e-4, atol=1e-5)  # the fused path reads `.weight`


def test_a_parametrized_weight_is_approximated_as_it_is_now():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)))
    x = torch.randn(3, 8)
    want = model(x)
    swap_linear(model, LowRank, rank=6)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_gpt2s_transposed_layers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=13, n_positions=8, n_inner=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(6)[None]
    want = model(ids).logits
    swap_linear(model, Monarch, nblocks=1)
    block = model.transformer.h[0]
    assert all(isinstance(m, Monarch) for m in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-3, atol=1e-4)


def test_densify_gives_convolutions_back():
    from lowdim.layers import MaestroConv2d

    net = nn.Sequential(MaestroConv2d(3, 5, 3, stride=2, padding=1), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    want = net(x)
    densify(net)
    assert type(net[0]) is nn.Conv2d
    assert torch.allclose(net(x), want, atol=1e-5)
