"""Training in legs: with pauses, each of which prepares the model anew, a run gives the bits of one in a single piece."""

import copy

import pytest
import torch

from lowdim import catalogue, models
from lowdim.methods import Setup, strategy_for
from lowdim.train.loop import FitSettings, fit
from lowdim.train.tasks import language_modelling

STEPS, PAUSES = 9, (3, 6, 9)
#: Trained weights of every kind: plain, projected, drawn anew, with a companion, with ranks or layers that change.
QUICK = ("lora", "full", "galore", "sora", "increlora", "lamda", "diffora")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "short.txt"
    text.write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:6000])
    return language_modelling(models.load_tokenizer("stories260k"), [text], max_length=16)


@pytest.fixture(scope="module")
def base():
    return models.load_model("stories260k", "causal-lm")


def prepared(chosen, base, task):
    torch.manual_seed(5)
    strategy = strategy_for(chosen)
    model = copy.deepcopy(base)
    batches = task.sample_batches(strategy.sample_batches(STEPS), 4, torch.device("cpu"))
    setup = Setup(lr=chosen.rates[0], steps=STEPS, batches=batches, loss_fn=task.loss_fn, seed=5, max_norm=1.0)
    return strategy, strategy.apply(model, setup)


def train(chosen, base, task, folder, pauses):
    """The losses, the trained model's state and the sizes of the checkpoints."""
    sizes = []
    for pause in pauses:
        strategy, applied = prepared(chosen, base, task)
        settings = FitSettings(
            steps=STEPS, batch_size=4, lr=chosen.rates[0], seed=5, clips_itself=strategy.clips_itself(), pause_at=pause
        )
        result = fit(applied, task, settings, folder, resume=True)
        sizes += [path.stat().st_size for path in folder.rglob("tensors.pt")]
        if pause != STEPS and pause is not None:
            assert len(list(folder.glob("checkpoint-*"))) <= 1
    return result, applied.model.state_dict(), sizes


def check(name, base, task, folder):
    chosen = catalogue.variant(name)
    whole, want, _ = train(chosen, base, task, folder / "whole", [None])
    legs, got, sizes = train(chosen, base, task, folder / "legs", PAUSES)
    assert whole.failure is None
    assert legs.losses == whole.losses
    assert legs.penalties == whole.penalties
    assert got.keys() == want.keys()
    for key, value in want.items():
        equal = torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value
        assert equal, f"{name}: {key} is not the same"
    return sizes


@pytest.mark.parametrize("name", QUICK)
def test_a_run_in_legs_is_the_run_in_one_piece(name, base, task, tmp_path):
    sizes = check(name, base, task, tmp_path)
    whole = sum(p.numel() * p.element_size() for p in base.parameters())
    if name == "lora":
        assert max(sizes) < whole / 2, "what is frozen is not written"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(catalogue.variants()) - {*QUICK, "linear-probe"}))
def test_every_method_trains_in_legs(name, base, task, tmp_path):
    check(name, base, task, tmp_path)


def test_a_leg_that_was_scored_before_is_not_trained_again(base, task, tmp_path):
    chosen = catalogue.variant("lora")
    first, state, _ = train(chosen, base, task, tmp_path, [3])
    again, same, _ = train(chosen, base, task, tmp_path, [3])
    assert again.losses == first.losses
    assert all(torch.equal(same[key], value) for key, value in state.items())
