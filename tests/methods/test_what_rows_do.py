"""What each row of the catalogue does over a short real run, with the row's own options, under the trainer."""

import math
from itertools import pairwise

import pytest
import torch
from lowdim.adapters.diffora_search import DiffoRAAdapted
from lowdim.layers.maestro_model import maestro_layers

import tiny
from lowdim import models
from lowdim.catalogue import variant, variants
from lowdim.methods import apply, strategy_for, with_options
from lowdim.train.loop import FitSettings, fit
from lowdim.train.metrics import metric_for
from lowdim.train.tasks import language_modelling

RATE = 1e-3


@pytest.fixture(scope="module")
def task():
    return language_modelling(models.load_tokenizer("stories260k"), ("lowdim:shakespeare",), max_length=32, limit=64)


def ready(task, name, steps, seed=0, lr=RATE, **options):
    torch.manual_seed(seed)
    model = models.load_model("stories260k", "causal-lm")
    chosen = with_options(variant(name), options)
    batches = task.sample_batches(strategy_for(chosen).sample_batches(steps), 4, torch.device("cpu"))
    return apply(chosen, model, lr=lr, steps=steps, batches=batches, loss_fn=task.loss_fn, seed=seed)


def run(applied, task, folder, steps, look=lambda: None, lr=RATE):
    """Train; returns the result and what `look()` gives after each step."""
    from transformers import TrainerCallback

    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(look())

    result = fit(applied, task, FitSettings(steps=steps, batch_size=4, lr=lr), folder, callbacks=(Watch(),))
    assert result.failure is None
    return result, seen


def updates(applied):
    return [layer.update for layer in applied.adapted.layers.values()]


def test_lamda_freezes_after_the_warm_up(task, tmp_path):
    steps, warmup, rank, share = 20, 2, 32, 0.3
    applied = ready(task, "lamda", steps)
    update = updates(applied)[0]
    _, seen = run(applied, task, tmp_path, steps, lambda: (update.frozen_columns(), update.B.detach().clone()))
    wanted = [min(rank, max(0, math.floor(rank * (i - warmup) / (share * steps) + 1e-9))) for i in range(2, steps + 2)]
    assert [count for count, _ in seen] == wanted, "in the step that comes next"
    assert not update.B.requires_grad
    for (frozen, before), (_, after) in pairwise(seen):
        moved = (before != after).any(0)
        assert not moved[:frozen].any()
        assert moved[frozen:].all() or frozen == rank


@pytest.mark.parametrize("steps", [3, 8, 30])
@pytest.mark.parametrize("layers", [("q_proj",), ("q_proj", "v_proj", "down_proj")], ids=len)
def test_increlora_reaches_its_budget(task, tmp_path, steps, layers):
    applied = ready(task, "increlora", steps, target_modules=list(layers))
    begun = applied.adapted.total_rank
    _, seen = run(applied, task, tmp_path, steps, lambda: applied.adapted.total_rank)
    budget = applied.adapted.method.target_rank * len(applied.adapted.layers)
    assert begun == budget // 2 == 4 * len(applied.adapted.layers)
    assert seen[-1] == budget
    assert seen[max(1, steps // 2)] == budget, "by the middle of the training"
    if steps == 30 and len(layers) == 3:
        assert len(set(seen)) > 4, "bit by bit"


def test_sora_closes_gates(task, tmp_path):
    applied = ready(task, "sora", 40)
    begun = sum(applied.adapted.effective_rank().values())
    _, seen = run(applied, task, tmp_path, 40, lambda: sum(applied.adapted.effective_rank().values()))
    assert begun == 8 * len(applied.adapted.layers)
    # The gates are normal with deviation 1; 40 steps of the threshold 1e-3 close those that began below about 0.04.
    assert 0.01 * begun < begun - seen[-1] < 0.2 * begun
    assert sum(applied.ranks().values()) == seen[-1], "the record has them"


@pytest.mark.parametrize("lr", [1e-4, 1e-3])
def test_maestro_takes_ranks_away(task, tmp_path, lr):
    applied = ready(task, "maestro", 60, lr=lr)
    layers = maestro_layers(applied.model).values()
    begun = sum(layer.rank for layer in layers)
    _, seen = run(applied, task, tmp_path, 60, lambda: sum(layer.rank for layer in layers), lr=lr)
    assert seen[-1] <= 0.9 * begun
    assert sum(applied.ranks().values()) == seen[-1], "the record has them"
    assert {i + 1 for i in range(59) if seen[i] != seen[i - 1]} <= {1, *range(6, 61, 6)}, "every tenth of the training"


@pytest.mark.parametrize("steps", [12, 7])
def test_sara_selects_again_in_the_middle(task, tmp_path, steps):
    applied = ready(task, "sara", steps, lr=3e-3)

    def active():
        return sum(int(update.active.sum()) for update in updates(applied))

    begun = active()
    _, seen = run(applied, task, tmp_path, steps, active, lr=3e-3)
    middle = steps // 2
    assert set(seen[: middle - 1]) == {begun}
    assert set(seen[middle - 1 :]) == {seen[-1]}
    assert seen[-1] < begun


def test_sst_turns_over(task, tmp_path):
    applied = ready(task, "sst", 52)
    layers = [m for m in applied.model.modules() if type(m).__name__ == "SSTLinear"]
    _, seen = run(applied, task, tmp_path, 52, lambda: [layer.active.tolist() for layer in layers])
    assert all(now == seen[0] for now in seen[:49])
    assert all(now == seen[-1] for now in seen[49:])
    assert all(before != after for before, after in zip(seen[0], seen[-1], strict=True)), "in every layer"


def test_lora_sb_starts_at_the_rate_that_it_is_trained_with(task):
    """`R = diag(σ) · lr / warmup`, with 0.1 of the steps as warm-up."""
    starts = {(lr, steps): updates(ready(task, "lora-sb", steps, lr=lr))[0].R for lr, steps in ((3e-3, 100), (3e-2, 40))}
    (a, b) = (R / (lr / (0.1 * steps)) for (lr, steps), R in starts.items())
    torch.testing.assert_close(a, b)
    assert float(a[0, 0]) > 1, "the largest singular value of a matrix of signs"


def test_diffora_searches_within_its_steps_on_its_own_data(task, tmp_path, monkeypatch):
    steps, pairs, original = 20, [], DiffoRAAdapted.search_step

    def spy(self, loss_fn, train, valid, *rest):
        pairs.append((train["input_ids"].tolist(), valid["input_ids"].tolist()))
        return original(self, loss_fn, train, valid, *rest)

    monkeypatch.setattr(DiffoRAAdapted, "search_step", spy)
    applied = ready(task, "diffora", steps)
    result, seen = run(applied, task, tmp_path, steps)
    assert len(pairs) == applied.spent == 4
    assert len(pairs) + len(seen) == len(pairs) + len(result.losses) == steps
    texts = [row for pair in pairs for batch in pair for row in batch]
    assert len({tuple(row) for row in texts}) == len(texts), "no text twice, in whatever half"
    assert applied.notes == ("4 of 20 steps go to the method's own search before the training",)


@pytest.mark.parametrize("name", ["sst", "maestro", "low-rank-restart"])
def test_the_companion_is_stepped_once_a_step_and_finished_once(task, tmp_path, name):
    applied, ends = ready(task, name, 5), []
    made = applied.make_companion

    def make(optimizer):
        companion = made(optimizer)
        end = companion.finish
        companion.finish = lambda: ends.append(companion.steps) or end()
        return companion

    applied.make_companion = make
    _, seen = run(applied, task, tmp_path, 5, lambda: applied.companion.steps)
    assert seen == [1, 2, 3, 4, 5]
    assert ends == [5]


def test_the_guide_fades_over_half_of_the_run_and_is_gone_after_it(task, tmp_path):
    applied = ready(task, "self-guided", 8)
    names = set(dict(applied.model.named_parameters()))
    _, seen = run(applied, task, tmp_path, 8, lambda: next(iter(applied.companion.layers.values())).ratio)
    assert seen == pytest.approx([0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0, 0, 0, 0, 0])
    assert set(dict(applied.model.named_parameters())) == names


@pytest.mark.parametrize("name", ["lamda", "sora", "sara", "increlora"])
def test_the_adapter_is_stepped_once_a_step(task, tmp_path, name):
    applied = ready(task, name, 4)

    def count():
        return updates(applied)[0].steps.item() if name == "lamda" else applied.adapted.shared.done

    _, seen = run(applied, task, tmp_path, 4, count)
    assert seen == [1, 2, 3, 4]


def test_the_loss_that_is_logged_is_the_tasks(task, tmp_path):
    plain, _ = run(ready(task, "full", 2), task, tmp_path, 2)
    assert plain.penalties == []
    for name in ("sora", "increlora", "maestro"):
        applied = ready(task, name, 2)
        first = applied.adapted.regularizer() if applied.adapted else None
        result, _ = run(applied, task, tmp_path, 2)
        assert result.losses[0] == pytest.approx(plain.losses[0], rel=1e-5), name
        assert len(result.penalties) == 2, name
        assert min(result.penalties) > 0, name
        if first is not None:
            assert result.penalties[0] == pytest.approx(float(first), rel=1e-5), name


def test_what_a_companion_draws_follows_from_the_seed_of_the_run(task):
    for name in ("sst", "maestro"):
        for seed in (0, 3):
            applied = ready(task, name, 10, seed=seed)
            applied.start(RATE)
            sampler = applied.companion.sampler if name == "maestro" else applied.companion
            assert sampler.seed == seed, name


def test_every_row_with_a_companion_is_looked_at():
    assert {name for name, row in variants().items() if row.companion} == {
        "sst",
        "maestro",
        "low-rank-restart",
        "self-guided",
    }


@pytest.mark.parametrize(("name", "steps", "shrinks"), [("maestro", 40, 4), ("maestro", 70, 7)])
def test_a_companions_schedule_is_that_of_the_run(task, name, steps, shrinks):
    """`total_steps` of the run, not twice as many: Maestro shrinks ten times."""
    applied = ready(task, name, steps)
    applied.start(1e-3)
    assert applied.companion.shrink_interval == shrinks


@pytest.mark.parametrize(("name", "itself"), [("q-galore", True), ("galore", False), ("lora", False)])
def test_gradients_are_clipped_once(task, tmp_path, monkeypatch, name, itself):
    """By the optimizer where the trainer cannot see its gradients, else by the trainer: in a comparison as in a run."""
    from lowdim.comparison import runs
    from lowdim.train.trainer import arguments

    seen = []

    class Enough(Exception):
        pass

    def fit(applied, task, settings, folder, **_):
        seen.append((applied.start(1e-3), arguments(settings, 5, tmp_path).max_grad_norm))
        raise Enough

    monkeypatch.setattr(runs, "fit", fit)
    model = tiny.llama()
    bench = runs.Contest(
        model=model, task=task, head=(), metric=metric_for("causal-lm"), steps=5, batch_size=2, folder=tmp_path, fingerprint=""
    )
    with pytest.raises(Enough):
        runs.perform(bench, runs.Run(variant(name), "seed", 0, 1e-3, 0, steps=5))
    ((optimizer, by_trainer),) = seen
    assert getattr(optimizer, "max_norm", None) == (1.0 if itself else None)
    assert by_trainer == (0.0 if itself else 1.0)
