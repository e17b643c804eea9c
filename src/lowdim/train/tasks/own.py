"""A task of one's own, for any module: rows, the loss of a batch, and one number for each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from lowdim.calibrate import map_tensors, row_count
from lowdim.errors import DataError, cut
from lowdim.linalg import derive_seed
from lowdim.train.metrics import Metric
from lowdim.train.tasks.base import Baseline, Score, Task

__all__ = ["OwnTask", "own_task"]

_HELD_OUT = 0.1  # share of the rows for each part that is not given


@dataclass(kw_only=True)
class OwnTask(Task):
    """A task made of functions; see `own_task`."""

    kind: ClassVar[str] = "own"
    evaluation_batch: int = 256

    loss: Callable[[nn.Module, Any], Tensor]
    values: Callable[[nn.Module, Any], Any]
    scored: Metric
    summed_up: Callable[[Sequence[float]], float] | None = None
    constant: Callable[[Any], Any] | None = None
    head: tuple[str, ...] = ()

    def metrics(self) -> list[Metric]:
        """The one metric."""
        return [self.scored]

    def order(self, part: Any) -> list[int]:
        """The rows as they come."""
        return list(range(len(part)))

    def count_items(self, batch: Any) -> int:
        """The rows of the batch."""
        return row_count(batch)

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch.

        Raises:
            TypeError: the task's `loss` gives something else.
        """
        loss = self.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise TypeError(
                f"loss(model, batch) must return a tensor with one number, the mean over the rows; got {_kind(loss)}"
            )
        return loss

    def outcomes(self, model: nn.Module, batch: Any, metric: Metric) -> Sequence[float]:
        """The task's value of each row.

        Raises:
            ValueError: it does not give one number for each row.
        """
        return _one_for_each_row(self.values(model, batch), "values(model, batch)", batch)

    def baseline(self, part: Any, metric: Metric) -> Baseline | None:
        """What the constant answer scores, if the task names one.

        Raises:
            ValueError: `constant` does not give one number for each row.
        """
        if self.constant is None:
            return None
        size, found = self.evaluation_batch, []
        for start in range(0, len(part), size):
            batch = self.collate([part[i] for i in range(start, min(start + size, len(part)))])
            found += _one_for_each_row(self.constant(batch), "constant(batch)", batch)
        score = self.score_of(found, metric)
        what = "always giving the constant answer"
        sentence = f"{what} gives {metric.title} {score.value:.3f}"
        return Baseline("constant-answer", "Constant answer", what, score, {metric.name: score.value}, sentence)

    def score_of(self, outcomes: Sequence[float], metric: Metric) -> Score:
        """The mean of the values, negative for a metric that is better if lower; or what `score` makes of them."""
        if self.summed_up is not None:
            return Score(float(self.summed_up(outcomes)), tuple(outcomes))
        mean = math.fsum(outcomes) / len(outcomes)
        return Score(mean if metric.higher_is_better else -mean, tuple(outcomes))


def own_task(
    rows: Any,
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    values: Callable[[nn.Module, Any], Any],
    metric: str = "score",
    higher_is_better: bool = True,
    score: Callable[[Sequence[float]], float] | None = None,
    validation: Any = None,
    test: Any = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    constant: Callable[[Any], Any] | None = None,
    head: Sequence[str] = (),
    name: str = "own data",
    seed: int = 0,
) -> OwnTask:
    """A task for any module and any rows.

    Args:
        rows: the training part: a list, a `torch.utils.data.Dataset` or `datasets.Dataset`, with `len` and integer indices.
        loss: `loss(model, batch)`, a tensor with one number: the mean over the rows of the batch. It is what training lowers.
        values: `values(model, batch)`, a number for each row of the batch, **higher is better**: 1 for a right answer and 0 for
            a wrong one, a negative squared error. The model is in evaluation mode, without gradients. They decide what is best.
        metric, higher_is_better: the name and direction of what is reported: the mean of the values, with the other sign if
            lower is better.
        score: from all values of a part, in order, to what is reported, if that is not their mean.
        validation, test: the other parts, in the same form. A part that is not given is a tenth of `rows`, drawn from `seed`:
            give both if rows belong together (images of one person, sentences of one text).
        collate: a list of rows -> batch: a tensor, or a dict, tuple or list of tensors, whose first dimension is the row.
        constant: `constant(batch)`, the values of an answer that ignores the inputs, such as the most frequent class or the
            mean. A comparison shows it as a row: what is no better has learned nothing.
        head: modules of the model that every method trains in full, such as a new output layer; a linear probe trains no more.
        name: of the data, for titles.

    Returns:
        A `Task` for `lowdim.compare(task=…, model=…)`.

    Raises:
        TypeError: `rows` has no length or indices, or the batch of its first rows holds no tensors.
        DataError: too few rows.

    Example:
        >>> import torch
        >>> from torch.nn.functional import mse_loss
        >>> from lowdim.train import own_task
        >>> rows = [(torch.tensor([float(x)]), torch.tensor([2.0 * x])) for x in range(20)]
        >>> task = own_task(
        ...     rows,
        ...     loss=lambda model, batch: mse_loss(model(batch[0]), batch[1]),
        ...     values=lambda model, batch: -(model(batch[0]) - batch[1]).square().squeeze(1),
        ...     metric="squared error",
        ...     higher_is_better=False,
        ... )
        >>> task.sizes()
        {'train': 16, 'validation': 2, 'test': 2}
    """
    for part, what in ((rows, "rows"), (validation, "validation"), (test, "test")):
        if part is not None and not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
            raise TypeError(f"{what} must have a length and integer indices, such as a list; got {_kind(part)}")
    train, validation, test = _parts(rows, validation, test, seed)
    try:
        row_count(collate([train[0]]))
    except TypeError as error:
        raise TypeError(
            f"collate cannot make a batch of the rows, of which the first is {_described(train[0])}: {error}"
        ) from error
    return OwnTask(
        train=train,
        validation=validation,
        test=test,
        collate=collate,
        name=name,
        example=_described(train[0]),
        loss=loss,
        values=values,
        scored=Metric(metric, (OwnTask.kind,), higher_is_better, low=-math.inf, high=math.inf),
        summed_up=score,
        constant=constant,
        head=(head,) if isinstance(head, str) else tuple(head),
    )


def _parts(rows: Any, validation: Any, test: Any, seed: int) -> tuple[Any, Any, Any]:
    """The three parts; those that are not given are drawn from the rows.

    Raises:
        DataError: a part would be empty.
    """
    missing = sum(part is None for part in (validation, test))
    if len(rows) < 1 + missing:
        raise DataError(
            f"rows must hold at least {1 + missing} rows, since {missing} parts are taken from them; got {len(rows)}"
        )
    for part, what in ((validation, "validation"), (test, "test")):
        if part is not None and not len(part):
            raise DataError(f"{what} must hold at least one row; got none")
    if not missing:
        return rows, validation, test
    held = max(1, round(_HELD_OUT * len(rows)))
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derive_seed(seed, "split"))).tolist()
    drawn = [Subset(rows, places[i * held : (i + 1) * held]) for i in range(missing)]
    train = Subset(rows, places[missing * held :])
    validation = drawn.pop() if validation is None else validation
    return train, validation, drawn.pop() if test is None else test


def _one_for_each_row(given: Any, what: str, batch: Any) -> list[float]:
    """The numbers that a function of the task gives for a batch.

    Raises:
        ValueError: not one number for each row.
        FloatingPointError: NaN or infinite.
    """
    values, rows = torch.as_tensor(given).double(), row_count(batch)
    if values.shape != (rows,):
        raise ValueError(f"{what} must return one number for each of the {rows} rows; got the shape {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError("a value is not finite")
    return values.tolist()


def _described(row: Any) -> str:
    """The shapes of a row, in one line."""

    def described(value: Tensor) -> str:
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"

    return cut(str(map_tensors(row, described)).replace("'", ""), 160)


def _kind(value: Any) -> str:
    return f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
