"""Block-wise bytes: the nearest code, exactly, on every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowdim.linalg import dequantize_blockwise, dynamic_codebook, quantize_blockwise, stream


def nearest(x, code, block):
    """The definition, entry by entry: argmin over all codes in float64, ties to the lower one."""
    flat = x.flatten().double()
    q, scales = [], []
    for part in flat.split(block):
        top = float(part.abs().max().float())
        scales.append(top)
        unit = (part.float() / (top or 1.0)).double()
        q.append((unit[:, None] - code.double()).abs().argmin(1))
    return torch.cat(q).view(x.shape), torch.tensor(scales)


@pytest.mark.parametrize("signed", [True, False])
def test_codebook(signed):
    code = dynamic_codebook(signed)
    assert code.dtype == torch.float32
    assert code.shape == (256,)
    assert bool((code.diff() > 0).all())
    assert float(code[-1]) == 1.0
    assert 0.0 in code.tolist()
    # the finest decade: 64 (128) cells of [0.1, 1], their midpoints
    cells = 64 if signed else 128
    top = 0.1 + 0.9 * (torch.arange(cells) + 0.5) / cells
    assert torch.allclose(code[-1 - cells : -1], top, atol=1e-6)
    if signed:
        assert float(code[0]) == -float(code[-2])  # +1 has no opposite
    code[0] = 5.0
    assert float(dynamic_codebook(signed)[0]) != 5.0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (3, 100), (2, 4, 64), (1000,)])
def test_nearest_code(signed, shape):
    draw = stream(0, signed, *shape)
    x = torch.randn(shape, generator=draw) * 10.0 ** torch.empty(shape).uniform_(-7, 0, generator=draw)
    x = x if signed else x.abs()
    code = dynamic_codebook(signed)
    q, absmax = quantize_blockwise(x, code)
    want, scales = nearest(x, code, 256)
    assert q.dtype == torch.uint8
    assert q.shape == x.shape
    assert torch.equal(absmax, scales.to(absmax.dtype))
    wrong = q.long() != want
    if bool(wrong.any()):  # only where two codes are equally near but for the last bit
        unit = (x / scales.repeat_interleave(256)[: x.numel()].view(shape))[wrong].double()
        a, b = code[q.long()[wrong]].double(), code[want[wrong]].double()
        assert float(((unit - a).abs() - (unit - b).abs()).abs().max()) < 1e-7
    back = dequantize_blockwise(q, absmax, code)
    assert torch.equal(back.flatten(), code[q.long().flatten()] * absmax.repeat_interleave(256)[: x.numel()])


@pytest.mark.parametrize("signed", [True, False])
def test_look_up_equals_binary_search(signed):
    """Every float that could matter: the middles and their neighbours, all binades, both zeros, denormals."""
    from lowdim.linalg.quantize import _search

    code = dynamic_codebook(signed)
    wide = code.double()
    middles = ((wide[1:] + wide[:-1]) / 2).float()
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    x = torch.cat(
        [middles, middles.nextafter(up), middles.nextafter(down), torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45])]
    )
    x = torch.cat([x, torch.rand(100_000, generator=stream(0)) * 2 - 1, torch.logspace(-40, 0, 10_000)])
    assert torch.equal(_search(code)(x), torch.bucketize(x, middles, out_int32=True))


def test_codes_too_dense_for_the_table_still_work():
    code = torch.linspace(0.5, 0.51, 16)  # many middles within one cell
    x = torch.linspace(0.5, 0.51, 100)
    q, _ = quantize_blockwise(torch.cat([x, torch.ones(1)]), code, block=101)
    assert torch.equal(q[:-1].long(), (x[:, None].double() - code.double()).abs().argmin(1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.integers(1, 50))
def test_codes_are_fixed_points(values, block):
    """Quantising what was quantised changes nothing where the largest magnitude has a code of its own (+1)."""
    code = dynamic_codebook(True)
    x = torch.tensor(values).abs()
    q, absmax = quantize_blockwise(x, code, block)
    back = dequantize_blockwise(q, absmax, code, block)
    again, absmax2 = quantize_blockwise(back, code, block)
    assert torch.equal(absmax, absmax2)
    assert torch.equal(dequantize_blockwise(again, absmax2, code, block), back)
    # the map is coarse near zero: half the widest cell of a block
    assert float((back - x).abs().max()) <= 0.0072 * float(x.max()) + 1e-30


def test_all_zero_blocks_and_empty_tensors():
    code = dynamic_codebook(True)
    q, absmax = quantize_blockwise(torch.zeros(300), code)
    assert absmax.tolist() == [0.0, 0.0]
    assert torch.equal(dequantize_blockwise(q, absmax, code), torch.zeros(300))
    q, absmax = quantize_blockwise(torch.zeros(0), code)
    assert q.shape == absmax.shape == (0,)
    assert dequantize_blockwise(q, absmax, code).shape == (0,)


def test_nan_stays_visible():
    x = torch.ones(300)
    x[5] = float("nan")
    q, absmax = quantize_blockwise(x, dynamic_codebook(True))
    back = dequantize_blockwise(q, absmax, dynamic_codebook(True))
    assert bool(back[:256].isnan().all())
    assert bool(back[256:].isfinite().all())


def test_half_precision_input_and_views():
    x = torch.randn(40, 30, generator=stream(0)).bfloat16()
    code = dynamic_codebook(True)
    for view in (x, x.mT):
        q, absmax = quantize_blockwise(view, code)
        same, absmax2 = quantize_blockwise(view.float().contiguous(), code)
        assert torch.equal(q, same)
        assert torch.equal(absmax, absmax2)


def test_errors():
    code = dynamic_codebook(True)
    with pytest.raises(ValueError, match="block"):
        quantize_blockwise(torch.ones(3), code, block=0)
    with pytest.raises(ValueError, match="code"):
        quantize_blockwise(torch.ones(3), torch.ones(257))
    with pytest.raises(TypeError, match="int64"):
        quantize_blockwise(torch.ones(3, dtype=torch.int64), code)
    with pytest.raises(ValueError, match="absmax must have 2"):
        dequantize_blockwise(torch.zeros(300, dtype=torch.uint8), torch.ones(1), code)
