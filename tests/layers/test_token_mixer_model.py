"""A transformers model with DeltaProduct in the place of its linear attention learns, and generates with its state."""

import pytest
import torch
from torch import nn

from lowdim.layers import DeltaProduct, as_token_mixer

transformers = pytest.importorskip("transformers")
WORDS, PERIOD = 11, 5


class Attention(nn.Module):
    """The call of Qwen3-Next's decoder layers."""

    def __init__(self, layer, layer_idx):
        super().__init__()
        self.mixer = as_token_mixer(layer, layer_idx)

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        return self.mixer(hidden_states, attention_mask, cache_params)[0]


@pytest.fixture(scope="module")
def model():
    """Two layers of DeltaProduct and one of attention, trained a little on words that repeat."""
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=0,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.Qwen3NextForCausalLM(config)
    for i in (0, 2):
        model.model.layers[i].linear_attn = Attention(DeltaProduct(16, num_heads=2, head_dim=8, expand_v=1.0, seed=i), i)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        rows = batch(16, 20)
        model.loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        model.loss.backward()
        optimizer.step()
    return model.eval()


def batch(rows, length):
    """Random words of five letters, repeated."""
    word = torch.randint(1, WORDS, (rows, PERIOD))
    return word.repeat(1, length // PERIOD + 1)[:, :length]


def test_it_learns(model):
    assert float(model.loss.detach()) < 2.0, "guessing gives 2.3"
    grads = {name: p.grad for name, p in model.named_parameters() if "linear_attn" in name}
    assert len(grads) == 2 * 13
    assert all(grad is not None and bool(grad.any()) for grad in grads.values())


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_the_state_is_that_without(model, how):
    """Rows padded on the left, which give what they give alone."""
    torch.manual_seed(1)
    prompt, mask = batch(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    prompt = prompt * mask
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True, **how}
    found = [model.generate(prompt, attention_mask=mask, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].scores[-1], found[1].scores[-1], rtol=1e-4, atol=1e-4)
    alone = model.generate(prompt[1:, 4:], **options)
    assert torch.equal(alone.sequences[0], found[0].sequences[1, 4:])
