import numpy as np
import pytest
import torch

from lowdim.linalg import Operator, as_operator
from lowdim.testing.agreement import refuses

A = torch.tensor([[2.0, -1.0, 0.0], [-1.0, 3.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)


class Matvec:
    """As hessian-eigenthings' operators: a product and a size, no shape."""

    size = 3

    def matvec(self, v):
        return A.to(v.dtype) @ v


class Curvlinops:
    """As curvlinops' operators: `@` on tensors and a shape, no matvec."""

    shape, dtype, device = (3, 3), torch.float64, torch.device("cpu")

    def __matmul__(self, v):
        assert isinstance(v, torch.Tensor)
        return A @ v


def sources():
    sparse = pytest.importorskip("scipy.sparse", reason="sparse arrays are scipy's")
    from scipy.sparse.linalg import aslinearoperator

    return {
        "tensor": A,
        "sparse coo": A.to_sparse_coo(),
        "sparse csr": A.to_sparse_csr(),
        "array": A.numpy(),
        "scipy csr": sparse.csr_array(A.numpy()),
        "scipy matrix": sparse.csr_matrix(A.numpy()),
        "LinearOperator": aslinearoperator(A.numpy()),
        "matvec": Matvec(),
        "curvlinops": Curvlinops(),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_every_source_multiplies_tensors_and_arrays():
    v, V = torch.tensor([1.0, 2.0, -1.0]).double(), torch.eye(3).double()[:, :2]
    for name, source in sources().items():
        operator = as_operator(source)
        assert (operator.n, operator.shape) == (3, (3, 3)), name
        for got in (operator(v), operator.matvec(v), operator @ v):
            torch.testing.assert_close(got, A @ v)
        array = operator @ v.numpy()
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, (A @ v).numpy())
        torch.testing.assert_close(operator @ V, A @ V)
        assert (operator @ v.float()).dtype == torch.float32, name
        assert operator.products == 7, name
        assert as_operator(operator) is operator
        scipys = operator.as_linear_operator()
        np.testing.assert_allclose(scipys @ v.numpy(), (A @ v).numpy())
        np.testing.assert_allclose(scipys @ V.numpy(), (A @ V).numpy())


def test_a_function_needs_its_size():
    operator = as_operator(lambda v: A @ v, 3)
    torch.testing.assert_close(operator(A[0]), A @ A[0])
    with pytest.raises(ValueError, match="n must be given"):
        as_operator(lambda v: v)


def test_it_computes_in_its_own_type():
    seen = []
    operator = Operator(lambda v: seen.append(v.dtype) or v, 2, dtype=torch.float32)
    assert operator(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert (operator @ np.array([1, 2])).tolist() == [1.0, 2.0]
    assert seen == [torch.float32] * 2
    assert as_operator(torch.eye(2, dtype=torch.int64)).dtype == torch.float64


def test_bad_input():
    operator = as_operator(A)
    refuses(
        [
            (ValueError, "square matrix; got shape (3, 2)", lambda: as_operator(A[:, :2])),
            (ValueError, "(4, 4); got (3, 3)", lambda: as_operator(A, 4)),
            (ValueError, "n must be an int", lambda: as_operator(A, 0)),
            (TypeError, "got list", lambda: as_operator([[1.0]])),
            (ValueError, "length 3; got shape (2,)", lambda: operator(torch.ones(2))),
            (ValueError, "give vectors of length 3", lambda: as_operator(lambda v: v[:2], 3)(torch.ones(3))),
        ]
    )
