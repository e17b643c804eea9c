import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowdim.errors import DataError, UnknownNameError
from lowdim.train.data import Examples, locate, read_examples, read_text, read_texts, split

ROWS = [("a good film", "pos"), ("a bad film", "neg"), ("fine", "pos"), ("dull", "neg")]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows, text="text", label="label"):
    return "".join(json.dumps({text: t, label: m}, ensure_ascii=False) + "\n" for t, m in rows)


def table(rows, mark=",", header=("text", "label")):
    return "\n".join(mark.join(row) for row in (header, *rows)) + "\n"


WRITTEN = {
    "a.jsonl": jsonl(ROWS),
    "b.json": json.dumps([{"text": t, "label": m} for t, m in ROWS]),
    "one-object-a-line.json": jsonl(ROWS),
    "a.csv": table(ROWS),
    "semicolon.csv": table(ROWS, ";"),
    "tab.csv": table(ROWS, "\t"),
    "a.tsv": table(ROWS, "\t"),
    "fasttext.txt": "".join(f"__label__{m} {t}\n" for t, m in ROWS),
    "tabbed.txt": "".join(f"{m}\t{t}\n" for t, m in ROWS),
}


@pytest.mark.parametrize("ending", ["unix", "dos", "mac", "mark"])
@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_and_line_ending_gives_the_same_examples(tmp_path, name, ending):
    content = WRITTEN[name]
    content = {
        "unix": content,
        "dos": content.replace("\n", "\r\n"),
        "mac": content.replace("\n", "\r"),
        "mark": "\ufeff" + content,
    }[ending]
    examples = read_examples([put(tmp_path / name, content)])
    assert examples.classes == ("neg", "pos")
    assert list(zip(examples.texts, (examples.classes[i] for i in examples.labels))) == ROWS
    assert examples.notes == ()


def test_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"sentence": [t for t, _ in ROWS] + ["lost", None], "label": [1.0, 0.0, 1.0, 0.0, float("nan"), 1.0]}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    examples = read_examples([tmp_path / "a.parquet"])
    assert examples.texts == tuple(t for t, _ in ROWS)
    assert examples.classes == ("0", "1")
    assert [note.split(" of ")[0] for note in examples.notes] == ["1 rows", "1 rows"]
    frame[:0].to_parquet(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_examples([tmp_path / "none.parquet"])
    with pytest.raises(DataError, match=r"is not a parquet file"):
        read_examples([put(tmp_path / "text.parquet", "text,label\n")])
    with pytest.raises(DataError, match=r"no such file; nearest there: .*a\.parquet"):
        read_examples([tmp_path / "aa.parquet"])


def test_several_files_each_with_its_own_columns(tmp_path):
    first, second = put(tmp_path / "a.csv", table(ROWS[:2])), put(tmp_path / "b.jsonl", jsonl(ROWS[2:], "review", "stars"))
    assert read_examples([first, second]).texts == tuple(t for t, _ in ROWS)


def test_separators_inside_a_text_do_not_end_its_line(tmp_path):
    odd = "one\u2028two\x0bthree\x85four\x1cfive"
    rows = [(odd, "pos"), ("dull", "neg")]
    for name, content in (
        ("a.jsonl", jsonl(rows)),
        ("a.tsv", table(rows, "\t")),
        ("a.csv", table(rows)),
        ("a.txt", f"pos {odd}\nneg dull\n"),
    ):
        assert read_examples([put(tmp_path / name, content)]).texts == (odd, "dull"), name


def test_quotes_are_text_in_a_tsv_and_quotes_in_a_csv(tmp_path):
    tsv = put(tmp_path / "a.tsv", 'text\tlabel\n"so-called" art\tneg\n"unfinished\tpos\n')
    assert read_examples([tsv]).texts == ('"so-called" art', '"unfinished')
    csv = put(tmp_path / "a.csv", 'text,label\n"a ""so-called"", film\nin two lines",neg\nplain,pos\n')
    assert read_examples([csv]).texts == ('a "so-called", film\nin two lines', "plain")


def test_a_long_document_in_a_csv(tmp_path):
    import csv

    before = csv.field_size_limit()
    file = put(tmp_path / "a.csv", f"text,label\n{'long ' * 40_000},neg\nshort,pos\n")
    assert len(read_examples([file]).texts[0]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("header", "text", "label"),
    [
        (("text", "label"), 0, 1),
        (("Label", "Text"), 1, 0),
        (("id", "sentence", "sentiment"), 1, 2),
        (("category", "remark"), 1, 0),
        (("remark", "verdict"), 0, 1),
    ],
)
def test_columns_are_found(tmp_path, header, text, label):
    rows = []
    for number, (sentence, mark) in enumerate(ROWS):
        row = [str(100 + number)] * len(header)
        row[text], row[label] = sentence, mark
        rows.append(row)
    examples = read_examples([put(tmp_path / "a.csv", table(rows, header=header))])
    assert examples.texts == tuple(t for t, _ in ROWS)
    assert examples.classes == ("neg", "pos")


def test_columns_by_name_and_the_nearest_one(tmp_path):
    file = put(
        tmp_path / "a.csv",
        table([(f"t{i}", f"u{i}", "xy"[i % 2], "vw"[i % 2]) for i in range(4)], header=("head", "body", "topic", "mood")),
    )
    examples = read_examples([file], text="head", label="mood")
    assert (examples.texts[0], examples.classes) == ("t0", ("v", "w"))
    with pytest.raises(
        UnknownNameError, match=r"--label: .*a\.csv has no column 'mod'; nearest: mood.*columns: head, body, topic, mood"
    ):
        read_examples([file], label="mod")
    with pytest.raises(UnknownNameError, match=r"--text: .* no column 'bodi'; nearest: body"):
        read_examples([file], text="bodi")


def test_columns_that_are_ambiguous_are_asked_for(tmp_path):
    file = put(tmp_path / "a.csv", table([("a", "b", "c")] * 3, header=("one", "two", "three")))
    with pytest.raises(
        UnknownNameError, match=r"which column holds the label\? name it with --label; columns: one, two, three"
    ):
        read_examples([file])
    with pytest.raises(UnknownNameError, match="which column holds the label"):
        read_examples([put(tmp_path / "b.csv", "text\nfine\n")])
    with pytest.raises(UnknownNameError, match="which column holds the text"):
        read_examples([file], label="one", text="one")
    with pytest.raises(UnknownNameError, match="which column holds the text"):
        read_examples([put(tmp_path / "c.jsonl", '{"label": 1, "n": 5}\n{"label": 0, "n": 6}\n')])


def test_a_table_without_a_header_is_noticed(tmp_path):
    file = put(tmp_path / "a.csv", "a good film,1\na bad one,0\nfine,1\n")
    with pytest.raises(DataError, match="looks like data"):
        read_examples([file])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,b,c\n", r"row 2 has 3 fields, the header 2 \(text, label\)"),
        ("a.csv", 'text,label\n"never closed,pos\nb,neg\n', r"line 3 is not CSV: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", "duplicate column name 'text'"),
        ("a.csv", "text,label\n", "has a header and no rows"),
        ("a.tsv", "text\tlabel\na\n", "row 2 has 1 fields"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b",\n', "line 2 is not JSON"),
        ("a.jsonl", '["a", 1]\n', "line 1 must be a JSON object; got list"),
        ("a.jsonl", '{"text": ["a", "b"], "label": 1}\n', "column 'text' must hold text or numbers; got a list"),
        ("a.jsonl", '{"text": "a", "label": {"x": 1}}\n', "column 'label' must hold text or numbers; got a dict"),
        ("a.json", '{"text": "a"}', "must hold a JSON list of objects"),
        ("a.json", "[1, 2]", "must hold a JSON list of objects"),
        ("a.json", "[", "is not JSON"),
        ("a.txt", "positive\n", "line 1: a labelled text file has `label text` on each line"),
        ("a.xlsx", "text", r"unknown file type '.xlsx'; it must be one of .jsonl, "),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\xef\xbb\xbf \n", "is empty"),
        ("a.csv", "text,label\n,1\n,0\n", r"no row has both a text \('text'\) and a label \('label'\)"),
        ("a.csv", "text,label\nfine,pos\ngood,pos\n", r"only one class \('pos'\)"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path, name, content, message):
    file = put(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        read_examples([file])
    assert str(file) in str(error.value)


def test_missing_file_and_folder(tmp_path):
    put(tmp_path / "train.csv", "x")
    with pytest.raises(DataError, match=r"trian\.csv: no such file; nearest there: train\.csv"):
        read_examples([tmp_path / "trian.csv"])
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_examples([tmp_path / "folder.csv"])


@pytest.mark.parametrize(
    ("raw", "byte", "encoding"),
    [
        ("text,label\ncafé,pos\n".encode("cp1252"), "byte 14 (0xe9, line 2)", "cp1252"),
        (b"\xef\xbb\xbftext,label\ncaf\xe9,pos\n", "byte 17 (0xe9, line 2)", "cp1252"),
        ("text,label\n\x81é,pos\n".encode("latin-1"), "byte 11 (0x81, line 2)", "latin-1"),
        ("text,label\nfine,pos\n".encode("utf-16"), "byte 0 (0xff, line 1)", "utf-16"),
        ("text,label\nfine,pos\n".encode("utf-32"), "byte 0 (0xff, line 1)", "utf-32"),
        ("text,label\nfine,pos\n".encode("utf-16-le"), "byte 1 (0x00, line 1)", "utf-16-le"),
        ("text,label\nfine,pos\n".encode("utf-16-be"), "byte 0 (0x00, line 1)", "utf-16-be"),
    ],
)
def test_a_file_in_another_encoding_names_the_byte_and_what_works(tmp_path, raw, byte, encoding):
    file = put(tmp_path / "a.csv", raw)
    with pytest.raises(DataError) as error:
        read_text(file)
    assert f"{byte}; it reads as {encoding}: iconv -f {encoding} -t utf-8 a.csv" in str(error.value)
    assert "text,label" in raw.removeprefix(b"\xef\xbb\xbf").decode(encoding)


def test_a_binary_file_is_called_so(tmp_path):
    raw = b"PK\x03\x04\x14\x00\x08\x08\xff\xfe" + bytes(range(1, 256)) * 4
    with pytest.raises(DataError, match="is not text: it holds zero bytes, the first at byte 5"):
        read_text(put(tmp_path / "a.csv", raw))


def test_rows_without_text_or_label_are_counted(tmp_path):
    rows = [*ROWS, ("", "pos"), ("  ", "neg"), ("no label", ""), ("none", None), (None, "pos"), (float("nan"), "pos")]
    examples = read_examples([put(tmp_path / "a.jsonl", jsonl(rows))])
    assert len(examples) == 4
    assert [note.split(" of ")[0] for note in examples.notes] == ["4 rows", "2 rows"]
    assert "empty text" in examples.notes[0]
    assert "no label" in examples.notes[1]


@pytest.mark.parametrize(
    ("marks", "classes"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([1, 0, 2.0], ("0", "1", "2")),
        ([True, False, True], ("false", "true")),
        (["b", " a", "a "], ("a", "b")),
        (["²", "--1", "3"], ("3", "--1", "²")),
        (["x", "3", "2"], ("2", "3", "x")),
    ],
)
def test_classes_are_in_their_natural_order(tmp_path, marks, classes):
    assert read_examples([put(tmp_path / "a.jsonl", jsonl([(f"t{i}", m) for i, m in enumerate(marks)]))]).classes == classes


def test_a_column_of_texts_is_no_class(tmp_path):
    file = put(tmp_path / "a.jsonl", jsonl([(f"t{i}", f"mark {i}") for i in range(60)]))
    with pytest.raises(DataError, match=r"60 different values in 60 rows, such as 'mark 0'; are they classes\?"):
        read_examples([file])


def test_classes_of_a_test_file_are_those_of_training(tmp_path):
    file = put(tmp_path / "a.jsonl", jsonl([("x", "pos")]))
    assert read_examples([file], classes=("neg", "pos")).labels == (1,)
    with pytest.raises(DataError, match=r"label 'pos' does not occur in the training data \(classes: a, b\)"):
        read_examples([file], classes=("a", "b"))


def test_shipped_samples():
    assert len(read_examples(["lowdim:sentence-polarity"]).classes) == 2
    assert read_texts(["lowdim:shakespeare"])[0][0]
    with pytest.raises(UnknownNameError, match="nearest: lowdim:shakespeare"):
        locate("lowdim:shakespear")


def test_documents_for_a_language_model(tmp_path):
    plain = put(tmp_path / "a.txt", "one\ntwo\n")
    rows = put(tmp_path / "b.jsonl", '{"content": "three"}\n{"content": ""}\n{"content": null}\n{"other": 1}\n')
    documents, notes = read_texts([plain, rows])
    assert documents == ["one\ntwo\n", "three"]
    assert notes == [f"3 rows of {rows} have an empty text and were left out"]
    with pytest.raises(UnknownNameError, match="no column 'contnet'; nearest: content"):
        read_texts([rows], text="contnet")
    with pytest.raises(UnknownNameError, match="no column holds text; columns: a, b"):
        read_texts([put(tmp_path / "c.jsonl", '{"a": 1, "b": 2}\n')])
    with pytest.raises(DataError, match="no text was found"):
        read_texts([put(tmp_path / "d.jsonl", '{"text": ""}\n')])


def make(texts, labels, classes=3):
    return Examples(tuple(texts), tuple(labels), tuple("abc"[:classes]))


@st.composite
def data(draw):
    """Examples with repeated texts, at least three different ones of each class."""
    texts, labels = [], []
    for label in range(3):
        count = draw(st.integers(3, 25))
        own = [f"{label}-{i}" for i in range(count)]
        repeated = draw(st.lists(st.sampled_from(own), max_size=10))
        texts += own + [text + " " for text in repeated]  # white space does not make another text
        labels += [label] * (len(own) + len(repeated))
    order = draw(st.permutations(range(len(texts))))
    return make([texts[i] for i in order], [labels[i] for i in order])


@settings(deadline=None, max_examples=60)
@given(data(), st.integers(0, 1000))
def test_split_is_disjoint_complete_stratified_and_repeatable(examples, seed):
    parts = split(examples, seed=seed)
    named = {"train": parts.train, "validation": parts.validation, "test": parts.test}
    seen = {name: [t.strip() for t in part.texts] for name, part in named.items()}
    everything = [t for texts in seen.values() for t in texts]
    assert sorted(everything) == sorted({t.strip() for t in examples.texts})  # all there, none twice
    for k in range(3):
        own = {t.strip() for t, label in zip(examples.texts, examples.labels) if label == k}
        held = sum(label == k for label in parts.test.labels)
        chosen = sum(label == k for label in parts.validation.labels)
        assert held == min(max(1, round(0.3 * len(own))), len(own) - 1)
        assert chosen == min(max(1, round(0.2 * (len(own) - held))), len(own) - held - 1)
        assert sum(label == k for label in parts.train.labels) >= 1
    assert split(examples, seed=seed) == parts


@settings(deadline=None, max_examples=30)
@given(data(), st.sets(st.integers(0, 24), min_size=1, max_size=3), st.integers(0, 5))
def test_split_keeps_texts_of_a_test_file_out_of_training(examples, shared, seed):
    held = make([f" {k}-{i}" for i in shared for k in range(3)], [k for _ in shared for k in range(3)])
    own = {t.strip() for t in held.texts}
    left = [sum(f"{k}-" in t for t in {t.strip() for t in examples.texts} - own) for k in range(3)]
    if min(left) < 2:
        with pytest.raises(DataError):
            split(examples, test=held, seed=seed)
        return
    parts = split(examples, test=held, seed=seed)
    assert parts.test is held
    assert not own & {t.strip() for t in (*parts.train.texts, *parts.validation.texts)}
    assert len(parts.train) + len(parts.validation) == sum(left)


def test_split_says_what_it_left_out():
    texts = [f"{k}-{i}" for k in range(2) for i in range(5)]
    examples = make([*texts, "0-0", "1-1 "], [0] * 5 + [1] * 5 + [0, 1], 2)
    assert split(examples).notes == ("2 duplicate texts were left out, so that no text is in two parts",)
    assert "1 training texts are also in the test file" in split(examples, test=make(["0-0", "new"], [0, 1], 2)).notes[1]
    with pytest.raises(DataError, match="every training text is also in the test file"):
        split(examples, test=examples)
    with pytest.raises(DataError, match=r"class 'b' has 2 examples; at least 3 are needed"):
        split(make(texts[:7], [0] * 5 + [1] * 2, 2))
    with pytest.raises(DataError, match=r"class 'c' has 0 examples"):
        split(make(texts, [0] * 5 + [1] * 5, 3))


def test_another_seed_is_another_split():
    examples = make([str(i) for i in range(60)], [i % 3 for i in range(60)])
    assert set(split(examples, seed=0).test.texts) != set(split(examples, seed=1).test.texts)
