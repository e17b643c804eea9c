import json

import pytest

from lowdim.report import render_sizes
from lowdim.testing.small_encoder import save_small_encoder

pytest.importorskip("sentence_transformers", reason="what is measured is a SentenceTransformer")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    save_small_encoder(folder / "model", layers=2, width=8)
    texts = (
        "the cat sat on a mat",
        "a dog ran under a tree",
        "the red bird sang",
        "the old dog sat",
        "a blue mat",
        "a young cat ran",
    )
    rows = [{"sentence1": a, "sentence2": b, "score": len(set(a) & set(b))} for a in texts for b in texts[::2] if a != b]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_table_page_and_record(call, place, tmp_path):
    common = ["sizes", place / "model", "--data", place / "pairs.jsonl", "--dims", "2,8", "--repeats", "1"]
    code, out, _ = call(*common, "--beside", place / "model", "--vectors", "1000", "--out", tmp_path / "page.html")
    assert code == 0
    assert "columns 'sentence1' and 'sentence2'" in out
    assert "vector_bytes" in out
    assert "smallest within 0.01: " in out
    page = (tmp_path / "page.html").read_text()
    for part in ("How small can the embedding be?", "(1, 2)", "(2, 8)", "<svg", "Beside it", "31.2 KiB"):
        assert part in page, part
    code, _, _ = call(*common, "--layers", "2", "--limit", "5", "--out", tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert code == 0
    assert record["pairs"] == 5
    assert [(row["layers"], row["dim"]) for row in record["rows"]] == [(2, 2), (2, 8)]
    assert record["smallest"] in record["rows"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--dims", "2,x"], "--dims must be whole numbers with commas"),
        (["--dims", "9"], "the model's dimensions (8)"),
        (["--layers", "3"], "the number of layers (2)"),
        (["--out", "page.txt"], "--out must end in .html or .json"),
        (["--within", "-1"], "--within"),
        (["--label", "grade"], "no column 'grade'"),
    ],
)
def test_bad_input_is_one_message(refused, place, arguments, word):
    assert word in refused("sizes", place / "model", "--data", place / "pairs.jsonl", "--repeats", "1", *arguments)


def test_a_model_that_is_none(refused, place):
    assert "no such folder" in refused("sizes", "./nowhere", "--data", place / "pairs.jsonl")


@pytest.mark.parametrize("record", [{}, {"rows": [None, {"layers": "x"}], "notes": ["<script>"], "smallest": 3, "beside": []}])
def test_odd_records_give_a_page(record):
    page = render_sizes(record)
    assert "No size was measured." in page
