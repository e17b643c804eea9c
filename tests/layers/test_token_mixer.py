"""Mixers with their state in transformers' caches: a prompt and then one token at a time give what the whole sequence gives."""

import pytest
import torch
from torch import nn

from lowdim.layers import S4D, DeltaProduct, as_token_mixer

cache_utils = pytest.importorskip("transformers.cache_utils")
LENGTH = 9


class Sums(nn.Module):
    """The simplest mixer whose state is one tensor: running sums."""

    def initial_state(self, batch):
        return torch.zeros(batch, 6, dtype=torch.float64)

    def forward(self, x, state=None, *, attention_mask=None, return_state=False):
        x = x if attention_mask is None else x * attention_mask[..., None]
        y = x.cumsum(1) + (0 if state is None else state[:, None])
        return (y, y[:, -1]) if return_state else y

    def step(self, x, state):
        return state + x, state + x


def delta(**changes):
    return DeltaProduct(6, num_heads=2, num_v_heads=4, head_dim=3, expand_v=1.0, seed=0, dtype=torch.float64, **changes)


def s4d():
    return S4D(6, 8, seed=0, dtype=torch.float64)


MIXERS = {"DeltaProduct": delta, "without convolution": lambda: delta(use_short_conv=False), "sums": Sums, "S4D": s4d}
mixers = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


def tokens(batch=3):
    return torch.randn(batch, LENGTH, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def caches():
    """At the second place; the first layer is attention."""
    return cache_utils.Cache(layers=[cache_utils.DynamicLayer(), cache_utils.LinearAttentionLayer()])


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@mixers
@pytest.mark.parametrize("prompt", [1, 2, 6])
def test_prompt_then_token_by_token(make, prompt):
    layer, x, cache = make(), tokens(), caches()
    mixer, want = as_token_mixer(layer, 1), layer(x)
    y, weights, same = mixer(x[:, :prompt], past_key_values=cache, use_cache=True)
    assert weights is None
    assert same is cache
    close(y, want[:, :prompt])
    for t in range(prompt, LENGTH):
        close(mixer(x[:, t : t + 1], past_key_values=cache)[0], want[:, t : t + 1])
    close(mixer(x)[0], want)


@mixers
def test_rows_padded_on_the_left(make):
    """As in generation: the mask of a step is that of all tokens so far."""
    layer, x, cache = make(), tokens(2), caches()
    mixer, prompt = as_token_mixer(layer, 1), 5
    mask = torch.ones(2, LENGTH)
    mask[1, :3] = 0
    y = [mixer(x[:, :prompt], mask[:, :prompt], cache)[0]]
    y += [mixer(x[:, t : t + 1], mask[:, : t + 1], cache)[0] for t in range(prompt, LENGTH)]
    close(torch.cat(y, 1)[0], layer(x[:1])[0])
    close(torch.cat(y, 1)[1, 3:], layer(x[1:, 3:])[0])


@mixers
def test_beams_are_reordered(make):
    layer, x, cache = make(), tokens(), caches()
    mixer, beams = as_token_mixer(layer, 1), torch.tensor([2, 0, 0])
    mixer(x[:, :5], past_key_values=cache)
    cache.layers[1].reorder_cache(beams)
    y = mixer(x[:, 5:], past_key_values=cache)[0]
    close(y, layer(torch.cat([x[beams, :5], x[:, 5:]], 1))[:, 5:])


@mixers
def test_a_reset_cache_begins_again(make):
    layer, x, cache = make(), tokens(), caches()
    mixer = as_token_mixer(layer, 1)
    for _ in range(2):
        close(mixer(x[:, :4], past_key_values=cache)[0], layer(x[:, :4]))
        close(mixer(x[:, 4:], past_key_values=cache)[0], layer(x)[:, 4:])
        cache.layers[1].reset()


@mixers
def test_the_cache_keeps_its_tensors_and_no_graph(make):
    mixer, x, cache = as_token_mixer(make(), 1), tokens(), caches()
    mixer(x[:, :4], past_key_values=cache)
    place = cache.layers[1].recurrent_states[0]
    y = mixer(x[:, 4:], past_key_values=cache)[0]
    assert cache.layers[1].recurrent_states[0] is place
    assert not place.requires_grad
    assert cache.get_recurrent_state(1) is place
    assert not cache.layers[1].is_croppable, "assisted decoding must refuse it"
    if y.requires_grad:
        y.sum().backward()  # what it read was not overwritten


def test_other_caches_and_layers():
    mixer, x = as_token_mixer(delta(), 0), tokens()
    for cache, found in ((caches(), "DynamicLayer"), (cache_utils.DynamicCache(), "nothing")):
        with pytest.raises(TypeError, match=rf"LinearAttentionLayer .* at layer 0; got {found}"):
            mixer(x, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask"):
        mixer(x, torch.ones(3, 1, LENGTH, LENGTH))
    with pytest.raises(TypeError, match=r"token mixer .* got Linear"):
        as_token_mixer(nn.Linear(6, 6), 0)
    with pytest.raises(ValueError, match="layer_idx"):
        as_token_mixer(delta(), -1)
    mixer, cache = as_token_mixer(delta(), 1), caches()
    mixer(x, past_key_values=cache)
    with pytest.raises(ValueError, match=r"state\.recurrent"):
        mixer(x[:2], past_key_values=cache)
