"""SaRA's nuclear penalty: its gradient, and the layer that is drawn for each step."""

import itertools

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import SaRA
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer


def big(seed=0, dims=(70, 72, 66)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(n, out) for n, out in itertools.pairwise(dims)])


def test_the_gradient_of_the_nuclear_norm():
    update = SaRA(threshold=0.2).attach(make_layer("linear")).update
    update.select(0.1)
    value = update.nuclear_norm()
    (got,) = torch.autograd.grad(value, update.values)
    dense = torch.zeros(9, 12, dtype=torch.float64)
    dense[update.mask] = update.values.detach() * update.active
    dense.requires_grad_()
    want = torch.linalg.matrix_norm(dense, "nuc")
    want.backward()
    assert relative_error(value, want) < 1e-12
    assert relative_error(got, dense.grad[update.mask] * update.active) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_nuclear_norm_of_zero_has_no_gradient(dtype):
    update = SaRA(threshold=1.0).attach(nn.Linear(7, 5, dtype=dtype)).update
    with torch.no_grad():
        update.values.zero_()
    value = update.nuclear_norm()
    value.backward()
    assert float(value.detach()) == 0.0
    assert value.dtype == torch.float32
    assert torch.equal(update.values.grad, torch.zeros_like(update.values))
    with torch.no_grad():
        update.values[0] = 3.0  # rank one: the other directions give nothing
    update.values.grad = None
    update.nuclear_norm().backward()
    assert update.values.grad.tolist() == pytest.approx([1.0] + [0.0] * (len(update.values) - 1), abs=1e-6)


def test_one_eligible_layer_is_drawn_for_each_step():
    adapted = lowdim.adapt(big(dims=(70, 72, 66, 40, 80)), SaRA(0.05, lambda_rank=0.5))  # the last two are too small
    norms = {name: 0.5 * float(layer.update.nuclear_norm().detach()) for name, layer in adapted.layers.items()}
    seen = []
    for _ in range(60):
        value = float(adapted.regularizer().detach())
        assert value == float(adapted.regularizer().detach())  # the same within a step
        seen.append(next(name for name, norm in norms.items() if norm == pytest.approx(value, rel=1e-6)))
        adapted.step()
    assert set(seen) == {"0", "1"}
    assert 15 < seen.count("0") < 45
    other = lowdim.adapt(big(dims=(70, 72, 66, 40, 80)), SaRA(0.05, lambda_rank=0.5, seed=1))
    drawn = []
    for _ in range(60):
        drawn.append(float(other.regularizer().detach()) == pytest.approx(norms["0"], rel=1e-6))
        other.step()
    assert drawn != [name == "0" for name in seen]


def test_the_draw_continues_after_a_resume(tmp_path):
    method = SaRA(0.05, lambda_rank=0.5)

    def values(adapted, count):
        found = []
        for _ in range(count):
            found.append(float(adapted.regularizer().detach()))
            adapted.step()
        return found

    whole = values(lowdim.adapt(big(), method), 12)
    assert len(set(whole)) == 2
    part = lowdim.adapt(big(), method)
    values(part, 5)
    part.save(tmp_path)
    fresh = lowdim.adapt(big(), method)
    fresh.model.load_state_dict(part.model.state_dict())
    assert values(fresh, 7) == whole[5:]
    assert values(lowdim.load_adapter(big(), tmp_path), 7) == whole[5:]


def test_what_is_not_eligible_gives_zero():
    x = torch.randn(2, 70)

    def value(model, method):
        adapted = lowdim.adapt(model, method)
        penalty = adapted.regularizer()
        assert penalty.shape == ()
        (model(x[:, : next(model.parameters()).shape[1]]).sum() + penalty).backward()
        return float(penalty.detach())

    assert value(big(), SaRA(0.05)) == 0.0
    assert value(big(dims=(64, 72)), SaRA(0.05, lambda_rank=1.0)) == 0.0
    assert value(big(dims=(65, 72)), SaRA(0.05, lambda_rank=1.0)) > 0.0
    adapted = lowdim.adapt(big(dims=(70, 70)), SaRA(0.05, lambda_rank=1.0))
    update = adapted.layers["0"].update
    count = len(update.values)
    assert value(big(dims=(70, 70)), SaRA(0.05, lambda_rank=1.0, nuclear_min_count=count)) == 0.0
    assert value(big(dims=(70, 70)), SaRA(0.05, lambda_rank=1.0, nuclear_min_count=count - 1)) > 0.0
    update.select(1e-4)  # active entries count, not all
    assert float(adapted.regularizer()) == 0.0
    conv = nn.Sequential(nn.Conv2d(80, 80, 3))
    assert float(lowdim.adapt(conv, SaRA(0.01, lambda_rank=1.0)).regularizer()) == 0.0
