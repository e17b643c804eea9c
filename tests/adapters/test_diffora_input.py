"""What DiffoRA refuses: options, data, losses and optimizers, and a search that has ended."""

import pytest
import torch
from diffora_blocks import Q_V, batch, blocks, loss_fn, searched
from torch import nn

import lowdim
from lowdim.adapters import DiffoRA


def test_before_training_needs_something_to_search_on():
    adapted = lowdim.adapt(blocks(), DiffoRA(**Q_V))
    for batches, loss in [([], loss_fn), ([batch(0)], None)]:
        with pytest.raises(ValueError, match="needs sample batches and loss_fn"):
            adapted.before_training(batches, loss, 0.05, 10)
    assert adapted.dam is not None


def test_bad_input():
    for bad in (0.0, -0.5, 1.5, float("nan"), None):
        with pytest.raises(ValueError, match="select_ratio"):
            DiffoRA(select_ratio=bad)
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="rank"):
            DiffoRA(rank=bad)
    for missing in (None, [], ""):
        model = blocks()
        with pytest.raises(ValueError, match="target_modules"):
            lowdim.adapt(model, DiffoRA(rank=1, target_modules=missing))
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="'query' matches no module"):
        lowdim.adapt(blocks(), DiffoRA(rank=1, target_modules=["q", "query"]))
    with pytest.raises(TypeError, match="Embedding"):
        DiffoRA(rank=1).attach(nn.Embedding(3, 4))

    adapted = searched(DiffoRA(**Q_V))
    dam_optimizer, weight_optimizer = torch.optim.SGD([adapted.dam], 0.1), torch.optim.SGD(adapted.weight_parameters(), 0.1)
    for which, batches in [("training", (1, 0)), ("validation", (0, 1))]:
        spoiled = [(batch(0), tuple(t * float("nan") for t in batch(0)))[k] for k in batches]
        with pytest.raises(ValueError, match=f"{which} loss must be finite; got nan"):
            adapted.search_step(loss_fn, *spoiled, dam_optimizer, weight_optimizer)
    with pytest.raises(ValueError, match=r"must hold adapted\.dam"):
        adapted.search_step(loss_fn, batch(0), batch(1), weight_optimizer, weight_optimizer)
    with pytest.raises(ValueError, match="weight_parameters"):
        adapted.search_step(loss_fn, batch(0), batch(1), dam_optimizer, dam_optimizer)
    with torch.no_grad():
        adapted.dam[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        adapted.discretize()
    with torch.no_grad():
        adapted.dam[0, 0] = 0.0
    adapted.discretize()
    for again in (
        adapted.discretize,
        lambda: adapted.dam_gradient(loss_fn, batch(0), batch(1), 0.1),
        lambda: adapted.search_step(loss_fn, batch(0), batch(1), dam_optimizer, weight_optimizer),
    ):
        with pytest.raises(RuntimeError, match="search has ended"):
            again()
