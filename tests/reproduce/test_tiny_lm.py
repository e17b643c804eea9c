"""The LM set-up, on a text of its own, so that it needs no data."""

import pytest
import torch

from lowdim.linalg import stream
from lowdim.reproduce.settings import tiny_lm


@pytest.fixture(scope="module")
def corpus():
    """Letters that repeat with a period of three: learnable at once."""
    text = torch.arange(4000) % 3
    return tiny_lm.Corpus(text[:3000], text[3000:], 3)


def test_schedule():
    settings = tiny_lm.Settings()
    rates = [settings.rate(step) for step in range(settings.steps)]
    assert rates[39] == 1.0
    assert rates[0] == 1 / 40
    assert rates == sorted(rates[:40]) + sorted(rates[40:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_it_learns_and_repeats(corpus):
    settings = tiny_lm.Settings(steps=30, warmup=5, context=12, batch=8, dim=16, heads=2, valid_batches=1, valid_batch=8)
    ends = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = tiny_lm.TinyTransformer(corpus.vocabulary, settings, seed=0)
        assert len(tiny_lm.matrices(model)) == 8
        seen = []
        before = tiny_lm.validate(model, corpus, settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        ends.append(tiny_lm.train(model, corpus, [optimizer], settings, seed=0, each=seen.append))
        assert seen == list(range(30))
        assert ends[-1] < 0.5 * before
    assert ends[0] == ends[1]


def test_the_model_looks_back_only(corpus):
    settings = tiny_lm.Settings(context=8)
    model = tiny_lm.TinyTransformer(corpus.vocabulary, settings, seed=0)
    a = torch.randint(3, (1, 8), generator=stream(0))
    b = a.clone()
    b[0, 5:] = (b[0, 5:] + 1) % 3
    with torch.no_grad():
        assert torch.allclose(model(a)[:, :5], model(b)[:, :5], atol=1e-6)
        assert not torch.allclose(model(a)[:, 5:], model(b)[:, 5:], atol=1e-3)
