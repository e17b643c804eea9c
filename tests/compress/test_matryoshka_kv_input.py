"""What MatryoshkaKV refuses, by layer and reason: batches, ranks, settings, models and NaN."""

import pytest
import torch
from projected_models import projected, projections
from torch import nn

import kv_models
from lowdim.compress import (
    MatryoshkaKVConfig,
    greedy_kv_ranks,
    kv_pca,
    matryoshka_freeze,
    matryoshka_kv,
    matryoshka_loss,
    sample_kv_ranks,
    set_kv_ranks,
)

pytest.importorskip("transformers")


def untouched(model):
    return not projections(model) and model.config._attn_implementation != "lowdim_matryoshka"


@pytest.mark.parametrize("batches", [None, []])
def test_no_batches(batches):
    model = kv_models.build()
    with pytest.raises(ValueError, match=r"batches is (missing|empty)"):
        matryoshka_kv(model, MatryoshkaKVConfig(), batches)
    assert untouched(model)


def test_one_batch_is_no_list():
    with pytest.raises(TypeError, match="put it in a list"):
        matryoshka_kv(kv_models.build(), MatryoshkaKVConfig(), {"input_ids": kv_models.ids()})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"key_ranks": 9}, r"key_ranks must be one int in \[1, 8\].*layer model\.layers\.0\.self_attn"),
        ({"value_ranks": [[1, 2]]}, "value_ranks must have a row for each of the 2 layers"),
        ({"value_ranks": [[1, 2], [3]]}, r"for each of 2 KV heads.*got \[3\] \(layer model\.layers\.1"),
        ({"value_ranks": [[1, 2], [3, 0]]}, r"got \[3, 0\] \(layer model\.layers\.1"),
        ({"budget": 0.1}, "budget must be at least interval / head_dim = 0.25"),
    ],
)
def test_ranks_that_do_not_fit(config, message):
    model = kv_models.build()
    with pytest.raises(ValueError, match=message):
        matryoshka_kv(model, MatryoshkaKVConfig(**config), kv_models.batches())
    assert untouched(model)


def test_ranks_change_all_together_or_not_at_all():
    model = projected(key_ranks=4)
    with pytest.raises(ValueError, match=r"layer model\.layers\.1"):
        set_kv_ranks(model, [[2, 2], [2, 99]])
    assert [p.ranks[0] for p in projections(model)] == [(4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_ranks": 0}, "key_ranks must be an int >= 1"),
        ({"key_ranks": 2.5}, "key_ranks must be an int >= 1"),
        ({"budget": 0}, "budget"),
        ({"budget": 0.5, "value_ranks": 2}, "leave out key_ranks and value_ranks"),
        ({"rank_step": 0}, "rank_step"),
        ({"temperature": 0}, "temperature"),
        ({"kl_weight": -1}, "kl_weight"),
        ({"kl_weight": 0, "ce_weight": 0}, "one must be above"),
    ],
)
def test_config(options, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaKVConfig(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_kv_ranks(1, 1, 8, step=3), "step must divide head_dim=8; got 3"),
        (lambda: greedy_kv_ranks(None, 1, 1, 8, budget=0.5, interval=3), "interval must divide head_dim=8"),
        (lambda: greedy_kv_ranks(None, 1, 1, 8, budget=0.2), "at least interval / head_dim = 0.25"),
        (lambda: greedy_kv_ranks(None, 1, 1, 8, budget=0.5, round_fraction=0.0), "round_fraction"),
        (lambda: kv_pca(torch.zeros(3, 4)), "tokens, heads, d"),
        (lambda: kv_pca(torch.full((3, 1, 2), torch.nan)), "NaN"),
        (lambda: matryoshka_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 3).long()), "labels"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_encoder_is_refused_by_layer_and_reason():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 48}
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    with pytest.raises(
        TypeError, match=r"layer encoder\.layer\.0\.attention\.self is a BertSelfAttention.*encoder caches no keys"
    ):
        matryoshka_kv(model, MatryoshkaKVConfig(), [{"input_ids": kv_models.ids()}])


def test_a_layer_that_computes_its_attention_itself_is_refused_by_name():
    transformers = pytest.importorskip("transformers")
    model = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64))
    with pytest.raises(TypeError, match=r"layer transformer\.h\.0\.self_attention is a BloomAttention.*AttentionInterface"):
        matryoshka_kv(model, MatryoshkaKVConfig(), [{"input_ids": kv_models.ids()}])


def test_other_models_are_refused():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(TypeError, match="transformers model with a decoder; got Linear"):
        matryoshka_kv(nn.Linear(2, 2), MatryoshkaKVConfig(), [torch.zeros(1, 2)])
    sizes = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
    with pytest.raises(TypeError, match="encoder with a decoder"):
        matryoshka_kv(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), MatryoshkaKVConfig(), [])
    sliding = kv_models.build("mistral", sliding_window=4)
    with pytest.raises(TypeError, match=r"layer model\.layers\.0\.self_attn.*DynamicSlidingWindowLayer"):
        matryoshka_kv(sliding, MatryoshkaKVConfig(), kv_models.batches())
    for call in (matryoshka_freeze, set_kv_ranks):
        with pytest.raises(TypeError, match="no layer with projections"):
            call(kv_models.build())


def test_nan_names_the_layer():
    model = kv_models.build()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.self_attn: the states have NaN"):
        matryoshka_kv(model, MatryoshkaKVConfig(), kv_models.batches())
    assert untouched(model)
