"""A-MTRL: relevance, allocation, the shared representation and the loop, against their formulas."""

import copy

import numpy as np
import pytest
import torch

import vectors
from lowdim.represent import ActiveMultiTask, SharedLinearRepresentation, allocate_samples, task_relevance
from lowdim.testing.result_case import ResultCase, ValueCase


def tasks(k=3, T=7, seed=0):
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(k, T))
    return W, W[:, 1] - 0.5 * W[:, 4]


class TestLeastNorm(ValueCase):
    def result(self):
        return task_relevance(*tasks(), order=2)

    def expected(self):
        W, w = tasks()
        return W.T @ np.linalg.solve(W @ W.T, w)

    def refusals(self):
        W, w = tasks()
        return [
            (ValueError, "order must be 1", lambda: task_relevance(W, w, order=3)),
            (ValueError, "lam", lambda: task_relevance(W, w, lam=-1.0)),
            (ValueError, "equally many rows; got (3, 7) and (2,)", lambda: task_relevance(W, w[:2])),
            (TypeError, "W must be real; got torch.complex128", lambda: task_relevance(W * 1j, w)),
            (ValueError, "W must be finite", lambda: task_relevance(W * np.nan, w)),
            (ValueError, "w_target must have 1 dimensions", lambda: task_relevance(W, W)),
        ]


class TestAllocation(ValueCase):
    def result(self):
        return allocate_samples(np.array([0.0, -3.0, 1.0, 1.0]), 13, order=1, minimum=2)

    def expected(self):  # 2 + 5 · (0, 3, 1, 1) / 5
        return np.array([2, 5, 3, 3])

    def refusals(self):
        return [
            (ValueError, "at least minimum x tasks = 3 x 4; got 11", lambda: allocate_samples(np.ones(4), 11, minimum=3)),
            (ValueError, "budget", lambda: allocate_samples(np.ones(4), -1)),
            (ValueError, "nu must be finite", lambda: allocate_samples([np.inf], 3)),
            (ValueError, "order", lambda: allocate_samples([1.0], 3, order=0)),
        ]


@pytest.mark.parametrize("case", ["relevance", "relevance_small"])
def test_published_relevance_and_allocations(case):
    known = vectors.load("a-mtrl", case)
    W, w, how = known["W"], known["w_target"], known.hyperparameters  # tolerances are absolute: scale=1.0
    sparse, short = task_relevance(W, w, lam=how["lam"]), task_relevance(W, w, order=2)
    known.close(task_relevance(W, w), "nu1", scale=1.0)
    known.close(short, "nu2", scale=1.0)
    known.close(sparse, "nu_lasso", scale=1.0)
    of = {"budget": how["budget"], "minimum": how["minimum"]}
    assert torch.equal(allocate_samples(sparse, **of), known["allocation_1"])
    assert torch.equal(allocate_samples(short, order=2, **of), known["allocation_2"])


def test_the_linear_program_has_the_least_absolute_sum():
    W, w = tasks()
    nu = task_relevance(W, w)
    assert np.abs(W @ nu - w).max() < 1e-9
    assert np.count_nonzero(np.abs(nu) > 1e-9) <= len(W)
    rng = np.random.default_rng(1)
    kernel = np.linalg.svd(W)[2][len(W) :]
    others = nu + rng.normal(size=(200, len(kernel))) * 0.1 @ kernel  # every one of them gives w as well
    assert np.abs(others).sum(1).min() >= np.abs(nu).sum() - 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_lasso_is_scikit_learns(seed):
    linear = pytest.importorskip("sklearn.linear_model")
    W, w = tasks(5, 30, seed)
    lam = 0.1 * np.abs(W.T @ w).max()
    peer = linear.Lasso(alpha=lam / len(W), fit_intercept=False, tol=1e-14, max_iter=1_000_000).fit(W, w)
    assert np.abs(task_relevance(W, w, lam=lam) - peer.coef_).max() < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_lasso_with_a_small_lam_and_tasks_of_unlike_size_is_optimal(seed):
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(4, 33)) * 10.0 ** rng.uniform(-3, 3, size=33)
    W[:, 5] = -W[:, 8]
    w = rng.normal(size=4)
    lam = 1e-6 * np.abs(W.T @ w).max()
    nu = task_relevance(W, w, lam=lam)
    pull = W.T @ (w - W @ nu)
    assert np.abs(pull).max() <= lam * (1 + 1e-6)
    assert np.abs(pull - lam * np.sign(nu))[nu != 0].max() <= lam * 1e-6


@pytest.mark.parametrize(("size", "length"), [(1e-8, 1.0), (1.0, 1e-8), (1e7, 1e-7), (1e-3, 1e6)])
def test_the_linear_program_does_not_depend_on_units(size, length):
    W, w = tasks()
    assert task_relevance(size * W, length * w) * size / length == pytest.approx(task_relevance(W, w), abs=1e-9)


def test_lasso_with_repeated_tasks_and_with_a_large_lam():
    W, w = tasks()
    double, lam = np.hstack([W, W]), 0.2
    nu = task_relevance(double, w, lam=lam)
    assert np.abs(nu).sum() == pytest.approx(np.abs(task_relevance(W, w, lam=lam)).sum(), rel=1e-8)
    assert not task_relevance(W, w, lam=float(np.abs(W.T @ w).max())).any()


def test_a_target_that_no_combination_gives_is_said():
    W = np.array([[1.0, 2.0], [0.0, 0.0]])
    with pytest.warns(UserWarning, match="W has rank 1 of 2.*Lasso with lam 0.1 answers"):
        nu = task_relevance(W, [1.0, 1.0])
    assert nu == pytest.approx([0.0, (2 - 0.1) / 4])  # one variable: (2 x 1 - lam) / 2²


@pytest.mark.parametrize("seed", range(20))
def test_rounding_keeps_the_budget(seed):
    rng = np.random.default_rng(seed)
    nu, minimum = rng.normal(size=9) * rng.integers(2, size=9), int(rng.integers(4))
    budget = 9 * minimum + int(rng.integers(60))
    for order in (1, 2):
        counts = allocate_samples(nu, budget, order=order, minimum=minimum)
        shares = np.abs(nu) ** order / (np.abs(nu) ** order).sum() if nu.any() else np.full(9, 1 / 9)
        assert (counts.dtype, counts.sum(), counts.min() >= minimum) == (np.int64, budget, True)
        assert np.abs(counts - minimum - shares * (budget - 9 * minimum)).max() < 1
    assert allocate_samples(np.zeros(3), 8).tolist() == [3, 3, 2]  # equal shares; of equal remainders the first


@pytest.mark.parametrize(
    ("nu", "budget", "counts"),
    [([1.0, 3.0, 3.0, 3.0], 5, [1, 2, 1, 1]), ([7.0, 7.0, 7.0, 49.0], 5, [1, 1, 0, 3]), ([0.1, 0.3], 2, [1, 1])],
)
def test_of_equal_remainders_the_first_is_rounded_up_for_shares_that_binary_numbers_do_not_hold(nu, budget, counts):
    assert allocate_samples(nu, budget).tolist() == counts
    assert allocate_samples(np.array(nu) * 1e300, budget).tolist() == counts
    assert allocate_samples(np.sqrt(nu) * 1e200, budget, order=2).tolist() == counts


def samples(rank=2, T=5, d=6, noise=0.0, seed=0, n=9):
    rng = np.random.default_rng(seed)
    B = np.linalg.qr(rng.normal(size=(d, rank)))[0]
    theta = B @ rng.normal(size=(rank, T))
    Xs = [rng.normal(size=(n + t, d)) for t in range(T)]
    return B, theta, Xs, [X @ theta[:, t] + noise * rng.normal(size=len(X)) for t, X in enumerate(Xs)]


def test_published_representation():
    known = vectors.load("a-mtrl", "representation")
    lists = [[known[f"{name}.{t}"] for t in range(known.hyperparameters["tasks"])] for name in "Xy"]
    shared = SharedLinearRepresentation(known.hyperparameters["rank"]).fit(*lists)
    B = shared.components_
    known.close(B @ B.mT, "B_projector")
    known.close(B @ shared.task_coef_, "theta")
    known.close(B @ shared.fit_target(known["X_target"], known["y_target"]), "theta_target")
    known.close(shared.predict(known["X_target"], shared.fit_target(known["X_target"], known["y_target"])), "y_target")


def test_the_fit_is_a_stationary_point_of_the_sum_over_samples():
    _, _, Xs, ys = samples(noise=0.5, n=4)  # some tasks have fewer samples than inputs
    shared = SharedLinearRepresentation(2, tol=1e-14, max_iter=5000).fit(Xs, ys)
    B = torch.tensor(shared.components_, requires_grad=True)
    w = torch.tensor(shared.task_coef_, requires_grad=True)
    loss = sum(((torch.tensor(X) @ B @ w[:, t] - torch.tensor(y)) ** 2).sum() for t, (X, y) in enumerate(zip(Xs, ys)))
    loss.backward()
    assert shared.objective_[-1] == pytest.approx(loss.item(), rel=1e-9)
    assert max(float(B.grad.abs().max()), float(w.grad.abs().max())) < 1e-5 * loss.item()
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(shared.objective_, shared.objective_[1:]))
    assert np.abs(shared.components_.T @ shared.components_ - np.eye(2)).max() < 1e-12
    assert (shared.n_iter_, shared.reason_) == (len(shared.objective_), "tol")
    assert SharedLinearRepresentation(2, max_iter=2, tol=0.0).fit(Xs, ys).reason_ == "max_iter"


def test_arrays_come_back_in_the_kind_that_was_given_with_the_same_bits():
    _, _, Xs, ys = samples(noise=0.1)
    plain = SharedLinearRepresentation(2).fit(Xs, ys)
    tensors = SharedLinearRepresentation(2).fit([torch.tensor(X) for X in Xs], [torch.tensor(y) for y in ys])
    assert isinstance(tensors.components_, torch.Tensor)
    for name in ("components_", "task_coef_"):
        assert np.array_equal(getattr(plain, name), getattr(tensors, name).numpy())
    new = torch.tensor(Xs[0], dtype=torch.float32)
    assert tensors.transform(new).dtype == torch.float64
    assert torch.equal(tensors.transform(new), torch.tensor(plain.transform(new.numpy())))
    again = copy.deepcopy(plain)  # by the protocol of pickle
    assert np.array_equal(again.transform(Xs[0]), Xs[0] @ plain.components_)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        ("rank must be at most the inputs, 6, and the tasks, 5; got 6", lambda X, y: SharedLinearRepresentation(6).fit(X, y)),
        ("one array for each task; got 5 and 4", lambda X, y: SharedLinearRepresentation(2).fit(X, y[:4])),
        (r"Xs\[1\] must be \(9, 6\)", lambda X, y: SharedLinearRepresentation(2).fit(X, [y[0], y[0], *y[2:]])),
        (r"ys\[0\] must be finite", lambda X, y: SharedLinearRepresentation(2).fit(X, [y[0] * np.nan, *y[1:]])),
        ("not fitted", lambda X, y: SharedLinearRepresentation(2).transform(X[0])),
        ("the 6 columns", lambda X, y: SharedLinearRepresentation(2).fit(X, y).transform(X[0][:, :5])),
        ("rank = 2 numbers; got 3", lambda X, y: SharedLinearRepresentation(2).fit(X, y).predict(X[0], np.ones(3))),
        ("equally many rows", lambda X, y: SharedLinearRepresentation(2).fit(X, y).fit_target(X[0], y[1])),
    ],
)
def test_wrong_lists(error, call):
    _, _, Xs, ys = samples()
    with pytest.raises(ValueError, match=error):
        call(Xs, ys)


def loop(order=1, kind=np.asarray, **options):
    """Noise-free tasks of which the target is one: what is drawn can be computed by hand."""
    _, theta, _, _ = samples(T=6)
    rng = np.random.default_rng(3)

    def draw(task, n):
        X = rng.normal(size=(n, len(theta)))
        return kind(X), kind(X @ theta[:, task])

    X = rng.normal(size=(4, len(theta)))
    return ActiveMultiTask(2, order=order, minimum=7, stages=2, **options).run(
        draw, 6, 100, kind(X), kind(X @ (3 * theta[:, 2]))
    )


class TestLoop(ResultCase):
    """Stage 0 takes 6 x 7 samples; stage 1 ends at 40, which is less, so it draws nothing; stage 2 draws the rest."""

    plots = True
    tolerance = 1e-6
    unchecked = {"representation": "a fitted model", "target_coef": "a rotation of B is free"}  # noqa: RUF012

    def result(self):
        return loop(lam=0.0)

    def expected(self):
        B, theta, _, _ = samples(T=6)
        W = B.T @ theta
        nu = task_relevance(W, 3 * W[:, 2])
        counts = allocate_samples(nu, 100, minimum=7)
        return {"nu": nu, "counts": counts, "history": [np.full(6, 7), np.zeros(6, dtype=int), counts - 7]}

    def refusals(self):
        return [
            (ValueError, "order", lambda: ActiveMultiTask(2, order=3)),
            (ValueError, "lam", lambda: ActiveMultiTask(2, lam=-0.1)),
            (ValueError, "stages", lambda: ActiveMultiTask(2, stages=0)),
            (
                ValueError,
                "minimum x tasks = 4 x 3; got 11",
                lambda: ActiveMultiTask(2).run(lambda t, n: None, 3, 11, [[1.0]], [1.0]),
            ),
            (
                ValueError,
                "draw(0, 4) must return 4 rows of each; got 3 and 4",
                lambda: ActiveMultiTask(2).run(lambda t, n: (np.ones((n - 1, 2)), np.ones(n)), 3, 60, [[1.0, 2.0]], [1.0]),
            ),
        ]


@pytest.mark.parametrize("order", [1, 2])
def test_tensors_and_arrays_draw_the_same(order):
    plain, tensors = loop(order), loop(order, kind=torch.tensor)
    assert isinstance(tensors.nu, torch.Tensor)
    assert tensors.counts.dtype == torch.int64
    assert np.array_equal(plain.nu, tensors.nu.numpy())
    assert np.array_equal(plain.target_coef, tensors.target_coef.numpy())
    assert [each.tolist() for each in plain.history] == [each.tolist() for each in tensors.history]
    assert (plain.counts.sum(), sum(plain.history).tolist()) == (100, plain.counts.tolist())


def test_a_task_that_has_more_than_its_share_draws_nothing_and_the_others_share_the_rest():
    from lowdim.represent.a_mtrl.active import _more

    have, shares = np.array([50, 10, 10, 10]), np.array([0.1, 0.6, 0.3, 0.0])
    # 120 samples with a minimum of 10: the first keeps its 50; of the other 70, 30 are minimum and 40 go 2 : 1 : 0
    assert _more(have, shares, 120, 10).tolist() == [0, 27, 13, 0]
    assert _more(have, shares, 80, 10).tolist() == [0, 0, 0, 0]
    assert _more(np.array([9, 9]), np.array([1.0, 0.0]), 20, 1).tolist() == [2, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_read_as_the_numbers_that_it_holds(dtype):
    def rounded(array):
        return torch.tensor(array).to(dtype)

    found, same = loop(kind=rounded), loop(kind=lambda array: rounded(array).double())
    assert found.nu.dtype == found.representation.components_.dtype == torch.float64
    assert torch.equal(found.nu, same.nu)
    assert torch.equal(found.counts, same.counts)
    W, w = (rounded(each) for each in tasks())
    assert torch.equal(task_relevance(W, w, lam=0.1), task_relevance(W.double(), w.double(), lam=0.1))


@pytest.mark.parametrize(
    ("error", "change"),
    [
        ("rank must be at most the inputs, 3, and the tasks, 2; got 3", {"rank": 3}),
        ("X_target and y_target must have equally many rows; got 5 and 4", {"y": np.ones(4)}),
        ("y_target must be finite", {"y": np.full(5, np.nan)}),
        ("X_target must have 2 dimensions", {"X": np.ones(5)}),
    ],
)
def test_what_cannot_work_is_said_before_a_sample_is_drawn(error, change):
    def draw(task, n):
        raise AssertionError("samples cost something")

    given = {"rank": 1, "X": np.ones((5, 3)), "y": np.ones(5), **change}
    with pytest.raises(ValueError, match=error):
        ActiveMultiTask(given["rank"]).run(draw, 2, 60, given["X"], given["y"])


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (r"y of draw\(0, 2\) must be finite", lambda n: (np.ones((n, 3)), np.full(n, np.nan))),
        (r"X of draw\(0, 2\) must have 2 dimensions", lambda n: (np.ones(n), np.ones(n))),
        (r"draw\(0, 2\) must return the 3 columns that X_target has; got 2", lambda n: (np.ones((n, 2)), np.ones(n))),
    ],
)
def test_a_draw_that_is_wrong_is_named(error, answer):
    with pytest.raises(ValueError, match=error):
        ActiveMultiTask(1).run(lambda task, n: answer(n), 2, 60, np.ones((5, 3)), np.ones(5))


def test_one_task_takes_the_whole_budget_and_a_budget_of_stage_0_is_enough():
    rng = np.random.default_rng(0)

    def draw(task, n):
        X = rng.normal(size=(n, 3))
        return X, (task + 1) * X[:, 0]

    X = rng.normal(size=(5, 3))
    alone = ActiveMultiTask(1, lam=0.0).run(draw, 1, 40, X, 2 * X[:, 0])
    assert (alone.counts.tolist(), alone.nu.round(6).tolist()) == ([40], [2.0])
    spent = ActiveMultiTask(1, minimum=4).run(draw, 3, 12, X, X[:, 0])
    assert [stage.tolist() for stage in spent.history] == [[4, 4, 4], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_a_draw_may_write_all_samples_into_one_buffer():
    rng, X_buffer, y_buffer = np.random.default_rng(0), np.empty((60, 3)), np.empty(60)

    def draw(task, n):
        X_buffer[:n] = rng.normal(size=(n, 3))
        y_buffer[:n] = X_buffer[:n, task]
        return X_buffer[:n], y_buffer[:n]

    X = np.random.default_rng(1).normal(size=(5, 3))
    found = ActiveMultiTask(2).run(draw, 2, 60, X, X[:, 1])
    assert np.abs(found.representation.components_ @ found.representation.task_coef_ - np.eye(3)[:, :2]).max() < 1e-9
