"""A task of one's own: plain modules, batches of any form, scores from one number for each row."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from lowdim.catalogue import variant
from lowdim.errors import DataError
from lowdim.methods import Setup, strategy_for
from lowdim.train import FitSettings, fit, own_task


def points(count=40):
    """Points of the plane with the number of their quadrant."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 4))


def task_of(rows, read, **more):
    return own_task(
        rows,
        loss=lambda model, batch: cross_entropy(model(read(batch)[0]), read(batch)[1]),
        values=lambda model, batch: (model(read(batch)[0]).argmax(-1) == read(batch)[1]).float(),
        metric="accuracy",
        **more,
    )


def pairs(**more):
    return task_of(TensorDataset(*points()), lambda batch: batch, **more)


def trained(task, method="full", model=None, **more):
    model = model or network()
    strategy = strategy_for(variant(method))
    batches = list(task.sample_batches(2, 8, torch.device("cpu")))
    applied = strategy.apply(model, Setup(lr=0.05, steps=10, loss_fn=task.loss_fn, batches=batches, head=task.head))
    settings = FitSettings(**{"steps": 10, "batch_size": 8, "lr": 0.05, "warmup": 0.0, "schedule": "constant", **more})
    return applied, settings


def losses(task, tmp_path, **more):
    applied, settings = trained(task, **more)
    return fit(applied, task, settings, tmp_path).losses


def test_the_score_is_the_mean_of_the_values_in_the_order_of_the_rows():
    task, model = pairs(), network()
    score = task.score(model, task.test, task.metrics()[0])
    with torch.no_grad():
        hits = [float(model(x[None]).argmax() == y) for x, y in (task.test[i] for i in range(len(task.test)))]
    assert list(score.values) == hits
    assert score.value == pytest.approx(sum(hits) / len(hits))


def test_a_metric_that_is_better_if_lower_has_the_other_sign_and_a_summary_its_own_rule():
    rows = [(torch.tensor([float(i)]), torch.tensor([0.0])) for i in range(1, 5)]
    parts = {"validation": rows, "test": rows}
    how = {
        "loss": lambda model, batch: mse_loss(model(batch[0]), batch[1]),
        "values": lambda model, batch: -(model(batch[0]) - batch[1]).square().squeeze(1),
        "higher_is_better": False,
    }
    same = nn.Identity()
    squares = [1.0, 4.0, 9.0, 16.0]
    plain = own_task(rows, metric="squared error", **how, **parts)
    assert plain.score(same, plain.test, plain.metrics()[0]) == (sum(squares) / 4, tuple(-s for s in squares), None)
    rooted = own_task(rows, metric="rmse", score=lambda values: math.sqrt(-sum(values) / len(values)), **how, **parts)
    assert rooted.evaluate(same, rooted.test, rooted.metrics()[0]) == pytest.approx(math.sqrt(sum(squares) / 4))
    assert not rooted.metrics()[0].higher_is_better


def test_parts_that_are_not_given_are_drawn_and_no_row_is_in_two():
    task = own_task([torch.tensor([i]) for i in range(50)], loss=lambda m, b: b.sum(), values=lambda m, b: b[:, 0])
    seen = [int(part[i]) for part in (task.train, task.validation, task.test) for i in range(len(part))]
    assert task.sizes() == {"train": 40, "validation": 5, "test": 5}
    assert sorted(seen) == list(range(50))
    assert seen != list(range(50))


@pytest.mark.parametrize("form", ["tuple", "dict", "nested"])
def test_a_batch_may_have_any_form(form, tmp_path):
    """The same rows in another form train the same model."""
    x, y = points()
    make, read = {
        "tuple": (lambda i: (x[i], y[i]), lambda batch: batch),
        "dict": (lambda i: {"x": x[i], "y": y[i]}, lambda batch: (batch["x"], batch["y"])),
        "nested": (lambda i: {"in": (x[i],), "out": [y[i]]}, lambda batch: (batch["in"][0], batch["out"][0])),
    }[form]
    task = task_of([make(i) for i in range(len(x))], read)
    found = losses(task, tmp_path)
    assert found == losses(pairs(), tmp_path)
    assert found[-1] < found[0]


def test_accumulated_batches_weigh_by_their_rows(tmp_path):
    """30 rows in micro-batches of 4 at most: the first step of 7 and a half of them is that of the whole batch."""
    rows = [(x, y) for x, y in zip(*points(30))]
    task = task_of(rows, lambda batch: batch, validation=rows, test=rows)
    whole, parts = (
        losses(task, tmp_path, batch_size=size, gradient_accumulation=count, steps=1) for size, count in ((30, 1), (4, 8))
    )
    assert parts == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("method", ["linear-probe", "lora", "galore", "monarch", "sora"])
def test_the_named_head_is_trained_by_every_method(method, tmp_path):
    model = network()
    start = model[2].weight.detach().clone()
    task = pairs(head="2")
    applied, settings = trained(task, method, model)
    found = fit(applied, task, settings, tmp_path)
    head = applied.model.get_submodule("2")
    weight = head.weight if isinstance(head, nn.Linear) else head.dense_weight()
    assert found.failure is None
    assert not torch.equal(weight.detach(), start)


def test_outputs_that_are_not_finite_have_no_score():
    task = own_task([torch.ones(1)] * 9, loss=lambda m, b: b.sum(), values=lambda m, b: b[:, 0] / 0)
    assert math.isnan(task.evaluate(network(), task.test, task.metrics()[0]))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (lambda model, batch: batch[0].sum(), r"one number for each of the 4 rows; got the shape \(\)"),
        (lambda model, batch: model(batch[0]), r"one number for each of the 4 rows; got the shape \(4, 4\)"),
    ],
)
def test_values_must_be_one_for_each_row(values, error):
    task = own_task(TensorDataset(*points()), loss=lambda m, b: b[0].sum(), values=values)
    with pytest.raises(ValueError, match=error):
        task.evaluate(network(), task.test, task.metrics()[0])


@pytest.mark.parametrize(("loss", "got"), [(lambda m, b: m(b[0]), r"the shape \(8, 4\)"), (lambda m, b: 1.0, "a float")])
def test_the_loss_must_be_one_number(loss, got, tmp_path):
    task = own_task(TensorDataset(*points()), loss=loss, values=lambda m, b: b[1])
    with pytest.raises(TypeError, match=rf"must return a tensor with one number, the mean over the rows; got {got}"):
        losses(task, tmp_path)


@pytest.mark.parametrize(
    ("rows", "more", "error"),
    [
        (iter([1]), {}, "rows must have a length and integer indices, such as a list; got a list_iterator"),
        ([object()] * 9, {}, "collate cannot make a batch of the rows"),
        (["text"] * 9, {}, "a batch must hold a tensor with a row for each example; got list"),
        ([torch.ones(1)] * 2, {}, "rows must hold at least 3 rows, since 2 parts are taken from them; got 2"),
        ([torch.ones(1)] * 9, {"test": []}, "test must hold at least one row; got none"),
    ],
)
def test_rows_of_no_use_are_refused(rows, more, error):
    with pytest.raises((TypeError, DataError), match=error):
        own_task(rows, loss=lambda m, b: b.sum(), values=lambda m, b: b, **more)


def test_a_constant_answer_is_scored_on_each_row():
    task = pairs(constant=lambda batch: (batch[1] == 3).float())
    task.evaluation_batch = 3  # several batches, of which the last is shorter
    (metric,) = task.metrics()
    found = task.baseline(task.test, metric)
    hits = [float(y == 3) for _, y in task.test]
    assert (list(found.score.values), found.scores) == (hits, {"accuracy": sum(hits) / len(hits)})
    assert found.sentence == f"always giving the constant answer gives accuracy {sum(hits) / len(hits):.3f}"
    assert pairs().baseline(task.test, metric) is None


def test_a_constant_answer_that_is_not_one_number_for_each_row():
    task = pairs(constant=lambda batch: batch[0])
    with pytest.raises(ValueError, match=r"constant\(batch\) must return one number for each of the 4 rows"):
        task.baseline(task.test, task.metrics()[0])
