import copy

import pytest
import torch
from adapter_vectors import layer_of, train
from torch import nn

import lowdim
import vectors
from lowdim.adapters import BlockLoRA, LoRA
from lowdim.plan.kept import kept_tensors
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model


class TestBlockLoRA(AdapterCase):
    rank, blocks, alpha = 4, 2, 7
    smallest_rank = 2  # one row for each block

    def method(self, **changes):
        blocks = self.blocks if "rank" not in changes else 1  # the shared tests ask for ranks that the blocks do not divide
        return BlockLoRA(**{"rank": self.rank, "blocks": blocks, "alpha": self.alpha, "dropout": 0.0, **changes})

    def dense(self, update):
        return self.alpha / self.rank * sum(B @ update.A for B in update.B)

    def start(self, weight, stats):
        return {"B": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return self.rank // self.blocks


class TestOneRowForEachBlock(TestBlockLoRA):
    blocks = smallest_rank = 4


@pytest.mark.parametrize("name", vectors.cases("block-lora"))
def test_vectors(name):
    case = vectors.load("block-lora", name)
    how = case.hyperparameters
    method = BlockLoRA(rank=how["rank"], blocks=how["blocks"], alpha=how["alpha"], dropout=how["dropout"])
    adapted = method.attach(layer_of(case))
    update = adapted.update
    with torch.no_grad():
        update.A.copy_(case["A0"])
        update.B.copy_(case["B0"])
    case.close(adapted.delta(), "delta0")
    case.close(adapted(case["x"]), "y0")

    def check(step):
        if step == 0:
            case.close(update.A.grad, "grad_A")
            case.close(update.B.grad, "grad_B")
        case.close(adapted.delta(), case["delta_steps"][step])

    train(case, adapted, how["steps"], check)
    assert torch.equal(adapted.base.weight, case["W"])


def test_numbers_and_start():
    adapted = BlockLoRA(rank=8, blocks=4, alpha=2.0).attach(nn.Linear(100, 50))
    update = adapted.update
    assert update.A.shape == (2, 100)
    assert update.B.shape == (4, 50, 2)
    assert update.scaling == 2 / 8  # over the whole rank, not a block's
    assert not update.B.any()
    assert 0.09 < float(update.A.detach().abs().max()) <= 1 / 10
    assert adapted.dropout == 0.25


def test_ranks_larger_than_the_layer_are_taken():
    assert BlockLoRA().attach(nn.Linear(6, 5)).update.B.shape == (8, 5, 1)
    update = BlockLoRA(rank=12, blocks=2).attach(nn.Linear(6, 5)).update
    assert (tuple(update.A.shape), tuple(update.B.shape)) == ((6, 6), (2, 5, 6))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_blocks_see_the_same_gradient_so_their_differences_never_change(optimizer):
    adapted = TestBlockLoRA().attach(make_layer("linear"))
    before = adapted.update.B.detach().clone()
    run = optimizer(adapted.update.parameters(), lr=0.05)
    for _ in range(5):
        run.zero_grad()
        adapted(torch.randn(7, 12, dtype=torch.float64)).square().mean().backward()
        run.step()
    after = adapted.update.B.detach()
    assert relative_error(after[1] - after[0], before[1] - before[0]) < 1e-12
    assert float((after - before).abs().max()) > 1e-3


def test_equal_starts_stay_equal_for_ever():
    adapted = lowdim.adapt(small_model(), BlockLoRA(rank=4, blocks=2, dropout=0.0))
    optimizer = torch.optim.AdamW(adapted.param_groups(0.05))
    for step in range(4):
        optimizer.zero_grad()
        adapted.model(sample_input(16, seed=step)).square().mean().backward()
        optimizer.step()
    for layer in adapted.layers.values():
        assert layer.update.B.any()
        assert torch.equal(layer.update.B[0], layer.update.B[1])


def test_it_is_a_lora_of_the_rank_of_one_block_whose_B_learns_faster():
    layer = make_layer("linear")
    blocks = BlockLoRA(rank=8, blocks=4, alpha=8, dropout=0.0).attach(layer)
    lora = LoRA(rank=2, alpha=2).attach(layer)
    with torch.no_grad():
        lora.update.A.copy_(blocks.update.A)
    runs = [
        (blocks, torch.optim.SGD(blocks.update.parameters(), lr=0.1)),
        (lora, torch.optim.SGD([{"params": [lora.update.A]}, {"params": [lora.update.B], "lr": 0.4}], lr=0.1)),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x, target = (torch.randn(6, size, generator=generator, dtype=torch.float64) for size in (12, 9))
        for adapted, optimizer in runs:
            optimizer.zero_grad()
            (adapted(x) - target).square().mean().backward()
            optimizer.step()
    assert float(lora.delta().abs().max()) > 0.01
    assert relative_error(blocks.delta(), lora.delta()) < 1e-10


def test_one_mask_of_dropout_serves_all_blocks():
    layer = nn.Linear(40, 30, bias=False)
    adapted = BlockLoRA(rank=4, blocks=4, alpha=4, dropout=0.5).attach(layer)
    with torch.no_grad():
        adapted.update.B.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0])[:, None, None].expand_as(adapted.update.B))
        x = torch.randn(6, 40)
        torch.testing.assert_close(adapted.train()(x), layer(x))  # with a mask for each block the terms would not cancel


def test_the_backward_pass_keeps_less_than_that_of_lora():
    x = torch.randn(512, 384)

    def kept(method):
        adapted = method.attach(nn.Linear(384, 384))
        return sum(t.untyped_storage().nbytes() for t in kept_tensors(lambda: adapted(x), adapted))

    assert kept(BlockLoRA(rank=32, blocks=4, dropout=0.0)) < kept(LoRA(rank=32))


def test_peft_gets_a_lora_of_the_rank_of_one_block(tmp_path):
    adapted = lowdim.adapt(small_model(), BlockLoRA(rank=8, blocks=4))
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_()
    report = adapted.export(tmp_path)
    assert report.exact
    assert set(report.ranks.values()) == {2}


def test_bfloat16_sums_its_blocks_as_stored():
    adapted = TestBlockLoRA().attach(make_layer("linear", torch.bfloat16))
    exact = copy.deepcopy(adapted.update).double()
    want = exact.scaling * exact.B.sum(0) @ exact.A
    assert adapted.update.A.dtype == torch.bfloat16
    assert relative_error(adapted.delta(), want) < 1e-6


def test_packed_attention_is_not_reached():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="in_proj_weight"):
        lowdim.adapt(model, BlockLoRA(target_modules=["in_proj_weight"]))


def test_bad_input():
    with pytest.raises(ValueError, match="rank must be a multiple of blocks; got rank=6, blocks=4"):
        BlockLoRA(rank=6, blocks=4)
    for bad in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="blocks"):
            BlockLoRA(rank=4, blocks=bad)
        with pytest.raises(ValueError, match="rank"):
            BlockLoRA(rank=bad, blocks=1)
    with pytest.raises(ValueError, match="alpha"):
        BlockLoRA(alpha=0)
    with pytest.raises(ValueError, match="dropout"):
        BlockLoRA(dropout=1.0)
    with pytest.raises(TypeError, match="Embedding"):
        BlockLoRA().attach(nn.Embedding(4, 3))
