import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowdim.diagnose import hessian_matvec
from lowdim.diagnose.core.curvature import mean_hessian, twice_differentiable
from lowdim.testing.agreement import refuses


class OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_the_order_is_that_of_the_parameters_row_by_row():
    a, b = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), nn.Parameter(torch.tensor([5.0]))
    H = hessian_matvec(lambda: a[0, 1] ** 2 * b[0] + a[1, 0], [a, b])  # of a₀₁² b: 2 b in place 1, 2 a₀₁ between 1 and 4
    want = torch.zeros(5, 5)
    want[1, 1], want[1, 4], want[4, 1] = 10.0, 4.0, 4.0
    assert torch.equal(H @ torch.eye(5), want)
    assert torch.equal(H @ torch.eye(5), want), "it can be used again"
    assert a.grad is None


def test_unused_parameters_and_linear_losses_have_zeros():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    assert torch.equal(hessian_matvec(lambda: (a**2).sum(), [a, b]) @ torch.ones(5), torch.tensor([2.0, 2, 0, 0, 0]))
    assert torch.equal(hessian_matvec(lambda: a.sum(), [a, b]) @ torch.ones(5), torch.zeros(5))


def test_half_precision_gives_float32_vectors():
    a = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    H = hessian_matvec(lambda: (a**3).sum(), [a])
    assert H.dtype == torch.float32
    assert (H @ torch.ones(2)).tolist() == [6.0, 12.0]


def test_parts_are_summed_with_their_weights():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    parts = [(lambda: (w**2).sum(), 0.25), (lambda: (w**3).sum(), 0.75)]
    H = mean_hessian(parts, [w])
    assert (H @ torch.ones(2)).tolist() == [0.25 * 2 + 0.75 * 6, 0.25 * 2 + 0.75 * 12]
    with torch.no_grad():
        w.add_(1.0)
    assert (H @ torch.ones(2)).tolist() == [0.25 * 2 + 0.75 * 12, 0.25 * 2 + 0.75 * 18], "parts are run again"


def test_attention_has_a_second_derivative_within_the_block():
    q = nn.Parameter(torch.randn(1, 2, 3, 4))

    def loss():
        return nn.functional.scaled_dot_product_attention(q, q, q).square().sum()

    H = hessian_matvec(loss, [q])  # the fused kernel of CPUs has none
    eye = torch.eye(24)
    dense = H @ eye
    torch.testing.assert_close(dense, dense.T, atol=1e-4, rtol=1e-4)
    before = torch.backends.cuda.flash_sdp_enabled()
    with twice_differentiable():
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_what_has_no_second_derivative_is_refused():
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def calls_backward():
        loss = (w**2).sum()
        loss.backward()
        return loss

    def reentrant():
        return checkpoint(lambda x: x**2, w, use_reentrant=True).sum()

    refuses(
        [
            (ValueError, "marked @once_differentiable", lambda: hessian_matvec(lambda: OnlyOnce.apply(w).prod(), [w])),
            (ValueError, "without calling backward()", lambda: hessian_matvec(calls_backward, [w])),
            (ValueError, "reentrant gradient checkpointing", lambda: hessian_matvec(reentrant, [w])),
            (ValueError, "does not depend on params", lambda: hessian_matvec(lambda: (w**2).sum(), [other])),
            (ValueError, "does not depend on params", lambda: hessian_matvec(lambda: torch.ones(()), [w])),
            (ValueError, "a tensor with one number; got (2,)", lambda: hessian_matvec(lambda: w**2, [w])),
            (ValueError, "a tensor with one number; got float", lambda: hessian_matvec(lambda: 1.0, [w])),
            (ValueError, "the loss is inf", lambda: hessian_matvec(lambda: (w / 0).sum(), [w])),
            (ValueError, "at least one parameter", lambda: hessian_matvec(lambda: w.sum(), [])),
        ]
    )  # fmt: skip


def test_other_errors_are_not_explained_away():
    def runs_out():
        raise torch.OutOfMemoryError("CUDA out of memory")

    w = nn.Parameter(torch.ones(2))
    with pytest.raises(torch.OutOfMemoryError):
        hessian_matvec(runs_out, [w])
