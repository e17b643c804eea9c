"""SaRA: the shared case, the vectors, and which entries the mask holds."""

import pytest
import torch
from torch import nn

import lowdim
import vectors
from lowdim.adapters import SaRA
from lowdim.adapters.sara.method import NOMINAL
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model


@pytest.mark.filterwarnings("ignore:no entry of")  # test_any_shape has layers of a single weight
class TestSaRA(AdapterCase):
    random_start = False  # everything follows from the weight
    exact_in_peft = False  # the update is sparse, of full rank
    has_factors = False
    threshold = 0.15

    def method(self, **changes):
        changes.pop("rank", None)  # there is none
        return SaRA(**{"threshold": self.threshold, **changes})

    def dense(self, update):
        change = torch.zeros_like(update.mask, dtype=update.values.dtype)
        return change.masked_scatter(update.mask, update.values - update.initial).flatten(1)

    def start(self, weight, stats):
        small = weight[weight.abs() < self.threshold]
        return {"values": small, "initial": small, "active": 1.0}

    def test_shapes_are_known_without_numbers(self):  # how many entries are trained follows from the numbers
        real = self.adapt(small_model(), disturbed=False).model.state_dict()
        with torch.device("meta"):
            model = small_model()
        on_meta = lowdim.adapt(model, self.method(), initialise=False).model.state_dict()
        counted = lowdim.adapt(small_model(), self.method(), initialise=False).model.state_dict()
        assert on_meta.keys() == real.keys()
        for key, value in real.items():
            assert counted[key].shape == value.shape
            single = key.endswith(("values", "active", "initial"))
            share = round(NOMINAL * real[key.rsplit(".", 1)[0] + ".mask"].numel()) if single else 0
            assert on_meta[key].shape == ((share,) if single else value.shape)

    def test_errors_name_the_layer(self):  # a threshold takes the place of the rank
        for bad in (0.0, -1e-3, float("nan"), float("inf"), None):
            with pytest.raises(ValueError, match="threshold"):
                self.method(threshold=bad)
        with pytest.raises(ValueError, match="dropout"):
            self.method(dropout=1.0)


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_vectors_of_the_mask():
    case = vectors.load("sara", "mask")
    threshold = case.hyperparameters["threshold"]
    update = SaRA(threshold).attach(linear(case["W0"])).update
    assert torch.equal(update.mask, case["mask"])
    assert torch.equal(update.values.detach(), case["values"])
    case.close(torch.tensor(SaRA.default_lr(threshold), dtype=torch.float64), "default_lr")
    assert bool(update.active.all())


def test_vectors_of_the_progressive_selection():
    case = vectors.load("sara", "progressive")
    how = case.hyperparameters
    model = nn.Sequential(linear(case["W1"]), nn.ReLU(), linear(case["W2"]))
    adapted = lowdim.adapt(model, SaRA(how["threshold"], progressive_iter=how["progressive_iter"]))
    names = ("lr", "weight_decay", "betas", "eps")
    optimizer = torch.optim.AdamW(adapted.trainable().values(), **{name: how[name] for name in names})
    losses = []
    for step in range(how["steps"]):
        optimizer.zero_grad()
        loss = (model(case["x"]) - case["target"]).square().mean() + adapted.regularizer()
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        adapted.step(optimizer)
        for layer, steps in zip(adapted.layers.values(), ("W1_steps", "W2_steps")):
            case.close(layer.effective_weight(), case[steps][step])
    case.close(torch.stack(losses), "losses")
    left = 0
    for layer, name in zip(adapted.layers.values(), ("active1", "active2")):
        dense = torch.zeros_like(case[name])
        dense[layer.update.mask] = layer.update.active
        assert torch.equal(dense, case[name])
        left += int((~layer.update.active).sum())
    assert left > 0


def test_vectors_of_the_nuclear_penalty():
    case = vectors.load("sara", "nuclear")
    how = case.hyperparameters
    model = nn.Sequential(linear(case["W0"]))
    adapted = lowdim.adapt(model, SaRA(how["threshold"], lambda_rank=how["lambda_rank"]))
    update = adapted.layers["0"].update
    names = ("lr", "weight_decay", "betas", "eps")
    optimizer = torch.optim.AdamW(adapted.trainable().values(), **{name: how[name] for name in names})
    norms = []
    for _ in range(how["steps"]):
        norms.append(update.nuclear_norm().detach())
        optimizer.zero_grad()
        penalty = adapted.regularizer()
        assert float(penalty.detach()) == pytest.approx(how["lambda_rank"] * float(norms[-1]), rel=1e-12)
        ((model(case["x"]) - case["target"]).square().mean() + penalty).backward()
        optimizer.step()
        adapted.step(optimizer)
    case.close(torch.stack(norms), "nuclear")
    case.tolerance = 1e-9  # of all but the norm
    case.close(update.values, "values")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_mask_is_strict_and_in_the_order_of_rows(dtype):
    layer = nn.Linear(3, 2, bias=False, dtype=dtype)
    layer.weight.data = torch.tensor([[0.5, -0.25, 0.125], [0.0, 0.375, -0.75]], dtype=dtype)
    update = SaRA(threshold=0.5).attach(layer).update
    assert update.mask.tolist() == [[False, True, True], [True, True, False]]
    assert update.values.tolist() == [-0.25, 0.125, 0.0, 0.375]
    assert update.values.dtype == dtype
    assert update.mask.dtype == update.active.dtype == torch.bool


def test_a_threshold_is_not_rounded_to_the_weights_dtype():
    # The bfloat16 number next to 0.002 is below it; rounded to bfloat16, the threshold would be that number itself.
    weight = torch.tensor([[0.002, 0.0021]], dtype=torch.bfloat16)
    assert float(weight[0, 0]) < 0.002 < float(weight[0, 1])
    layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    layer.weight.data = weight
    assert SaRA(threshold=2e-3).attach(layer).update.mask.tolist() == [[True, False]]


def test_a_convolutions_mask_has_the_weights_shape():
    conv = nn.Conv2d(4, 6, 3)
    update = SaRA(threshold=0.05).attach(conv).update
    assert torch.equal(update.mask, conv.weight.abs() < 0.05)
    assert torch.equal(update.values, conv.weight[update.mask])


def test_every_entry_or_none():
    model, plain = small_model(), small_model()
    adapted = lowdim.adapt(model, SaRA(threshold=10.0, target_modules=["first"]))
    assert len(adapted.layers["body.first"].update.values) == 12 * 8
    x = sample_input()
    assert torch.equal(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    whole = plain.body["first"].weight.grad.flatten()
    assert relative_error(adapted.layers["body.first"].update.values.grad, whole) < 1e-6

    with pytest.warns(UserWarning, match=r"no entry of Linear with weight \(6, 12\)"):
        none = lowdim.adapt(small_model(), SaRA(threshold=1e-12, target_modules=["second"]))
    assert none.layers["body.second"].update.values.shape == (0,)
    inner = x.clone().requires_grad_()
    none.model(inner).square().sum().backward()
    none.step()
    assert bool(inner.grad.any())
    assert not list(none.trainable())
    assert torch.equal(none.model(x), plain(x))


def test_biases_stay():
    model = small_model()
    adapted = lowdim.adapt(model, SaRA(threshold=10.0))
    assert all(name.endswith(".update.values") for name in adapted.trainable())
