import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
import vectors
from lowdim.layers import BlockDense, BlockShuffle, LowRank, Monarch, PreMerged, swap_linear
from lowdim.testing.layer_case import LayerCase

KINDS = {"lowrank": LowRank, "blockdense": BlockDense, "blockshuffle": BlockShuffle}


class TestBlockDense(LayerCase):
    layer_class = BlockDense
    how = {"rank": 6, "nblocks": 3}  # noqa: RUF012 (typed in the base class)
    lossless = {"rank": 12, "nblocks": 3}  # noqa: RUF012

    def dense(self, layer):
        """`B` times the block-diagonal matrix."""
        return layer.B @ torch.block_diag(*layer.blkdiag)


class TestBlockDenseTall(TestBlockDense):
    in_features, out_features = 21, 12
    lossless = {"rank": 21, "nblocks": 3}  # noqa: RUF012


class TestBlockShuffle(LayerCase):
    layer_class = BlockShuffle
    how = {"nblocks": 4}  # noqa: RUF012
    lossless = {"nblocks": 1}  # noqa: RUF012

    def dense(self, layer):
        """Output `e n + b` is output e of block b of the second factor, which reads channel `j n + b` of the first."""
        n = self.how["nblocks"]
        first = torch.block_diag(*layer.blkdiag1)
        second = torch.einsum("bej,bc->ebjc", layer.blkdiag2, torch.eye(n, dtype=layer.blkdiag2.dtype))
        return second.reshape(self.out_features, -1) @ first


class TestBlockShuffleTall(TestBlockShuffle):
    in_features, out_features = 20, 12


def from_vectors(v):
    how = dict(v.hyperparameters)
    layer = KINDS[how.pop("kind")](**how, dtype=torch.float64)
    layer.load_state_dict({name: v[name] for name, _ in layer.named_parameters()})
    return layer


@pytest.mark.parametrize("case", KINDS)
def test_official_layer(case):
    v = vectors.load("structured-ffn", case)
    layer, x = from_vectors(v), v["x"].clone().requires_grad_(True)
    y = layer(x)
    v.close(y, "y")
    v.close(layer.dense_weight(), "dense_weight")
    v.close(torch.linalg.svdvals(layer.dense_weight()), "singular_values")
    y.backward(v["grad_y"])
    v.close(x.grad, "grad_x")
    for name, parameter in layer.named_parameters():
        v.close(parameter.grad, v["grad_y"].sum((0, 1)) if name == "bias" else f"grad_{name}")


@pytest.mark.parametrize("case", ["blockdense", "blockshuffle"])
def test_the_start_is_orthogonal_as_the_authors(case):
    """Each block, and B, has singular values 1; a fresh layer has what the vectors' factors have."""
    official = from_vectors(vectors.load("structured-ffn", case))
    fresh = type(official)(64, 96, seed=0, dtype=torch.float64, **({"rank": 32} if case == "blockdense" else {}))
    for layer in (official, fresh):
        assert layer is official or not bool(layer.bias.any())
        for name, factor in layer.named_parameters():
            if name != "bias":
                values = torch.linalg.svdvals(factor.detach())
                torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-9)


def test_the_low_rank_start_is_balanced_as_the_authors():
    """`A Aᵀ = Bᵀ B = S_r`, in the layer's own precision."""
    fresh = LowRank(64, 96, rank=8, init="svd", seed=0, dtype=torch.float64)
    for layer in (from_vectors(vectors.load("structured-ffn", "lowrank")), fresh):
        a, b = layer.A @ layer.A.T, layer.B.T @ layer.B
        assert float((a - b).detach().abs().max()) < 1e-8
        assert float((a - a.diag().diag()).detach().abs().max()) < 1e-8
    # the largest singular value of a normal (96, 64) matrix with standard deviation 1/8 is near (√96 + √64) / 8
    assert float(torch.linalg.matrix_norm(fresh.dense_weight().detach(), 2)) == pytest.approx((96**0.5 + 8) / 8, rel=0.1)


@pytest.mark.parametrize("cls", [BlockDense, BlockShuffle])
def test_random_start(cls):
    """Standard deviation 1/√(last dimension) of each factor, or the given one."""
    for std in ("xavier", 0.02):
        layer = cls(256, 512, nblocks=4, init="random", std=std, seed=0)
        for name, factor in layer.named_parameters():
            if name != "bias":
                want = factor.shape[-1] ** -0.5 if std == "xavier" else std
                assert float(factor.detach().std()) == pytest.approx(want, rel=0.05)


def test_cost_by_hand():
    dense, shuffle = BlockDense(8, 12, rank=4, nblocks=2).cost(3), BlockShuffle(8, 16, nblocks=2).cost(3)
    # (2, 2, 4) and (12, 4); (2, 4, 4) and (2, 8, 4)
    assert dense == (16 + 48 + 12, 2 * 3 * 64, 4 * 3 * 64, 4 * (3 * 8 + 16 + 3 * 4 + 3 * 4 + 48 + 3 * 12), 2 * 592)
    assert shuffle == (32 + 64 + 16, 2 * 3 * 96, 4 * 3 * 96, 4 * (3 * 8 + 32 + 3 * 8 + 3 * 8 + 64 + 3 * 16), 2 * 864)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockDense(12, 8, rank=8, nblocks=5), "nblocks must divide in_features; got nblocks=5 and in_features=12"),
        (lambda: BlockDense(12, 8, rank=6, nblocks=4), "nblocks must divide rank; got nblocks=4 and rank=6"),
        (lambda: BlockDense(12, 8, rank=0), "rank must be an int >= 1; got 0"),
        (lambda: BlockDense(12, 8, rank=16), r"rank must be an int in \[1, 12\]; got 16"),
        (lambda: BlockDense(12, 8, rank=4, nblocks=0), "nblocks must be an int >= 1; got 0"),
        (lambda: BlockDense(12, 8, rank=4, init="svd"), "init must be one of ortho, random; got 'svd'"),
        (lambda: BlockDense(12, 8, rank=4, std=0.0), "std must be"),
        (lambda: BlockShuffle(12, 9, nblocks=2), "nblocks must divide out_features; got nblocks=2 and out_features=9"),
        (lambda: BlockShuffle(9, 12, nblocks=2), "nblocks must divide in_features; got nblocks=2 and in_features=9"),
        (lambda: BlockShuffle.from_linear(nn.Linear(9, 12)), "nblocks must divide in_features"),
        (lambda: LowRank(12, 8, rank=9), r"rank must be an int in \[1, 8\]; got 9"),
        (lambda: PreMerged(BlockShuffle(4, 4), max_tokens=-1), "max_tokens must be an int >= 0; got -1"),
        (lambda: swap_linear(nn.Sequential(nn.Linear(9, 8)), BlockShuffle), "layer 0: nblocks must divide in_features"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("cls", "how"), [(BlockDense, {"rank": 8, "nblocks": 2}), (BlockShuffle, {"nblocks": 2})])
def test_a_file_rebuilds_the_layers(cls, how, tmp_path):
    """In the place of plain layers, from the folder alone."""
    from transformers import LlamaForCausalLM

    from lowdim.pretrained import save_compressed

    model, ids = swap_linear(tiny.llama(1).eval(), cls, ["down_proj"], **how), torch.arange(12)[None]
    save_compressed(model, tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again.model.layers[0].mlp.down_proj) is cls
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_prints_its_sizes():
    assert "in_features=8, out_features=6, bias=False, rank=4, nblocks=2" in repr(BlockDense(8, 6, False, rank=4, nblocks=2))
    assert "in_features=8, out_features=6, bias=True, nblocks=2" in repr(BlockShuffle(8, 6))


# The product before use


@pytest.mark.parametrize(
    "layer",
    [
        LowRank(12, 20, rank=4, init="svd", seed=0),
        BlockDense(12, 20, rank=8, seed=0),
        BlockShuffle(12, 20, seed=0),
        Monarch(12, 20),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("max_tokens", [0, 5, 16])
def test_pre_merged_is_the_layer_on_both_sides_of_the_limit(layer, max_tokens):
    merged = PreMerged(copy.deepcopy(layer).eval(), max_tokens=max_tokens)
    with torch.no_grad():
        merged.layer.bias.copy_(torch.linspace(-1, 1, 20))
        for rows in ((), (0,), (5,), (2, 3), (4, 4), (17,)):
            x = torch.randn(*rows, 12)
            want = F.linear(x, merged.layer.dense_weight(), merged.layer.bias)
            torch.testing.assert_close(merged(x), want, rtol=1e-5, atol=1e-5)


def test_pre_merged_uses_the_product_for_few_tokens_only():
    merged = PreMerged(BlockShuffle(8, 8, seed=0).eval(), max_tokens=6)
    with torch.no_grad():
        merged.weight.zero_()
        assert not bool(merged(torch.ones(2, 3, 8)).any()), "six tokens use the dense weight"
        assert bool(merged(torch.ones(7, 8)).any()), "seven use the factors"


def test_pre_merged_follows_loaded_tensors_and_refresh():
    merged, other = (PreMerged(BlockShuffle(8, 8, seed=seed).eval()) for seed in (0, 1))
    assert list(merged.state_dict()) == ["layer.blkdiag1", "layer.blkdiag2", "layer.bias"]
    merged.load_state_dict(other.state_dict())
    assert torch.equal(merged.weight, other.weight)
    with torch.no_grad():
        merged.layer.blkdiag1.mul_(2)
    assert torch.equal(merged.weight, other.weight)
    merged.refresh()
    assert torch.equal(merged.weight, 2 * other.weight)
    assert torch.equal(merged.to_linear().weight, merged.weight)


def test_pre_merged_does_not_train():
    merged = PreMerged(BlockShuffle(8, 8))
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        merged(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="x must have 8 features"):
        merged.eval()(torch.zeros(1, 9))
    with pytest.raises(TypeError, match="got Linear"):
        PreMerged(nn.Linear(8, 8))
