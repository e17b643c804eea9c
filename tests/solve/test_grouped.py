import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowdim.solve.matrix_completion import grouped
from lowdim.solve.matrix_completion.grouped import Entries, blocks_of


def draw(seed, m=40, n=60, p=0.3):
    g = torch.Generator().manual_seed(seed)
    rate = p * 2 * torch.rand(m, 1, generator=g)
    rows, cols = (torch.rand(m, n, generator=g) < rate).nonzero().T
    values = torch.randn(len(rows), generator=g, dtype=torch.float64)
    order = torch.randperm(len(rows), generator=g)
    return Entries.sorted(rows[order], cols[order], values[order], (m, n))


def dense(entries):
    out = torch.zeros(entries.shape, dtype=torch.float64)
    out[entries.rows, entries.cols] = entries.values
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(6, 20), st.sampled_from([1, 50, 1 << 19]))
def test_blocks_hold_each_entry_once(seed, rank, sketch, numbers):
    entries = draw(seed)
    before, grouped._BLOCK_NUMBERS = grouped._BLOCK_NUMBERS, numbers
    try:
        blocks = blocks_of(entries, rank, sketch)
    finally:
        grouped._BLOCK_NUMBERS = before
    counts = entries.counts()
    out = torch.zeros(40, 61, dtype=torch.float64)
    for block in blocks:
        out[block.rows[:, None], block.cols] += block.values
        length, own = block.cols.shape[1], counts[block.rows]
        assert int(own.max()) == length or len(block.rows) * length <= 50 or numbers < 1 << 19
        assert float(own.min()) * (1 + 1 / 8) >= length - 1
        kinds = {"under": own < rank, "short": (own >= rank) & (own <= sketch), "long": own > sketch}
        assert bool(kinds[block.kind].all())
        assert block.design(torch.ones(61, rank)).shape == (len(block.rows), length, rank)
        assert len(block.rows) == 1 or len(block.rows) * length * rank <= numbers
    assert torch.equal(out[:, :60], dense(entries))
    assert not out[:, 60].any()
    held = torch.cat([b.rows for b in blocks]).sort().values if blocks else torch.empty(0)
    assert torch.equal(held, counts.nonzero()[:, 0].to(held.dtype))


def test_transpose_sparse_and_pick():
    entries = draw(3)
    assert torch.equal(dense(entries.T), dense(entries).T)
    x = torch.randn(60, 4, dtype=torch.float64)
    assert torch.allclose(entries.sparse() @ x, dense(entries) @ x)
    mask = torch.arange(len(entries)) % 2 == 0
    part = entries.pick(mask)
    assert torch.allclose(part.sparse() @ x, dense(part) @ x)
    assert torch.equal(dense(part) + dense(entries.pick(~mask)), dense(entries))
