"""The terminal table fits, keeps its numbers whole, and obeys no markup or escape sequence in the record."""

import pytest
from fake import comparison
from rich.console import Console

from lowdim import report
from lowdim.report.text import size


def _printed(record, width):
    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(report.table(record, width=width))
    return capture.get()


@pytest.mark.parametrize("width", [72, 80, 96, 100, 120])
def test_table_fits_and_cuts_no_number(width):
    record = comparison()
    text = _printed(record, width)
    rows = text.splitlines()
    assert max(map(len, rows)) <= width
    for method in record["methods"][:10]:
        row = next(r for r in rows if f"{method['mean']:.3f}" in r and method["label"][:8] in r)
        assert f"[{method['interval'][0]:.3f}, {method['interval'][1]:.3f}]" in row
        assert size(method["measured_peak_bytes"]) in row
        assert (size(method["file_bytes"]) in row) == (width >= 96)
    assert "→ LaMDA" in text
    assert "ATLAS skipped: forecast peak memory" in text
    assert "SVFit failed: ValueError" in text


def test_narrow_tables_drop_columns():
    wide, middle, narrow = (_printed(comparison(), width) for width in (100, 80, 60))
    assert "Forecast" in wide
    assert "File" in wide
    assert "Forecast" not in middle
    assert "95 % interval" in middle
    assert "95 % interval" not in narrow
    assert max(map(len, narrow.splitlines())) <= 60


def test_names_are_text():
    record = comparison()
    record["methods"][0]["label"] = "[red]x[/red]\x1b[2J"
    record["methods"][10]["reason"] = "[/bold] broken \x07"
    text = _printed(record, 120)
    assert "[red]x[/red][2J" in text
    assert "[/bold] broken" in text
    assert "\x1b" not in text
    assert "\x07" not in text


@pytest.mark.parametrize("record", [{}, {"methods": [{}]}, {"methods": [{"name": "a", "status": "failed"}]}])
def test_nearly_nothing_gives_a_table(record):
    assert "Method" in _printed(record, 80)
