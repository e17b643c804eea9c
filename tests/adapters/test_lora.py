import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowdim
from lowdim.adapters import LoRA
from lowdim.adapters.core.low_rank import LoRAUpdate
from lowdim.linalg import add_low_rank, low_rank_norm, low_rank_product
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer


class TestLoRA(AdapterCase):
    rank, alpha = 2, 5

    def method(self, **changes):
        return LoRA(**{"rank": self.rank, "alpha": self.alpha, **changes})

    def dense(self, update):
        return self.alpha / self.rank * update.B @ update.A

    def start(self, weight, stats):
        return {"B": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return 2


class TestLoRAStabilized(TestLoRA):
    def method(self, **changes):
        return super().method(**{"rank_stabilized": True, **changes})

    def dense(self, update):
        return self.alpha / math.sqrt(self.rank) * update.B @ update.A


def test_scale_and_start():
    layer = nn.Linear(100, 50)
    update = LoRA(rank=4, alpha=8).attach(layer).update
    assert update.scaling == 2
    assert LoRA(rank=4, alpha=8, rank_stabilized=True).attach(layer).update.scaling == 4
    assert not update.B.any()
    bound = 1 / math.sqrt(100)
    assert float(update.A.detach().abs().max()) <= bound
    assert float(update.A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_start_is_that_of_kaiming_uniform():
    layer, generator = nn.Linear(64, 8), torch.Generator().manual_seed(3)
    got = LoRA(rank=5).attach(layer, generator=generator).update.A
    want = nn.init.kaiming_uniform_(torch.empty(5, 64), a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got.detach(), want)


def test_an_embedding_row_is_adapted_and_indices_get_no_gradient():
    adapted = LoRA(rank=2).attach(make_layer("embedding"))
    with torch.no_grad():
        adapted.update.B.normal_()
    index = torch.tensor([[1, 1], [4, 0]])
    want = F.embedding(index, adapted.effective_weight().T)
    assert relative_error(adapted(index), want) < 1e-12


def test_products_match_their_dense_forms():
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    A, B = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    want = 1.5 * x @ (B @ A).T
    torch.testing.assert_close(low_rank_product(x, A, B, 1.5), want)
    torch.testing.assert_close(low_rank_product(x, A, B), want / 1.5)
    for rows in (x, x[0], x[0, 0], x[:0]):
        base = y.new_zeros(*rows.shape[:-1], 4) + 1
        torch.testing.assert_close(add_low_rank(base, rows, A, B, 1.5), 1 + 1.5 * rows @ (B @ A).T)
    target = y.clone()
    out = add_low_rank(target, x, A, B, 1.5, inplace=True)
    assert out.data_ptr() == target.data_ptr()
    torch.testing.assert_close(out, y + want)
    torch.testing.assert_close(low_rank_norm(A, B), torch.linalg.matrix_norm(B @ A))
    assert float(low_rank_norm(torch.zeros(2, 5), torch.zeros(4, 2))) == 0


def test_mixed_dtypes_come_back_in_the_bases_own():
    x, y = torch.randn(3, 5), torch.randn(3, 4, dtype=torch.bfloat16)
    out = add_low_rank(y, x, torch.randn(2, 5), torch.randn(4, 2))
    assert out.dtype == torch.bfloat16


def test_outputs_may_be_overwritten_only_without_autograd_and_hooks():
    layer = nn.Linear(4, 4)
    adapted = LoRA(rank=1).attach(layer)
    seen = []
    with torch.no_grad():
        adapted.update.B.normal_()
        want = adapted(torch.ones(2, 4)).clone()
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
        got = adapted(torch.ones(2, 4))
        assert torch.equal(seen[0], layer(torch.ones(2, 4)))  # what the hook kept was not added to
    torch.testing.assert_close(got, want)


def test_an_update_without_its_two_methods_says_so():
    update = lowdim.adapters.WeightUpdate(2, 3)
    for call in (lambda: update(torch.ones(3)), update.dense, lambda: update.columns(torch.ones(1))):
        with pytest.raises(NotImplementedError, match="WeightUpdate"):
            call()
    thin = lowdim.adapters.ThinUpdate(2, 3, 1)
    for call in (thin.down, thin.up):
        with pytest.raises(NotImplementedError, match="ThinUpdate must define"):
            call()
    assert isinstance(LoRA(rank=1).attach(nn.Linear(2, 2)).update, LoRAUpdate)


def test_bad_input():
    for field, bad in [("rank", 0), ("alpha", 0), ("alpha", float("nan")), ("dropout", 1.0), ("dropout", -0.1)]:
        with pytest.raises(ValueError, match=field):
            LoRA(**{field: bad})
