import pytest
import torch

from lowdim.linalg import CountSketch, stream
from lowdim.testing.agreement import refuses


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("tail", [(), (4,)])
def test_apply_is_the_dense_product(batch, tail):
    sketch = CountSketch.draw(5, *batch, 20, generator=stream(0, "test"))
    x = torch.randn(*batch, 20, *tail, dtype=torch.float64)
    dense = sketch.dense()
    assert sketch.shape == tuple(dense.shape) == (*batch, 5, 20)
    want = dense @ x if tail else (dense @ x[..., None])[..., 0]
    assert torch.allclose(sketch.apply(x), want, atol=1e-13)


def test_every_column_has_one_sign_and_all_buckets_and_signs_occur():
    dense = CountSketch.draw(4, 400, generator=stream(0, "test")).dense()
    assert torch.equal(dense.abs().sum(0), torch.ones(400, dtype=torch.float64))
    assert (dense > 0).any(1).all()
    assert (dense < 0).any(1).all()
    assert dense.abs().sum(1).min() > 60  # 100 each in the mean


def test_dtype_follows_x_and_gradients_pass():
    sketch = CountSketch.draw(4, 10, generator=stream(1, "test"))
    x = torch.randn(10, 2, requires_grad=True)
    y = sketch.apply(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert torch.allclose(x.grad, sketch.dense().float().sum(0)[:, None].expand(10, 2))


def test_nothing_to_sketch():
    assert torch.equal(CountSketch.draw(3, 0).apply(torch.zeros(0, 2)), torch.zeros(3, 2))


def test_wrong_input_is_refused():
    buckets, signs = torch.tensor([0, 1]), torch.ones(2)
    refuses(
        [
            (ValueError, "rows", lambda: CountSketch(buckets, signs, 0)),
            (ValueError, "[0, 1)", lambda: CountSketch(buckets, signs, 1)),
            (ValueError, "[0, 2)", lambda: CountSketch(buckets - 1, signs, 2)),
            (ValueError, "one shape", lambda: CountSketch(buckets, torch.ones(3), 2)),
            (TypeError, "integers", lambda: CountSketch(signs, signs, 2)),
            (ValueError, "(3,)", lambda: CountSketch(buckets, signs, 2).apply(torch.ones(3))),
        ]
    )
