"""Group-wise affine storage: the authors' codes, unbiased rounding, half precision, packing, and what it refuses."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vectors
from lowdim.linalg import dequantize_affine, pack_nibbles, quantize_affine, store_affine, stream, unpack_nibbles
from lowdim.plan import PeakMemory


def rounded(w, group_size, **options):
    codes, scales, zeros = quantize_affine(w, group_size=group_size, **options)
    return dequantize_affine(codes, scales, zeros, group_size=group_size), scales


def test_vectors_quantize():
    case = vectors.load("q-galore", "quantize")
    size, bits = case.hyperparameters["group_size"], case.hyperparameters["bits"]
    codes, scales, zeros = quantize_affine(case["w"], group_size=size, bits=bits)
    assert torch.equal(codes, case["codes"])
    assert torch.equal(zeros, case["zeros"])
    assert torch.allclose(scales, case["scales"], rtol=1e-12)
    assert torch.allclose(dequantize_affine(codes, scales, zeros, group_size=size), case["dequantized"], rtol=1e-12, atol=0)
    codes, scales, zeros = quantize_affine(case["w"], group_size=size)
    assert torch.equal(codes, case["codes8"])
    assert torch.equal(zeros, case["zeros8"])
    assert torch.allclose(scales, case["scales8"], rtol=1e-12)
    codes, _, _ = quantize_affine(case["w"], group_size=size, uniform=case["uniform"])
    assert torch.equal(codes, case["codes8_stochastic"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_in_lower_precision(dtype):
    """The same numbers within half a code, and the rounding of the dtype."""
    case = vectors.load("q-galore", "quantize")
    back, scales = rounded(case["w"].to(dtype), case.hyperparameters["group_size"])
    assert back.dtype == scales.dtype == dtype
    error = (back.double() - case["w"].to(dtype).double()).abs().view(len(scales), -1)
    slack = 1.02 * scales.double() / 2 + torch.finfo(dtype).eps * case["w"].abs().max()
    assert bool((error <= slack).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits):
    """Codes stay below 2^bits and use the whole range; the error is at most half a code."""
    w = torch.randn(8, 64, generator=stream(0, "w"), dtype=torch.float64)
    codes, scales, zeros = quantize_affine(w, group_size=32, bits=bits)
    assert int(codes.max()) == 2**bits - 1
    assert int(codes.min()) == 0
    error = (dequantize_affine(codes, scales, zeros, group_size=32) - w).abs().view(len(scales), -1)
    assert bool((error <= 1.0001 * scales).all())  # at the ends the rounded zero point costs up to another half
    assert float((error <= 0.5001 * scales).double().mean()) > 0.8


def test_groups_on_one_side_of_zero_survive():
    """The trap: a range that does not hold zero needs a zero point outside of the codes."""
    for w in (torch.linspace(5.0, 6.0, 32), -torch.linspace(5.0, 6.0, 32)):
        back, _ = rounded(w, 32)
        assert float((back - w).abs().max()) <= 6 / 255


def test_zero_is_exact_and_constants_are_kept():
    w = torch.tensor([0.0, 1.0, -2.0, 0.0, 3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    back, scales = rounded(w, 4)
    assert float(back[0]) == float(back[3]) == 0.0
    assert torch.allclose(back[4:8], torch.tensor(3.0), rtol=1e-6)
    assert torch.equal(back[8:], torch.zeros(4))
    assert float(scales[2]) == pytest.approx(1e-5 / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stochastic_rounding_is_unbiased(dtype):
    """The mean of many roundings is the number; the nearest code is not."""
    w = torch.full((1, 64), 0.3, dtype=torch.float64)
    w[0, 0], w[0, 1] = 100.0, -100.0  # a code is 0.784
    w = w.to(dtype)
    codes, scales, zeros = quantize_affine(w, group_size=64)
    total = torch.zeros(64, dtype=torch.float64)
    draw = stream(0, "noise")
    for _ in range(400):
        store_affine(w, codes, scales, zeros, group_size=64, generator=draw)
        total += dequantize_affine(codes, scales, zeros, group_size=64).double().view(-1)
    mean = float(total[2:].mean()) / 400
    deviation = 0.784 * 0.5 / (400 * 62) ** 0.5
    assert abs(mean - 0.3) < 5 * deviation + 0.005 * (dtype == torch.bfloat16)
    nearest, _ = rounded(w, 64)
    assert abs(float(nearest[0, 5]) - 0.3) > 0.2


def test_drawn_numbers_do_what_given_ones_do():
    """`generator` rounds to one of the two neighbours, up as often as the fraction says; the same seed, the same bits."""
    w = torch.randn(64, 256, generator=stream(0, "w"))
    made = []
    for seed in (1, 1, 2):
        codes, scales, zeros = quantize_affine(w)
        store_affine(w, codes, scales, zeros, generator=stream(seed, "noise"))
        made.append(codes)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    exact = w.view(-1, 256) / scales + zeros
    assert bool(((made[0].view(-1, 256) - exact).abs() < 1.001).all())
    up = (made[0].view(-1, 256) > exact).float().mean()
    assert abs(float(up) - 0.5) < 0.02


def test_large_tensors_are_worked_on_in_pieces():
    """Pieces give what one piece gives, and no temporary of the tensor's size is made."""
    w = torch.randn(2048, 512, generator=stream(0, "w"))
    codes, scales, zeros = quantize_affine(w)
    assert torch.equal(codes[1000:1001], quantize_affine(w[1000:1001])[0])
    with PeakMemory(tensors=[w, codes, scales, zeros]) as memory:
        store_affine(w, codes, scales, zeros, generator=stream(0, "noise"))
    extra = memory.bytes - sum(t.nbytes for t in (w, codes, scales, zeros))
    assert extra < w.nbytes / 2
    with PeakMemory(tensors=[codes, scales, zeros]) as memory:
        back = dequantize_affine(codes, scales, zeros)
    assert memory.bytes - sum(t.nbytes for t in (codes, scales, zeros)) < 1.1 * back.nbytes


def test_half_precision_scales_are_rounded_up():
    """A scale that was rounded down would clip the largest entry of its group by up to half a code."""
    w = torch.rand(64, 64, generator=stream(0, "w")).bfloat16()
    _, scales, _ = quantize_affine(w, group_size=64)
    assert bool((scales.double() * 255 >= w.double().amax(1, keepdim=True)).all())
    assert bool((scales.double() * 255 <= w.double().amax(1, keepdim=True) * (1 + 2**-7)).all())


def test_other_dtypes_on_request():
    w = torch.randn(4, 64)
    codes, scales, zeros = quantize_affine(w, group_size=64)
    wide = dequantize_affine(codes, scales, zeros, group_size=64, dtype=torch.float64)
    half = dequantize_affine(codes, scales, zeros, group_size=64, dtype=torch.bfloat16)
    assert torch.allclose(wide.float(), dequantize_affine(codes, scales, zeros, group_size=64))
    assert torch.equal(half, dequantize_affine(codes, scales, zeros, group_size=64).bfloat16())


def test_not_finite_weights():
    """Refused when quantized on purpose; visible, not hidden, when an optimizer writes them back."""
    w = torch.randn(4, 64)
    codes, scales, zeros = quantize_affine(w, group_size=64)
    for value in (float("nan"), float("inf"), -float("inf")):
        w[2, 5] = value
        with pytest.raises(ValueError, match=r"w has NaN or infinite"):
            quantize_affine(w, group_size=64)
        store_affine(w, codes, scales, zeros, group_size=64)
        back = dequantize_affine(codes, scales, zeros, group_size=64)
        assert not bool(torch.isfinite(back[2]).any())
        assert bool(torch.isfinite(back[[0, 1, 3]]).all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"group_size": 48}, r"group_size must divide .* 128; got group_size=48"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 64, "bits": 0}, r"bits must be an int in \[1, 8\]; got 0"),
        ({"group_size": 64, "bits": 9}, "bits"),
        ({"group_size": 64, "uniform": torch.zeros(128)}, r"uniform must have the shape of w, \(2, 64\)"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        quantize_affine(torch.zeros(2, 64), **options)


def test_wrong_dtypes_and_sizes():
    with pytest.raises(TypeError, match="floating"):
        quantize_affine(torch.zeros(2, 64, dtype=torch.int32))
    codes, scales, zeros = quantize_affine(torch.zeros(2, 64), group_size=64)
    with pytest.raises(ValueError, match="divide"):
        dequantize_affine(codes, scales, zeros, group_size=60)
    with pytest.raises(ValueError, match="scales must have 4 entries"):
        dequantize_affine(codes, scales, zeros, group_size=32)
    with pytest.raises(ValueError, match="zeros must have 2 entries"):
        dequantize_affine(codes, scales, zeros[:1], group_size=64)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_packing(count):
    codes = torch.randint(0, 16, (count,), dtype=torch.uint8, generator=stream(0, "codes"))
    packed = pack_nibbles(codes)
    assert packed.numel() == -(-count // 2)
    assert torch.equal(unpack_nibbles(packed, count), codes)
    with pytest.raises(ValueError, match=r"must hold \d+ uint8 for \d+ codes"):
        unpack_nibbles(packed, count + 2)


def test_forecasts_allocate_nothing_else():
    """On fake tensors and on the meta device: shapes, no numbers."""
    with FakeTensorMode():
        codes, scales, zeros = quantize_affine(torch.empty(4096, 1024), group_size=256)
        store_affine(torch.empty(4096, 1024), codes, scales, zeros, generator=stream(0, "noise"))
        back = dequantize_affine(codes, scales, zeros)
    assert codes.shape == back.shape == (4096, 1024)
    assert scales.shape == (16384, 1)
    codes, scales, zeros = quantize_affine(torch.empty(4, 256, device="meta"))
    assert dequantize_affine(codes, scales, zeros).device.type == "meta"
