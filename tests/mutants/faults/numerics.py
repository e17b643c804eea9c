"""Faults in the numerics that systems stand on: linalg, ranks, statistics of sample batches, surgery, files."""

from mutants.planting import Fault, Tests


def of(path: str, keyword: str = "") -> Tests:
    """Tests of one file."""
    return Tests((f"{path}.py",), keyword)


FAULTS = [
    Fault(
        "codes are rounded down",
        "linalg/affine.py",
        "            part.round_()\n",
        "            part.floor_()\n",
        of("linalg/test_affine", "vectors or every_width"),
    ),
    Fault(
        "stochastic rounding is biased",
        "linalg/affine.py",
        "cells.to(like.dtype).mul_(2.0**-16).add_(0.5 + 2.0**-17)",
        "cells.to(like.dtype).mul_(2.0**-17).add_(0.5 + 2.0**-17)",
        of("linalg/test_affine", "unbiased or drawn"),
    ),
    Fault(
        "nibbles are packed the other way round",
        "linalg/affine.py",
        "torch.stack([packed & 15, packed >> 4], -1)",
        "torch.stack([packed >> 4, packed & 15], -1)",
        of("linalg/test_affine", "packing"),
    ),
    Fault(
        "a tie takes the upper code",
        "linalg/quantize.py",
        "return ((wide[:-1] + wide[1:]) / 2).to(torch.float32)",
        "return (wide[:-1] * 0.6 + wide[1:] * 0.4).to(torch.float32)",
        of("linalg/test_quantize", "nearest"),
    ),
    Fault(
        "the randomised basis is not turned onto the singular vectors",
        "linalg/leading.py",
        "vectors = q @ inner[:, :rank]",
        "vectors = q[:, :rank]",
        of("linalg/test_leading", "sketch"),
    ),
    Fault(
        "singular vectors have any sign",
        "linalg/svd.py",
        "    u, vh = canonical_signs(u, vh)\n    assert vh is not None\n    return u, s, vh\n",
        "    return u, s, vh\n",
        Tests(("linalg/test_svd.py", "linalg/test_context.py", "adapters/test_svfit.py::TestSVFit"), "start or sign"),
    ),
    Fault(
        "balanced factors are not balanced",
        "linalg/balance.py",
        "balanced_a = torch.where(dead[:, None], a, root[:, None] * right)",
        "balanced_a = torch.where(dead[:, None], a, s[:, None] * right)",
        of("linalg/test_balance", "balanced"),
    ),
    Fault(
        "the damping of a covariance is absolute",
        "linalg/context.py",
        "damped = covariance + damp * 2.0**doubling * mean * eye",
        "damped = covariance + damp * 2.0**doubling * eye",
        of("linalg/test_context", "scale_of_the_covariance or doubled"),
    ),
    Fault(
        "Fastfood draws its permutation first",
        "linalg/fastfood.py",
        "    signs = torch.randint(",
        "    torch.randperm(length, **where)\n    signs = torch.randint(",
        of("linalg/test_fastfood", "order_signs"),
    ),
    Fault(
        "an LDU does not divide by its pivots",
        "linalg/ldu.py",
        "return torch.tensor(order, device=work.device), lower, d, upper / d[:, None]",
        "return torch.tensor(order, device=work.device), lower, d, upper",
        of("linalg/test_ldu", "product_and"),
    ),
    Fault(
        "the cosine's constant vector is too long",
        "linalg/dct.py",
        "table.new_full((1,), math.sqrt(1 / n))",
        "table.new_full((1,), math.sqrt(2 / n))",
        of("linalg/test_dct", "formula or columns"),
    ),
    Fault(
        "a Tucker product leaves its modes out of order",
        "linalg/tucker.py",
        "tensor = tensor.movedim(0, -1)",
        "tensor = tensor",
        of("linalg/test_tucker", "einsum"),
    ),
    Fault(
        "WeLore's spectra are not taken down to their least value",
        "ranks.py",
        "reached = squares.cumsum(0) >= energy * total - 1e-12 * total",
        "reached = squares.cumsum(0) > energy * total + 1e-12 * total",
        of("test_ranks", "energy_rank"),
    ),
    Fault(
        "flat spectra get the smallest ranks",
        "ranks.py",
        "for group, choice in enumerate(sorted(choices, reverse=True)):",
        "for group, choice in enumerate(sorted(choices)):",
        of("test_ranks", "by_energy or remainder"),
    ),
    Fault(
        "gradients are not divided by the batch size",
        "calibrate/collecting.py",
        "grad.reshape(len(grad), -1)) / batch_size)",
        "grad.reshape(len(grad), -1)))",
        of("test_calibrate", "gradients_are_summed"),
    ),
    Fault(
        "padding counts as tokens",
        "calibrate/collecting.py",
        "            x = x[mask.view(x.shape[:-1])]\n",
        "            x = x + 0\n",
        of("test_calibrate", "masked_rows"),
    ),
    Fault(
        "outputs are not centred",
        "calibrate/collecting.py",
        'out["output_covariance"] = sums.pop("output_square").div_(sums["output_count"]).sub_(torch.outer(mean, mean))',
        'out["output_covariance"] = sums.pop("output_square").div_(sums["output_count"])',
        of("test_calibrate", "output_statistics or large_mean"),
    ),
    Fault(
        "a write that fails leaves its temporary file",
        "files.py",
        "            os.unlink(temporary)\n",
        "            pass\n",
        of("test_files", "failed_write or interruption"),
    ),
    Fault(
        "infinity is written into JSON",
        "files.py",
        'return value if value == value and abs(value) != float("inf") else None',
        "return value",
        of("test_files", "json"),
    ),
]
