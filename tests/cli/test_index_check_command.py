import json
import re

import numpy as np
import pytest

from lowdim.jobs import IndexCheckSettings, index_check
from lowdim.report import render_replacement

LABELS = np.repeat(np.arange(4), 12)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    old = draw.normal(size=(4, 8))[LABELS] + 0.1 * draw.normal(size=(48, 8))
    np.save("old.npy", old)
    np.save("same.npy", old + 0.001 * draw.normal(size=old.shape))
    np.save("other.npy", draw.normal(size=(4, 8))[LABELS] + 0.1 * draw.normal(size=(48, 8)))
    np.save("short.npy", old[:40])
    np.save("narrow.npy", old[:, :5])
    np.save("labels.npy", LABELS)
    return tmp_path


def test_it_says_whether_the_index_may_stay(call, files):
    code, out, _ = call("index-check", "old.npy", "same.npy", "--labels", "labels.npy", "--out", "page.html")
    assert code == 0
    assert out.startswith("stay: new queries in the old index score +0.000")
    assert "old on old 1.000, new on old 1.000, new on new 1.000" in out
    assert "class  queries  old_old" in out
    page = (files / "page.html").read_text()
    assert "The old index may stay." in page
    assert page.count("<td>1.000</td>") >= 4
    assert 'id="classes"' in page
    assert 'id="inequalities"' in page
    assert "labels.npy" in page
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", page)


def test_it_says_where_the_index_must_be_rebuilt(call, files):
    code, out, _ = call("index-check", "old.npy", "other.npy", "--labels", "labels.npy", "--out", "report.json")
    assert code == 0
    assert out.startswith("rebuild: ")
    record = json.loads((files / "report.json").read_text())
    assert record["verdict"] == "rebuild"
    assert record["old"] == "old.npy"


def test_without_labels_and_with_other_sizes(call, files):
    assert call("index-check", "old.npy", "same.npy", "--k", "5", "--out", "bare.html")[1].startswith(
        "stay: of the 5 neighbours"
    )
    page = (files / "bare.html").read_text()
    assert "There are no labels" in page
    assert 'id="classes"' not in page
    assert "cannot be compared" in call("index-check", "old.npy", "narrow.npy", "--out", "narrow.html")[1]
    assert "The index must be rebuilt." in (files / "narrow.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("old.npy", "short.npy"), "old.npy has 48 rows and short.npy 40"),
        (("old.npy", "none.npy"), "does not exist"),
        (("old.npy", "same.npy", "--labels", "short.npy"), "must be a vector"),
        (("old.npy", "same.npy", "--out", "page.pdf"), "--out must end in .html or .json"),
        (("old.npy", "same.npy", "--k", "0"), "k must be an int"),
        (("old.npy", "same.npy", "--query", "labels.npy"), "who asks must be 1 or 0"),
    ],
)
def test_bad_input_is_one_message(call, files, arguments, word):
    code, _, err = call("index-check", *arguments)
    assert code == 2
    assert word in " ".join(err.split())


def test_a_query_mask_says_who_asks(files):
    np.save("q.npy", np.arange(48) % 3 == 0)
    report = index_check(IndexCheckSettings(old="old.npy", new="same.npy", labels="labels.npy", query="q.npy"))
    assert sum(row.queries for row in report.per_class) == 16


def test_a_file_of_someone_else_is_kept(call, files):
    (files / "mine.html").write_text("mine")
    code, _, err = call("index-check", "old.npy", "same.npy", "--out", "mine.html")
    assert code == 2
    assert "was not written by lowdim" in " ".join(err.split())
    assert (files / "mine.html").read_text() == "mine"


@pytest.mark.parametrize(
    "record",
    [{}, {"verdict": "<b>", "matrix": 3, "per_class": [None, {"label": "<script>"}], "inequalities": [None, "x"], "gap": "x"}],
)
def test_odd_records_give_a_page(record):
    page = render_replacement(record)
    assert "No verdict." in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page or not record
