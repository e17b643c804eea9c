"""Routers, experts and other matrices that are no layers of their own: left out with a note, refused by name."""

import pytest
import torch
from torch import nn
from unusual_models import IDS, SIZES, made, told

import lowdim
from lowdim.adapters import LoRA
from lowdim.errors import NoMatchingModuleError
from lowdim.layers import Monarch, swap_linear


def test_routers_are_left_out_and_refused_by_name():
    T = pytest.importorskip("transformers")
    config = T.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=24, head_dim=8, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    model = made(T.Llama4ForCausalLM, config)
    want = model(IDS).logits
    notes, adapted = told(lambda: lowdim.adapt(model, LoRA(rank=2)))
    assert not any("router" in name for name in adapted.layers)
    assert torch.equal(model(IDS).logits, want)
    assert any("model.layers.*.feed_forward.experts.gate_up_proj" in note for note in notes)
    fresh = made(T.Llama4ForCausalLM, config)
    with pytest.raises(NoMatchingModuleError, match=r"router \(Llama4Router .*returns a tuple"):
        lowdim.adapt(fresh, LoRA(rank=2, target_modules=["router"]))
    assert all(p.requires_grad for p in fresh.parameters())
    assert not any(
        "router" in name for name, m in swap_linear(fresh, Monarch, nblocks=2).named_modules() if isinstance(m, Monarch)
    )


def experts():
    T = pytest.importorskip("transformers")
    sparse = {"moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
    return made(T.Qwen2MoeForCausalLM, T.Qwen2MoeConfig(**SIZES, **sparse))


@pytest.mark.parametrize(
    "targets",
    [None, "all-linear", ["q_proj", "down_proj"], r".*(q_proj|down_proj)"],
)
def test_experts_that_are_not_reached_are_named_with_their_share(targets):
    model = experts()
    stacked = {n: p for n, p in model.named_parameters() if ".experts." in n}
    reached = stacked if targets in (None, "all-linear") else {n: p for n, p in stacked.items() if "down" in n}
    share = sum(p.numel() for p in reached.values()) / sum(p.numel() for p in model.parameters())
    notes, _ = told(lambda: lowdim.adapt(model, LoRA(rank=1, target_modules=targets)))
    (note,) = [note for note in notes if "not adapted" in note]
    assert f"{share:.0%} of the model's parameters" in note
    assert "model.layers.*.mlp.experts.down_proj" in note


def test_no_word_is_said_of_experts_that_were_not_asked_for():
    notes, _ = told(lambda: lowdim.adapt(experts(), LoRA(rank=2, target_modules=["q_proj"])))
    assert not notes
    notes, _ = told(lambda: lowdim.adapt(nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4)), LoRA(rank=2)))
    assert not notes


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "experts.gate_up_proj",
            r"is a parameter, not a layer: model\.layers\.0\.mlp\.experts\.gate_up_proj of shape \(4, 32, 16\)",
        ),
        ("gate_up_proj", "is a parameter, not a layer"),
        ("experts", r"keeps its weights as stacked parameters \(model\.layers\.0\.mlp\.experts\.gate_up_proj"),
    ],
)
def test_experts_that_are_asked_for_by_name_are_refused_with_the_reason(name, reason):
    with pytest.raises(NoMatchingModuleError, match=reason):
        lowdim.adapt(experts(), LoRA(rank=2, target_modules=[name]))


def test_matrices_that_attention_keeps_by_itself_are_named():
    block = nn.TransformerEncoderLayer(8, 2, 16)
    notes, adapted = told(lambda: lowdim.adapt(nn.ModuleList([block]), LoRA(rank=2)))
    assert list(adapted.layers) == ["0.linear1", "0.linear2"]
    assert any("*.self_attn.in_proj_weight" in note and "experts" not in note for note in notes)


def test_transposed_convolutions_are_named_and_not_called_experts():
    notes, _ = told(lambda: lowdim.adapt(nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Linear(4, 4)), LoRA(rank=2)))
    assert len(notes) == 1
    assert "(*.weight; 67% of the model's parameters)" in notes[0]
    assert "experts" not in notes[0]
