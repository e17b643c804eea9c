"""The scale of a table's column: places are linear, ticks are round, and far values do not squeeze the others."""

import re

import pytest

from lowdim.report.axis import Scale, fences, ticks
from lowdim.report.line_chart import Line, line_chart


@pytest.mark.parametrize("ends", [(0.0, 0.068), (0.705, 0.7802), (-0.02, 0.05), (12.86, 12.87), (0.0, 2e-7), (1.0, 3e12)])
def test_ticks_are_told_apart_and_lie_between_the_ends(ends):
    low, high = ends
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 5
    assert len({text for _, text in found}) == len(found)
    for value, text in found:
        assert low - 1e-9 * (high - low) <= value <= high + 1e-9 * (high - low)
        assert float(text.replace("−", "-")) == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (1.0, 0.5), (float("nan"), 1.0), (0.0, float("inf")), (0.0, 5e-324)])
def test_no_ticks_without_a_range(ends):
    assert ticks(*ends, 4) == []


def test_places_are_linear_between_margins_of_three_percent():
    scale = Scale(10.0, 20.0)
    assert [scale.at(v) for v in (5, 10, 12.5, 20, 30)] == [3.0, 3.0, 3 + 94 * 0.25, 97.0, 97.0]


def test_a_row_off_the_scale_is_an_arrow():
    scale = Scale(0.0, 1.0, band=(0.0, 0.5), origin=0.0)
    inside = scale.row(0.25, (0.0, 0.5), colour="c0", filled=False)
    assert re.findall(r'cx="([\d.]+)%"', inside) == ["26.5"]
    assert 'class="mean open"' in inside
    assert 'x1="3.0%" x2="50.0%"' in inside
    outside = scale.row(2.0, (1.9, 2.1), colour="c0", filled=True)
    assert "▸" in outside
    assert "circle" not in outside


def test_fences_leave_out_what_is_far_from_the_middle():
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert fences(values) == (0.1, 0.5)
    assert fences([*values, 100.0]) == (0.1, 0.5)
    assert fences([0.3]) == (0.3, 0.3)


def test_a_chart_of_counts_has_no_negative_ticks():
    drawn = line_chart([Line("mean", [0, 1], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])], ["0", "10"], "step", "intruders")
    assert "−" not in drawn
    assert ">0<" in drawn
    below = line_chart([Line("mean", [0, 1], [-0.5, 0.5], [-0.5, 0.5], [-0.5, 0.5])], ["0", "10"], "step", "gain")
    assert "−" in below
