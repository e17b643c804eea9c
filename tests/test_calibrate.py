import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowdim.calibrate import call_model, capture, capturing, collect


class Net(nn.Module):
    """Attention-mask aware only in that it accepts one."""

    def __init__(self):
        super().__init__()
        self.drop, self.up, self.down = nn.Dropout(0.5), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, attention_mask=None):
        return self.down(torch.relu(self.up(self.drop(x))))


@pytest.fixture
def net():
    return Net()


def layers(model, *names):
    return {name: model.get_submodule(name) for name in names}


def rows(count=50, seed=0):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_input_statistics_are_pooled_over_batches_of_any_shape(net):
    x = rows(60)
    stats = collect(
        net, layers(net, "up", "down"), {"covariance", "norms"}, [x[:7], x[7:12].view(1, 5, 4), x[12:].view(6, 8, 4)]
    )
    torch.testing.assert_close(stats["up"]["covariance"], x.double().T @ x.double())
    torch.testing.assert_close(stats["up"]["norms"], x.double().norm(dim=0))
    hidden = torch.relu(net.up(x)).detach().double()
    torch.testing.assert_close(stats["down"]["covariance"], hidden.T @ hidden, rtol=1e-6, atol=1e-6)
    assert stats["up"]["count"] == stats["down"]["count"] == 60
    assert stats["up"]["covariance"].dtype == torch.float64
    assert set(stats["up"]) == {"covariance", "norms", "count"}


def test_output_statistics(net):
    x = rows(60)
    stats = collect(net, layers(net, "up"), {"output_covariance"}, iter([x[:20], x[20:]]))["up"]
    y = net.up(x).detach().double()
    torch.testing.assert_close(stats["output_mean"], y.mean(0))
    torch.testing.assert_close(stats["output_covariance"], torch.cov(y.T, correction=0))
    assert stats["output_count"] == 60


def test_output_covariance_survives_a_large_mean():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = rows(80).double()
    want = torch.cov((x @ model[0].weight.detach().T).T, correction=0)
    with torch.no_grad():
        model[0].bias.fill_(1e8)
    got = collect(model, layers(model, "0"), {"output_covariance"}, [x[:30], x[30:]])["0"]["output_covariance"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)  # about 0 the sums would cancel to no digit at all


@pytest.mark.parametrize("flat", [False, True])
def test_masked_rows_are_left_out(flat):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x, attention_mask):
            return self.up(x.flatten(0, 1) if flat else x)

    model, x, mask = Model(), rows(10).view(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    batch = {"x": x, "attention_mask": mask}
    stats = collect(model, layers(model, "up"), {"covariance", "output_covariance"}, [batch])["up"]
    kept = x[mask.bool()].double()
    torch.testing.assert_close(stats["covariance"], kept.T @ kept)
    torch.testing.assert_close(stats["output_mean"], model.up(kept.float()).detach().double().mean(0))
    assert stats["count"] == stats["output_count"] == 7


def test_a_mask_of_another_shape_is_not_the_rows(net):
    x = rows(6).view(2, 3, 4)
    batch = {"x": x, "attention_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])}
    assert collect(net, layers(net, "up"), {"norms"}, [batch])["up"]["count"] == 6


def test_gradients_are_summed_and_divided_by_the_batch_size(net):
    batches = [(rows(8), torch.randn(8, 3)), (rows(5, seed=1), torch.randn(5, 3))]
    got = collect(net, layers(net, "up"), {"gradient"}, batches, lambda m, b: F.mse_loss(m(b[0]), b[1]))["up"]["gradient"]
    net.eval()
    want = torch.zeros(6, 4)
    for x, y in batches:
        want += torch.autograd.grad(F.mse_loss(net(x), y), net.up.weight)[0] / len(x)
    torch.testing.assert_close(got, want)


def test_gradients_together_with_other_statistics(net):
    x = rows(8)
    stats = collect(net, layers(net, "down"), {"gradient", "norms"}, [x], lambda m, b: m(b).square().mean())["down"]
    assert set(stats) == {"gradient", "norms", "count"}
    assert stats["norms"].requires_grad is False


def test_layers_that_share_a_weight_share_its_gradient():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    stats = collect(model, layers(model, "0", "1"), {"gradient"}, [rows(8)], lambda m, b: m(b).square().mean())
    assert torch.equal(stats["0"]["gradient"], stats["1"]["gradient"])


def test_half_precision_gradients_are_summed_wide():
    model = nn.Linear(4, 3).bfloat16()
    net = nn.Sequential(model)
    stats = collect(net, layers(net, "0"), {"gradient"}, [rows(8).bfloat16()], lambda m, b: m(b).square().mean())
    assert stats["0"]["gradient"].dtype == torch.float32


def test_transposed_layers_and_convolutions():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(3, 4))
    stats = collect(model, layers(model, "0"), {"gradient", "covariance"}, [rows(8)], lambda m, b: m(b).square().mean())["0"]
    assert stats["gradient"].shape == (3, 4)
    assert stats["covariance"].shape == (4, 4)

    conv = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, stride=2))
    x = torch.randn(3, 2, 6, 6)
    stats = collect(conv, layers(conv, "0"), {"covariance", "output_covariance"}, [x])["0"]
    patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 18).double()
    torch.testing.assert_close(stats["covariance"], patches.T @ patches)
    outputs = conv(x).detach().movedim(1, -1).reshape(-1, 5).double()
    torch.testing.assert_close(stats["output_covariance"], torch.cov(outputs.T, correction=0), rtol=1e-6, atol=1e-7)


def test_a_layer_called_by_keyword_and_one_used_twice():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x):
            return self.up(input=self.up(x))

    model, x = Model(), rows(5)
    stats = collect(model, layers(model, "up"), {"covariance"}, [x])["up"]
    second = model.up(x).detach().double()
    torch.testing.assert_close(stats["covariance"], x.double().T @ x.double() + second.T @ second, rtol=1e-6, atol=1e-6)
    assert stats["count"] == 10


def context_of(*samples):
    """The definition, one sample at a time."""
    return sum((s / s.max().abs()).T @ (s / s.max().abs()) for s in samples) / len(samples)


def test_context_covariance_weights_samples_equally(net):
    x = rows(30).view(5, 6, 4) * torch.tensor([1.0, 100.0, 1e-3, 7.0, 1.0])[:, None, None]
    stats = collect(net, layers(net, "up", "down"), {"context_covariance"}, [x[:2], x[2:]])
    torch.testing.assert_close(stats["up"]["covariance"], context_of(*x))
    hidden = torch.relu(net.up(x)).detach()
    torch.testing.assert_close(stats["down"]["covariance"], context_of(*hidden))
    assert stats["up"]["covariance"].dtype == torch.float32
    assert (stats["up"]["samples"], stats["up"]["count"]) == (5, 30)
    assert set(stats["up"]) == {"covariance", "samples", "count"}


def test_context_covariance_divides_by_the_largest_entry_not_the_largest_magnitude(net):
    x = -rows(6).abs().view(1, 6, 4) - 0.01
    got = collect(net, layers(net, "up"), {"context_covariance"}, [x])["up"]["covariance"]
    scale = float(x.max()) ** 2
    torch.testing.assert_close(got, x[0].T @ x[0] / scale)
    assert abs(float(x.min())) ** 2 > 2 * scale


class Named(NamedTuple):
    x: torch.Tensor
    attention_mask: torch.Tensor


@pytest.mark.parametrize("batch", [dict, Named])
@pytest.mark.parametrize("flat", [False, True])
def test_context_covariance_leaves_padding_out(flat, batch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x, attention_mask):
            return self.up(x.flatten(0, 1) if flat else x)

    model, x = Model(), rows(20).view(4, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    x[mask == 0] = torch.nan  # nothing of it may count
    stats = collect(model, layers(model, "up"), {"context_covariance"}, [batch(x=x, attention_mask=mask)])["up"]
    torch.testing.assert_close(stats["covariance"], context_of(x[0, :3], x[1, 1:], x[3]))
    assert (stats["samples"], stats["count"]) == (3, 12)


def test_context_covariance_of_rows_pictures_and_repeated_layers(net):
    x = rows(8)
    one = collect(net, layers(net, "up"), {"context_covariance"}, [x])["up"]
    torch.testing.assert_close(one["covariance"], context_of(x))  # rows without a mask are one sample
    twice = collect(net, layers(net, "up"), {"context_covariance"}, [x, x[:0], 3 * x])["up"]
    torch.testing.assert_close(twice["covariance"], one["covariance"])
    assert (twice["samples"], twice["count"]) == (2, 16)

    conv, pictures = nn.Sequential(nn.Conv2d(2, 5, 3)), torch.randn(3, 2, 6, 6)
    got = collect(conv, layers(conv, "0"), {"context_covariance"}, [pictures])["0"]
    torch.testing.assert_close(got["covariance"], context_of(*F.unfold(pictures, 3).transpose(1, 2)))


def test_context_covariance_together_with_norms(net):
    x = rows(40).view(5, 8, 4)
    stats = collect(net, layers(net, "up"), {"context_covariance", "norms"}, [x])["up"]
    assert set(stats) == {"covariance", "norms", "count", "samples"}
    assert stats["count"] == 40


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_context_covariance_refuses_a_sample_without_a_scale(net, value):
    x = rows(40).view(5, 8, 4)
    x[3] = value
    with pytest.raises(ValueError, match=r"layer up: the largest input of a sample is (0|nan|inf);"):
        collect(net, layers(net, "up"), {"context_covariance"}, [x])


def test_few_rows_leave_the_context_covariance_singular(net):
    with pytest.warns(UserWarning, match=r"layer down with 6 inputs saw 5 rows .*\(1 of 2 layers") as caught:
        collect(net, layers(net, "up", "down"), {"context_covariance"}, [rows(5)])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(net, layers(net, "up", "down"), {"context_covariance"}, [rows(6)])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("needs", [{"covariance"}, {"gradient"}, {"context_covariance"}])
def test_the_model_is_left_as_it_was(net, needs, fails):
    net.down.eval()
    net.up.bias.requires_grad_(False)
    grad = net.down.weight.grad = torch.ones(3, 6)
    state = copy.deepcopy(net.state_dict())
    modes = {name: module.training for name, module in net.named_modules()}
    batches = [rows(4), torch.zeros(2, 99)] if fails else [rows(4)]
    try:
        collect(net, layers(net, "up"), needs, batches, lambda m, b: m(b).square().mean())
    except RuntimeError:
        assert fails
    else:
        assert not fails
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["up.bias"]
    assert net.down.weight.grad is grad
    assert torch.equal(grad, torch.ones(3, 6))
    assert net.up.weight.grad is None
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_batches_are_consumed_once_and_seen_without_dropout(net):
    drawn = []

    def batches():
        for i in range(3):
            drawn.append(i)
            yield rows(5, seed=i)

    stats = collect(net.train(), layers(net, "up"), {"norms"}, batches())["up"]
    assert drawn == [0, 1, 2]
    want = torch.cat([rows(5, seed=i) for i in range(3)]).double().norm(dim=0)
    torch.testing.assert_close(stats["norms"], want)  # dropout would have doubled or zeroed entries


def test_call_model():
    def model(*args, **kwargs):
        return args, kwargs

    assert call_model(model, 3) == ((3,), {})
    assert call_model(model, (3, 4)) == call_model(model, [3, 4]) == ((3, 4), {})
    assert call_model(model, {"a": 3}) == ((), {"a": 3})


def test_nothing_needed_reads_nothing(net):
    assert collect(net, layers(net, "up"), (), None) == {"up": {}}


@pytest.mark.parametrize(
    ("needs", "batches", "loss", "error", "match"),
    [
        ({"fisher"}, [], None, ValueError, r"needs must be among .*; got \['fisher'\]"),
        ({"covariance", "context_covariance"}, [rows(3)], None, ValueError, "give the same entry"),
        ({"context_covariance"}, [rows(3)[:0]], None, ValueError, "layer up saw no token"),
        (
            {"context_covariance"},
            [rows(9) - 1 / (rows(9) > -1)],
            None,
            ValueError,
            "layer up: its covariance .* NaN or infinite",
        ),
        ({"norms"}, None, None, ValueError, "batches is missing: norms"),
        ({"norms"}, [], None, ValueError, "batches is empty"),
        ({"norms"}, {"x": rows(3)}, None, TypeError, "got a single dict: put it in a list"),
        ({"norms"}, rows(3), None, TypeError, "got a single Tensor: put it in a list"),
        ({"gradient"}, [rows(3)], None, ValueError, "loss_fn is missing"),
        ({"gradient"}, [rows(3)], lambda m, b: m.down.weight.sum() + 0 * m(b).sum(), ValueError, "layer up got no gradient"),
        ({"gradient"}, [rows(3)], lambda m, b: m(b).sum() * torch.nan, ValueError, "layer up: its gradient .* NaN"),
        ({"norms"}, [rows(3) * torch.inf], None, ValueError, "layer up: its norms .* NaN or infinite"),
        ({"output_covariance"}, [rows(3)[:0]], None, ValueError, "layer up saw no token"),
    ],
)
def test_wrong_input(net, needs, batches, loss, error, match):
    with pytest.raises(error, match=match):
        collect(net, layers(net, "up"), needs, batches, loss)


def test_embeddings_have_no_input_statistics():
    model = nn.Sequential(nn.Embedding(5, 4))
    with pytest.raises(ValueError, match="input statistics of an embedding"):
        collect(model, layers(model, "0"), {"covariance"}, [torch.tensor([1, 2])])


# capture


class Branching(nn.Module):
    """A block that runs twice, one that gives a tuple, and one that only long inputs reach."""

    def __init__(self):
        super().__init__()
        self.twice, self.pair, self.rare = nn.Linear(3, 3), nn.LSTM(3, 2), nn.Linear(3, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.twice(self.twice(x)))
        if len(x) > 4:
            self.rare(x)
        return self.pair(x)[0]


def test_capture_gives_outputs_and_inputs_of_each_batch():
    model, batches = Branching().train(), [torch.randn(2, 3), torch.randn(5, 3)]
    W, b = model.twice.weight.detach(), model.twice.bias.detach()
    outputs = list(capture(model, ["twice", "pair", "rare"], iter(batches)))
    inputs = list(capture(model, ["twice", "rare"], batches, inputs=True))
    for x, out, into in zip(batches, outputs, inputs, strict=True):
        once = x @ W.T + b
        again = once @ W.T + b
        torch.testing.assert_close(out["twice"], torch.cat([once, again]))
        torch.testing.assert_close(into["twice"], torch.cat([x, once]))
        assert out["pair"].shape == (len(x), 2)
        assert not out["pair"].requires_grad
        assert ("rare" in out) is ("rare" in into) is (len(x) > 4)
    torch.testing.assert_close(inputs[1]["rare"], (batches[1] @ W.T + b) @ W.T + b)  # no dropout
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_capturing_keeps_the_graph_and_forgets_the_last_pass():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    with capturing(model, ["0"]) as found:
        model(torch.ones(4, 3))
        model(torch.ones(1, 3))
        assert found["0"].shape == (1, 2)
        found["0"].sum().backward()
    torch.testing.assert_close(model[0].weight.grad, torch.ones(2, 3))
    model(torch.ones(4, 3))
    assert found["0"].shape == (1, 2)


def test_capture_leaves_no_hook_after_an_error():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    with pytest.raises(RuntimeError):
        list(capture(model, ["0"], [torch.ones(1, 4)]))
    with pytest.raises(ValueError, match=r"'1\.linear' is not a module of the model; nearest: "):
        list(capture(model, ["0", "1.linear"], [torch.ones(1, 3)]))
    with pytest.raises(ValueError, match="names must hold at least one"):
        list(capture(model, [], [torch.ones(1, 3)]))
    with pytest.raises(TypeError, match="batches must be an iterable of batches; got a single Tensor: put it in a list"):
        list(capture(model, ["0"], torch.ones(1, 3)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_capture_needs_tensors():
    class Dictionary(nn.Module):
        def forward(self, x):
            return {"x": x}

    with pytest.raises(TypeError, match="module 0: its output must be a tensor; got dict"):
        list(capture(nn.Sequential(Dictionary()), ["0"], [torch.ones(1)]))
