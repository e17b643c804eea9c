from typing import ClassVar

import pytest
import torch
from adapter_starts import leading
from adapter_vectors import layer_of, train
from torch import nn

import lowdim
import vectors
from lowdim.adapters import LoRASB, LoRAXS
from lowdim.plan.kept import kept_tensors
from lowdim.surgery import weight_matrix
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model


class TestLoRASB(AdapterCase):
    starts_unchanged = False  # the model starts at its first update
    random_start = False  # exact decompositions at this size
    rank, rate, warmup = 3, 0.04, 4

    def method(self, **changes):
        return LoRASB(**{"rank": self.rank, "lr": self.rate, "warmup_steps": self.warmup, **changes})

    def dense(self, update):
        return update.B @ update.R @ update.A  # it has no scale

    def start(self, weight, stats):
        U, sigma, Vh = leading(-self.rate / self.warmup * stats["gradient"].sign(), self.rank)
        return {"B": U, "R": torch.diag(sigma), "A": Vh}

    def max_delta_rank(self, out_features, in_features):
        return 3


class TestLoRAXS(AdapterCase):
    start_tolerance: ClassVar = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 1e-2}  # R starts as noise of 1e-5
    rank, alpha = 3, 4

    def method(self, **changes):
        return LoRAXS(**{"rank": self.rank, "alpha": self.alpha, **changes})

    def dense(self, update):
        return self.alpha / self.rank * update.B @ update.R @ update.A

    def start(self, weight, stats):
        U, sigma, Vh = leading(weight, self.rank)
        return {"B": U, "A": sigma[:, None] * Vh}

    def max_delta_rank(self, out_features, in_features):
        return 3


@pytest.mark.parametrize("name", ["sgd_steps", "adam_steps"])
def test_vectors(name):
    case = vectors.load("lora-sb", name)
    how = case.hyperparameters
    layer = layer_of(case)
    method = LoRASB(rank=how["rank"], lr=how["lr"], warmup_steps=how["warmup_steps"], sign=how["sign"])
    adapted = method.attach(layer, stats={"gradient": case["gradient"]})
    assert torch.equal(adapted.base.weight, case["W"])
    case.close(adapted.delta(), "delta0")
    case.close(adapted.update.R.diagonal(), "singular_values")
    case.close(adapted(case["x"]), "y0")
    train(case, adapted, how["steps"], lambda step: case.close(adapted.delta(), case["delta_steps"][step]), how["train_lr"])
    case.close(adapted(case["x"]), "y_end")


def test_vector_of_lora_xs():
    case = vectors.load("lora-sb", "loraxs_forward")
    adapted = LoRAXS(rank=3, alpha=6).attach(layer_of(case))
    with torch.no_grad():
        adapted.update.R.copy_(case["R"])
    case.close(adapted.update.B @ adapted.update.A, "BA")
    case.close(adapted(case["x"]), "y")
    case.close(adapted.delta(), "delta")


def test_the_start_is_the_best_approximation_of_the_first_step():
    gradient = torch.randn(9, 12, dtype=torch.float64)
    gradient[0, :] = 0.0  # sign(0) = 0
    adapted = LoRASB(rank=4, lr=0.2, warmup_steps=10).attach(make_layer("linear"), stats={"gradient": gradient})
    step = -0.02 * gradient.sign()
    u, s, vh = torch.linalg.svd(step, full_matrices=False)
    assert relative_error(adapted.delta(), (u[:, :4] * s[:4]) @ vh[:4]) < 1e-12
    plain = LoRASB(rank=9, lr=0.2, sign=False).attach(make_layer("linear"), stats={"gradient": gradient})
    assert relative_error(plain.delta(), -0.2 * gradient) < 1e-12


def test_factors_are_orthonormal_so_a_step_on_r_is_the_projected_gradient():
    adapted = LoRASB(rank=3, lr=0.1).attach(make_layer("linear"), stats={"gradient": torch.randn(9, 12)})
    A, B, R = adapted.update.A, adapted.update.B, adapted.update.R
    x = torch.randn(6, 12, dtype=torch.float64)
    weight = (adapted.effective_weight()).requires_grad_()
    (x @ weight.T).pow(3).sum().backward()
    before = adapted.delta()
    (adapted(x) - adapted.base.bias).pow(3).sum().backward()
    with torch.no_grad():
        R -= 0.1 * R.grad
    moved = adapted.delta() - before
    assert relative_error(moved, -0.1 * B @ B.T @ weight.grad @ A.T @ A) < 1e-10


def test_gradients_are_summed_over_batches_and_divided_by_their_size():
    model = small_model(dtype=torch.float64)
    batches = [sample_input(4, seed=s, dtype=torch.float64) for s in (1, 2)]
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    layer = model.body["second"]
    total = sum(torch.autograd.grad(loss(model, b), layer.weight)[0] / 4 for b in batches)
    adapted = lowdim.adapt(
        model, LoRASB(rank=6, sign=False, lr=1.0, target_modules=["second"]), batches=iter(batches), loss_fn=loss
    )
    assert relative_error(adapted.layers["body.second"].delta(), -total) < 1e-12
    assert layer.weight.grad is None


def test_large_sign_matrix_is_approximated_as_well_as_by_the_exact_decomposition():
    gradient = torch.randn(700, 640, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(640, 700)
    adapted = LoRASB(rank=24, lr=1.0).attach(layer, stats={"gradient": gradient}, generator=torch.Generator().manual_seed(1))
    s = torch.linalg.svdvals(gradient.sign())
    got = float(adapted.delta().square().sum() / s[:24].square().sum())
    assert 0.99 < got <= 1 + 1e-5


def test_the_backward_pass_keeps_thin_products_only():
    adapted = LoRAXS(rank=2).attach(make_layer("linear"))
    x = torch.randn(40, 12, dtype=torch.float64)
    assert max(t.numel() for t in kept_tensors(lambda: adapted(x))) == 40 * 2


def test_bad_input():
    layer = nn.Linear(5, 4)
    method = LoRASB(rank=2)
    with pytest.raises(ValueError, match="needs stats"):
        method.attach(layer)
    with pytest.raises(ValueError, match=r"must have shape \(4, 5\); got \(5, 4\)"):
        method.attach(layer, stats={"gradient": torch.ones(5, 4)})
    with pytest.raises(ValueError, match="NaN"):
        method.attach(layer, stats={"gradient": torch.full((4, 5), torch.nan)})
    with pytest.raises(ValueError, match="all zero"):
        method.attach(layer, stats={"gradient": torch.zeros(4, 5)})
    with pytest.raises(ValueError, match="at most min"):
        LoRASB(rank=5).attach(layer, stats={"gradient": torch.ones(4, 5)})
    with pytest.raises(ValueError, match="loss_fn is missing"):
        lowdim.adapt(small_model(), method, batches=[sample_input()])
    with pytest.raises(ValueError, match="batches is missing"):
        lowdim.adapt(small_model(), method)
    only_first = lambda model, batch: model.body["first"](batch).square().mean()  # noqa: E731
    with pytest.raises(ValueError, match=r"body\.second got no gradient"):
        lowdim.adapt(small_model(), method, batches=[sample_input()], loss_fn=only_first)
    for field, bad in [("lr", 0.0), ("lr", -1), ("warmup_steps", 0), ("warmup_steps", 0.5), ("rank", 0)]:
        with pytest.raises(ValueError, match=field):
            LoRASB(**{field: bad})
    for field, bad in [("alpha", 0), ("init_std", -1e-5), ("rank", 0)]:
        with pytest.raises(ValueError, match=field):
            LoRAXS(**{field: bad})
    with pytest.raises(TypeError, match="alpha"):
        LoRASB(alpha=16)


def test_w_is_not_touched():
    layer = make_layer("linear")
    before = layer.weight.detach().clone()
    adapted = LoRASB(rank=2).attach(layer, stats={"gradient": torch.randn(9, 12)})
    assert adapted.base is layer
    assert torch.equal(weight_matrix(adapted.base), before)
