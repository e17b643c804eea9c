"""Embeddings that are more than a lookup: scaled, with a row of padding, or of positions."""

import copy

import pytest
import torch
from torch import nn
from unusual_models import IDS, SIZES, disturb, made

import lowdim
from lowdim.adapters import LoRA, SoRA
from lowdim.errors import NoMatchingModuleError


class Scaled(nn.Embedding):
    """An embedding of the user's own; nothing in its name or attributes tells the factor."""

    def forward(self, ids):
        return super().forward(ids) * 7.0


@pytest.mark.parametrize("kind", [LoRA, SoRA])
def test_an_update_is_scaled_as_its_embedding_is(kind, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(9, 4))
    ids, weight = torch.tensor([[1, 2, 8]]), model[0].weight.detach().clone()
    adapted = lowdim.adapt(model, kind(rank=2, target_modules=["0"]))
    disturb(adapted)
    out = model(ids)
    torch.testing.assert_close(out, 7.0 * (weight + adapted.layers["0"].delta().T)[ids])
    adapted.save(tmp_path)
    twin = nn.Sequential(Scaled(9, 4))
    twin[0].weight.data = weight.clone()
    lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(ids), out)
    torch.testing.assert_close(adapted.merge()(ids), out)


@pytest.mark.parametrize("kind", [LoRA, SoRA])
def test_the_row_of_padding_is_not_trained(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 1))
    before = model[0].weight.detach().clone()
    adapted = lowdim.adapt(model, kind(rank=2, target_modules=["0"]))
    optimizer = torch.optim.AdamW(adapted.param_groups(0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    after = adapted.merge()[0].weight
    assert torch.equal(after[2], before[2])
    assert bool(((after - before).abs().sum(1) > 1e-4)[[0, 1, 3, 4, 5]].all())


def gemma():
    T = pytest.importorskip("transformers")
    return made(T.Gemma3ForCausalLM, T.Gemma3TextConfig(**SIZES, head_dim=8)), "embed_tokens", lambda m: m(IDS).logits


def bart():
    T = pytest.importorskip("transformers")
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = T.BartConfig(vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, **sizes, scale_embedding=True)
    return made(T.BartModel, config), "encoder.embed_tokens", lambda m: m.encoder(IDS).last_hidden_state


def own_class():
    """PEFT knows scales only by the attribute `embed_scale`, so the export has this one in its factors."""
    torch.manual_seed(0)
    return nn.Sequential(Scaled(32, 4), nn.Linear(4, 3)), "0", lambda m: m(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [gemma, bart, own_class])
def test_scaled_embeddings_agree_adapted_merged_and_in_peft(make, dtype, tmp_path):
    PeftModel = pytest.importorskip("peft").PeftModel
    model, name, run = make()
    model.to(dtype)
    base = copy.deepcopy(model)
    adapted = lowdim.adapt(model, LoRA(rank=2, target_modules=[name]))
    disturb(adapted, 1.0)
    with torch.no_grad():
        want, before = run(model), run(base)
    allowed = (1e-5 if dtype == torch.float32 else 0.05) * float(want.abs().max())
    assert (want - before).abs().max() > 5 * allowed
    assert adapted.export(tmp_path).exact
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    again = copy.deepcopy(base)
    lowdim.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert (run(again) - want).abs().max() < allowed
        assert (run(peft.base_model.model) - want).abs().max() < allowed
        assert (run(adapted.merge()) - want).abs().max() < allowed


@pytest.mark.parametrize("name", ["OPT", "Bart", "Whisper"])
def test_embeddings_of_positions_are_refused_by_name(name):
    T = pytest.importorskip("transformers")
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    if name == "OPT":
        heads = {"num_attention_heads": 2, "word_embed_proj_dim": 16}
        model = T.OPTModel(T.OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, **heads))
    elif name == "Bart":
        model = bart()[0]
    else:
        model = T.WhisperModel(T.WhisperConfig(vocab_size=64, d_model=16, **layers, **sizes, **tokens))
    with pytest.raises(NoMatchingModuleError, match=r"embed_positions.*forward method has arguments beyond the input"):
        lowdim.adapt(model, LoRA(rank=2, target_modules=["decoder.embed_positions"]))
