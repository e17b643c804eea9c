"""The ladder of sizes: ranks at which methods train as many parameters, or take as much memory, as LoRA."""

import pytest
import torch
from torch import nn

from lowdim import catalogue
from lowdim.comparison.hunt import first_candidates, next_rate
from lowdim.comparison.ladder import build_ladder, largest_rank, own_rank, parameter_counter, parameters_of, sized

HEAD = 50


class Model(nn.Module):
    """Two layers of 24 x 16 and a head of 16 x 2 with a bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.b(self.a(x)))


def rank_of(chosen):
    return chosen.options["rank"]


def law(**powers):
    """Measured values `HEAD + c r^k` by method."""

    def measure(chosen):
        scale, power = powers[chosen.name.replace("-", "_")]
        return HEAD + scale * rank_of(chosen) ** power

    return measure


@pytest.mark.parametrize(
    ("scale", "power", "want"),
    [
        (40, 1, (8, 2)),  # as LoRA
        (20, 1, (16, 4)),
        (5, 2, (8, 4)),  # 5 r² = 320 and 80
        (2560, -1, (8, 32)),  # the more rank, the fewer parameters
    ],
)
def test_the_rank_at_which_a_power_law_meets_the_budget(scale, power, want):
    measure = law(lora=(40, 1), randlora=(scale, power))
    ladder = build_ladder([catalogue.variant("randlora")], 2, "parameters", 64, measure, HEAD)
    assert ladder.sizes == {"randlora": want}
    assert ladder.skipped == {}


def test_memory_is_a_line():
    def measure(chosen):
        return 100 + (30 if chosen.name == "lora" else 10) * rank_of(chosen)

    assert build_ladder([catalogue.variant("corda")], 2, "memory", 64, measure).sizes == {"corda": (24, 6)}


def test_ranks_end_where_the_layers_end():
    measure = law(lora=(40, 1), svfit=(1, 1))
    ladder = build_ladder([catalogue.variant("svfit")], 2, "parameters", 16, measure, HEAD)
    assert ladder.sizes == {"svfit": (16,)}
    assert ladder.notes == ["SVFit has 1 of 2 sizes: the layers allow ranks up to 16; others cost the same"]
    small = build_ladder([catalogue.variant("lora")], 4, "parameters", 4, law(lora=(40, 1)), HEAD)
    assert small.sizes == {"lora": (4, 2, 1)}, "8, 2, 32 and 1/2 within what a layer of side 4 allows"


def test_without_equal_cost_each_method_has_multiples_of_its_own_rank():
    chosen = [catalogue.variant(name) for name in ("lora", "lamda", "galore", "full")]
    assert [own_rank(each) for each in chosen] == [8, 32, 32, None]
    ladder = build_ladder(chosen, 2, "none", 64, lambda each: 1.0)
    assert ladder.sizes == {"lora": (8, 2), "lamda": (32, 8), "galore": (32, 8), "full": (None,)}


def test_what_cannot_train_the_model_is_left_out_with_its_reason():
    def measure(chosen):
        if chosen.name == "corda":
            raise ValueError("no layer of these kinds")
        return 40.0 * rank_of(chosen)

    ladder = build_ladder([catalogue.variant("lora"), catalogue.variant("corda")], 1, "parameters", 64, measure)
    assert (ladder.sizes, ladder.skipped) == ({"lora": (8,)}, {"corda": "no layer of these kinds"})


def test_parameters_are_counted_on_a_copy_without_memory():
    """LoRA trains r (in + out) numbers of each layer, LoRA-XS r², and both the head."""
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with parameter_counter(model, ["head"], False) as count:
        assert count(sized(catalogue.variant("lora"), 4)) == 2 * 4 * (16 + 24) + 34
        assert count(sized(catalogue.variant("lora-xs"), 4)) == 2 * 4 * 4 + 34
        assert count(catalogue.variant("full")) == 2 * 16 * 24 + 24 + 16 + 34
        found = build_ladder(
            [catalogue.variant("lora-xs")],
            2,
            "parameters",
            largest_rank(model, ["head"]),
            count,
            parameters_of(model, ["head"]),
        )
    assert largest_rank(model, ["head"]) == 16
    assert found.sizes == {"lora-xs": (16, 9)}, "2 r² = 8 (16 + 24) 2 is above the layers, 2 r² = 2 (16 + 24) 2 gives 9"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_candidates_come_rate_by_rate_and_size_by_size():
    variants = {name: catalogue.variant(name) for name in ("lora", "full")}
    found = first_candidates(variants, {"lora": (8, 2), "full": (None,)}, 2, False)
    assert [(c.method, c.lr, c.size) for c in found] == [
        ("lora", 1e-3, 8), ("full", 5e-5, None), ("lora", 1e-3, 2), ("lora", 3e-4, 8), ("full", 2e-5, None), ("lora", 3e-4, 2),
    ]  # fmt: skip


def test_rates_beyond_a_rows_own_follow_its_scale():
    rates = (1e-3, 3e-4, 3e-3)
    assert [next_rate(rates, 1e-3, True), next_rate(rates, 3e-3, True), next_rate(rates, 1e-2, True)] == [3e-3, 1e-2, 3e-2]
    assert [next_rate(rates, 3e-4, False), next_rate(rates, 1e-4, False)] == [1e-4, 3e-5]
