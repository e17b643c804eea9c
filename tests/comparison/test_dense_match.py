"""Structured layers from random weights, sized like the dense layers: in parameters, and in FLOPs."""

import pytest
import torch
from torch import nn

import lowdim
from lowdim.catalogue import methods, variant
from lowdim.comparison.costs import Costs, DenseMatch, costs_of
from lowdim.comparison.ladder import build_ladder, largest_rank, sized, without_memory
from lowdim.comparison.settings import CompareSettings
from lowdim.layers import BlockDense, swap_linear
from lowdim.records import ComparisonRecord

LAYERS = "full,galore,low-rank,block-dense,block-shuffle,monarch,sltrain"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 32), nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))


def ladder(equal, sizes=2, chosen=LAYERS):
    net = model()
    limit = largest_rank(net)
    with without_memory(net, (), True) as prepare:

        def measure(each):
            applied = prepare(each)
            return costs_of(applied.model, applied.trained(), 64)

        match = DenseMatch(measure, equal, net, sizes, limit)
        found = build_ladder(methods(chosen), sizes, "parameters", limit, lambda v: measure(v).parameters, 0, match.sizes)
        costs = {(n, s): match.costs(sized(variant(n), s)) for n, sizes in found.sizes.items() for s in sizes}
    return found, match, costs


def test_costs_are_counted_from_shapes():
    """By hand: an embedding multiplies nothing, and of a block-diagonal factor only the blocks do."""
    net = model()
    assert costs_of(net, 5, 64) == Costs(5, 2 * 2 * 32 * 64)
    swap_linear(net, BlockDense, ["1"], rank=8, nblocks=4, fresh=True)
    assert costs_of(net, 5, 64).flops == 2 * (8 * 32 // 4 + 64 * 8) + 2 * 32 * 64
    assert str(Costs(1234, 5678)) == "1,234 parameters, 5,678 FLOPs a token"


def test_equal_parameters():
    """Low rank: r (32 + 64) numbers a layer against 32 · 64; BlockDense: r (32 / 4 + 64) and r (64 / 4 + 32)."""
    found, match, costs = ladder("parameters")
    dense = 7 * 32 + 2 * 32 * 64
    assert match.dense.parameters == dense
    assert not found.skipped
    assert found.sizes["low-rank"] == (21, 5)  # 4096 / 192 = 21.3, a quarter of it 5.3
    assert found.sizes["block-dense"] == (32, 8)  # 4096 / 120 = 34.1, multiples of 4 up to 32; 8.5
    assert found.sizes["monarch"] == found.sizes["block-shuffle"]
    assert found.sizes["full"] == (None,)
    for name in ("low-rank", "block-dense", "sltrain"):
        first, second = found.sizes[name]
        assert costs[name, first].parameters == pytest.approx(dense, rel=0.07), name
        assert costs[name, second].parameters - 7 * 32 == pytest.approx((dense - 7 * 32) / 4, rel=0.2), name
    assert costs["low-rank", 21] == Costs(7 * 32 + 2 * 21 * 96, 2 * 2 * 21 * 96)


def test_equal_flops():
    """SLTrain builds its weight in every pass, so that at the dense model's FLOPs it has fewer parameters than low rank."""
    found, match, costs = ladder("flops")
    assert match.rest == 0
    assert found.sizes["low-rank"] == (21, 5)
    assert costs["low-rank", 21].flops == pytest.approx(match.dense.flops, rel=0.05)
    assert costs["block-dense", 32].flops == pytest.approx(match.dense.flops, rel=0.07)
    assert costs["sltrain", found.sizes["sltrain"][0]].flops >= match.dense.flops


def test_a_number_of_blocks_is_a_size_of_layers_that_have_it_alone():
    assert sized(variant("monarch"), 8).options["nblocks"] == 8
    assert sized(variant("block-dense"), 8).options == {"rank": 8, "nblocks": 4}
    assert sized(variant("full"), 8) == variant("full")


def test_flops_are_for_random_weights():
    with pytest.raises(ValueError, match="--equal flops is for structured layers from random weights"):
        CompareSettings(model="m", data=("d",), equal="flops")
    CompareSettings(model="m", data=("d",), task="pretrain", equal="flops")


@pytest.mark.slow
@pytest.mark.parametrize("equal", ["parameters", "flops"])
def test_a_comparison_prints_both_counts_of_each_row(equal, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"{i} and {i + 1} are {2 * i + 1}, as {i * i % 97} is {i % 7}." for i in range(400)))
    found = lowdim.compare(model="llama-tiny", task="pretrain", data=str(file), methods="full,block-dense,monarch,sltrain",
                           equal=equal, rates=1, sizes=1, seeds=1, steps=3, batch_size=4, max_length=16,
                           out=tmp_path / "out")  # fmt: skip
    record = ComparisonRecord.read(tmp_path / "out")
    rows = {row.name: row for row in record.methods if not row.trivial}
    assert rows.keys() == {"full", "block-dense", "monarch", "sltrain"}
    assert all(row.flops_per_token and row.trained_parameters for row in rows.values())
    dense, block = rows["full"], rows["block-dense"]
    key = "trained_parameters" if equal == "parameters" else "flops_per_token"
    assert getattr(block, key) == pytest.approx(getattr(dense, key), rel=0.05)
    assert any(f"{dense.trained_parameters:,} parameters, {dense.flops_per_token:,} FLOPs" in note for note in record.notes)
    assert {row["FLOPs per token"] for row in found.rows()} >= {dense.flops_per_token, block.flops_per_token}
    assert "FLOPs" in (tmp_path / "out" / "report.html").read_text()
