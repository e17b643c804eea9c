"""LoRAM's way back: updates of the pruned model in the whole one, in its files, with its heads, and under grouped queries."""

import copy

import pytest
import torch
from loram_models import GROUPS, deep, trained
from torch import nn

import lowdim
import tiny
from lowdim.adapters import ChannelGroup, LoRAM, gqa_channels, select_channels
from lowdim.testing.closeness import relative_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_layer_may_be_pruned_on_both_sides(dtype):
    model = deep(dtype)
    adapted = trained(model, LoRAM(rank=2, dropout=0.0, groups=GROUPS))
    assert [tuple(adapted.layers[n].base.weight.shape) for n in ("0", "2", "4")] == [(5, 6), (4, 5), (3, 4)]
    rows, columns = torch.tensor([1, 2, 7, 11]), torch.tensor([0, 3, 4, 9, 15])
    assert torch.equal(adapted.layers["2"].base.weight, model[2].weight[rows][:, columns])
    whole = adapted.recover(model)
    update = adapted.layers["2"].update
    want = model[2].weight.detach().double()
    want[rows[:, None], columns] += 8.0 * update.B.detach().double() @ update.A.detach().double()
    assert relative_error(whole[2].weight, want) <= {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert whole[2].weight.dtype == dtype
    assert torch.equal(whole[2].bias, model[2].bias)
    assert whole[2].bias is not model[2].bias
    assert all(change.relative_change > 0 for change in adapted.merge_report.layers)


def test_an_untrained_update_gives_the_whole_model_bit_for_bit():
    model = deep()
    method = LoRAM(rank=2, groups=GROUPS)
    whole = lowdim.adapt(method.shrink(model), method).recover(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in whole.state_dict().items())


def test_the_whole_model_gets_its_own_weights_and_not_the_aligned_ones():
    model, method = deep(), LoRAM(rank=2, groups=GROUPS)
    small = method.shrink(model)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1.0)  # what a publisher's alignment would do
    whole = lowdim.adapt(small, method).recover(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in whole.state_dict().items())


def test_masks_zero_weights_and_keep_factors_as_they_are():
    model = deep()
    mask = torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    adapted = trained(model, LoRAM(rank=2, masks={"2": mask}))
    assert torch.equal(adapted.layers["2"].base.weight, model[2].weight * mask)
    update = adapted.layers["2"].update
    A, B = adapted.recovered(model)["2"]
    assert torch.equal(A, update.A)
    assert torch.equal(B, update.B)
    whole = adapted.recover(model)
    assert relative_error(whole[2].weight, model[2].weight + 8.0 * update.B @ update.A) < 1e-6


def test_the_small_adapter_continues_after_a_save(tmp_path):
    model = deep()
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    method = LoRAM(rank=2, groups=GROUPS[:1], masks={"4": mask})
    adapted = trained(model, method)
    adapted.save(tmp_path)
    loaded = lowdim.load_adapter(method.shrink(model), tmp_path)
    assert loaded.method == method
    assert torch.equal(loaded.method.masks["4"], mask)
    x = torch.randn(4, 6)
    assert torch.equal(loaded.recover(model)(x), adapted.recover(model)(x))


def test_the_recovered_adapter_is_a_plain_one(tmp_path):
    peft = pytest.importorskip("peft")
    model = deep()
    adapted = trained(model, LoRAM(rank=2, groups=GROUPS))
    x = torch.randn(4, 6)
    want = adapted.recover(model)(x)
    whole = adapted.attach_to(copy.deepcopy(model))
    assert relative_error(whole.model(x), want) < 1e-5
    assert whole.export(tmp_path / "peft").exact
    assert relative_error(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft")(x), want) < 1e-5
    whole.save(tmp_path / "own")
    loaded = lowdim.load_adapter(model, tmp_path / "own")
    assert torch.equal(loaded.model(x), whole.model(x))


def test_a_trained_head_goes_along():
    model = deep()
    method = LoRAM(rank=2, groups=GROUPS[:1], target_modules=["0", "2"])
    adapted = lowdim.adapt(method.shrink(model), method, modules_to_save=["4"])
    with torch.no_grad():
        adapted.model[4].weight.fill_(7.0)
    whole = adapted.recover(model)
    assert bool((whole[4].weight == 7.0).all())
    other = deep()
    other[4] = nn.Linear(12, 5)
    with pytest.raises(ValueError, match="module 4 has a different shape"):
        adapted.recover(other)


def test_a_tied_head_is_separated_in_the_whole_model():
    model = tiny.llama(tie_word_embeddings=True)
    method = LoRAM(rank=2, target_modules=["lm_head", "q_proj"])
    adapted = trained(model, method)
    whole = adapted.recover(model)
    assert adapted.merge_report.untied == ("lm_head",)
    assert whole.config.tie_word_embeddings is False
    assert torch.equal(whole.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings is True


def test_a_pruned_llama_with_grouped_queries():
    model = tiny.llama(num_attention_heads=4, num_key_value_heads=2)
    config, groups = model.config, []
    d, q = config.hidden_size // 4, 2
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        kept = select_channels(model, [f"{attention}.q_proj"], [f"{attention}.o_proj"], 0.5, block=d * q)
        kv, qo = gqa_channels(kept[:: d * q] // (d * q), 4, 2, d)
        assert torch.equal(kept, qo)
        up = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        groups += [
            ChannelGroup([f"{attention}.k_proj", f"{attention}.v_proj"], [], kv),
            ChannelGroup([f"{attention}.q_proj"], [f"{attention}.o_proj"], qo),
            ChannelGroup(up, [f"{mlp}.down_proj"], select_channels(model, up, [f"{mlp}.down_proj"], 0.5)),
        ]
    method = LoRAM(rank=2, groups=groups)
    small = method.shrink(model)
    ids = torch.arange(12).view(2, 6)
    for layer in small.model.layers:
        layer.self_attn.num_key_value_groups = q  # one key head, two query heads: the group size stays
    adapted = lowdim.adapt(small, method)
    loss = small(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(layer.update.B.grad is not None for layer in adapted.layers.values())
    whole = adapted.recover(model)
    assert torch.equal(whole(input_ids=ids).logits, model(input_ids=ids).logits)
