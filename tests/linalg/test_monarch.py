import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from lowdim.linalg import monarch_dense, monarch_multiply, monarch_project

SHAPES = [
    ((4, 3, 5), (4, 3, 3)),  # l does not divide q
    ((2, 4, 3), (4, 2, 2)),  # l divides q
    ((3, 2, 2), (6, 4, 1)),  # one channel per class
    ((1, 5, 4), (1, 3, 5)),  # one block: a plain low-rank product
    ((6, 2, 1), (2, 2, 6)),
]


def by_definition(x, w1, w2):
    """The product of the spec, channel by channel."""
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    h = [w1[t // q, t % q] @ x[t // q * p : (t // q + 1) * p] for t in range(k * q)]
    y = torch.zeros(l * s, dtype=w1.dtype)
    for b in range(l):
        for e in range(s):
            y[e * l + b] = sum(w2[b, e, j] * h[j * l + b] for j in range(r))
    return y


def factors(shape1, shape2, dtype=torch.float64):
    return torch.randn(shape1, dtype=dtype), torch.randn(shape2, dtype=dtype)


@pytest.mark.parametrize(("shape1", "shape2"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_product_and_dense_are_the_definition(shape1, shape2, dtype):
    w1, w2 = factors(shape1, shape2, dtype)
    x = torch.randn(shape1[0] * shape1[2], dtype=dtype)
    want = by_definition(x, w1, w2)
    torch.testing.assert_close(monarch_multiply(x, w1, w2), want, rtol=1e-12, atol=1e-12)
    bias = torch.randn_like(want)
    torch.testing.assert_close(monarch_multiply(x, w1, w2, bias), want + bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(monarch_dense(w1, w2) @ x, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_product_is_the_definition_for_any_shapes(k, l, p, s, multiple, data):
    channels = k * l * multiple // torch.gcd(torch.tensor(k), torch.tensor(l)).item()
    w1, w2 = factors((k, channels // k, p), (l, s, channels // l))
    x = torch.randn(k * p, dtype=torch.float64)
    torch.testing.assert_close(monarch_multiply(x, w1, w2), by_definition(x, w1, w2), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_first_and_second_derivatives(dtype):
    w1, w2 = factors(*SHAPES[0], dtype)
    tensors = [torch.randn(3, 20, dtype=dtype), w1, w2, torch.randn(w2.shape[0] * w2.shape[1], dtype=dtype)]
    for tensor in tensors:
        tensor.requires_grad_(True)
    assert torch.autograd.gradcheck(monarch_multiply, tensors)
    assert torch.autograd.gradgradcheck(monarch_multiply, tensors)


def test_function_transforms():
    x, (w1, w2) = torch.randn(5, 20, dtype=torch.float64), factors(*SHAPES[0])
    per_row = torch.func.vmap(torch.func.grad(lambda w, row: monarch_multiply(row, w, w2).square().sum()), (None, 0))(w1, x)
    w1.requires_grad_(True)
    (total,) = torch.autograd.grad(monarch_multiply(x, w1, w2).square().sum(), w1)
    torch.testing.assert_close(per_row.sum(0), total)
    biases = torch.randn(3, w2.shape[0] * w2.shape[1], dtype=torch.float64)
    members = torch.func.vmap(lambda last, bias: monarch_multiply(x, w1, last, bias))(torch.stack([w2] * 3), biases)
    torch.testing.assert_close(members, monarch_multiply(x, w1, w2) + biases[:, None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape1", "shape2", "rows"), [((4, 3, 5), (2, 800, 6), 700), ((2, 4, 3), (8, 250, 1), 530)])
def test_many_rows_are_done_in_blocks(shape1, shape2, rows, bias):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, shape1[0] * shape1[2]), shape1, shape2, (shape2[0] * shape2[1],)
    x, w1, w2, b = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    inputs = (x, w1, w2, b) if bias else (x, w1, w2)
    y = monarch_multiply(*inputs)
    want = x @ monarch_dense(w1, w2).mT + (b if bias else 0)
    assert rows * shapes[3][0] >= 2**20
    assert rows >= 512
    assert y.is_contiguous()
    torch.testing.assert_close(y, want)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(want, inputs, grad))
    with torch.no_grad():
        assert torch.equal(monarch_multiply(*inputs), y)


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_one_class_is_contiguous_too(rows):
    x, w1, w2 = torch.randn(rows, 6), torch.randn(2, 4, 3), torch.randn(1, 5, 8)
    y = monarch_multiply(x, w1, w2)
    assert y.is_contiguous()
    torch.testing.assert_close(y, x @ monarch_dense(w1, w2).mT)


def test_frozen_factors_keep_nothing_for_their_gradient():
    x, (w1, w2) = torch.randn(7, 20, dtype=torch.float64, requires_grad=True), factors(*SHAPES[0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = monarch_multiply(x, w1, w2)
    assert sorted(kept) == sorted([w1.shape, w2.shape])  # neither x nor the middle channels
    y.sum().backward()
    torch.testing.assert_close(x.grad, monarch_dense(w1, w2).sum(0).expand(7, 20))


def test_output_is_contiguous_and_input_may_be_strided():
    w1, w2 = factors(*SHAPES[0])
    x = torch.randn(20, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    y = monarch_multiply(x, w1, w2)
    assert y.shape == (4, 3, 12)
    assert y.is_contiguous()
    torch.testing.assert_close(y, x @ monarch_dense(w1, w2).T)


@pytest.mark.parametrize("case", ["layer_wide", "layer_padded"])
def test_official_product(case):
    v = vectors.load("monarch", case)
    w1, w2 = v["blkdiag1"], v["blkdiag2"]
    out_features, in_features = v["dense_weight"].shape
    v.close(monarch_dense(w1, w2)[:out_features, :in_features], "dense_weight")


def test_official_projection():
    v = vectors.load("monarch", "project_wide")
    w1, w2 = monarch_project(v["weight"], tuple(v.hyperparameters["w1_shape"]), tuple(v.hyperparameters["w2_shape"]))
    dense = monarch_dense(w1, w2)
    v.close(dense, "projected")
    v.close(torch.linalg.matrix_norm(v["weight"] - dense).view(1), "error")
    v.close(monarch_multiply(v["x"], w1, w2) + v["bias"], "y")


def test_the_fourier_matrix_is_a_monarch_matrix():
    v = vectors.load("monarch", "dft24")
    matrix = torch.complex(v["matrix_real"], v["matrix_imag"])
    w1, w2 = monarch_project(matrix, tuple(v.hyperparameters["w1_shape"]), tuple(v.hyperparameters["w2_shape"]))
    dense = monarch_dense(w1, w2)
    v.close(dense.real, "projected_real", scale=1.0)
    v.close(dense.imag, "projected_imag", scale=1.0)
    assert float((dense - matrix).abs().max()) < 1e-12


@pytest.mark.parametrize(("shape1", "shape2"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_projection_returns_a_monarch_matrix_unchanged(shape1, shape2, dtype):
    dense = monarch_dense(*factors(shape1, shape2, dtype))
    torch.testing.assert_close(monarch_dense(*monarch_project(dense, shape1, shape2)), dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape1", "shape2"), SHAPES[:2])
def test_projection_is_the_nearest(shape1, shape2):
    (k, q, p), (l, s, _) = shape1, shape2
    m = torch.randn(l * s, k * p, dtype=torch.float64)
    got = torch.linalg.matrix_norm(m - monarch_dense(*monarch_project(m, shape1, shape2))) ** 2
    rest = 0.0  # the blocks are independent: the optimum leaves the small singular values of each
    for a in range(k):
        for b in range(l):
            rank = sum(t % l == b for t in range(a * q, (a + 1) * q))
            rest += torch.linalg.svdvals(m[b::l, a * p : (a + 1) * p])[rank:].square().sum()
    torch.testing.assert_close(got, rest, rtol=1e-10, atol=0)


def test_projection_splits_the_singular_values_evenly():
    m = torch.randn(8, 6, dtype=torch.float64)
    w1, w2 = monarch_project(m, (2, 4, 3), (4, 2, 2))
    norms1, norms2 = w1.norm(dim=2).reshape(2, 4).reshape(-1), w2.norm(dim=1)  # channel t = j l + b
    torch.testing.assert_close(norms1, torch.stack([norms2[t % 4, t // 4] for t in range(8)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_projection_of_half_precision_runs_wide(dtype):
    m = torch.randn(8, 6).to(dtype)
    w1, w2 = monarch_project(m, (2, 4, 3), (4, 2, 2))
    assert w1.dtype == w2.dtype == dtype
    wide = monarch_project(m.float(), (2, 4, 3), (4, 2, 2))
    assert torch.equal(w1, wide[0].to(dtype))
    assert torch.equal(w2, wide[1].to(dtype))


@pytest.mark.parametrize(
    ("shape1", "shape2"), [((2, 3, 4), (4, 5, 2)), ((2, 3), (2, 3, 3)), ((0, 3, 4), (1, 2, 0)), ((2, 4, 0), (4, 2, 2))]
)
def test_factors_that_do_not_chain(shape1, shape2):
    w1, w2 = torch.zeros(shape1), torch.zeros(shape2)
    for call in (
        lambda: monarch_dense(w1, w2),
        lambda: monarch_multiply(torch.zeros(3, 8), w1, w2),
        lambda: monarch_project(torch.zeros(20, 8), shape1, shape2),
    ):
        with pytest.raises(ValueError, match=r"k q = l r.*got w1"):
            call()


def test_wrong_sizes():
    with pytest.raises(ValueError, match=r"x must have 6 features .* got \(3, 7\)"):
        monarch_multiply(torch.zeros(3, 7), torch.zeros(2, 4, 3), torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\) .* got \(7,\)"):
        monarch_multiply(torch.zeros(3, 6), torch.zeros(2, 4, 3), torch.zeros(4, 2, 2), torch.zeros(7))
    with pytest.raises(ValueError, match=r"m must have shape \(8, 6\) .* got \(6, 8\)"):
        monarch_project(torch.zeros(6, 8), (2, 4, 3), (4, 2, 2))
    with pytest.raises(ValueError, match="NaN"):
        monarch_project(torch.full((8, 6), torch.nan), (2, 4, 3), (4, 2, 2))
