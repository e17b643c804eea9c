import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
from lowdim.catalogue import variant
from lowdim.layers import BlockDense, BlockShuffle, LowRank, SelfGuide, StructuredFFN, structured_mlp
from lowdim.methods import apply, with_options

KINDS = {
    "lowrank": (LowRank, {"rank": 4}),
    "blockdense": (BlockDense, {"rank": 8, "nblocks": 2}),
    "blockshuffle": (BlockShuffle, {"nblocks": 4}),
    "dense": (nn.Linear, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gelu_and_swiglu_by_hand(kind):
    cls, how = KINDS[kind]
    x = torch.randn(3, 8, dtype=torch.float64)
    for act in ("gelu", "swiglu"):
        ffn = StructuredFFN(8, 16, kind, act=act, **how).double()
        assert type(ffn.fc1) is type(ffn.fc2) is cls
        h = F.linear(x, ffn.fc1.weight, ffn.fc1.bias)
        if act == "gelu":  # ½ h (1 + tanh(√(2/π) (h + 0.044715 h³)))
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        else:
            assert h.shape == (3, 32)
            h = h[:, :16] / (1 + torch.exp(-h[:, :16])) * h[:, 16:]
        torch.testing.assert_close(ffn(x), F.linear(h, ffn.fc2.weight, ffn.fc2.bias), rtol=1e-10, atol=1e-12)


def test_the_low_rank_block_starts_from_an_svd_with_rank_256():
    ffn = StructuredFFN(512, 512, "lowrank", bias=False)
    assert ffn.fc1.rank == ffn.fc2.rank == 256
    assert ffn.fc1.bias is None
    a = (ffn.fc1.A @ ffn.fc1.A.T).detach()
    torch.testing.assert_close(a, (ffn.fc1.B.T @ ffn.fc1.B).detach(), rtol=0, atol=1e-4)


def test_a_seed_gives_each_layer_its_own_numbers():
    one, two = (StructuredFFN(8, 8, "blockshuffle", seed=0) for _ in range(2))
    assert torch.equal(one.fc1.blkdiag1, two.fc1.blkdiag1)
    assert not torch.equal(one.fc1.blkdiag1, one.fc2.blkdiag1)


@pytest.mark.parametrize("kind", ["lowrank", "blockdense", "blockshuffle"])
def test_a_llama_is_built_trained_and_loaded_to_the_bit(kind, tmp_path):
    from transformers import LlamaForCausalLM
    from transformers.monkey_patching import apply_patches, register_patch_mapping, unregister_patch_mapping

    cls, how = KINDS[kind]
    register_patch_mapping({"^LlamaMLP$": structured_mlp(kind, **how)})
    try:
        with apply_patches():
            model = tiny.llama(2)
        layers = [getattr(block.mlp, name) for block in model.model.layers for name in ("fc1", "fc2")]
        assert {type(layer) for layer in layers} == {cls}
        assert [layer.out_features for layer in layers] == [128, 32, 128, 32]
        assert not torch.equal(*(next(layer.parameters()) for layer in layers[::2])), "blocks must not start alike"
        ids = torch.arange(24).view(2, 12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[2] < losses[0]
        model.eval().save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
        assert type(again.model.layers[1].mlp.fc1) is cls
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    finally:
        unregister_patch_mapping(["^LlamaMLP$"])


def test_from_scratch_the_method_starts_from_an_svd_and_guides_each_layer():
    model = tiny.llama(1)
    chosen = with_options(variant("self-guided"), {"rank": 4})
    applied = apply(chosen, model, lr=1e-3, steps=10, scratch=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowRank)}
    assert len(layers) == 7  # four of attention, three of the feed-forward block
    for layer in layers.values():
        a, b = layer.A @ layer.A.T, layer.B.T @ layer.B
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    applied.start(1e-3)
    assert isinstance(applied.companion, SelfGuide)
    assert applied.companion.layers.keys() == layers.keys()
    assert {layer.steps for layer in applied.companion.layers.values()} == {5}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StructuredFFN(8, 8, "monarch"), ValueError, "kind must be one of"),
        (lambda: StructuredFFN(8, 8, "dense", act="relu"), ValueError, "act must be one of"),
        (
            lambda: StructuredFFN(8, 16, "lowrank"),
            ValueError,
            r"layer fc1 \(8 -> 16\): rank must .* 8\]; got 256",
        ),
        (lambda: StructuredFFN(8, 9, "blockshuffle"), ValueError, "layer fc1 .*nblocks must divide out_features"),
        (lambda: StructuredFFN(8, 8, "blockshuffle", rank=4), TypeError, "rank"),
        (lambda: structured_mlp("blockdense", blocks=4), TypeError, "blocks"),
        (lambda: structured_mlp("blockdense", seed=0), ValueError, "all blocks would start alike"),
        (lambda: structured_mlp("dense")(tiny.llama(hidden_act="relu").config), ValueError, "hidden_act of the configuration"),
    ],
)
def test_bad_values(make, error, message):
    with pytest.raises(error, match=message):
        make()
