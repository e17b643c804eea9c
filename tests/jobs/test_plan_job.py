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


@pytest.mark.slow
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


def test_what_is_left_out_or_unchanged_is_said():
    settings = PlanSettings(model="stories260k", methods="linear-probe,lora,full,galore", rank=4, layerwise=True)
    assert [v.name for v in settings.chosen()] == ["lora", "full", "galore"]
    assert settings.notes() == [
        "left out: Linear probe: a language model has no new head to probe; it is for --task classify",
        "--rank does not change Full fine-tuning: they have no rank",
        "--layerwise does not change LoRA, Full fine-tuning: only lowdim.optim methods update layer by layer",
    ]
    scratch = PlanSettings(model="llama-tiny", methods="lora,lamda,galore", task="pretrain")
    assert scratch.notes() == [
        "left out: LoRA, LaMDA: an adapter needs a trained model; --task pretrain starts from random weights"
    ]
    assert PlanSettings(model="stories260k", methods="linear-probe,lora,galore", task="classify").notes() == []


def test_the_tokenizers_vocabulary_is_the_models():
    common = {"model": "llama-tiny", "methods": "full", "task": "pretrain", "length": 16}
    own, by_byte = (plan(PlanSettings(**common, tokenizer=name)).forecasts[0] for name in (None, "bytes"))
    assert (own.vocabulary, by_byte.vocabulary) == (32_000, 258)
    assert by_byte.total < own.total / 3
    with pytest.raises(ValueError, match="--tokenizer characters depends on the text"):
        PlanSettings(**common, tokenizer="characters")
    with pytest.raises(ValueError, match="--tokenizer is for --task pretrain"):
        PlanSettings(model="stories260k", tokenizer="bytes")


def test_accumulation_and_classes_reach_the_forecast():
    common = {"model": "stories260k", "methods": "full", "length": 16, "task": "classify"}
    few, held, many = (plan(PlanSettings(**common, **more)).forecasts[0] for more in ({}, {"accumulate": 2}, {"classes": 1002}))
    assert (few.accumulate, held.accumulate) == (1, 2)
    assert held.total > few.total
    assert many.trained_parameters - few.trained_parameters == 1000 * 64  # the head has no bias


def test_a_regression_has_one_output():
    settings = PlanSettings(model="stories260k", task="regress", classes=7, methods="linear-probe", length=16)
    (found,) = plan(settings).forecasts
    assert found.trained_parameters == 64  # a head without bias over the width of the model
