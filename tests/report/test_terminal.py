"""The terminal table fits, keeps its numbers whole, and obeys no markup or escape sequence in the record."""

import pytest
from fake import comparison
from judged import judged
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


def _summed(record, width):
    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(report.summary(record, width=width))
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_verdict_stands_above_the_table(width):
    record = judged(19)
    text = _summed(record, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0] == record["judgement"]["headline"][:width]
    said = " ".join(text.split())
    found = record["judgement"]
    places = [said.index(part) for part in (found["headline"], *found["reasons"], found["needed"], "Method")]
    assert places == sorted(places)
    for method in record["methods"]:
        if method["mean"] is not None and method["difference"] and width >= 72:
            row = next(line for line in lines if method["label"] in line and f"{method['mean']:.3f}" in line)
            assert f"{-100 * method['difference']:.1f} ± 2.1" in row
            chosen = method["name"] == record["winner"]["method"]
            assert row[0] == ("→" if chosen else "≈" if method["may_be_best"] else "○" if method.get("trivial") else " ")
    assert "left in the search: LaMDA, SVFit, MoRe, IncreLoRA, FLoRA and S²FT" in said


def test_with_one_seed_rows_near_the_best_are_marked_and_no_others():
    """The record says of all rows that they may be the best, since one seed shows nothing."""
    record = judged(6, seeds=1)
    for row in record["methods"]:
        row["may_be_best"], row["within_noise"] = True, row["name"] in ("full", "galore")
    text = _summed(record, 110)
    marked = {line[2:20].strip() for line in text.splitlines() if line.startswith("≈ ")}
    assert marked == {"Full fine-tuning", "GaLore"}
    assert "≈ close on the test rows" in text
    assert "≈ may be best" not in text


def test_five_samples_of_the_untouched_and_the_tuned_model():
    record = judged(6, task="instruct")
    record["samples"] *= 2
    record["samples"][0]["answers"]["lora"] = "[red]x[/red]\x1b[2J"
    text = _summed(record, 100)
    assert text.count("untouched  ") == text.count("expected   ") == 5
    assert "[red]x[/red][2J" in text
    assert "\x1b" not in text
    assert "Samples" not in _summed(judged(6), 100)


def test_a_notebook_shows_verdict_and_table():
    record = judged(6)
    record["judgement"]["headline"] = "<b>No</b> method is better."
    cell = report.fragment(record)
    assert cell.startswith("<p><strong>&lt;b&gt;No&lt;/b&gt; method is better.</strong></p>\n<table>")
    assert all(f"{method['mean']:.3f}" in cell for method in record["methods"])
    assert "<script" not in cell
    assert "<th>Behind the best</th>" in cell
