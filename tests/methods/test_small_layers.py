"""A layer that is smaller than the rank stops no command: it is capped, left dense or not projected, and the notes name it."""

import copy

import pytest
import torch
from torch import nn

from lowdim.catalogue import variant
from lowdim.compress import LoRDConfig, last_report, lord
from lowdim.jobs.systems import compressor
from lowdim.layers import LowRankLinear, SLTrainLinear, SSTLinear, densify, swap_linear
from lowdim.methods import apply, strategy_for
from lowdim.optim import DCTAdamW, Fira, GaLore, QGaLore
from methods import METHODS

RANK = 24
RANKED = [name for name in METHODS if strategy_for(variant(name)).at_rank(RANK) is not None]


class Gated(nn.Module):
    """A wide layer, a key projection of 6 outputs, and a gate of one, as some mixtures of experts have."""

    def __init__(self):
        super().__init__()
        self.up, self.key, self.gate, self.lm_head = (nn.Linear(32, n) for n in (40, 6, 1, 3))
        self.down = nn.Linear(40, 32)

    def forward(self, x):
        gate = torch.sigmoid(self.gate(x))
        return self.lm_head(gate * self.down(torch.tanh(self.up(x))) + self.key(x).mean(-1, keepdim=True))


def model_and_batch():
    torch.manual_seed(0)
    return Gated(), torch.randn(50, 32)


def loss_of(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.filterwarnings("ignore:layer .* inputs saw .* rows")
def test_every_method_with_a_rank_trains_and_says_what_it_did(name):
    model, batch = model_and_batch()
    chosen = strategy_for(variant(name)).at_rank(RANK)
    applied = apply(chosen, model, lr=1e-3, steps=10, batches=[batch] * 4, loss_fn=loss_of)
    optimizer = applied.start(1e-3)
    applied.loss(batch, loss_of).total.backward()
    optimizer.step()
    applied.after_step(optimizer)
    applied.finish()
    assert torch.isfinite(applied.model(batch)).all()
    notes = " ".join(applied.notes)
    if applied.kind == "adapter":
        bounded = applied.adapted.method.bounded_rank
        assert set(applied.capped_ranks) >= ({"key", "gate"} if bounded else set())
        assert ("key (" in notes and "gate (" in notes) if bounded else not applied.capped_ranks
    else:
        assert "key" in notes
        assert "gate" in notes
        assert "down" not in notes


@pytest.mark.parametrize("name", ["low-rank", "sltrain", "sst"])
def test_layers_that_are_all_small_or_named_are_capped(name):
    chosen = strategy_for(variant(name)).at_rank(RANK)
    for targets in (None, ["0", "1"]):
        model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5))
        more = {} if targets is None else {"target_modules": targets}
        one = copy.copy(chosen)
        object.__setattr__(one, "options", {**chosen.options, **more})
        applied = apply(one, model, lr=1e-3, steps=10)
        assert applied.capped_ranks == {"0": 8, "1": 5}
        assert "0 (8), 1 (5)" in applied.notes[0]
        assert [applied.model[i].rank for i in range(2)] == [8, 5]


@pytest.mark.parametrize(("kind", "options"), [(LowRankLinear, {}), (SLTrainLinear, {"density": 0.1}), (SSTLinear, {})])
def test_swap_linear_caps_where_it_is_asked_to(kind, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5))
    before, x = copy.deepcopy(model), torch.randn(3, 12)
    with pytest.raises(ValueError, match=r"layer 1: rank must be an int in \[1, 5\]; got 7; .*cap_rank=True"):
        swap_linear(model, kind, rank=7, **options)
    swapped = swap_linear(model, kind, rank=7, cap_rank=True, **options)
    assert [layer.rank for layer in swapped] == [7, 5]
    if kind is LowRankLinear:  # at its full rank a layer is the same map
        torch.testing.assert_close(swapped[1].dense_weight(), before[1].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(densify(copy.deepcopy(swapped))(x), swapped(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [GaLore, Fira, QGaLore, DCTAdamW])
def test_a_rank_above_a_matrix_names_it_its_limit_and_the_remedy(optimizer):
    layer = nn.Linear(32, 6)
    with pytest.raises(ValueError, match=r"rank must be at most 6, the smaller side .*\(6, 32\); got 24; .*param_groups"):
        optimizer([layer.weight], rank=RANK, lr=1e-3)
    if optimizer in (GaLore, Fira):
        with pytest.raises(ValueError, match=r"parameter key\.weight: rank must be at most 6"):
            optimizer([("key.weight", layer.weight)], rank=RANK, lr=1e-3)


def test_a_model_without_a_large_matrix_is_trained_and_the_note_says_so():
    applied = apply(variant("galore"), nn.Sequential(nn.Linear(8, 8)), lr=1e-3, steps=10)
    assert applied.notes == ("no matrix has a smaller side above rank 32: all of the model is trained without projection",)


@pytest.mark.filterwarnings("ignore:LoRD left all 2 layers")
def test_lord_caps_where_it_is_asked_to_and_the_command_asks():
    torch.manual_seed(0)
    samples, options = [torch.randn(400, 12)], {"rank": 7, "skip_unprofitable": False}

    def make():
        return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 5))

    with pytest.raises(ValueError, match=r"layer 1: rank must be in \[1, 5\]; got 7; .*cap_rank=True"):
        lord(make(), LoRDConfig(**options), samples)
    model = lord(make(), LoRDConfig(**options, cap_rank=True), samples)
    assert (model[0].rank, model[1].rank) == (7, 5)
    assert last_report(model).details["capped_ranks"] == {"1": 5}
    assert compressor("lord").build({"rank": 7}).cap_rank
    assert not compressor("lord").build({"rank": 7, "cap_rank": False}).cap_rank
    model = lord(make(), compressor("lord").build({"rank": 7}), samples)  # at its full rank a layer would not shrink
    assert type(model[1]) is nn.Linear
