"""Q-GaLore's projector: the basis in packed codes, and the interval that grows while the subspace is stable."""

import copy

import pytest
import torch
from torch import nn

from lowdim.linalg import dequantize_affine, quantize_affine, stream
from lowdim.optim import QGaLore, QuantizedSVDProjector, state_bytes


def test_the_basis_is_packed():
    """Spec's memory formula: s r / 2 bytes and 8 bytes a group, and s numbers for the first vector."""
    for shape, side in (((96, 64), "right"), ((64, 96), "left")):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        optimizer = QGaLore([p], rank=16, min_8bit_size=64)
        optimizer.step()
        state = optimizer.state[p]
        assert state[f"{side}_codes"].shape == (64 * 16 // 2,)
        basis = 64 * 16 // 2 + 8 * 64 * 16 // 256 + 4 * 64
        moments = 2 * (96 * 16 + 4 * 96 * 16 // 256)
        assert state_bytes(optimizer) == basis + moments + 5 * 4 + 2 * 4  # the queue; energy and overlap
        projector = optimizer.parts(optimizer.param_groups[0], 2).projector
        assert projector.nbytes(shape, 16, torch.float32) == basis + 28


@pytest.mark.parametrize(("bits", "worst"), [(2, 0.9), (4, 0.25), (8, 0.02)])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_down_and_up_share_the_rounded_basis(bits, worst, shape):
    """In the layout of the spec: the basis lies (r, n) or (m, r) when it is cut into groups."""
    grad = torch.randn(shape, generator=stream(0, "g"), dtype=torch.float64)
    exact = QuantizedSVDProjector(3, bits=None)
    rough = QuantizedSVDProjector(3, bits=bits, group_size=8)
    one, two = {}, {}
    exact.prepare(grad, one, 0)
    rough.prepare(grad, two, 0)
    (key,) = (k for k in one if k.endswith("_basis"))
    basis = one[key]
    flat = (basis.mT if key.startswith("right") else basis).reshape(-1)
    pieces = [flat[:16], flat[16:]] if len(flat) < 24 else [flat[:24], flat[24:]]
    back = []
    for piece in pieces:
        size = min(8, piece.numel())
        if piece.numel():
            back.append(dequantize_affine(*quantize_affine(piece, group_size=size, bits=bits), group_size=size))
    want = torch.cat(back)
    P = want.view(3, -1).mT if key.startswith("right") else want.view(-1, 3)
    low = rough.down(grad, two)
    assert torch.allclose(low, grad @ P if key.startswith("right") else P.mT @ grad, atol=1e-12)
    up = rough.up(low, two)
    assert torch.allclose(up, low @ P.mT if key.startswith("right") else P @ low, atol=1e-12)
    weight = torch.ones(shape, dtype=torch.float64)
    rough.add_up(weight, low, two, alpha=0.5, beta=2.0)
    assert torch.allclose(weight, 2 + 0.5 * up, atol=1e-12)
    assert 0 < float((P - basis).abs().max()) < worst


def lazy_run(grads, **options):
    p = nn.Parameter(torch.zeros(grads[0].shape, dtype=grads[0].dtype))
    optimizer = QGaLore([p], rank=2, **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return optimizer.state[p]


def test_interval_grows_only_while_the_first_vector_is_stable():
    steady = torch.randn(8, 6, generator=stream(0, "steady"))
    noise = [torch.randn(8, 6, generator=stream(k, "noise")) for k in range(40)]
    still = lazy_run([steady + 0.01 * n for n in noise], update_interval=2, queue_size=3)
    wild = lazy_run(noise, update_interval=2, queue_size=3, cos_threshold=0.99)
    assert still["interval"] > 2
    assert still["svd_count"] < 20
    assert (wild["interval"], wild["svd_count"]) == (2, 20)
    assert lazy_run([steady] * 40, update_interval=2, queue_size=3, cos_threshold=1.5)["svd_count"] == 20
    assert lazy_run([steady] * 40, update_interval=2, queue_size=3, gamma=1)["interval"] == 2
    assert lazy_run([steady] * 8, update_interval=2, queue_size=2, gamma=1.6)["interval"] == 4  # int(3 * 1.6) at step 6


def test_the_sign_of_a_vector_does_not_matter():
    """The trap: LAPACK's signs are arbitrary, so a cosine of -1 says that nothing has turned."""
    projector = QuantizedSVDProjector(2, update_interval=1, queue_size=1, bits=None)
    first = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    state: dict = {}
    projector.prepare(first, state, 0)
    state["right_basis"] = -state["right_basis"]
    projector.prepare(first, state, 1)
    assert float(state["queue"][0]) == pytest.approx(1.0)
    assert state["interval"] == 2


def test_a_doubled_interval_may_wait():
    """The modulo is taken with the interval of the moment: 3, doubled at step 6, lets steps 9, 10 and 11 pass."""
    steady = torch.randn(8, 6, generator=stream(0, "steady"))
    counts = [lazy_run([steady] * (n + 1), update_interval=3, queue_size=2)["svd_count"] for n in range(13)]
    # chosen at 0, 3 and 6 (queue full: 6), then at 12
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4]


def test_bad_gradient_at_a_refresh_keeps_basis_and_count():
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = QGaLore([p], rank=2, update_interval=2)
    for _ in range(2):
        p.grad = torch.randn(8, 6)
        optimizer.step()
    before = copy.deepcopy(optimizer.state[p])
    p.grad = torch.full((8, 6), float("inf"))
    optimizer.step()
    after = optimizer.state[p]
    assert torch.equal(after["right_codes"], before["right_codes"])
    assert after["svd_count"] == 1
    q = nn.Parameter(torch.zeros(8, 6))
    q.grad = torch.full((8, 6), float("nan"))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*NaN"):
        QGaLore([q], rank=2).step()
