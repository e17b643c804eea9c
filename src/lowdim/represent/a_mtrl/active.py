"""Active learning of a shared representation: each stage draws samples from the tasks that matter for the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lowdim.errors import check_float, check_int
from lowdim.linalg import as_given, as_tensor
from lowdim.represent.a_mtrl.relevance import (
    DEFAULT_LAM,
    by_largest_remainder,
    check_order,
    numbers,
    relevance,
    shares_of,
)
from lowdim.represent.a_mtrl.representation import SharedLinearRepresentation
from lowdim.results import Result

__all__ = ["ActiveMultiTask", "ActiveResult"]


@dataclass(frozen=True)
class ActiveResult(Result):
    """What was drawn, and what came of it.

    Attributes:
        nu: relevance of each task in the last stage, which decided its samples.
        counts: samples of each task, int64; their sum is the budget.
        history: the samples that each stage drew, the first stage first; they add up to `counts`.
        representation: fitted to all samples.
        target_coef: of the target, on it.
    """

    left_out: ClassVar[tuple[str, ...]] = ("representation",)

    nu: Any  # (T,)
    counts: Any  # (T,)
    history: list[Any]  # of (T,)
    representation: SharedLinearRepresentation
    target_coef: Any  # (rank,)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each task: relevance, share of the samples, and the samples of each stage."""
        nu, counts, stages = self.nu.tolist(), self.counts.tolist(), [stage.tolist() for stage in self.history]
        total = sum(counts)
        return [
            {"task": t, "nu": nu[t], "share": counts[t] / total, **{f"stage_{s}": drawn[t] for s, drawn in enumerate(stages)}}
            for t in range(len(counts))
        ]

    @property
    def summary(self) -> str:
        """One line."""
        counts = self.counts.tolist()
        most = max(range(len(counts)), key=counts.__getitem__)
        return f"ActiveResult: {sum(counts)} samples of {len(counts)} tasks; task {most} gave most, {counts[most]}"

    def plot(self, *, ax: Any = None) -> Any:
        """Samples of each task as bars, stage upon stage."""
        axes = self._axes(ax)
        tasks, below = range(len(self.counts)), np.zeros(len(self.counts))
        for stage, drawn in enumerate(self.history):
            axes.bar(tasks, drawn.tolist(), bottom=below, label=f"stage {stage}")
            below = below + np.array(drawn.tolist())
        axes.set_xlabel("source task")
        axes.set_ylabel("samples")
        axes.legend()
        return axes


class ActiveMultiTask:
    """Draw source samples where they help the target most, in stages.

    Stage 0 draws `minimum` samples of every task. Each of the following stages fits the shared representation to all samples
    so far, and the target's coefficients on it; it computes the relevance ν of the tasks (`task_relevance`), and draws so that
    the totals reach `allocate_samples` of ν and of the budget up to this stage, which grows by 2, 3, …, `stages + 1` parts. A
    task that already has more draws nothing, and the others share what is left. At the end there is one more fit.

    Args:
        rank: of the representation.
        order: 1: samples in proportion to |ν| of the sparse ν; 2: to ν² of the shortest.
        lam: λ of the Lasso for order 1; None: `0.05 max |Ŵᵀ ŵ|` of each stage's estimates; 0: the linear program.
        stages: stages after stage 0.
        minimum: samples of every task in stage 0; None: the larger of `2 rank` and a twentieth of an equal share.
        random_state: passed to the representation; all draws are the caller's.

    Raises:
        ValueError: options out of range.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import ActiveMultiTask
        >>> rng = np.random.default_rng(0)
        >>> weights = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])  # a column for each of three tasks
        >>> def draw(task, n):
        ...     X = rng.normal(size=(n, 3))
        ...     return X, X @ weights[:, task]
        >>> X = rng.normal(size=(8, 3))
        >>> found = ActiveMultiTask(2).run(draw, 3, 90, X, X @ weights[:, 0])
        >>> found.counts.tolist(), found.nu.round(1).tolist()
        ([82, 4, 4], [1.0, 0.0, 0.0])

    Not where the representation is not linear, or where every task is as far from the target: uniform samples are then as good.

    Source: Wang, Chen, Jamieson, Du, "Improved Active Multi-Task Representation Learning via Lasso", ICML 2023,
    arXiv 2306.02556.
    """

    def __init__(
        self,
        rank: int,
        *,
        order: int = 1,
        lam: float | None = None,
        stages: int = 3,
        minimum: int | None = None,
        random_state: int = 0,
    ):
        check_int("rank", rank, 1)
        check_order(order)
        check_int("stages", stages, 1)
        if lam is not None:
            check_float("lam", lam, 0.0)
        if minimum is not None:
            check_int("minimum", minimum, 1)
        self.rank, self.order, self.lam, self.stages = rank, order, lam, stages
        self.minimum, self.random_state = minimum, random_state

    def run(
        self,
        draw: Callable[[int, int], tuple[Any, Any]],
        n_tasks: int,
        budget: int,
        X_target: Any,  # (n, d)
        y_target: Any,  # (n,)
    ) -> ActiveResult:
        """Draw the budget and fit.

        Args:
            draw: `draw(task, n)` -> n new samples `(n, d)` and their responses `(n,)`, numpy or torch.
            n_tasks: T, the source tasks.
            budget: source samples in all.

        Raises:
            ValueError: a budget below `minimum` for each task, a rank above the inputs or the tasks, a target that does not fit
                or is not finite: all before anything is drawn. Or `draw` returns another number of rows than asked for, other
                columns than the target's, NaN or infinite entries; the error names the draw.
        """
        check_int("n_tasks", n_tasks, 1)
        check_int("budget", budget, 1)
        minimum = max(2 * self.rank, budget // (20 * n_tasks)) if self.minimum is None else self.minimum
        if budget < minimum * n_tasks:
            raise ValueError(f"budget must be at least minimum x tasks = {minimum} x {n_tasks}; got {budget}")
        target = numbers("X_target", X_target, 2), numbers("y_target", y_target, 1)
        if len(target[0]) != len(target[1]):
            raise ValueError(f"X_target and y_target must have equally many rows; got {len(target[0])} and {len(target[1])}")
        inputs = target[0].shape[1]
        if self.rank > min(inputs, n_tasks):
            raise ValueError(f"rank must be at most the inputs, {inputs}, and the tasks, {n_tasks}; got {self.rank}")
        samples = _Samples(draw, n_tasks, inputs)
        samples.draw(np.full(n_tasks, minimum))
        shared, nu = SharedLinearRepresentation(self.rank, random_state=self.random_state), np.zeros(n_tasks)
        parts = np.cumsum(np.arange(2, self.stages + 2))  # of the budget, up to each stage
        for upto in parts:
            w_target = self._fitted(shared, samples, *target)
            nu = self._relevance(numbers("W", shared.task_coef_, 2), w_target)
            total = max(int(samples.counts.sum()), int(budget * upto) // int(parts[-1]))
            samples.draw(_more(samples.counts, shares_of(nu, self.order), total, minimum))
        w_target = self._fitted(shared, samples, *target)

        def given(array: np.ndarray) -> Any:
            return as_given(as_tensor(array), like=samples.like)

        return ActiveResult(given(nu), given(samples.counts), [given(n) for n in samples.history], shared, given(w_target))

    def _fitted(self, shared: SharedLinearRepresentation, samples: _Samples, X: np.ndarray, y: np.ndarray) -> np.ndarray:
        return shared.fit(*samples.lists()).fit_target(X, y)

    def _relevance(self, W: np.ndarray, w_target: np.ndarray) -> np.ndarray:
        lam = self.lam
        if lam is None and self.order == 1:
            lam = DEFAULT_LAM * float(np.abs(W.T @ w_target).max())
            if not lam:
                return np.zeros(W.shape[1])
        return relevance(W, w_target, self.order, lam)


class _Samples:
    """What was drawn of each task so far."""

    like: Any  # what `draw` returned first: its kind is that of the answer

    def __init__(self, draw: Callable[[int, int], tuple[Any, Any]], tasks: int, inputs: int):
        self._draw, self._inputs = draw, inputs
        self.X: list[list[np.ndarray]] = [[] for _ in range(tasks)]
        self.y: list[list[np.ndarray]] = [[] for _ in range(tasks)]
        self.counts = np.zeros(tasks, dtype=np.int64)
        self.history: list[np.ndarray] = []

    def draw(self, more: np.ndarray) -> None:
        """Draw so many more samples of each task.

        Raises:
            ValueError: `draw` returns something else.
        """
        for task in np.flatnonzero(more).tolist():
            asked = int(more[task])
            given, answers = self._draw(task, asked)
            call = f"draw({task}, {asked})"
            X, y = numbers(f"X of {call}", given, 2), numbers(f"y of {call}", answers, 1)
            if len(X) != asked or len(y) != asked:
                raise ValueError(f"{call} must return {asked} rows of each; got {len(X)} and {len(y)}")
            if X.shape[1] != self._inputs:
                raise ValueError(f"{call} must return the {self._inputs} columns that X_target has; got {X.shape[1]}")
            if not self.history and not task:
                self.like = given
            self.X[task].append(X.copy())  # the next draw may overwrite it
            self.y[task].append(y.copy())
        self.counts = self.counts + more
        self.history.append(np.asarray(more, dtype=np.int64))

    def lists(self) -> tuple[list[Any], list[Any]]:
        """All samples and responses of each task, in the kind that `draw` returned."""
        return tuple(  # type: ignore[return-value]
            [as_given(as_tensor(np.concatenate(parts)), like=self.like) for parts in kind] for kind in (self.X, self.y)
        )


def _more(have: np.ndarray, shares: np.ndarray, total: int, minimum: int) -> np.ndarray:
    """How many each task draws so that all have `total` together, nearest to the allocation by shares."""
    open_, wanted = np.ones(len(have), dtype=bool), have.copy()
    while open_.any():
        rest = total - int(have[~open_].sum()) - minimum * int(open_.sum())
        inside = shares[open_]
        even = np.full(len(inside), 1 / len(inside))
        part = minimum + by_largest_remainder(inside / inside.sum() if inside.any() else even, rest)
        wanted[open_] = part
        above = open_ & (wanted < have)
        if not above.any():
            break
        wanted[above] = have[above]
        open_ &= ~above
    return wanted - have
