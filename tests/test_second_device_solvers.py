"""Solvers on a device other than the CPU: they answer there, or say that they need the CPU."""

import pytest
import torch

from second_device import numbers, second_device, to_lazy


def test_a_linear_system_is_solved_there():
    from lowdim.solve import DCDNet, as_model, dcd_loss, ritz_dataset, solve_dcd

    torch.manual_seed(0)
    net = DCDNet(2, filters=2, coarse_blocks=1, up_blocks=1)
    line = 2 * torch.eye(4, dtype=torch.float64) - torch.diag(torch.ones(3), 1) - torch.diag(torch.ones(3), -1)
    A = torch.kron(line, torch.eye(4)) + torch.kron(torch.eye(4), line)
    b = torch.arange(16.0, dtype=torch.float64)
    mask = torch.arange(16).view(4, 4) != 5

    def answers(net, A, b):
        masked = as_model(net, (4, 4), mask=mask)(b)
        found = solve_dcd(A, b, as_model(net, (4, 4)), maxiter=3, orth=1)
        return [masked, found.x, torch.tensor(found.residuals), dcd_loss(A, b[None], b.flip(0)[None]), ritz_dataset(A, 6, 2)]

    want = answers(net, A, b)
    with second_device():
        got = answers(to_lazy(net), to_lazy(A), to_lazy(b))
    torch.testing.assert_close(numbers(got), want, rtol=1e-4, atol=1e-5)


def test_regression_says_that_it_uses_the_cpu():
    from lowdim.solve import linf_lstsq

    with second_device(), pytest.raises(ValueError, match=r"A must be on the CPU; got lazy:0"):
        linf_lstsq(to_lazy(torch.ones(6, 2)), torch.ones(6))


def test_matrix_completion_says_that_it_uses_the_cpu():
    from lowdim.solve import complete_matrix

    index = torch.arange(6)
    with second_device(), pytest.raises(ValueError, match=r"values must .* on the CPU; got lazy:0"):
        complete_matrix(index % 3, index % 2, to_lazy(torch.ones(6)), (3, 2), 1)
