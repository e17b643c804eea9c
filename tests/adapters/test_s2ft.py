import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowdim
import vectors
from lowdim.adapters import S2FT, AdapterSet, s2ft_scores
from lowdim.errors import UnknownNameError
from lowdim.linalg import stream
from lowdim.plan.kept import kept_tensors
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_input, make_layer
from lowdim.testing.small_model import sample_input, small_model


class Channels(AdapterCase):
    axis = "in"

    def method(self, **changes):
        changes.pop("rank", None)  # there is none; seed 0 of the small model gives each layer some channels
        return S2FT(**{"ratio": 0.3, "axis": self.axis, **changes})

    def dense(self, update):
        place = F.one_hot(update.indices, update.in_features).to(update.s2.dtype)
        return update.s2 @ place

    def start(self, weight, stats):
        return {"s2": 0.0}

    def test_errors_name_the_layer(self):  # a ratio and a block take the place of the rank
        for bad in (0.0, -0.1, 1.1, float("nan"), None):
            with pytest.raises(ValueError, match="ratio"):
                self.method(ratio=bad)
        with pytest.raises(ValueError, match=r"body\.first.*\(12, 8\).*block must divide"):
            self.adapt(small_model(), method=self.method(block=5))
        with pytest.raises(ValueError, match="dropout"):
            self.method(dropout=1.0)


class TestChannelsThatEnter(Channels):
    pass


class TestChannelsThatLeave(Channels):
    axis = "out"

    def dense(self, update):
        place = F.one_hot(update.indices, update.out_features).to(update.s2.dtype)
        return place.T @ update.s2


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class Gated(nn.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, gate, up, down):
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gated(width=7, hidden=18, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Gated(nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)).to(dtype)


# Vectors


def test_vectors_of_a_gated_mlp():
    case = vectors.load("s2ft", "ffn")
    model = Gated(*(linear(case[name]) for name in ("Wg", "Wu", "Wd")))
    up = lowdim.adapt(model, S2FT(axis="out", indices={"up": case["up_idx"]}))
    down = lowdim.adapt(model, S2FT(axis="in", indices={"down": case["down_idx"]}))
    updates = {"up": up.layers["up"].update, "down": down.layers["down"].update}
    for name, update in updates.items():
        assert torch.equal(update.indices, case[f"{name}_idx"])
        with torch.no_grad():
            update.s2.copy_(case[f"s2_{name}"])
    y = model(case["x"])
    case.close(y, "y")
    (y.square().sum() / 2).backward()
    for name, update in updates.items():
        case.close(update.s2.grad, f"grad_s2_{name}")
        case.close(update.delta(), f"delta_{name}")


def test_vectors_of_five_steps():
    case = vectors.load("s2ft", "row_steps")
    how = case.hyperparameters
    layer = linear(case["W0"], case["b"])
    adapted = S2FT(axis=how["axis"], indices=case["indices"]).attach(layer)
    optimizer = torch.optim.Adam(adapted.update.parameters(), lr=how["lr"], betas=how["betas"], eps=how["eps"])
    for _ in range(how["steps"]):
        optimizer.zero_grad()
        (adapted(case["x"]) - case["target"]).square().mean().backward()
        optimizer.step()
    case.close(adapted.update.s2, "s2")
    case.close(adapted.merged().weight, "W_merged")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_vectors_of_the_selection(dtype):
    case = vectors.load("s2ft", "selection")
    ratio = case.hyperparameters["ratio"]
    if dtype == torch.float32:
        case.tolerance = 1e-6
    seen = 0
    for axis in ("in", "out"):
        for block in case.hyperparameters["blocks"]:
            weight = case["W"].to(dtype)
            case.close(s2ft_scores(weight, axis, block), f"scores_{axis}_{block}")
            for largest in (True, False):
                method = S2FT(ratio=ratio, axis=axis, block=block, selection="weight", largest=largest)
                got = method.attach(linear(case["W"]).to(dtype)).update.indices
                assert torch.equal(got, case[f"indices_{axis}_{block}_{'largest' if largest else 'smallest'}"])
                seen += 1
    assert seen == 8


# Which channels


def blocks_of(adapted, block=1):
    return {name: layer.update.indices.view(-1, block)[:, 0] // block for name, layer in adapted.layers.items()}


def test_random_blocks_are_drawn_over_all_layers_together():
    counts = []
    for seed in range(40):
        adapted = lowdim.adapt(small_model(), S2FT(ratio=0.2, block=2, seed=seed))
        found = blocks_of(adapted, 2)
        counts.append({name: len(blocks) for name, blocks in found.items()})
        assert sum(counts[-1].values()) == int((8 // 2 + 12 // 2) * 0.2)
        for name, layer in adapted.layers.items():
            indices = layer.update.indices
            assert torch.equal(indices, (found[name][:, None] * 2 + torch.arange(2)).flatten())
            assert bool((indices.diff() > 0).all())
            assert indices.dtype == torch.int64
            assert layer.update.s2.shape == (layer.out_features, len(indices))
    assert {tuple(count.values()) for count in counts} == {(0, 2), (1, 1), (2, 0)}


def test_the_draw_is_uniform():
    # Each of the 20 channels of the small model is trained with probability 6/20.
    hits = torch.zeros(20)
    for seed in range(300):
        found = S2FT(ratio=0.3).prepare({"a": nn.Linear(8, 2), "b": nn.Linear(12, 2)}, seed=seed)
        hits[torch.tensor(found["a"]["blocks"] + [8 + i for i in found["b"]["blocks"]])] += 1
    assert float((hits / 300 - 0.3).abs().max()) < 5 * (0.3 * 0.7 / 300) ** 0.5


def test_both_seeds_decide_and_nothing_else_does():
    def draw(seed, of_adapt):
        return blocks_of(lowdim.adapt(small_model(), S2FT(ratio=0.3, seed=seed), seed=of_adapt))

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    torch.manual_seed(1)
    first = draw(0, 0)
    torch.manual_seed(2)
    assert same(first, draw(0, 0))
    assert not same(first, draw(1, 0))
    assert not same(first, draw(0, 1))


def test_alone_a_layer_draws_from_the_generator_or_the_methods_seed():
    layer = nn.Linear(40, 3)
    method = S2FT(ratio=0.25)
    assert len(method.attach(layer).update.indices) == 10
    assert torch.equal(method.attach(layer).update.indices, method.attach(layer).update.indices)
    drawn = [method.attach(layer, generator=stream(seed, "test")).update.indices for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_nothing_to_train_is_a_warning():
    with pytest.warns(UserWarning, match=r"ratio=0\.01 selects none of the 20 channel blocks"):
        lowdim.adapt(small_model(), S2FT(ratio=0.01))


def test_a_layer_without_a_channel_is_left_as_it_is(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, S2FT(indices={"body.first": [], "body.second": [1]}))
    update = adapted.layers["body.first"].update
    assert update.s2.shape == (12, 0)
    x = sample_input()
    want = small_model()(x)
    assert torch.equal(model(x), want)
    optimizer = torch.optim.AdamW(adapted.param_groups(0.1))
    model(x).square().sum().backward()
    optimizer.step()
    adapted.step(optimizer)
    assert not torch.equal(model(x), want)
    with pytest.warns(UserWarning, match=r"zero in 1 of 2 .*body\.first"):
        assert adapted.check()["body.first"] == 0.0
    adapted.save(tmp_path)
    adapted.export(tmp_path / "peft")
    twin = small_model()
    lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(x), model(x))
    out = S2FT(axis="out", indices=[]).attach(nn.Linear(4, 3))
    assert out.update.s2.shape == (0, 4)
    assert torch.equal(out(torch.ones(2, 4)), out.base(torch.ones(2, 4)))


def test_equal_scores_go_to_the_lower_index():
    layer = nn.Linear(6, 2, bias=False)
    layer.weight.data.fill_(1.0)
    for largest in (True, False):
        update = S2FT(ratio=0.5, selection="weight", largest=largest).attach(layer).update
        assert update.indices.tolist() == [0, 1, 2]


def loss_fn(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_activations_and_gradients_choose(axis, largest, block):
    model = small_model(dtype=torch.float64)
    batches = [sample_input(9, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    x = torch.cat(batches)
    hidden = torch.tanh(model.body["first"](x)).detach()
    weights = {name: model.body[name].weight for name in ("first", "second")}
    values = {"first": (x, model.body["first"](x)), "second": (hidden, model.body["second"](hidden))}
    grads = torch.autograd.grad(sum(loss_fn(model, batch) / len(batch) for batch in batches), list(weights.values()))
    for selection in ("activation", "gradient"):
        method = S2FT(ratio=0.5, axis=axis, block=block, selection=selection, largest=largest)
        adapted = lowdim.adapt(small_model(dtype=torch.float64), method, batches=batches, loss_fn=loss_fn)
        for name, grad in zip(weights, grads):
            if selection == "activation":
                scores = values[name][axis == "out"].detach().square().sum(0).view(-1, block).sum(1)
            else:
                scores = grad.square().sum(0 if axis == "in" else 1).view(-1, block).sum(1)
            want = scores.argsort(descending=largest)[: int(len(scores) * 0.5)].sort().values
            got = adapted.layers[f"body.{name}"].update.indices.view(-1, block)[:, 0] // block
            assert torch.equal(got, want), (selection, name)


def test_data_driven_selections_need_data():
    for axis in ("in", "out"):
        for selection in ("activation", "gradient"):
            method = S2FT(axis=axis, selection=selection)
            with pytest.raises(ValueError, match="batches is missing"):
                lowdim.adapt(small_model(), method)
            with pytest.raises(ValueError, match="needs stats"):
                method.attach(nn.Linear(4, 4))
    assert not S2FT(selection="gradient", indices=[1]).needs


def test_scores_that_are_no_numbers_are_refused():
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"layer 0.*NaN"):
        lowdim.adapt(nn.Sequential(layer), S2FT(selection="weight"))


# Given channels


@pytest.mark.parametrize("given", [[3, 0, 2], (3, 0, 2), torch.tensor([3, 0, 2])], ids=["list", "tuple", "tensor"])
def test_given_channels_are_put_in_order(given):
    for method in (S2FT(indices=given), S2FT(indices={"0": given})):
        adapted = lowdim.adapt(nn.Sequential(nn.Linear(4, 3)), method)
        assert adapted.layers["0"].update.indices.tolist() == [0, 2, 3]
        assert S2FT.from_config(method.config()) == method


def test_given_channels_name_their_layers():
    adapted = lowdim.adapt(small_model(), S2FT(indices={"body.second": [1, 11]}))
    assert list(adapted.layers) == ["body.second"]
    with pytest.raises(UnknownNameError, match=r"'body\.first'"):
        lowdim.adapt(small_model(), S2FT(indices={"body.second": [1]}, target_modules=["first", "second"]))
    with pytest.raises(UnknownNameError, match=r"'body\.first'"):
        lowdim.adapt(small_model(), S2FT(indices={"body.first": [1], "body.second": [1]}, target_modules=["second"]))
    with pytest.raises(ValueError, match="indices is a mapping from layers"):
        S2FT(indices={"0": [1]}).attach(nn.Linear(4, 4))


# Traps


def test_two_axes_in_one_model_by_adapting_twice():
    model = gated()
    up = lowdim.adapt(model, S2FT(ratio=0.2, axis="out", target_modules=["up"]))
    down = lowdim.adapt(model, S2FT(ratio=0.2, axis="in", target_modules=["down"]))
    assert list(up.layers) == ["up"]
    assert list(down.layers) == ["down"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"up.update.s2", "down.update.s2"}
    assert set(up.trainable()) == {"up.update.s2"}
    optimizer = torch.optim.AdamW(up.param_groups(0.05) + down.param_groups(0.05))
    x = torch.randn(32, 7, generator=stream(0, "test"))
    losses = []
    for _ in range(20):
        loss = (model(x) - x.sin()).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        up.step(optimizer)
        down.step(optimizer)
    assert losses[-1] < 0.8 * losses[0]
    want = model(x)
    up.merge()
    down.merge()
    assert relative_error(model(x), want) < 1e-6


def test_gate_projections_can_be_trained_too():
    adapted = lowdim.adapt(gated(), S2FT(ratio=0.2, axis="out", target_modules=["gate", "up"]))
    assert sum(layer.update.s2.shape[0] for layer in adapted.layers.values()) == int(36 * 0.2)


def test_inputs_of_any_number_of_dimensions():
    for axis in ("in", "out"):
        adapted = S2FT(axis=axis, indices=[0, 3]).attach(nn.Linear(5, 4))
        with torch.no_grad():
            adapted.update.s2.normal_()
        x = torch.randn(2, 3, 4, 5)
        for rows in (x, x[0], x[0, 0], x[0, 0, 0], x[:0]):
            assert torch.allclose(adapted(rows), adapted.merged()(rows), atol=1e-5)


def test_whole_heads_of_grouped_query_attention(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    heads = lowdim.adapt(model, S2FT(ratio=0.5, block=4, target_modules=["o_proj"]))
    values = lowdim.adapt(model, S2FT(ratio=0.5, axis="out", block=4, target_modules=["v_proj"]))
    for adapted, total in ((heads, 8), (values, 4)):
        chosen = torch.cat([layer.update.indices.view(-1, 4) for layer in adapted.layers.values()])
        assert len(chosen) == total * 0.5
        assert bool((chosen[:, 0] % 4 == 0).all())
        with torch.no_grad():
            for layer in adapted.layers.values():
                layer.update.s2.normal_()
    ids = torch.arange(12).view(2, 6)
    want = model(ids).logits
    heads.merge()
    values.merge()
    assert relative_error(model(ids).logits, want) < 1e-5


def test_merging_is_undone_by_restoring_to_the_same_bits():
    model = small_model(dtype=torch.bfloat16)
    adapted = lowdim.adapt(model, S2FT(ratio=0.5))
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.s2.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted.merge()
    adapted.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_dtype_is_that_of_the_weight_unless_asked():
    model = small_model(dtype=torch.bfloat16)
    assert lowdim.adapt(model, S2FT(ratio=0.5)).layers["body.first"].update.s2.dtype == torch.bfloat16
    model = small_model(dtype=torch.bfloat16)
    for axis in ("in", "out"):
        name = "first" if axis == "in" else "second"
        adapted = lowdim.adapt(model, S2FT(ratio=0.5, axis=axis, target_modules=[name]), dtype=torch.float32)
        assert adapted.layers[f"body.{name}"].update.s2.dtype == torch.float32
    y = model(sample_input(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(bool(p.grad.any()) for p in adapted.trainable().values())


def test_disjoint_channels_fuse_without_interference():
    weight = torch.randn(6, 10, dtype=torch.float64, generator=stream(0, "test"))
    model = nn.Sequential(linear(weight))
    adapters = AdapterSet(model)
    for name, channels in (("one", [0, 4]), ("two", [2, 7, 9])):
        adapters.add(name, S2FT(indices=channels))
        with torch.no_grad():
            adapters[name].layers["0"].update.s2.normal_()
    updates = {name: adapters[name].layers["0"].update for name in ("one", "two")}
    total = updates["one"].delta() + updates["two"].delta()
    for update in updates.values():
        assert torch.equal(total[:, update.indices], update.s2)
    assert int((total != 0).sum()) == 6 * 5
    adapters.activate("one", "two")
    x = torch.randn(3, 10, dtype=torch.float64)
    assert relative_error(model(x), x @ (weight + total).T) < 1e-12


# What it costs


def test_the_backward_pass_keeps_only_the_chosen_inputs():
    adapted = S2FT(indices=[1, 5]).attach(make_layer("linear"))
    x = torch.randn(40, 12, dtype=torch.float64)
    assert max(t.numel() for t in kept_tensors(lambda: adapted(x), adapted)) == 40 * 2
    rows = S2FT(axis="out", indices=[1, 5]).attach(make_layer("linear"))
    kept = kept_tensors(lambda: rows(x), rows)
    assert sorted(t.numel() for t in kept) == [40 * 2, 40 * 12]  # the thin product and x, as for LoRA


def test_factors_are_exact_and_one_hot():
    for axis in ("in", "out"):
        update = S2FT(axis=axis, indices=[1, 5]).attach(make_layer("linear")).update
        with torch.no_grad():
            update.s2.normal_()
        A, B = update.lora_factors()
        assert A.shape == (2, 12)
        assert B.shape == (9, 2)
        assert torch.equal(B @ A, update.dense())
        places = A if axis == "in" else B.mT
        assert places.argmax(1).tolist() == [1, 5]
        assert torch.equal(places.sum(1), torch.ones(2, dtype=torch.float64))


def test_without_autograd_the_output_is_the_same():
    for axis in ("in", "out"):
        layer = make_layer("linear")
        adapted = S2FT(axis=axis, indices=[0, 7]).attach(layer)
        with torch.no_grad():
            adapted.update.s2.normal_()
        x = make_input(layer)
        want = adapted(x)
        with torch.no_grad():
            assert relative_error(adapted(x), want) <= 1e-14


# Bad input


def test_bad_input():
    with pytest.raises(UnknownNameError, match="axis"):
        S2FT(axis="rows")
    with pytest.raises(UnknownNameError, match="selection"):
        S2FT(selection="magnitude")
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="block"):
            S2FT(block=bad)
    with pytest.raises(ValueError, match="duplicates"):
        S2FT(indices=[1, 2, 1])
    with pytest.raises(ValueError, match=r"indices\['a'\] must not have duplicates"):
        S2FT(indices={"a": [1, 1]})
    for bad in ([-1], [0.5], [True]):
        with pytest.raises(ValueError, match="indices"):
            S2FT(indices=bad)
    with pytest.raises(ValueError, match=r"layer 0 .*below the 4 channels of axis 'in'; got 4"):
        lowdim.adapt(nn.Sequential(nn.Linear(4, 9)), S2FT(indices=[0, 4]))
    with pytest.raises(ValueError, match=r"layer 0 .*block must divide the 4 channels of axis 'in'; got 3"):
        lowdim.adapt(nn.Sequential(nn.Linear(4, 9)), S2FT(block=3))
    with pytest.raises(ValueError, match="block must divide the 4 channels"):
        S2FT(block=3).attach(nn.Linear(4, 9))
    for axis, block in (("rows", 1), ("in", 3), ("in", 0)):
        with pytest.raises(ValueError, match=r"axis|block"):
            s2ft_scores(torch.ones(4, 4), axis, block)
    for layer in (nn.Conv2d(4, 4, 3), nn.Embedding(4, 4)):
        with pytest.raises(TypeError, match="adapts linear"):
            S2FT().attach(layer)
