"""The stable limit of Adam's rate: by its formula on a quadratic, and by what the steps do there."""

import pytest
import torch

from lowdim.diagnose.core.preconditioned import AdamGroup, adam_limit

N = 12


@pytest.fixture(scope="module")
def quadratic():
    """`½ wᵀ H w + b · w` with a known Hessian, whose gradients differ by four orders of magnitude between coordinates."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(N, N, generator=draw, dtype=torch.float64)).Q
    hessian = basis @ torch.diag(torch.logspace(-2, 1, N, dtype=torch.float64)) @ basis.T
    w = torch.nn.Parameter(torch.randn(N, generator=draw, dtype=torch.float64))
    shifts = [
        torch.randn(N, generator=draw, dtype=torch.float64) * torch.logspace(-2, 2, N, dtype=torch.float64) for _ in range(3)
    ]
    losses = [lambda b=b: 0.5 * w @ hessian @ w + b @ w for b in shifts]
    gradients = torch.stack([hessian @ w.detach() + b for b in shifts])
    return w, hessian, losses, gradients


def expected(hessian, gradients, beta1, eps, scale=1.0):
    """The formula, with dense matrices."""
    D = (gradients.square().mean(0).sqrt() + eps) / scale
    top = torch.linalg.eigvalsh(hessian / (D[:, None] * D[None, :]).sqrt())[-1]
    return float((2 + 2 * beta1) / ((1 - beta1) * top)), float(top)


@pytest.mark.parametrize(("beta1", "eps"), [(0.9, 1e-8), (0.0, 1e-8), (0.95, 0.5)])
def test_the_limit_is_that_of_the_preconditioned_spectrum(beta1, eps, quadratic):
    w, hessian, losses, gradients = quadratic
    found = adam_limit(losses, [AdamGroup([w], beta1=beta1, eps=eps)], steps=N)
    lr, top = expected(hessian, gradients, beta1, eps)
    assert found.lr == pytest.approx(lr, rel=1e-6)
    assert found.eigenvalue == pytest.approx(top, rel=1e-6)
    assert found.idle == 0
    few = adam_limit(losses, [AdamGroup([w], beta1=beta1, eps=eps)], steps=6)
    assert few.lr == pytest.approx(lr, rel=0.01), "half of the steps find it within 1 %"
    assert abs(few.eigenvalue - top) <= few.error + 1e-9, "and the error that is stated holds"


@pytest.mark.parametrize(("part", "grows"), [(0.99, False), (1.01, True)])
def test_steps_below_the_limit_shrink_and_above_it_grow(part, grows, quadratic):
    """Adam with its preconditioner held fixed: the limit is one, whatever its derivation says."""
    w, hessian, losses, gradients = quadratic
    lr = part * adam_limit(losses, [AdamGroup([w])], steps=N).lr
    D = gradients.square().mean(0).sqrt() + 1e-8
    x, momentum = torch.ones(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    sizes = []
    for _ in range(4000):
        momentum = 0.9 * momentum + 0.1 * (hessian @ x)
        x = x - lr * momentum / D
        sizes.append(float(x.norm()))
    late, later = max(sizes[1000:1500]), max(sizes[3500:])
    assert (later > 10 * late) is grows
    assert (later < late) is not grows


def test_groups_with_rates_of_their_own(quadratic):
    w, hessian, _, _ = quadratic
    first, second = (torch.nn.Parameter(part.detach().clone()) for part in w.split([5, 7]))

    def loss():
        x = torch.cat([first, second])
        return 0.5 * x @ hessian @ x

    scale = torch.cat([torch.full((5,), 1.0), torch.full((7,), 16.0)]).double()
    found = adam_limit([loss], [AdamGroup([first]), AdamGroup([second], scale=16.0)], steps=N)
    lr, _ = expected(hessian, (hessian @ w.detach())[None], 0.9, 1e-8, scale)
    assert found.lr == pytest.approx(lr, rel=1e-6)


def test_parameters_without_a_gradient_are_left_out():
    """A saddle, as of an adapter whose B is zero: A has curvature together with B, and no gradient."""
    A, B = torch.nn.Parameter(torch.tensor([2.0])), torch.nn.Parameter(torch.tensor([0.0]))
    found = adam_limit([lambda: ((A * B - 3.0) ** 2).sum()], [AdamGroup([A, B])])
    # d/dB = 2 A (A B − 3) = −12, d²/dB² = 2 A² = 8
    assert found.idle == 1
    assert found.eigenvalue == pytest.approx(8 / 12, rel=1e-5)


def test_what_cannot_be_measured():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="no positive curvature: the largest eigenvalue is"):
        adam_limit([lambda: -(w**2).sum()], [AdamGroup([w])])
    with pytest.raises(ValueError, match="no positive curvature"):
        adam_limit([lambda: w.sum()], [AdamGroup([w])])
    with pytest.raises(ValueError, match="no trained parameter has a gradient"):
        adam_limit([lambda: ((w - w.detach()) ** 2).sum()], [AdamGroup([w])])
    v = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"one beta1: .* got \[0\.8, 0\.9\]"):
        adam_limit([lambda: (w**2).sum() + (v**2).sum()], [AdamGroup([w]), AdamGroup([v], beta1=0.8)])
    with pytest.raises(ValueError, match="gradient of a loss has NaN"):
        adam_limit([lambda: (w**2).sum(), lambda: (w * torch.nan).sum()], [AdamGroup([w])])
