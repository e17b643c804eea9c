"""Tables as programs write them are read as they were written, held as Arrow columns, or refused with one clear message."""

import csv
import json
import subprocess
import sys

import pytest

from lowdim.errors import DataError, UnknownNameError
from lowdim.train.data import read_examples
from lowdim.train.tables import read_rows

TEXTS = ['He said "hi" there', "plain", 'it is 6" long', "two\nlines", "a\ttab", "", '"', "a, b; c | d", '"in quotes"']


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path, *confirmed):
    return [tuple(row.values()) for row in read_rows(path, confirmed)]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_what_csv_writer_writes_is_read_as_it_was_written(tmp_path, suffix, separator, quoting):
    path = tmp_path / f"a{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator, quoting=quoting).writerows(
            [["text", "label"], *([text, i % 2] for i, text in enumerate(TEXTS))]
        )
    assert rows(path) == [(text, str(i % 2)) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_what_pandas_writes_is_read_as_it_was_written(tmp_path, separator):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": TEXTS, "label": range(len(TEXTS))})
    frame.to_csv(tmp_path / "a.tsv", sep=separator)
    table = read_rows(tmp_path / "a.tsv")
    assert table.columns == ("Unnamed: 0", "text", "label")
    assert table.column("text") == TEXTS


def test_quotes_of_glue_are_text_and_the_reading_is_said_where_there_are_two(tmp_path):
    loose = read_rows(put(tmp_path / "a.tsv", 'text\tlabel\n"so-called" art\t0\n"open\t1\n6" long\t1\n'))
    assert list(loose.column("text")) == ['"so-called" art', '"open', '6" long']
    assert loose.notes == ()
    whole = read_rows(put(tmp_path / "b.tsv", 'text\tlabel\n"so-called"\t0\nplain\t1\n'))
    assert list(whole.column("text")) == ['"so-called"', "plain"]
    assert "quotes were read as part of the text" in whole.notes[0]
    two = read_rows(put(tmp_path / "c.tsv", 'text\tlabel\n"opened\t0\nand closed"\t1\n'))
    assert list(two.column("text")) == ['"opened', 'and closed"']
    doubled = read_rows(put(tmp_path / "d.tsv", 'text\tlabel\n"He said ""hi"""\t0\nplain\t1\n'))
    assert list(doubled.column("text")) == ['He said "hi"', "plain"]
    assert "quotes were read as csv.writer and pandas write them" in doubled.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\ngood,1\n"open,0\nb,1\n', r"line 4 is not CSV: .* \(the row begins on line 3\).*written twice"),
        ("a.csv", 'text,label\n"He said \\"hi\\" there",1\n', r"line 2 is not CSV: .*written twice"),
        ("a.csv", "text,label\ngood, fine,1\n", "row 2 has 3 fields, the header 2 .*separated by ','; .*must be in quotes"),
        ("a.tsv", "text\tlabel\nb\t1\nc\n", "line 3: row 3 has 1 fields, the header 2 .*separated by a tab"),
        ("a.csv", "text:label\ngood:1\nbad:0\n", "seem to be separated by ':'"),
        ("a.csv", "text label\ngood 1\nbad 0\n", "seem to be separated by a space"),
        ("a.csv", "text^label\ngood^1\nbad^0\n", r"seem to be separated by '\^'"),
        ("a.tsv", "text::label\ngood::1\nbad::0\n", "seem to be separated by '::'"),
        ("a.csv", "text\x01label\ngood\x011\nbad\x010\n", r"seem to be separated by '\\x01'"),
        ("a.csv", "| text | label |\n|---|---|\n| good | 1 |\n", "is a Markdown table"),
        ("a.csv", "sep=;\n", "no rows"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(put(tmp_path / name, content))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bars.csv", "text|label\ngood film|pos\nbad film|neg\n"),
        ("commas.tsv", "text,label\ngood film,pos\nbad film,neg\n"),
        ("sep.csv", "sep=;\ntext;label\ngood film;pos\nbad film;neg\n"),
        ("sep.csv", '"sep=|"\r\ntext|label\r\ngood film|pos\r\nbad film|neg\r\n'),
        ("sep-tab.csv", "SEP=\t\ntext\tlabel\ngood film\tpos\nbad film\tneg\n"),
        ("mark.csv", "\ufeffsep=,\ntext,label\ngood film,pos\nbad film,neg\n"),
        ("mark-in-quotes.csv", '\ufeff"text","label"\n"good film","pos"\n"bad film","neg"\n'),
        ("spaces.csv", 'text, label\n"good film", "pos"\n"bad film", "neg"\n'),
        ("blank.csv", "\n\ntext,label\n\ngood film,pos\n  \nbad film,neg\n\n"),
        ("twice.csv", "text,label\ngood film,pos\ntext,label\nbad film,neg\n"),
    ],
)
def test_separators_and_first_lines(tmp_path, name, content):
    assert rows(put(tmp_path / name, content)) == [("good film", "pos"), ("bad film", "neg")]


def test_commas_in_the_header_do_not_hide_the_separator(tmp_path):
    assert rows(put(tmp_path / "a.csv", 'text;"label, in words"\n"a, b";pos\n"c, d";neg\n')) == [
        ("a, b", "pos"),
        ("c, d", "neg"),
    ]


def test_words_of_a_text_are_no_columns(tmp_path):
    quoted, plain = '"The first, document"\n"The second, document"\n', "Breaking News\nOther News\nMore News\n"
    for content in (quoted, plain):
        assert read_rows(put(tmp_path / "a.csv", f"text\n{content}")).columns == ("text",)
    assert read_rows(put(tmp_path / "b.csv", plain)).columns == ("Breaking News",)
    with pytest.raises(DataError, match="looks like data"):
        read_rows(put(tmp_path / "c.csv", quoted))


def test_a_header_in_quotes_over_fields_without(tmp_path):
    assert read_rows(put(tmp_path / "a.tsv", '"text"\t"label"\na film\t1\n')).columns == ("text", "label")


def test_a_header_that_is_repeated_is_left_out_and_counted(tmp_path):
    table = read_rows(put(tmp_path / "a.csv", "text,label\ngood,1\ntext,label\nbad,0\n"))
    assert len(table) == 2
    assert "1 rows of" in table.notes[0]
    assert "repeat the header" in table.notes[0]


def test_row_numbers_of_r_are_a_column_without_a_name(tmp_path):
    table = read_rows(put(tmp_path / "a.csv", '"text","label"\n"1","good","pos"\n"2","bad","neg"\n'))
    assert table.columns == ("Unnamed: 0", "text", "label")
    assert list(table.column("text")) == ["good", "bad"]
    with pytest.raises(DataError, match="row 3 has 3 fields, the header 2"):
        read_rows(put(tmp_path / "b.csv", "text,label\n1,good,pos\n5,bad,neg\n"))


@pytest.mark.parametrize(
    "content",
    [
        "1\tThe first document of all.\n2\tThe second document.\n",
        "gj04\t1\t\tOur friends will not buy this analysis.\ngj04\t0\t*\tThe more we study verbs.\n",
        "The first document of all.\tx\nThe second one.\ty\n",
        "good\tpos\nbad\tneg\nfine\tpos\n",
        "https://example.org/a\tsome words\nhttps://example.org/b\tother words\n",
        "45%\tsome words\n50%\tother words\n",
        "it was the best of times it was the worst\tx\nit was the age of wisdom and of folly\ty\n",
        "__label__pos\tgood\n__label__neg\tbad\n",
    ],
)
@pytest.mark.parametrize("separator", ["\t", ";"])
def test_a_first_row_that_is_data_is_refused_unless_it_was_named(tmp_path, content, separator):
    path = put(tmp_path / "a.csv", content.replace("\t", separator))
    with pytest.raises(DataError, match=r"the first row, .*, looks like data .*column names, .*; if it is a header, .* --text"):
        read_rows(path)
    assert (
        len(read_rows(path, [read_rows(path, [content.split("\n")[0].split("\t")[0]]).columns[0]])) == content.count("\n") - 1
    )


@pytest.mark.parametrize(
    ("header", "note"),
    [
        ("text,label", False),
        ("remark,verdict", False),
        (",text", False),
        ("0,1", True),
        ("Breaking News,Film at Eleven", True),
        ("How did you like the course in all?,label", False),
    ],
)
def test_a_header_is_a_header_and_an_unusual_one_is_shown(tmp_path, header, note):
    table = read_rows(put(tmp_path / "a.csv", f"{header}\nsome text,x\nother text,y\n"))
    assert len(table) == 2
    assert [("read as the names of the columns" in n) for n in table.notes] == [True] * note


def test_columns_without_a_name_are_told_apart(tmp_path):
    again = read_rows(put(tmp_path / "b.csv", ",Unnamed: 0,text\n0,0,good\n1,1,bad\n"))
    assert again.columns == ("Unnamed: 0.1", "Unnamed: 0", "text")
    table = read_rows(put(tmp_path / "a.csv", ",text,\n0,good,x\n1,bad,y\n"))
    assert table.columns == ("Unnamed: 0", "text", "Unnamed: 2")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("row", "where"),
    [
        ('{"text": "half \\ud83d of it"}', "column 'text'"),
        ('{"text": "x", "list": [{"deep": ["\\udc00"]}]}', "column 'list'"),
        ('{"text": "x", "dict": {"\\ud83d": 1}}', "column 'dict'"),
        ('{"te\\ud83dxt": "x"}', "the column name"),
    ],
)
def test_half_a_character_is_named_by_file_and_line(tmp_path, suffix, row, where):
    whole = '{"text": "whole: \\ud83d\\ude00"}'
    content = f"{whole}\n{row}\n" if suffix == ".jsonl" else f"[{whole}, {row}]"
    path = put(tmp_path / f"a{suffix}", content)
    with pytest.raises(DataError) as error:
        read_rows(path)
    said = str(error.value)
    assert said.encode()
    assert said.startswith(f"{path}, {'line' if suffix == '.jsonl' else 'row'} 2: {where}")
    assert "lone surrogate" in said
    assert rows(put(tmp_path / f"b{suffix}", whole if suffix == ".jsonl" else f"[{whole}]")) == [("whole: 😀",)]


def test_text_of_a_parquet_that_is_not_utf_8_names_the_column(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xed\xa0\xbd"], pa.binary()).buffers())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' holds text that is not UTF-8"):
        read_rows(tmp_path / "a.parquet")


def test_values_of_json_keep_their_types(tmp_path):
    values = ["1", 1, 1.0, True, None, [1, "a"], {"b": [None]}, 10**30, 0.1, "ä"]
    content = "".join(json.dumps({"value": value, "number": n}) + "\n" for n, value in enumerate(values))
    table = read_rows(put(tmp_path / "a.jsonl", content))
    found = list(table.column("value"))
    assert found == values
    assert list(map(type, found)) == list(map(type, values))
    assert list(table.column("number")) == list(range(len(values)))
    assert table[3] == {"value": True, "number": 3}
    assert table[2:4][0] == {"value": 1.0, "number": 2}


@pytest.mark.parametrize("size", [10, 2**18 - 3, 2**18, 700_000])
def test_a_list_of_json_is_read_in_pieces(tmp_path, size):
    values = [{"text": "x" * size, "n": 1}, {"text": 'a, ]}[{ \\ " ü', "n": [1, {}]}, {"n": 12}] * 3
    for content in (json.dumps(values), json.dumps(values, indent=3, ensure_ascii=False), f" \n{json.dumps(values)}\n\n"):
        table = read_rows(put(tmp_path / "a.json", content))
        assert list(table) == [{"text": row.get("text"), "n": row["n"]} for row in values]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},]', "is not JSON"),
        ('[{"a": 1} {"a": 2}]', "is not JSON"),
        ('[{"a": 1}', "is not JSON"),
        ('[{"a": 1}] x', "is not JSON"),
        ('[{"a": 1}, 2]', "must hold a JSON list of objects; entry 2 is of type int"),
        ('{\n "a": 1\n}', "must hold a JSON list of objects"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "has no rows"),
        ("1", "must hold a JSON list of objects"),
        ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    ],
)
def test_what_is_no_list_of_json_objects_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(put(tmp_path / "a.json", content))


def test_many_batches_of_rows_are_one_table(tmp_path):
    count = 20_000
    content = "".join(json.dumps({"n": n, **({"odd": str(n)} if n % 2 else {})}) + "\n" for n in range(count))
    table = read_rows(put(tmp_path / "a.jsonl", content))
    assert list(table.column("n")) == list(range(count))
    assert list(table.column("odd").take([4, 9999, 3])) == [None, "9999", "3"]
    assert table[-1] == {"n": count - 1, "odd": str(count - 1)}


def test_fasttext_labels_stand_anywhere_and_several_are_lists(tmp_path):
    content = "__label__a first\nsecond __label__b\n thi__label__rd __label__a one \nno label\n__label__a __label__a twice\n"
    found = [("a", "first"), ("b", "second"), ("a", "thi__label__rd one"), (None, "no label"), ("a", "twice")]
    assert rows(put(tmp_path / "a.txt", content)) == found
    several = "__label__x,__label__y one\n__label__sauce how much __label__cheese in it\nno label\n"
    lists = [(["x", "y"], "one"), (["sauce", "cheese"], "how much in it"), ([], "no label")]
    assert rows(put(tmp_path / "b.txt", several)) == lists


MEMORY = """
import resource, sys
import pyarrow.parquet
from lowdim.train.data import read_documents, read_examples
reader, small, large, size = sys.argv[1:]
reader = {"documents": read_documents, "examples": read_examples}[reader]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
reader([small])
before = peak()
found = reader([large])
print((peak() - before) / int(size))
"""
SENTENCE = "a sentence about thing number {n} that goes on for about a hundred and forty characters or so until it ends"


@pytest.mark.parametrize(
    ("reader", "name", "head", "line"),
    [
        ("examples", "a.csv", "text,label\n", f"{SENTENCE},{{k}}\n"),
        ("documents", "a.csv", "text,number\n", f"{SENTENCE} ünd 😀,{{n}}\n"),
        ("examples", "a.tsv", "text\tlabel\n", f'"{SENTENCE}, ""so"" they say"\t{{k}}\n'),
        ("examples", "a.json", "[", f'{{{{"text": "{SENTENCE} 😀", "label": {{k}}}}}},\n'),
        ("examples", "a.jsonl", "", f'{{{{"text": "{SENTENCE}", "label": {{k}}}}}}\n'),
    ],
)
def test_a_table_takes_at_most_twice_its_size(tmp_path, reader, name, head, line):
    """Measured in a process of its own, after a small file has loaded what reading needs."""
    small, large = tmp_path / f"small{name[1:]}", tmp_path / name
    for path, count in ((small, 6_000), (large, 80_000)):
        content = head + "".join(line.format(n=n, k=n % 2) for n in range(count))
        put(path, f"{content[:-2]}]" if head == "[" else content)
    words = [sys.executable, "-c", MEMORY, reader, str(small), str(large), str(large.stat().st_size)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 2


@pytest.mark.parametrize(
    ("count", "length", "as_dictionary"), [(2_000_000, 10, True), (2_000_000, 10, False), (20_000, 90_000, False)]
)
def test_a_small_parquet_file_of_endless_repeats_is_refused(tmp_path, count, length, as_dictionary):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zeros = pa.array([0] * count, pa.int32())
    text = pa.DictionaryArray.from_arrays(zeros, ["x" * length])
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": text, "label": zeros}), path, compression="zstd", store_schema=as_dictionary)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(DataError, match=r"a\.parquet holds [0-9,]+ rows in [0-9,]+ bytes, so nearly all of them are repeats"):
        read_rows(path)


def test_a_parquet_file_that_compresses_well_is_read(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"the film number {index} was good", "label": "good"} for index in range(3000)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="zstd")
    assert list(read_rows(tmp_path / "a.parquet")) == rows


@pytest.mark.parametrize("text", ['""', '""\n', '""\n""\n'])
def test_a_table_of_empty_lines_has_no_header(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(
        DataError, match=r"a\.csv (has no header: all of its lines are empty|is empty|has a header and no rows)"
    ):
        read_rows(tmp_path / "a.csv")


def test_columns_of_a_table_without_a_header_have_numbers(tmp_path):
    path = tmp_path / "pairs.tsv"
    lines = [f"news\t{i % 6}.500\tfilm {i} begins\tplot {i} ends" for i in range(20)]
    path.write_text("\n".join([*lines[:7], lines[7] + "\tsource\thttps://example.org", *lines[8:]]) + "\n")
    found = read_examples([path], text="3,4", label="2", numbers=True)
    assert (len(found), found.texts[0], found.others[19], found.labels[:2]) == (20, "film 0 begins", "plot 19 ends", (0.5, 1.5))
    assert found.columns[0].roles.text == ("3", "4")
    assert f"{path} was read without a header; its columns are counted from 1 to 4" in found.notes
    assert f"1 rows of {path} have more than 4 fields; the others were left out" in found.notes
    with pytest.raises(
        DataError, match=r"the first row, .* looks like data \('0\.500' is a number\).* by number, such as --text 2"
    ):
        read_examples([path], numbers=True)
    with pytest.raises(UnknownNameError, match="0"):
        read_examples([path], text="0,3", label="2", numbers=True)


def test_numbers_that_are_names_name_columns(tmp_path):
    path = tmp_path / "named.csv"
    path.write_text("1,2\n" + "".join(f"{'ab'[i % 2]},film {i}\n" for i in range(9)))
    assert len(read_examples([path], text="2", label="1")) == 9
    path.write_text("".join(f"{i % 2},film {i}\n" for i in range(9)))
    assert len(read_examples([path], text="2", label="1")) == 9


def test_a_comma_in_a_text_without_quotes_is_no_further_field(tmp_path):
    path = tmp_path / "ragged.csv"
    path.write_text("a,good film\nb,bad film\na,good, long film\n" + "b,dull film\n" * 9)
    with pytest.raises(DataError, match="line 3: row 3 has 3 fields, the first row 2"):
        read_examples([path], text="2", label="1")


def test_a_table_is_not_read_as_labelled_lines(tmp_path):
    path = put(tmp_path / "sick.txt", "id\ta\tb\tscore\n" + "".join(f"{i}\tfilm {i}\tplot {i}\t{i % 5}\n" for i in range(9)))
    with pytest.raises(DataError, match=r"sick\.txt is a table: each line has 4 fields .*; give it the name sick\.tsv"):
        read_rows(path)
    put(path, "good\ta film\nbad\ta\tb\n")
    assert rows(path) == [("good", "a film"), ("bad", "a\tb")]
