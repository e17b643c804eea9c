"""Mixtures of experts: forecast as any model where the experts are computed as one, and named where no adapter reaches them."""

import pytest
import torch
from test_plan_tasks import blocks, train

from lowdim.models import build
from lowdim.plan import forecast, unreached

pytest.importorskip("transformers")

ROWS, LENGTH = 8, 64  # of `blocks`


def mixtral(layers=2):
    from transformers import MixtralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralConfig(num_hidden_layers=layers, vocab_size=500, num_local_experts=4, num_experts_per_tok=2, **sizes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_forecast_of_a_mixture_is_what_training_takes(method):
    torch.manual_seed(0)
    model = build(mixtral(), "causal-lm").to(torch.bfloat16)
    took, trained = train(model, method, blocks(mixtral()), lambda m, b: m(**b).loss, ())
    how = {"task": "causal-lm", "batch_size": ROWS, "sequence_length": LENGTH}
    got = forecast(mixtral(), method, dtype=torch.bfloat16, **how)
    assert got.trained_parameters == trained
    assert got.total == pytest.approx(took, rel=0.1)


def test_a_dtype_in_which_torch_knows_no_shapes_is_refused():
    with pytest.raises(ValueError, match=r"cannot be forecast: .*BF16"):
        forecast(mixtral(), "lora", task="causal-lm", batch_size=ROWS, sequence_length=LENGTH)


def test_experts_are_named_with_their_share_at_the_model_s_own_depth():
    config = mixtral(12)
    note = unreached(config, task="causal-lm")
    assert "model.layers.*.mlp.experts.gate_up_proj" in note
    experts = 12 * 4 * 3 * 64 * 128
    whole = sum(p.numel() for p in build(config, "causal-lm").parameters())
    assert f"{experts / whole:.0%} of the model's parameters" in note
