import pytest
import torch

from lowdim.linalg import balanced_factors


@pytest.mark.parametrize(("shape", "rank"), [((7, 12), 3), ((12, 7), 7), ((9, 9), 1)])
def test_balanced_factors_are_the_best_approximation_with_equal_spectra(shape, rank):
    weight = torch.randn(*shape, dtype=torch.float64)
    A, B = balanced_factors(weight, rank)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(B @ A, u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank])
    torch.testing.assert_close(A @ A.T, torch.diag(s[:rank]))
    torch.testing.assert_close(B.T @ B, torch.diag(s[:rank]))


def test_balanced_factors_of_half_precision_are_made_in_float32():
    weight = torch.randn(5, 4).bfloat16()
    A, B = balanced_factors(weight, 4)
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(B @ A, weight.float())


def test_balanced_factors_refuse():
    with pytest.raises(ValueError, match=r"rank must be an int in \[1, 4\]; got 5"):
        balanced_factors(torch.ones(5, 4), 5)
    with pytest.raises(ValueError, match="NaN"):
        balanced_factors(torch.full((5, 4), float("nan")), 2)
