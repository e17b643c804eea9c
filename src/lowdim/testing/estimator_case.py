"""Tests of every scikit-learn estimator: its formula, scikit-learn's own checks, pipelines, searches, files and tables.

A test defines how to make one, its data, and the output as a formula::

    class TestTopMeans(EstimatorCase):
        exceptions = {"check_fit2d_1feature": "there is nothing to reduce"}

        def estimator(self, **changes):
            return TopMeans(**{"rank": 2, **changes})

        def data(self):
            return X, y

        def expected(self, X, y):
            v = np.linalg.svd(X - X.mean(0))[2][:2]
            return (X - X.mean(0)) @ v.T

        def grid(self):
            return {"rank": [1, 2]}

`exceptions` names the checks of scikit-learn that the method cannot pass, each with its reason; a listed check that passes is
an error too, so the list stays current.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from lowdim.testing.agreement import Refusal, agrees, refuses

__all__ = ["EstimatorCase"]


class EstimatorCase(ABC):
    """Subclass in a test file: define the estimator, its data, the formula of its output and a grid to search.

    Attributes:
        exceptions: name of a check of scikit-learn -> why the method cannot pass it.
        output: the method whose output is compared: `"predict"`, `"transform"`, `"predict_proba"`.
        random: whether it draws random numbers, from `random_state`.
        tolerance: largest error relative to the largest entry of the formula.
    """

    exceptions: ClassVar[dict[str, str]] = {}
    output: ClassVar[str] = "predict"
    random: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-8

    @abstractmethod
    def estimator(self, **changes: Any) -> Any:
        """A fresh estimator, with these hyperparameters changed."""

    @abstractmethod
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """`X (samples, features)` and `y`, the same at each call."""

    @abstractmethod
    def expected(self, X: np.ndarray, y: np.ndarray) -> Any:
        """The required output on `X` after fitting, as a formula of the data in numpy."""

    @abstractmethod
    def grid(self) -> dict[str, list[Any]]:
        """Hyperparameters to search over, each with at least two values."""

    def refusals(self) -> list[Refusal]:
        """Wrong uses beyond those of scikit-learn's checks."""
        return []

    def _fitted(self, **changes: Any) -> Any:
        return self.estimator(**changes).fit(*self.data())

    def _out(self, fitted: Any, X: Any) -> Any:
        return getattr(fitted, self.output)(X)

    def _size(self, fitted: Any, X: Any, y: Any) -> float:
        """A score for estimators without one: the mean size of the output."""
        return float(np.abs(self._out(fitted, X)).mean())

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test for each check of scikit-learn that applies to the estimator."""
        if metafunc.function.__name__ == "test_scikit_learn":
            checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="the checks are scikit-learn's")
            found = [check for _, check in checks.estimator_checks_generator(self.estimator())]
            metafunc.parametrize("check", found, ids=_check_name)

    def test_scikit_learn(self, check: Any):
        """A check of `sklearn.utils.estimator_checks`; a declared exception must fail, or it is declared in error."""
        estimator, name = self.estimator(), _check_name(check)
        if name not in self.exceptions:
            check(estimator)
            return
        try:
            check(estimator)
        except Exception:  # noqa: BLE001 (whatever it fails with is what was declared)
            pytest.skip(f"declared: {self.exceptions[name]}")
        pytest.fail(f"{name} passes: remove it from `exceptions`")

    def test_declared_exceptions_are_checks(self):
        """A misspelt exception would declare nothing."""
        checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="the checks are scikit-learn's")
        known = {_check_name(check) for _, check in checks.estimator_checks_generator(self.estimator())}
        assert set(self.exceptions) <= known
        assert all(len(reason) > 10 for reason in self.exceptions.values())

    def test_it_is_what_the_formula_says(self):
        """The output on the data that it was fitted on, against the formula in the test."""
        X, y = self.data()
        agrees(self._out(self._fitted(), X), self.expected(X, y), self.tolerance)

    def test_a_clone_is_unfitted_and_the_same(self):
        """`sklearn.base.clone` of a fitted one keeps the hyperparameters and nothing else."""
        from sklearn.base import clone
        from sklearn.exceptions import NotFittedError

        fitted, (X, y) = self._fitted(), self.data()
        twin: Any = clone(fitted)
        assert repr(twin.get_params()) == repr(fitted.get_params())
        with pytest.raises(NotFittedError):
            self._out(twin, X)
        agrees(self._out(twin.fit(X, y), X), self._out(fitted, X), 0.0)

    def test_in_a_pipeline(self):
        """After a scaler it gives the same as scaling by hand."""
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        X, y = self.data()
        scaled = (X - X.mean(0)) / X.std(0)
        whole = make_pipeline(StandardScaler(), self.estimator()).fit(X, y)
        agrees(self._out(whole, X), self._out(self.estimator().fit(scaled, y), scaled), 1e-6)

    def test_in_a_grid_search(self):
        """Every point of the grid is fitted, and the best one is refitted on all the data."""
        from sklearn.model_selection import GridSearchCV

        (X, y), grid = self.data(), self.grid()
        assert all(len(values) > 1 for values in grid.values())
        scoring = None if hasattr(self.estimator(), "score") else self._size
        options: dict[str, Any] = {"cv": 2, "error_score": "raise", "scoring": scoring}
        search = GridSearchCV(self.estimator(), grid, **options).fit(X, y)
        assert len(search.cv_results_["params"]) == int(np.prod([len(values) for values in grid.values()]))
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()
        agrees(self._out(search.best_estimator_, X), self._out(self.estimator(**search.best_params_).fit(X, y), X), 0.0)

    def test_a_file_gives_it_back(self, tmp_path: Path):
        """joblib, as scikit-learn's users save estimators."""
        import joblib

        X, _ = self.data()
        fitted = self._fitted()
        joblib.dump(fitted, tmp_path / "estimator")
        agrees(self._out(joblib.load(tmp_path / "estimator"), X), self._out(fitted, X), 0.0)

    def test_tables_of_pandas(self):
        """A table in gives the same numbers and keeps the names of its columns; a transformer gives a table out when asked."""
        pd = pytest.importorskip("pandas", reason="tables are pandas'")
        X, y = self.data()
        names = [f"feature {i}" for i in range(X.shape[1])]
        frame = pd.DataFrame(X, columns=names, index=range(100, 100 + len(X)))
        fitted = self.estimator().fit(frame, y)
        assert fitted.feature_names_in_.tolist() == names
        agrees(self._out(fitted, frame), self._out(self._fitted(), X), 1e-10)  # columns lie in memory in another order
        if hasattr(fitted, "transform"):
            out = fitted.set_output(transform="pandas").transform(frame)
            assert isinstance(out, pd.DataFrame)
            assert out.index.tolist() == frame.index.tolist()
            assert out.columns.tolist() == fitted.get_feature_names_out().tolist()

    def test_random_state_decides(self):
        """One `random_state` gives the same bits, another one other numbers."""
        if not self.random:
            assert "random_state" not in self.estimator().get_params(), "it has random_state: set `random = True`"
            pytest.skip("it draws no random numbers")
        X, _ = self.data()
        one, same, other = (self._out(self._fitted(random_state=seed), X) for seed in (0, 0, 1))
        agrees(one, same, 0.0)
        assert not np.array_equal(one, other)

    def test_wrong_input_is_refused(self):
        """Each error names what is wrong."""
        if not self.refusals():
            pytest.skip("scikit-learn's checks hold all its errors")
        refuses(self.refusals())


def _check_name(check: Any) -> str:
    return getattr(check, "func", check).__name__
