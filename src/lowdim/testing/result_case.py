"""Tests of every function that returns something (formula, reproducibility, errors), and more for every result.

A test defines how to get the answer, and the required answer as a formula of the same input::

    class TestSpectralNorm(ValueCase):  # a function that returns numbers or arrays
        def result(self):
            return spectral_norm(self.matrix())

        def expected(self):
            return np.linalg.svd(self.matrix())[1][0]

    class TestSpectrum(ResultCase):  # a function that returns a lowdim.results.Result
        plots = True

        def result(self):
            return spectrum(self.matrix())

        def expected(self):
            s = np.linalg.svd(self.matrix())[1]
            return {"values": s, "condition": s[0] / s[-1]}

A check that does not apply is switched off by name, with the reason: `test_wrong_input_is_refused = None  # takes anything`.
"""

from __future__ import annotations

import html
import json
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pytest

from lowdim.results import Result
from lowdim.testing.agreement import Refusal, agrees, refuses

__all__ = ["ResultCase", "ValueCase"]


class ValueCase(ABC):
    """Base of the test class of a function that returns numbers, arrays or a result.

    Attributes:
        tolerance: largest error relative to the largest entry.
        unchecked: field of the result -> why it has no formula.
    """

    tolerance: ClassVar[float] = 1e-10
    unchecked: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def result(self) -> Any:
        """Call the function; the same input at each call."""

    @abstractmethod
    def expected(self) -> Any:
        """The answer by its formula, written out from the paper in numpy or torch, without functions of the system.

        For a result a dict from each field (and any property) to its value; nested dataclasses are dicts too.
        """

    @abstractmethod
    def refusals(self) -> list[Refusal]:
        """Wrong uses: the error, a word of its message, the call."""

    def answer(self, result: Any) -> Any:
        """The value to compare with `expected()`."""
        return result

    def test_it_is_what_the_formula_says(self):
        """The answer, field by field, against the formula in the test."""
        agrees(self.answer(self.result()), self.expected(), self.tolerance, self.unchecked)

    def test_a_second_call_gives_the_same_bits(self):
        """All random numbers come from a seed."""
        first, second = self.answer(self.result()), self.answer(self.result())
        pair = (first.to_dict(), second.to_dict()) if isinstance(first, Result) else (first, second)
        assert repr(pair[0]) == repr(pair[1])
        agrees(pair[0], pair[1], 0.0)

    def test_wrong_input_is_refused(self):
        """Each error names what is wrong."""
        refuses(self.refusals())


class ResultCase(ValueCase):
    """Base of the test class of a function that returns a `Result`.

    Attributes:
        plots: whether the result has a plot.
    """

    plots: ClassVar[bool] = False

    def test_the_record_is_strict_json(self):
        """The record survives JSON without infinity and NaN, and names every field that is not left out."""
        result = self.result()
        assert isinstance(result, Result)
        record = result.to_dict()
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert record

    def test_the_table_holds_the_rows(self):
        """Rows have one set of columns and plain values, and pandas gets them all."""
        pytest.importorskip("pandas", reason="tables are pandas'")
        result = self.result()
        rows, frame = result.rows(), result.to_dataframe()
        assert rows
        assert len(frame) == len(rows)
        for name in frame.columns:
            for value, row in zip(frame[name].tolist(), rows, strict=True):
                assert isinstance(row[name], (str, int, float, bool, type(None))), f"{name} holds a {type(row[name]).__name__}"
                assert value == row[name] or (_is_gap(value) and _is_gap(row[name])), f"{name}: {value!r} is not {row[name]!r}"
        assert all(list(row) == list(frame.columns) for row in rows)

    def test_a_plot_where_one_is_promised(self):
        """It draws on the given axes; a result without a plot raises a clear error."""
        result = self.result()
        if not self.plots:
            with pytest.raises(TypeError, match="has no plot"):
                result.plot()
            return
        matplotlib = pytest.importorskip("matplotlib", reason="pictures are matplotlib's")
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        axes = plt.subplots()[1]
        assert not axes.has_data()
        assert result.plot(ax=axes) is axes
        assert axes.has_data()
        own = result.plot()
        assert own is not axes
        assert own.has_data()
        plt.close("all")

    def test_it_reads_well(self):
        """A terminal and a notebook get a summary in one line and a short table, not arrays."""
        result = self.result()
        lines = str(result).splitlines()
        assert lines[0] == result.summary
        assert len(lines) <= 30
        assert not any(word in str(result) for word in ("tensor(", "array("))
        shown = result._repr_html_()
        assert shown.startswith("<table>")
        assert html.escape(result.summary) in shown
        assert len(shown) < 20_000


def _is_gap(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
