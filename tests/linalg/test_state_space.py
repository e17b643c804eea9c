"""Kernels of diagonal state spaces against their formula and the authors' numbers; sums of powers; first diagonals."""

import math

import pytest
import torch

import vectors
from lowdim.linalg import power_states, power_sum, s4d_discrete, s4d_init, s4d_kernel, stream

DISCS = ["zoh", "bilinear", "dss"]


def system(H=3, modes=4, seed=0):
    draw = stream(seed, "s4d", "test")

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    A = torch.complex(-normal(H, modes).exp(), 3 * normal(H, modes))
    B, C = (torch.complex(normal(H, modes), normal(H, modes)) for _ in range(2))
    return A, B, C, normal(H).exp() / 5


def by_powers(A, B, C, dt, length, disc):
    """One power after another."""
    z = dt[:, None] * A
    if disc == "bilinear":
        factor, weights = (2 + z) / (2 - z), 2 * C * B * dt[:, None] / (1 - z / 2)
    else:
        factor, weights = z.exp(), 2 * C * B * (z.exp() - 1) / A
    if disc == "dss":
        d = A * ((length * z).exp() - 1)
        weights = B * C * (z.exp() - 1) * d.conj() / (d.abs() ** 2 + 1e-7)
    out = []
    for _ in range(length):
        out.append(weights.sum(-1).real)
        weights = weights * factor
    return torch.stack(out, 1)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 23])
@pytest.mark.parametrize("disc", DISCS)
def test_it_is_its_formula(disc, length):
    A, B, C, dt = system()
    want = by_powers(A, B, C, dt, length, disc)
    torch.testing.assert_close(s4d_kernel(A, B, C, dt, length, disc), want, rtol=1e-10, atol=1e-12)
    both = s4d_kernel(A, B, torch.stack([C, 2 * C]), dt, length, disc)
    torch.testing.assert_close(both, torch.stack([want, 2 * want]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["bilinear_recurrent", "dss_kernel"])
def test_official_kernels_and_gradients(case):
    v = vectors.load("s4d", case)
    names = ("log_dt", "log_A_real", "A_imag", "B", "C")
    given = {name: v[name].requires_grad_() for name in names}
    A = torch.complex(-given["log_A_real"].exp(), given["A_imag"])
    B, C = (torch.view_as_complex(given[name]) for name in "BC")
    K = s4d_kernel(A, B, C, given["log_dt"].exp(), v.hyperparameters["length"], v.hyperparameters["disc"])
    v.close(K, "kernel")
    for name, grad in zip(names, torch.autograd.grad((K * v["grad_kernel"]).sum(), list(given.values())), strict=True):
        v.close(grad, f"grad_{name}")


@pytest.mark.parametrize("disc", DISCS)
def test_gradients_by_finite_differences(disc):
    given = [t.requires_grad_() for t in system(H=1, modes=2)]
    assert torch.autograd.gradcheck(lambda A, B, C, dt: s4d_kernel(A, B, C, dt, 5, disc), given)


def test_memory_grows_with_the_root_of_the_length():
    """No saved tensor holds all powers of all modes."""
    A, B, C, dt = (t.requires_grad_() for t in system(H=2, modes=32))
    length, saved = 1024, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        s4d_kernel(A, B, C, dt, length)
    assert max(saved) <= 2 * 2 * 32 * 33
    assert 2 * 32 * length > 10 * max(saved)


@pytest.mark.parametrize("length", [1, 2, 5, 9, 12])
def test_states_and_sums_of_powers(length):
    A, B, C, dt = system()
    u = torch.randn(2, length, 3, dtype=torch.float64, generator=stream(1, "s4d", "u"))
    log_step, _ = s4d_discrete(A, B, dt)
    want = torch.zeros(2, 3, 4, dtype=torch.complex128)
    for t in range(length):
        want = log_step.exp() * want + u[:, t, :, None]
    torch.testing.assert_close(power_states(u, log_step), want, rtol=1e-10, atol=1e-12)
    powers = torch.stack([(C * log_step.exp() ** j).sum(-1).real for j in range(length)], 1)
    torch.testing.assert_close(power_sum(C, log_step, length), powers, rtol=1e-10, atol=1e-12)


def test_official_first_numbers():
    v = vectors.load("s4d", "init")
    for init in ("lin", "inv", "legs", "real", "quad"):
        A, B = s4d_init(init, 16)
        v.close(A.real, f"A_real_{init}")
        v.close(A.imag, f"A_imag_{init}")
        if init != "legs":
            assert bool((B == 1).all())
    error = (s4d_init("legs", 16)[1].real - v["B_abs_legs"]).abs().max() / v["B_abs_legs"].abs().max()
    assert float(error) < 2e-3  # they clip the imaginary part


def test_legs_without_a_clip():
    B = s4d_init("legs", 16, b_clip=None)[1].real
    assert float(B.max()) == pytest.approx(10, abs=1)
    assert float(B.min()) == pytest.approx(0.7, abs=0.1)
    # both of each pair together are as long as b
    assert float(2 * B.square().sum()) == pytest.approx(sum(2 * i + 1 for i in range(16)))


def test_random_is_drawn():
    one, two, other = (s4d_init("random", 4000, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert bool((one.real == -0.5).all())
    logs = one.imag.log()
    assert (float(logs.mean()), float(logs.std())) == pytest.approx((0, 1), abs=0.1)
    wins = s4d_init("random", 4, seed=0, generator=torch.Generator().manual_seed(5))[0]
    assert torch.equal(wins, s4d_init("random", 4, seed=1, generator=torch.Generator().manual_seed(5))[0])


def test_bad_input():
    A, B, C, dt = system()
    for call, named in (
        (lambda: s4d_kernel(A, B, C, dt, 0), "length"),
        (lambda: s4d_kernel(A, B, C, dt, 3, "euler"), "disc"),
        (lambda: s4d_kernel(A, B[:2], C, dt, 3), r"A and B must be \(H, modes\).*B \(2, 4\)"),
        (lambda: s4d_discrete(A, B, dt, "dss"), "disc"),
        (lambda: s4d_init("lin", 7), "d_state must be even.*7"),
        (lambda: s4d_init("lin", 0), "d_state"),
        (lambda: s4d_init("hippo", 8), "init"),
        (lambda: s4d_init("legs", 8, b_clip=0), "b_clip"),
    ):
        with pytest.raises(ValueError, match=named):
            call()
    assert math.isfinite(float(s4d_kernel(A.real.to(A.dtype), B, C, dt, 3).sum()))
