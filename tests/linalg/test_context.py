"""The context-oriented decomposition: exact, ordered by what the inputs use, damped only as far as it must be."""

import pytest
import torch

import vectors
from lowdim.linalg import context_svd, stream


def weight(out=7, n=10, seed=0):
    return torch.randn(out, n, generator=stream(seed, "context"), dtype=torch.float64)


def covariance(n=10, rows=60, seed=1):
    x = torch.randn(rows, n, generator=stream(seed, "inputs"), dtype=torch.float64) * torch.logspace(0, -3, n)
    return x.T @ x


@pytest.mark.parametrize("rows", [60, 4])
@pytest.mark.parametrize("shape", [(7, 10), (10, 7), (1, 5), (8, 8)])
def test_the_product_is_the_weight(shape, rows):
    W, C = weight(*shape), covariance(shape[1], rows)
    U, S, Vh = context_svd(W, C)
    torch.testing.assert_close(U * S @ Vh, W, rtol=0, atol=1e-10)
    torch.testing.assert_close(U.T @ U, torch.eye(min(shape), dtype=W.dtype), rtol=0, atol=1e-12)
    assert bool((S.diff() <= 0).all())
    damped = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    torch.testing.assert_close(Vh @ damped @ damped @ Vh.T, torch.eye(min(shape), dtype=W.dtype), rtol=0, atol=1e-9)


def test_the_scale_of_the_covariance_does_not_matter():
    W, C = weight(), covariance()
    U, S, Vh = context_svd(W, C)
    for scale in (1e-8, 3.0, 1e8):
        u, s, vh = context_svd(W, scale * C)
        torch.testing.assert_close(u, U, rtol=0, atol=1e-9)
        torch.testing.assert_close(s / scale, S, rtol=1e-9, atol=0)
        torch.testing.assert_close(s[:, None] * vh, S[:, None] * Vh, rtol=0, atol=1e-9)


def test_the_first_components_are_what_the_inputs_use():
    """With inputs in one direction only, the first component is all that they see of the weight."""
    W = weight()
    direction = torch.linalg.qr(torch.randn(10, 1, generator=stream(2), dtype=torch.float64)).Q
    U, S, Vh = context_svd(W, direction @ direction.T, damp=1e-6)
    first = S[0] * torch.outer(U[:, 0], Vh[0])
    torch.testing.assert_close(first @ direction, W @ direction, rtol=0, atol=1e-3)
    plain = torch.linalg.svd(W)
    assert float((plain.S[0] * torch.outer(plain.U[:, 0], plain.Vh[0]) @ direction - W @ direction).norm()) > 0.1


def test_the_damping_is_doubled_until_there_is_an_inverse():
    """Tiny damping of a singular covariance cannot be inverted; half the λ that is taken at last must fail."""
    W, C = weight(), covariance(rows=2)
    mean, eye = C.diagonal().mean(), torch.eye(10, dtype=C.dtype)

    def error(damp):
        damped = C + damp * mean * eye
        return float(torch.linalg.matrix_norm(damped @ torch.linalg.inv(damped) - eye))

    damp = 1e-17
    assert not error(damp) < 1e-8
    _, S, _ = context_svd(W, C, damp=damp, max_inverse_error=1e-8)
    taken = next(i for i in range(41) if error(damp * 2**i) < 1e-8)
    assert taken > 3
    want = torch.linalg.svdvals(W @ (C + damp * 2**taken * mean * eye))
    torch.testing.assert_close(S, want, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"no inverse within max_inverse_error=1e-30.*2\^40"):
        context_svd(W, C, max_inverse_error=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_weights_are_decomposed_in_float64(dtype):
    W = weight().to(dtype)
    U, S, Vh = context_svd(W, covariance().float())
    assert U.dtype == S.dtype == Vh.dtype == torch.float64
    torch.testing.assert_close(U * S @ Vh, W.double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", vectors.cases("corda"))
def test_the_largest_and_smallest_of_the_vectors(name):
    case = vectors.load("corda", name)
    how = case.hyperparameters
    _, S, _ = context_svd(case["W"], case["covariance"], damp=how["damp"])
    chosen = S[: how["rank"]] if how["mode"] == "instruction" else S[-how["rank"] :]
    case.close(chosen, "singular_values")


def test_bad_input():
    W, C = weight(), covariance()
    for bad, match in [
        (C[:9, :9], r"must have shape \(in, in\)"),
        (C[0], r"must have shape \(in, in\)"),
        (torch.zeros_like(C), "all zero"),
        (C * torch.nan, "NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=match):
            context_svd(W, bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        context_svd(W * torch.inf, C)
    for name, value in [("damp", 0.0), ("damp", -1.0), ("max_inverse_error", 0.0)]:
        with pytest.raises(ValueError, match=name):
            context_svd(W, C, **{name: value})
