"""Each shared case passes a right system (those of docs/examples, in test_docs_examples) and fails a wrong one."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from examples import example
from lowdim.results import Result
from lowdim.testing.agreement import agrees, disagreements, refuses
from lowdim.testing.estimator_case import EstimatorCase
from lowdim.testing.represent_case import RepresentCase
from lowdim.testing.result_case import ResultCase, ValueCase
from lowdim.testing.solve_case import ScipySolveCase, conditioned

FORMULA = "test_it_is_what_the_formula_says"


def fails(case: type, name: str, *arguments: Any, match: str | None = None) -> None:
    with pytest.raises(AssertionError, match=match):
        getattr(case(), name)(*arguments)


# --- comparing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (1.0 + 1e-9, 1.0),
        (torch.tensor([1.0, float("nan")]), [1.0, float("nan")]),
        (np.array([3, 4]), [3, 4]),
        ({"a": [1.0, "x"]}, {"a": [1.0, "x"]}),
        ([float("inf")], [float("inf")]),
        (None, None),
    ],
)
def test_what_agrees(got, want):
    agrees(got, want, 1e-8)


@pytest.mark.parametrize(
    ("got", "want", "words"),
    [
        (1.0 + 1e-7, 1.0, "answer is off by 1e-07"),
        (torch.ones(2), [1.0], "has shape"),
        (float("nan"), 1.0, "off by nan"),
        ([float("inf")], [float("-inf")], "not finite"),
        ([1.0], [float("nan")], "not finite"),
        ([3, 5], [3, 4], r"\[3, 5\]"),
        ({"a": 1.0}, {"b": 1.0}, "keys"),
        ({"a": ["y"]}, {"a": ["x"]}, r"answer\['a'\]\[0\] is 'y'"),
        (1, True, "want True"),
        ("1", 1, "answer is '1'; want numbers"),
        (None, 1.0, "answer is None; want numbers"),
    ],
)
def test_what_does_not_agree(got, want, words):
    with pytest.raises(AssertionError, match=words):
        agrees(got, want, 1e-8)


@dataclass(frozen=True)
class Spectrum(Result):
    values: np.ndarray
    condition: float


def spectrum(matrix: np.ndarray) -> Spectrum:
    if matrix.ndim != 2:
        raise ValueError(f"matrix must be 2-D; got shape {matrix.shape}")
    values = np.linalg.svd(matrix)[1]
    return Spectrum(values, float(values[0] / values[-1]))


def test_a_field_without_a_formula_is_an_error():
    found = spectrum(np.diag([2.0, 1.0]))
    assert disagreements(found, {"values": [2.0, 1.0]}, 1e-12, {}) == [
        "answer.condition has no formula: give one in expected(), or a reason in `unchecked`"
    ]
    assert not disagreements(found, {"values": [2.0, 1.0]}, 1e-12, {"condition": "as the paper leaves it open"})


def test_refusals_must_come_and_name_what_is_wrong():
    refuses([(ValueError, "2-D", lambda: spectrum(np.ones(3)))])
    with pytest.raises(AssertionError, match="lacks 'columns'"):
        refuses([(ValueError, "columns", lambda: spectrum(np.ones(3)))])
    with pytest.raises(AssertionError, match="no ValueError"):
        refuses([(ValueError, "2-D", lambda: spectrum(np.eye(3)))])


# --- results ---------------------------------------------------------------------------------------------------------


class TestSpectrum(ResultCase):
    def result(self):
        return spectrum(conditioned(6, 4, condition=5))

    def expected(self):
        s = 5.0 ** -np.linspace(0, 1, 4)
        return {"values": s, "condition": 5.0}

    def refusals(self):
        return [(ValueError, "2-D", lambda: spectrum(np.ones(3)))]


class Plotted(TestSpectrum):
    plots = True


class WrongField(TestSpectrum):
    def result(self):
        found = super().result()
        return dataclasses.replace(found, condition=found.condition * 1.01)


@dataclass(frozen=True)
class Unserious(Spectrum):
    def to_dict(self):
        return {"condition": float("inf")}

    def rows(self):
        return [{"value": value} for value in self.values]

    def __str__(self):
        return repr(self)


class Careless(TestSpectrum):
    def result(self):
        return Unserious(**vars(super().result()))


def test_results_that_are_wrong():
    fails(WrongField, FORMULA, match=r"answer\.condition is off by 0\.01")
    with pytest.raises(TypeError, match="no plot"):
        Plotted().test_a_plot_where_one_is_promised()
    with pytest.raises(ValueError, match="not JSON"):
        Careless().test_the_record_is_strict_json()
    fails(Careless, "test_it_reads_well")


class Drawn(ValueCase):
    """A function whose random numbers have no seed."""

    generator = np.random.default_rng(0)

    def result(self):
        return self.generator.normal()

    def expected(self):
        return 0.0

    def refusals(self):
        return []


def test_an_answer_that_does_not_repeat():
    fails(Drawn, "test_a_second_call_gives_the_same_bits")


# --- diagnostics, solvers, estimators: the examples of the docs with something wrong ------------------------------------


def test_a_diagnostic_that_is_wrong(tmp_path):
    module = example("diagnostic")

    class Uncorrected(module.TestEffectiveRanks):
        def measure(self, *sources):
            return module.effective_ranks(*sources, floor=0.5)

    class DependsOnItsSource(module.TestEffectiveRanks):
        def measure(self, *sources):
            found = module.effective_ranks(*sources)
            return found if isinstance(sources[0], nn.Module) else dataclasses.replace(found, share=0.0)

    class Meddles(module.TestEffectiveRanks):
        def measure(self, *sources):
            with torch.no_grad():
                sources[0][0].weight.mul_(2)
            return module.effective_ranks(*sources)

    fails(Uncorrected, FORMULA, match=r"answer\.ranks\['0\.weight'\] is off")
    fails(DependsOnItsSource, "test_module_dict_file_and_shards_agree", tmp_path)
    fails(Meddles, "test_models_are_left_as_they_were")


def test_a_solver_that_is_wrong():
    module = example("solver")

    class Scaled(module.TestKaczmarz):
        def solve(self, A, b):
            found = module.kaczmarz(A, b)
            return dataclasses.replace(found, x=1.5 * found.x)

    class AlwaysNumpy(module.TestKaczmarz):
        def solve(self, A, b):
            found = module.kaczmarz(A, b)
            return dataclasses.replace(found, x=np.asarray(found.x))

    class Optimist(module.TestKaczmarz):
        def solve(self, A, b):
            return dataclasses.replace(module.kaczmarz(A, b, maxiter=30), residual=1e-12)

    fails(Scaled, FORMULA, match=r"off by 0\.5")
    fails(Scaled, "test_it_says_how_far_it_came_and_why_it_stopped")
    fails(AlwaysNumpy, "test_the_kind_of_array_is_kept", match="torch")
    fails(Optimist, "test_it_says_how_far_it_came_and_why_it_stopped")


class TestScipysOwn(ScipySolveCase):
    """scipy's conjugate gradients, the shape that a solver like it has."""

    kinds = ("numpy", "sparse")
    stated = 1e-4

    def problem(self):
        root = conditioned(12, 12, condition=3)
        A = root.T @ root
        return A, A @ self.solution()

    def solution(self):
        return np.cos(np.arange(12.0))

    def solve(self, A, b):
        linalg = pytest.importorskip("scipy.sparse.linalg", reason="the solver is scipy's")
        return linalg.cg(A, b, rtol=1e-12)

    def residual(self, A, b, x):
        return np.linalg.norm(b - A @ x)

    def refusals(self):
        return [(ValueError, "square", lambda: self.solve(np.ones((2, 3)), np.ones(2)))]


class GivesUp(TestScipysOwn):
    def solve(self, A, b):
        return np.zeros(12), 0


def test_a_solver_in_scipys_shape_that_is_wrong():
    fails(GivesUp, FORMULA)
    fails(GivesUp, "test_it_says_how_far_it_came_and_why_it_stopped")


def test_an_estimator_that_is_wrong():
    module = example("representation")

    class Uncentred(module.LeadingDirections):
        def transform(self, X):
            return super().transform(X) + self.mean_[: len(self.components_)]

    class Rewrites(module.LeadingDirections):
        def fit(self, X, y=None):
            self.rank = min(self.rank, 1)
            return super().fit(X, y)

    class WithUncentred(module.TestLeadingDirections):
        def estimator(self, **changes):
            return Uncentred(**{"rank": 2, **changes})

    class WithRewrites(module.TestLeadingDirections):
        def estimator(self, **changes):
            return Rewrites(**{"rank": 2, **changes})

    class Excused(module.TestLeadingDirections):
        exceptions = {"check_fit2d_1feature": "it cannot be fitted, or so it says"}  # noqa: RUF012

    class Misspelt(module.TestLeadingDirections):
        exceptions = {"check_fit2d_one_feature": "it cannot be fitted, or so it says"}  # noqa: RUF012

    estimator_checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="the checks are scikit-learn's")
    fails(WithUncentred, FORMULA)
    fails(WithRewrites, "test_scikit_learn", partial(estimator_checks.check_estimators_overwrite_params, "Rewrites"))
    with pytest.raises(pytest.fail.Exception, match="remove it"):
        Excused().test_scikit_learn(partial(estimator_checks.check_fit2d_1feature, "LeadingDirections"))
    fails(Misspelt, "test_declared_exceptions_are_checks")


def random_projection(**options):
    projections = pytest.importorskip("sklearn.random_projection", reason="the estimator is scikit-learn's")
    return projections.GaussianRandomProjection(**{"n_components": 2, "random_state": 0, **options})


class TestRandomProjection(EstimatorCase):
    """scikit-learn's own, an estimator that draws."""

    output, random = "transform", True

    def estimator(self, **changes):
        return random_projection(**changes)

    def data(self):
        return np.random.default_rng(0).normal(size=(30, 5)), np.arange(30) % 2

    def expected(self, X, y):
        return X @ np.random.RandomState(0).normal(scale=2**-0.5, size=(2, 5)).T

    def grid(self):
        return {"n_components": [1, 3]}


class AlwaysTheSame(TestRandomProjection):
    def estimator(self, **changes):
        return random_projection(**{**changes, "random_state": 7})


class Undeclared(TestRandomProjection):
    random = False


def test_an_estimator_that_ignores_random_state():
    fails(AlwaysTheSame, "test_random_state_decides")
    fails(AlwaysTheSame, FORMULA)
    fails(Undeclared, "test_random_state_decides", match="random = True")


# --- modules ---------------------------------------------------------------------------------------------------------


class ScaledHead(nn.Module):
    """A small right system: logits at a temperature."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale, self.weight = scale, nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) / 3)

    def forward(self, x):
        if x.shape[-1] != 8:
            raise ValueError(f"x must have 8 features; got {x.shape[-1]}")
        return self.scale * F.linear(x, self.weight)


class TestScaledHead(RepresentCase):
    def batch(self, dtype):
        return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor([0, 1, 2, 0, 1])

    def make(self):
        return ScaledHead()

    def loss(self, module, dtype):
        x, y = self.batch(dtype)
        logits = module(x)
        return F.cross_entropy(logits.float() if dtype == torch.bfloat16 else logits, y)

    def expected(self, module):
        x, y = self.batch(torch.float64)
        logits = 2.0 * x @ module.weight.T
        return (logits.logsumexp(1) - logits[torch.arange(5), y]).mean()

    def refusals(self):
        return [(ValueError, "8 features", lambda: self.make()(torch.ones(7)))]


class WrongScale(TestScaledHead):
    def make(self):
        return ScaledHead(scale=1.0)


class Detached(TestScaledHead):
    """Right numbers, wrong gradient."""

    def loss(self, module, dtype):
        right = super().loss(module, dtype)
        return right.detach() + 0.5 * (right - right.detach())


def test_a_module_that_is_wrong():
    fails(WrongScale, FORMULA)
    fails(Detached, FORMULA, match="weight")
