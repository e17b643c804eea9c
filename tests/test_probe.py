"""The check of what commands write: a small input, and whether another model answers it in the same way."""

import copy
import math

import pytest
import torch
from torch import nn

import tiny
from lowdim.errors import WrittenModelError
from lowdim.models.probe import Probe, probe_inputs


def models():
    """Name -> a small model of each kind of input."""
    import transformers as T

    torch.manual_seed(0)
    vit = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    whisper = {
        "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8,
        "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    gpt2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 4, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "llama": tiny.llama(),
        "gpt2": T.GPT2LMHeadModel(T.GPT2Config(**gpt2)),
        "vit": T.ViTForImageClassification(T.ViTConfig(image_size=16, patch_size=8, **vit)),
        "resnet": T.ResNetForImageClassification(T.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
        "t5": T.T5ForConditionalGeneration(T.T5Config(**t5)),
        "whisper": T.WhisperForConditionalGeneration(T.WhisperConfig(**whisper)),
    }


def test_every_kind_of_model_is_asked_and_a_changed_weight_is_found():
    for name, model in models().items():
        model.train()
        probe = Probe.of(model)
        assert probe is not None, name
        assert model.training, "its mode is as before"
        assert probe.difference(copy.deepcopy(model)) == 0.0, name
        assert probe.check(model, "the folder") == 0.0
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        with pytest.raises(
            WrittenModelError, match=r"the folder does not give the model that was measured.*by up to \S+ on a test"
        ):
            probe.check(other, "the folder")


def test_tokens_fit_the_model():
    inputs = probe_inputs(models()["gpt2"])
    assert inputs["input_ids"].shape == (2, 4), "no longer than its positions"
    model = tiny.llama()
    model.config.pad_token_id = 12
    assert not (probe_inputs(model)["input_ids"] == 12).any()
    assert int(probe_inputs(model)["input_ids"].max()) < 48


def test_rounding_in_16_bits_is_no_difference():
    model = tiny.llama().to(torch.bfloat16)
    probe, other = Probe.of(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 2**-7)
    assert probe.check(other, "it") > 0


def test_the_same_weights_have_no_rounding():
    model = tiny.llama()
    probe, other = Probe.of(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 2**-17)
    assert probe.check(other, "it") > 0
    with pytest.raises(WrittenModelError, match="it does not give the model"):
        probe.check(other, "it", same=True)


def test_outputs_that_are_not_numbers_or_of_another_shape_differ():
    probe = Probe.of(tiny.llama())
    broken = tiny.llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    assert probe.difference(broken) == math.inf
    import transformers as T

    smaller = T.LlamaForCausalLM(T.LlamaConfig(**{**tiny.llama().config.to_dict(), "vocab_size": 40}))
    assert (
        Probe(probe.inputs | {"input_ids": probe.inputs["input_ids"] % 40}, probe.wanted, 1.0).difference(smaller) == math.inf
    )


def test_models_without_a_known_input_are_not_asked():
    assert Probe.of(nn.Linear(2, 2)) is None
    model = tiny.llama()
    model.forward = lambda **inputs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Probe.of(model)  # an error of the model itself is not hidden
    model.forward = lambda pixel_values: pixel_values
    assert Probe.of(model) is None
