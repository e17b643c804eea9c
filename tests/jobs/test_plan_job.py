"""`lowdim.jobs.plan`: a rank reaches every method that has one, and the others are named."""

import pytest

from lowdim.jobs import PlanSettings, plan, touched_layers

RANKED = (
    "lora", "lamda", "lamda++", "diffora", "loram", "svfit", "allora", "flora", "increlora", "galore", "low-rank",
)  # fmt: skip


@pytest.fixture(scope="module")
def outcomes():
    common = {"model": "stories260k", "methods": ",".join(RANKED), "length": 16}
    return [plan(PlanSettings(**common, rank=rank)) for rank in (2, 6)]


@pytest.mark.parametrize("method", RANKED)
def test_a_rank_changes_what_is_trained_or_kept(method, outcomes):
    assert not any(outcome.refused for outcome in outcomes)
    small, large = ({f.method: f for f in outcome.forecasts}[method] for outcome in outcomes)
    assert (small.trained_parameters, small.optimizer_state) < (large.trained_parameters, large.optimizer_state)


def test_who_has_no_rank_is_named():
    settings = PlanSettings(model="stories260k", methods="lora,full,monarch", rank=4)
    assert settings.unchanged() == ["Full fine-tuning", "Monarch"]
    assert PlanSettings(model="stories260k", methods="full").unchanged() == []


def test_a_rank_that_a_method_refuses_is_a_reason():
    outcome = plan(PlanSettings(model="stories260k", methods="block-lora,lora", length=16, rank=3))
    assert [f.method for f in outcome.forecasts] == ["lora"]
    ((variant, reason),) = outcome.refused
    assert variant.name == "block-lora"
    assert "rank" in reason


def test_the_layers_that_are_touched_at_a_rank():
    ((_, two),) = touched_layers(PlanSettings(model="stories260k", methods="svfit", rank=2))
    assert {layer.trained for layer in two if layer.trained} == {2}
