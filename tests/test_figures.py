"""Every measured number of README and docs stands in a committed JSON file that its section names."""

import dataclasses
import json

import pytest

from figures import ROOT, figures, pages, traced, unmarked_times

#: Page -> printed number -> why it needs no JSON file.
EXCEPTIONS = {
    "docs/systems/corda.md": {
        "10,000": "a factor that was set, not measured",
        "40": "a constant of the code",
    },
    "docs/systems/flora.md": {"2.6": "704 / 268 trained parameters, both in the table above it"},
    "docs/systems/matrix-completion.md": {"5.4": "quotients of the times in the table above it"},
    "docs/systems/nola.md": {"1": "the size of a chunk, a constant of the code"},
    "docs/systems/sst.md": {"1.5": "arithmetic from shapes: 1.458 times in results/bench-training.json"},
}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_measured_numbers_name_their_file(page):
    known = EXCEPTIONS.get(str(page.relative_to(ROOT)), {})
    untraced = [figure for figure in figures(page) if not traced(figure, page)]
    unknown = [figure.place for figure in untraced if figure.text not in known]
    assert not unknown, (
        "not in a JSON file that the section (between two ## headings) names; name it, measure again, or remove the number: "
        + "; ".join(unknown[:20])
    )
    assert set(known) == {figure.text for figure in untraced}, "an exception that is not needed any more"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_times_of_a_busy_machine_say_so(page):
    assert list(unmarked_times(page)) == [], "say that the machine was busy, or measure again"


def test_what_a_time_of_a_busy_machine_is(tmp_path, monkeypatch):
    monkeypatch.setattr("figures.ROOT", tmp_path)
    for name, load in (("calm", 0.5), ("full", 12.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": {"load_average_before": load}, "ms": 4}))
    page = tmp_path / "page.md"
    says = [
        "full.json: 4 ms",
        "full.json: 4 ms, on a busy machine",
        "calm.json: 4 ms",
        "full.json: 4 MiB",
        "| n | ms |\n| --- | --- |\n| 1 | 4 |\nfull.json",
    ]
    page.write_text("\n".join(f"## {i}\n{text}" for i, text in enumerate(says)))
    assert [found.rpartition(" ")[2] for found in unmarked_times(page)] == ["0", "4"]


def test_numbers_that_are_wrong_are_found():
    """The check has teeth: of numbers that are changed by a few per cent, most are not in their file."""
    changed, passed = 0, 0
    for page in pages():
        for figure in figures(page):
            digits = len(figure.text.partition(".")[2])
            other = f"{1.07 * figure.value + 3 * 10.0**-digits:.{digits}f}"
            if "e" not in figure.text and traced(figure, page):
                changed += 1
                passed += traced(dataclasses.replace(figure, text=other), page)
    assert changed > 800
    assert passed < 0.25 * changed


def test_what_is_a_measured_number(tmp_path, monkeypatch):
    monkeypatch.setattr("figures.ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    rows = [{"arm": "a", "score": score, "seconds": 0.0312, "peak": 2_200_000} for score in (0.5, 0.7)]
    (tmp_path / "results" / "x.json").write_text(json.dumps({"rows": rows}))
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\nIt took 9 s.\n\n## Measured\n\n"
        "`results/x.json`: a step took 31.2 ms, and 2.10 MiB; version 2.0 and rank 8 do not count.\n\n"
        "| method | mean score | note |\n| --- | --- | --- |\n| a | 0.6 | 4 |\n| b | 0.9 | |\n\n```text\n77 ms\n```\n"
    )
    found = list(figures(page))
    assert [f.text for f in found] == ["9", "31.2", "2.10", "0.6", "0.9"]
    assert [traced(f, page) for f in found] == [False, True, True, True, False]
    assert [f.line for f in found] == [3, 7, 7, 11, 12]
