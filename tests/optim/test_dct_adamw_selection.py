"""DCT-AdamW's choice of columns: which score highest, when they are chosen, and how the moments follow."""

import pytest
import torch
from torch import nn

from lowdim.linalg import dct_matrix, stream
from lowdim.optim import AdamWRule, DCTAdamW, DCTProjector
from lowdim.optim.dct import PickingAdamW

f64 = torch.float64


def projected(a, **options):
    projector, state = DCTProjector(**options), {}
    projector.prepare(a, state, 0)
    return projector, state


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12), (700, 300), (300, 700)])
def test_the_largest_scores_win(shape, basis, norm):
    """By the definition, for the product and the FFT, and through several chunks."""
    G = torch.randn(shape, generator=stream(0, "dct", *shape), dtype=f64)
    Q = dct_matrix(min(shape), kind=3 if basis == "dct2" else 2)
    tall = shape[0] >= shape[1]
    scores = torch.linalg.vector_norm(G @ Q if tall else Q.T @ G, ord=norm, dim=0 if tall else 1)
    want = torch.topk(scores, 5).indices.sort().values
    projector, state = projected(G, rank=5, basis=basis, norm=norm)
    assert torch.equal(state["indices"].long(), want)
    assert state["indices"].dtype == torch.int32
    low = projector.down(G, state)
    assert low.shape == projector.low_shape(shape)
    assert float((low - (G @ Q[:, want] if tall else Q[:, want].T @ G)).abs().max()) < 1e-12
    up = projector.up(low, state)
    weight = torch.ones(shape, dtype=f64)
    projector.add_up(weight, low, state, alpha=-0.5, beta=0.9)
    assert float((weight - (0.9 - 0.5 * up)).abs().max()) < 1e-12
    if norm == 2:  # the best columns for the squared error: what is lost are the other scores
        assert abs(float((G - up).square().sum()) - float(scores.square().sum() - scores[want].square().sum())) < 1e-9


def test_dct2_is_the_transform_of_rows():
    """Rows that are cosines of frequency 2 and 5 have all their energy in these columns."""
    C = dct_matrix(16)
    G = torch.randn(30, 2, generator=stream(1, "dct"), dtype=f64) @ C[[2, 5]]
    projector, state = projected(G, rank=2, basis="dct2")
    assert state["indices"].tolist() == [2, 5]
    assert float((projector.up(projector.down(G, state), state) - G).abs().max()) < 1e-12


def test_ties_take_the_lower_index():
    """All columns of a zero gradient score the same; and an exact tie on the identity of scores."""
    _, state = projected(torch.zeros(9, 6), rank=3)
    assert state["indices"].tolist() == [0, 1, 2]
    from lowdim.optim.dct import _largest

    assert _largest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_choices_happen_when_the_authors_make_them():
    """At k = 1 and whenever T divides k: the second choice comes after T - 1 more steps."""
    p = nn.Parameter(torch.zeros(20, 12))
    optimizer = DCTAdamW([p], rank=2, update_interval=3)
    chosen = []
    for step in range(8):
        p.grad = torch.randn(20, 12, generator=stream(step, "dct"))
        before = optimizer.state[p].get("indices")
        optimizer.step()
        chosen.append(optimizer.state[p]["indices"] is not before)
    assert chosen == [True, False, True, False, False, True, False, False]


def test_no_svd_is_called(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("an SVD was called")

    for name in ("svd", "svdvals", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    p = nn.Parameter(torch.zeros(20, 12))
    optimizer = DCTAdamW([p], rank=2, error_feedback=True)
    for step in range(3):
        p.grad = torch.randn(20, 12, generator=stream(step, "dct"))
        optimizer.step()


def test_models_with_two_sizes():
    """The authors build one basis, of the first matrix's size."""
    p, q = nn.Parameter(torch.zeros(20, 12)), nn.Parameter(torch.zeros(7, 30))
    optimizer = DCTAdamW([p, q], rank=2)
    p.grad, q.grad = torch.randn(20, 12), torch.randn(7, 30)
    optimizer.step()
    assert optimizer.state[p]["length"] == 12
    assert optimizer.state[q]["length"] == 7


@pytest.mark.parametrize("side", ["right", "left"])
def test_moments_follow_their_columns(side):
    """Q is orthogonal: rotating picks the columns that stay and zeroes the new ones, out of place."""
    projector, state = DCTProjector(rank=4), {}
    s, long = 9, 15
    Q = dct_matrix(s)
    old, new = torch.tensor([0, 3, 5, 8]), torch.tensor([1, 3, 4, 8])
    for index in (old, new):
        low = torch.zeros(long, s, dtype=f64)
        low[:, index] = 1 + torch.arange(4, dtype=f64)
        G = low @ Q.T
        projector.prepare(G if side == "right" else G.T, state, 0 if index is old else 1)
        assert torch.equal(state["indices"].long(), index)
    R, found = projector.rotation(state)
    assert found == side
    assert "rotation" not in state
    assert float((R - Q[:, old].T @ Q[:, new]).abs().max()) < 1e-14
    shape = (long, 4) if side == "right" else (4, long)
    m, v = torch.randn(shape, dtype=f64), torch.rand(shape, dtype=f64)
    ends = []
    for rule in (AdamWRule(), PickingAdamW()):
        moments = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        rule.rotate(moments, R, side)
        ends.append(moments)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ends[0][name], ends[1][name])
    kept = ends[1]["exp_avg"] if side == "right" else ends[1]["exp_avg"].T
    source = m if side == "right" else m.T
    assert torch.equal(kept[:, [1, 3]], source[:, [1, 3]])
    assert not kept[:, [0, 2]].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_gradient_keeps_the_columns(bad):
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = DCTAdamW([p], rank=2)
    p.grad = torch.full((8, 6), bad)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*NaN"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(8, 6))
    p.grad = torch.randn(8, 6, generator=stream(7, "dct"))
    optimizer.step()
    before = optimizer.state[p]["indices"].clone()
    p.grad = torch.full((8, 6), bad)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["indices"], before)
