"""The recurrence of DeltaProduct against its formula, the official numbers, and itself in chunks."""

import itertools

import pytest
import torch

import vectors
from lowdim.linalg import delta_product, stream, unit_rows

CHUNKS = [None, 1, 3, 7, 64]


def arguments(*, n=2, gated=True, state=True, B=2, T=8, H=2, K=3, V=4, seed=0):
    draw = stream(seed, "delta", "test")

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    given = {
        "q": normal(B, T, H, K),
        "k": unit_rows(normal(B, T * n, H, K)),
        "v": normal(B, T * n, H, V),
        "beta": 2 * normal(B, T * n, H).sigmoid(),
    }
    if gated:
        given["g"] = -normal(B, T, H).exp()
    if state:
        given["initial_state"] = normal(B, H, K, V)
    return given


def by_transitions(q, k, v, beta, g=None, initial_state=None, *, n):
    """Each token as one affine map of the state: the product of its n Householder matrices, and what its micro-steps write."""
    B, T, H, K = q.shape
    eye, out = torch.eye(K, dtype=q.dtype), torch.empty(B, T, H, v.shape[3], dtype=q.dtype)
    last = torch.zeros(B, H, K, v.shape[3], dtype=q.dtype)
    for b, h in itertools.product(range(B), range(H)):
        S = last[b, h] if initial_state is None else initial_state[b, h]
        for t in range(T):
            A, W = eye * (1 if g is None else g[b, t, h].exp()), torch.zeros_like(S)
            for i in range(t * n, t * n + n):
                house = eye - beta[b, i, h] * torch.outer(k[b, i, h], k[b, i, h])
                A, W = house @ A, house @ W + beta[b, i, h] * torch.outer(k[b, i, h], v[b, i, h])
            S = A @ S + W
            out[b, t, h] = S.T @ q[b, t, h] / K**0.5
        last[b, h] = S
    return out, last


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_it_is_its_formula(n, gated, chunk):
    given = arguments(n=n, gated=gated)
    got = delta_product(**given, num_householder=n, chunk_size=chunk)
    for a, b in zip(got, by_transitions(**given, n=n), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("case", ["core_gated", "core_plain"])
def test_official_numbers_and_gradients(case, chunk):
    v = vectors.load("delta-product", case)
    names = [name for name in ("q", "k", "v", "beta", "g", "initial_state") if name in v]
    given = {name: v[name].requires_grad_() for name in names}
    o, state = delta_product(**given, num_householder=v.hyperparameters["num_householder"], chunk_size=chunk)
    v.close(o, "o")
    v.close(state, "state")
    grads = torch.autograd.grad((o * v["grad_o"]).sum() + (state * v["grad_state"]).sum(), list(given.values()))
    for name, grad in zip(names, grads, strict=True):
        v.close(grad, f"grad_{name}")


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize(("gated", "state", "normalize"), list(itertools.product([True, False], repeat=3)))
def test_gradients_by_finite_differences(gated, state, normalize, chunk):
    given = {
        name: tensor.requires_grad_() for name, tensor in arguments(gated=gated, state=state, B=1, T=3, H=1, K=2, V=2).items()
    }

    def function(*tensors):
        how = {"num_householder": 2, "normalize_qk": normalize, "chunk_size": chunk}
        return delta_product(**dict(zip(given, tensors, strict=True)), **how)

    assert torch.autograd.gradcheck(function, tuple(given.values()))


@pytest.mark.parametrize("chunk", [None, 4])
def test_scale_and_lengths_of_queries_and_keys(chunk):
    given = arguments()
    longer = {**given, "q": 3 * given["q"], "k": 5 * given["k"]}
    want = delta_product(**{**given, "q": unit_rows(given["q"])}, num_householder=2, scale=0.7)[0]
    got = delta_product(**longer, num_householder=2, scale=0.7, normalize_qk=True, chunk_size=chunk)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # the 1e-6 in the root


@pytest.mark.parametrize("chunk", [None, 5])
def test_strong_decay_stays_finite(chunk):
    """exp(D_s − D_r) of an earlier s would be infinite, and its gradient NaN."""
    given = arguments()
    given["g"] = torch.full_like(given["g"], -600.0).requires_grad_()
    o, state = delta_product(**given, num_householder=2, chunk_size=chunk)
    (grad,) = torch.autograd.grad(o.sum() + state.sum(), given["g"])
    assert bool(grad.isfinite().all())
    torch.testing.assert_close(o, by_transitions(**given, n=2)[0])


@pytest.mark.parametrize("chunk", [None, 3])
def test_half_precision_is_computed_in_float32(chunk):
    given = {name: tensor.bfloat16() for name, tensor in arguments().items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, state = delta_product(**given, num_householder=2, chunk_size=chunk)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    want = delta_product(**{name: tensor.double() for name, tensor in given.items()}, num_householder=2)[1]
    torch.testing.assert_close(state.double(), want, rtol=1e-5, atol=1e-5)


def test_no_tokens():
    given = arguments(T=0)
    o, state = delta_product(**given, num_householder=2, chunk_size=4)
    assert o.shape == (2, 0, 2, 4)
    assert torch.equal(state, given["initial_state"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": torch.zeros(2, 8, 2, 3)}, r"k must be \(2, 16, 2, 3\)"),
        ({"v": torch.zeros(2, 8, 2, 4)}, r"v must be \(2, 16, 2, 4\)"),
        ({"beta": torch.zeros(2, 16, 2, 1)}, r"beta must be \(2, 16, 2\)"),
        ({"g": torch.zeros(2, 16, 2)}, r"g must be \(2, 8, 2\)"),
        ({"initial_state": torch.zeros(1, 2, 3, 4)}, r"initial_state must be \(2, 2, 3, 4\)"),
        ({"q": torch.zeros(8, 2, 3)}, r"q and v must be"),
        ({"num_householder": 0}, "num_householder"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"scale": float("nan")}, "scale"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(changes, named):
    with pytest.raises(ValueError, match=named):
        delta_product(**{**arguments(), "num_householder": 2, **changes})
