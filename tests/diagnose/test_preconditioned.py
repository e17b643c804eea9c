"""The stable limit of Adam's rate: by its formula on a quadratic, and by what the steps do there."""

import pytest
import torch

from lowdim.comparison.measured_rates import adam_groups
from lowdim.diagnose.core.preconditioned import AdamGroup, adam_limit
from lowdim.optim import GaLore

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


@pytest.fixture(scope="module")
def in_a_subspace():
    """A quadratic in a matrix, whose sharpest direction GaLore's subspace cannot reach, and its optimizer after a step."""
    draw = torch.Generator().manual_seed(3)
    m, n, rank = 6, 4, 2
    basis = torch.linalg.qr(torch.randn(m * n, m * n, generator=draw, dtype=torch.float64)).Q
    hessian = basis @ torch.diag(torch.logspace(-1, 3, m * n, dtype=torch.float64)) @ basis.T
    W = torch.nn.Parameter(torch.randn(m, n, generator=draw, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.randn(3, generator=draw, dtype=torch.float64))

    def loss():
        return 0.5 * W.flatten() @ hessian @ W.flatten() + 0.5 * (bias**2).sum()

    optimizer = GaLore([{"params": [W], "rank": rank}, {"params": [bias], "rank": None}], lr=1e-6, scale=0.25)
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    R = optimizer.state[W]["right_basis"]
    P = torch.block_diag(torch.kron(torch.eye(m, dtype=torch.float64), R), torch.eye(3, dtype=torch.float64))
    return optimizer, loss, torch.block_diag(hessian, torch.eye(3, dtype=torch.float64)), P


def test_a_projected_optimizer_has_the_limit_of_its_subspace(in_a_subspace):
    """`λ` of `D^-½ Pᵀ H P D^-½`, `D = (√v + eps) / scale`, with dense matrices; the bias is not projected and has scale 1."""
    optimizer, loss, hessian, P = in_a_subspace
    W, bias = (group["params"][0] for group in optimizer.param_groups)
    low = P.T @ (hessian @ torch.cat([W.detach().flatten(), bias.detach()]))
    assert P.shape == (27, 15)
    scale = torch.cat([torch.full((12,), 0.25), torch.ones(3)]).double()
    want, top = expected(P.T @ hessian @ P, low[None], 0.9, 1e-6, scale)
    found = adam_limit([loss], adam_groups(optimizer, 1e-6), steps=15)
    assert found.lr == pytest.approx(want, rel=1e-6)
    assert found.eigenvalue == pytest.approx(top, rel=1e-6)
    everywhere = adam_limit([loss], [AdamGroup([W], scale=0.25, eps=1e-6), AdamGroup([bias], eps=1e-6)], steps=27)
    assert found.lr > 1.2 * everywhere.lr, "what is outside limits nothing"


@pytest.mark.parametrize(("part", "grows"), [(0.98, False), (1.02, True)])
def test_steps_in_a_subspace_below_the_limit_shrink_and_above_it_grow(part, grows, in_a_subspace):
    """GaLore with subspace and preconditioner held fixed, in the coordinates of the weights, around the minimum there."""
    optimizer, loss, hessian, P = in_a_subspace
    W, bias = (group["params"][0] for group in optimizer.param_groups)
    lr = part * adam_limit([loss], adam_groups(optimizer, 1e-6), steps=15).lr
    low = P.T @ (hessian @ torch.cat([W.detach().flatten(), bias.detach()]))
    step = torch.cat([torch.full((12,), 0.25), torch.ones(3)]).double() / (low.abs() + 1e-6)
    x, momentum = P @ torch.ones(15, dtype=torch.float64), torch.zeros(15, dtype=torch.float64)
    sizes = []
    for _ in range(1500):
        momentum = 0.9 * momentum + 0.1 * (P.T @ (hessian @ x))
        x = x - lr * P @ (step * momentum)
        sizes.append(float(x.norm()))
    assert (max(sizes[1300:]) > 10 * max(sizes[300:500])) is grows
    assert (max(sizes[1300:]) < max(sizes[300:500])) is not grows


def test_a_term_with_a_kink_is_in_the_gradients_and_not_in_the_curvature():
    """`½ a w² + c ‖u‖`: beside 0 the norm has the curvature `c / ‖u‖` across `u`, and its gradient is never above `c`."""
    w, u = torch.nn.Parameter(torch.tensor([3.0])), torch.nn.Parameter(torch.tensor([2e-6, 1e-6]))
    whole = lambda: 2.0 * (w**2).sum() + 0.5 * u.norm()  # noqa: E731
    smooth = lambda: 2.0 * (w**2).sum()  # noqa: E731
    groups = [AdamGroup([w, u])]
    assert adam_limit([whole], groups, steps=3).eigenvalue > 1e5
    found = adam_limit([whole], groups, smooth=smooth, steps=3)
    assert found.eigenvalue == pytest.approx(4.0 / 12.0, rel=1e-5)
    assert found.idle == 0


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
