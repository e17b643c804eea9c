"""The cache of MatryoshkaKV in everything that generation asks of a cache."""

import copy

import pytest
import torch
from torch import nn

import kv_models
from lowdim.compress import MatryoshkaKVConfig, kv_cache_bytes, matryoshka_kv, set_kv_ranks

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache  # noqa: E402

from lowdim.compress import MatryoshkaCache  # noqa: E402

NEW = 10
RAGGED = ([[2, 5], [8, 3]], [[4, 5], [1, 3]])


def projected(name="llama", dtype=torch.float32, key_ranks=None, value_ranks=None, **changes):
    model = kv_models.build(name, dtype=dtype, **changes)
    return matryoshka_kv(model, MatryoshkaKVConfig(key_ranks=key_ranks, value_ranks=value_ranks), kv_models.batches())


def compressed_layers(cache):
    return [layer for layer in cache.layers if hasattr(layer, "blocks")]


def ragged(model):
    """Different ranks in every head of every layer, whatever the model's sizes."""
    modules = [m.lowdim_kv for m in model.modules() if hasattr(m, "lowdim_kv")]
    for i, module in enumerate(modules):
        heads = range(module.num_kv_heads)
        module.set_ranks([1 + (3 * h + i) % 7 for h in heads], [1 + (5 * h + 2 * i) % 8 for h in heads])
    return model


def prompt(rows, padded=False):
    ids = kv_models.ids(rows, 9)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def lookup():
    return {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}


DECODING = {
    "greedy": lambda: (prompt(2), {}),
    "left padded": lambda: (prompt(3, padded=True), {}),
    "beam": lambda: (prompt(2, padded=True), {"num_beams": 3, "num_return_sequences": 2}),
    "sampling": lambda: (prompt(2), {"do_sample": True, "num_return_sequences": 3, "top_k": 0}),
    "prompt lookup": lambda: (lookup(), {"prompt_lookup_num_tokens": 3}),
    "assisted": lambda: (prompt(1), {"assistant_model": kv_models.build(seed=7)}),
}


def generated(model, decoding, cache=None):
    inputs, how = DECODING[decoding]()
    torch.manual_seed(3)
    done = model.generate(
        **inputs,
        **{"do_sample": False, **how},
        max_new_tokens=NEW,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return done.sequences, torch.stack(done.logits, 1)


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("name", kv_models.MODELS)
def test_full_rank_gives_the_tokens_of_the_dense_model(name, decoding):
    want, numbers = generated(kv_models.build(name), decoding)
    model = projected(name)
    cache = MatryoshkaCache(model)
    got, ours = generated(model, decoding, cache)
    assert torch.equal(got, want)
    torch.testing.assert_close(ours, numbers, rtol=1e-4, atol=1e-5 * float(numbers.abs().max()))
    assert all(
        layer.length >= got.shape[1] - 1 - (decoding in ("prompt lookup", "assisted")) for layer in compressed_layers(cache)
    )
    assert compressed_layers(cache)


@pytest.mark.parametrize("decoding", DECODING)
def test_reduced_ranks_give_the_tokens_of_the_model_without_a_cache_of_ours(decoding):
    """The projected model with transformers' own cache computes the same, from all numbers."""
    model = ragged(projected())
    want, _ = generated(model, decoding, DynamicCache(config=model.config))
    got, _ = generated(model, decoding, MatryoshkaCache(model))
    assert torch.equal(got, want)
    dense, _ = generated(kv_models.build(), decoding)
    assert not torch.equal(got, dense)


@pytest.mark.parametrize("name", kv_models.MODELS)
def test_cached_in_parts_equals_uncached(name):
    model = ragged(projected(name, dtype=torch.float64))
    inputs = prompt(3, padded=True)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        cache, got, seen = MatryoshkaCache(model), [], 0
        for size in (4, 1, 3, 1):
            part = inputs["input_ids"][:, seen : seen + size]
            seen += size
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)[:, seen - size : seen]
            got.append(
                model(
                    part, attention_mask=inputs["attention_mask"][:, :seen], position_ids=positions, past_key_values=cache
                ).logits
            )
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        want = model(**inputs, position_ids=positions, use_cache=False).logits
    got = torch.cat(got, 1)
    scale = float(want.abs().max())
    torch.testing.assert_close(
        got[real], want[real], rtol=0, atol=1e-6 * scale if name in ("gemma2", "gemma3") else 1e-10 * scale
    )


# What it holds


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("ranks", [(2, 6), RAGGED])
def test_bytes_are_the_forecast_within_one_percent(ranks, tokens):
    model = projected(key_ranks=ranks[0], value_ranks=ranks[1], max_position_embeddings=512)
    cache, dense = MatryoshkaCache(model), DynamicCache(config=model.config)
    ids = kv_models.ids(3, tokens)
    with torch.no_grad():
        for part in (ids[:, : tokens // 2], *ids[:, tokens // 2 :].split(1, 1)):
            if part.shape[1]:
                model(part, past_key_values=cache)
        model(ids, past_key_values=dense)
    full = [[8, 8], [8, 8]]
    each = [r if isinstance(r, list) else [[r, r], [r, r]] for r in ranks]
    want = kv_cache_bytes(*each, tokens, batch=3, element_size=4)
    assert want <= cache.nbytes() <= 1.01 * want
    assert sum(t.nbytes for layer in dense.layers for t in (layer.keys, layer.values)) == kv_cache_bytes(
        full, full, tokens, 3, 4
    )
    assert MatryoshkaCache(model).nbytes() == 0


def test_half_precision_is_held_in_half_precision():
    model = projected(key_ranks=4, value_ranks=4).to(torch.bfloat16)
    cache = MatryoshkaCache(model)
    with torch.no_grad():
        model(kv_models.ids(2, 9), past_key_values=cache)
    assert cache.nbytes() == kv_cache_bytes([[4, 4]] * 2, [[4, 4]] * 2, 9, batch=2)


def filled(model, cache=None, ids=None):
    cache = MatryoshkaCache(model) if cache is None else cache
    with torch.no_grad():
        model(kv_models.ids() if ids is None else ids, past_key_values=cache)
    return cache


def continued(model, cache, rows=2):
    with torch.no_grad():
        return model(kv_models.ids(rows, 3, seed=9), past_key_values=cache).logits


@pytest.fixture
def model():
    return projected(dtype=torch.float64, key_ranks=RAGGED[0], value_ranks=RAGGED[1])


def test_crop(model):
    ids = kv_models.ids(2, 9)
    cache = filled(model, ids=ids)
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    want = continued(model, filled(model, ids=ids[:, :5]))
    torch.testing.assert_close(continued(model, cache), want)
    cache.crop(0)
    assert cache.get_seq_length() == 8
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)
    cache.crop(-8)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(continued(model, cache), continued(model, MatryoshkaCache(model)))


def test_reorder_repeat_and_select(model):
    ids = kv_models.ids(3, 9)
    want = continued(model, filled(model, ids=ids[[2, 0, 0]]), 3)
    cache = filled(model, ids=ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(continued(model, cache, 3), want)
    cache = filled(model, ids=ids)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    want = continued(model, filled(model, ids=ids[[2, 2, 0, 0]]), 4)
    torch.testing.assert_close(continued(model, cache, 4), want)


def test_reset(model):
    cache = filled(model)
    want = continued(model, MatryoshkaCache(model))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    torch.testing.assert_close(continued(model, cache), want)


def test_offload_and_prefetch(model):
    """What transformers calls around each layer; between two devices they are seen on the device `meta`."""
    cache = filled(model)
    want = continued(model, copy.deepcopy(cache))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(continued(model, cache), want)
    layer = cache.layers[0]
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {t.device.type for block in layer.blocks for t in block} == {"meta"}


def test_a_copy_continues_by_itself(model):
    """A prompt is computed once, and continued twice."""
    cache = filled(model)
    other = copy.deepcopy(cache)
    want = continued(model, filled(model))
    continued(model, cache, 2)
    torch.testing.assert_close(continued(model, other), want)
    assert other.layers[0].projection is model.model.layers[0].self_attn.lowdim_kv


def test_appending_does_not_change_what_was_handed_out(model):
    """Room for more tokens is written later; the views of before stay as they were."""
    layer = MatryoshkaCache(model).layers[0]
    k, v = torch.randn(2, 1, 2, 200, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.update(k, v)
        key, _ = layer.update(k[:, :, :1], v[:, :, :1])
        before = key.clone()
        later, _ = layer.update(k[:, :, 1:2], v[:, :, 1:2])
    assert later.shape[2] == 202
    assert torch.equal(key, before)
    assert torch.equal(later[:, :, :201], before)
    assert later.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()  # nothing was copied


def test_gradients_flow_through_a_filled_cache():
    model = projected(dtype=torch.float64, key_ranks=4)
    ids = kv_models.ids(1, 6)
    parameter = model.model.layers[0].self_attn.k_proj.weight

    def gradient(cached):
        parameter.grad = None
        cache = MatryoshkaCache(model) if cached else None
        if cached:
            out = [model(part, past_key_values=cache).logits for part in ids.split(2, 1)]
        else:
            out = [model(ids, use_cache=False).logits]
        torch.cat(out, 1).square().sum().backward()
        return parameter.grad

    torch.testing.assert_close(gradient(True).clone(), gradient(False))


def test_inference_mode_then_no_grad(model):
    with torch.inference_mode():
        cache = filled(model)
    want = continued(model, filled(model))
    torch.testing.assert_close(continued(model, cache), want)


def test_it_is_a_cache(model):
    cache = MatryoshkaCache(model)
    assert isinstance(cache, transformers.Cache)
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    assert cache.get_mask_sizes(3, 0) == (3, 0)
    filled(model, cache)
    assert cache.is_initialized
    assert cache.get_mask_sizes(3, 0) == (12, 0)
    assert len(cache) == 2


# Other layers


def test_layers_with_a_sliding_window_are_left_alone():
    model = projected("gemma3", key_ranks=2, value_ranks=2)
    assert [hasattr(layer.self_attn, "lowdim_kv") for layer in model.model.layers] == [False, True]
    cache = filled(model)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "_Layer"]
    kept = cache.layers[0]
    assert cache.nbytes() == sum(t.untyped_storage().nbytes() for t in (kept.keys, kept.values)) + kv_cache_bytes(
        [[2, 2]], [[2, 2]], 9, batch=2, element_size=4
    )


def hybrid():
    """A layer of linear attention and one of full attention."""
    sizes = {k: v for k, v in kv_models.SIZES.items() if k != "initializer_range"}
    sizes |= {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "initializer_range": 0.3}
    sizes |= {f"linear_{what}_head_dim": 8 for what in ("key", "value")} | {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3NextForCausalLM(
            transformers.Qwen3NextConfig(
                **sizes, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16
            )
        )
    model.generation_config.eos_token_id = None
    return model.eval()


def test_the_other_layers_of_a_hybrid_model_are_left_alone():
    dense = hybrid()
    want, _ = generated(dense, "greedy")
    model = matryoshka_kv(hybrid(), MatryoshkaKVConfig(), kv_models.batches())
    cache = MatryoshkaCache(model)
    assert [type(layer).__name__ for layer in cache.layers] == ["LinearAttentionLayer", "_Layer"]
    assert torch.equal(generated(model, "greedy", cache)[0], want)
    state = sum(t.nbytes for states in (cache.layers[0].conv_states, cache.layers[0].recurrent_states) for t in states.values())
    assert cache.nbytes() - state == kv_cache_bytes([[8, 8]], [[8, 8]], 9 + NEW - 1, batch=2, element_size=4)


# Wrong use


def test_ranks_do_not_change_while_a_cache_is_filled(model):
    cache = filled(model)
    set_kv_ranks(model, 3, 3)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn.*cache\.reset"):
        continued(model, cache)
    cache.reset()
    continued(model, cache)
    with torch.no_grad():
        model.model.layers[1].self_attn.lowdim_kv.value_raw[0, 1, 0] += 1
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.self_attn.*changed"):
        continued(model, cache)


def test_the_cache_of_another_model_is_refused(model):
    other = projected(dtype=torch.float64, key_ranks=RAGGED[0], value_ranks=RAGGED[1])
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn.*another model"):
        filled(model, MatryoshkaCache(other))
    with pytest.raises(ValueError, match=r"LlamaAttention.*no projection"):
        filled(hybrid_free(), MatryoshkaCache(other))


def hybrid_free():
    """A model whose layers call our attention function but have no projection."""
    model = projected(dtype=torch.float64)
    for layer in model.model.layers:
        del layer.self_attn.lowdim_kv
    return model


def test_keys_that_the_model_changes_after_the_cache_are_noticed(model):
    module = model.model.layers[0].self_attn.lowdim_kv
    layer = MatryoshkaCache(model).layers[0]
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        key, value = layer.update(x, x)
        with pytest.raises(NotImplementedError, match=r"layer model\.layers\.0\.self_attn.*changes the keys"):
            module.attention(torch.randn(1, 4, 3, 8, dtype=torch.float64), key.clone(), value, scaling=1.0)


def test_a_model_without_projections_has_no_such_cache():
    with pytest.raises(TypeError, match="no layer with projections"):
        MatryoshkaCache(kv_models.build())
    with pytest.raises(TypeError, match="transformers model"):
        MatryoshkaCache(nn.Linear(2, 2))


def test_on_another_device():
    """Calibration, training, uneven ranks and generation on a device that refuses tensors of the CPU."""
    from lowdim.compress import matryoshka_freeze, matryoshka_step
    from second_device import numbers, second_device, to_lazy

    def run(model, ids):
        matryoshka_kv(model, MatryoshkaKVConfig(budget=0.75), [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
        loss = matryoshka_step(model, {"input_ids": ids}, MatryoshkaKVConfig(), seed=0)
        gradients = torch.autograd.grad(loss, matryoshka_freeze(model))
        cache = MatryoshkaCache(ragged(model))
        with torch.no_grad():
            outputs = [model(part, past_key_values=cache).logits for part in ids.split(4, 1)]
        cache.reorder_cache(torch.tensor([1, 0]))
        return [loss, *gradients, *outputs, cache.layers[0].blocks[0][0]]

    want = run(kv_models.build(), kv_models.ids(2, 9))
    with second_device():
        got = run(to_lazy(kv_models.build()), to_lazy(kv_models.ids(2, 9)))
    for mine, theirs in zip(numbers(got), want, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))
