"""Which columns are read: never one of several in silence, never an id, never a text as a label; the same in every format."""

import csv
import json

import pytest

from lowdim.errors import DataError, UnknownNameError
from lowdim.train.data import read_documents, read_examples
from lowdim.train.packing import pretraining
from lowdim.train.streams import StreamSource
from lowdim.train.tokenizers import byte_tokenizer

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
SENTENCES = [
    f"{who} went to the market on day {i} and bought {i * 7} apples" for i, who in enumerate(("Ann", "Bob", "Cid") * 4)
]
ASKED = [f"How many apples did {who} buy on day {i}?" for i, who in enumerate(("Ann", "Bob", "Cid") * 4)]
TURNS = [[{"role": "user", "content": q}, {"role": "assistant", "content": s}] for q, s in zip(ASKED, SENTENCES)]
FROM = [[{"from": "human", "value": q}, {"from": "gpt", "value": s}] for q, s in zip(ASKED, SENTENCES)]
SHORT = ["no", "yes"] * 6
IDS = [f"sample number {i} of the file" for i in range(12)]
ROWS = [f"row-{i:05d}" for i in range(12)]


def rows(columns):
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def write(folder, kind, columns):
    """The columns as a file; a csv holds lists as JSON."""
    path = folder / f"train.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(columns)))
    elif kind == "json":
        path.write_text(json.dumps(rows(columns)))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerow(columns)
            for row in rows(columns):
                writer.writerow(json.dumps(v) if isinstance(v, (list, dict)) else v for v in row.values())
    return path


# --- language models ------------------------------------------------------------------------------------------------------

SEVERAL = {
    "prompt and answer": {"prompt": ASKED, "answer": SENTENCES},
    "question and a short answer": {"id": ROWS, "question": ASKED, "answer": [str(i) for i in range(12)]},
    "alpaca": {"instruction": ["Translate into French"] * 12, "input": SENTENCES, "output": SHORT},
    "prompt and completion": {"prompt": ASKED, "completion": SENTENCES},
    "preference": {"prompt": ASKED, "chosen": SENTENCES, "rejected": SENTENCES[::-1]},
    "meaning and reference": {"mr": [f"name[The Eagle {i}], food[French]" for i in range(12)], "ref": SENTENCES},
    "source and target": {"source": SENTENCES, "target": ASKED},
    "two languages": {"de": SENTENCES, "en": ASKED},
    "names in another language": {"frage": ASKED, "antwort": SENTENCES, "nr": list(range(12))},
    "a text and its summary": {"text": SENTENCES, "summary": ASKED},
    "a document and a question on it": {"question": ASKED, "document": SENTENCES},
    "premise and hypothesis": {"premise": SENTENCES, "hypothesis": ASKED, "label": SHORT},
    "a longer text beside `text`": {"text": ASKED, "transcript": [s * 3 for s in SENTENCES]},
    "short questions and answers": {"prompt": ["hi", "ho"] * 6, "response": SHORT},
    "short strings of any name": {"left": SHORT, "right": SHORT[::-1]},
}
LISTS = {
    "messages beside an id": {"id": IDS, "messages": TURNS},
    "conversations beside an id": {"id": IDS, "conversations": FROM},
    "messages beside a prompt": {"prompt": ASKED, "prompt_id": ROWS, "messages": TURNS},
    "messages beside a text": {"text": SENTENCES, "messages": TURNS},
    "preference rows of turns": {"chosen": TURNS, "rejected": TURNS[::-1], "score": list(range(12))},
    "a chat of an unusual name": {"key": IDS, "exchange": TURNS},
}
NESTED = {  # which a table of strings cannot show
    "a pair in a dict": {"id": IDS, "translation": [{"de": s, "en": q} for s, q in zip(SENTENCES, ASKED)]},
    "a list of texts": {"id": IDS, "paragraphs": [[s, q] for s, q in zip(SENTENCES, ASKED)]},
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SEVERAL)
def test_one_column_of_several_is_refused(tmp_path, kind, name):
    columns = SEVERAL[name]
    path = write(tmp_path, kind, columns)
    with pytest.raises(DataError, match="--text") as error:
        read_documents([path])
    said = [column for column in columns if column not in ("id", "nr", "label")]
    assert all(column in str(error.value) for column in said)
    assert len(str(error.value)) < 2000
    one = said[-1]
    assert read_documents([path], text=one).texts == list(map(str, columns[one])), "on purpose it is read"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", LISTS)
def test_lists_are_never_skipped_in_favour_of_an_id(tmp_path, kind, name):
    with pytest.raises(DataError, match=r"must hold text or numbers; got a (list|dict|chat written as a string)"):
        read_documents([write(tmp_path, kind, LISTS[name])])


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", NESTED)
def test_texts_in_lists_and_dicts_are_not_skipped(tmp_path, kind, name):
    path = write(tmp_path, kind, NESTED[name])
    with pytest.raises(DataError, match=r"must hold text or numbers; got a (list|dict)"):
        read_documents([path])
    with pytest.raises(DataError, match=r"must hold text or numbers; got a (list|dict)"):
        read_documents([path], text=list(NESTED[name])[1])


ONE = {
    "a usual name": ({"id": ROWS, "text": SENTENCES}, "text"),
    "a page": ({"id": ROWS, "url": [f"https://x.org/{r}" for r in ROWS], "title": ["Ann Lee"] * 12, "text": SENTENCES}, "text"),
    "a longer name of an id": ({"sample_id": IDS, "body_text": SENTENCES}, "body_text"),
    "classified sentences": ({"sentence": SENTENCES, "label": SHORT}, "sentence"),
    "short sentences": ({"review": ["so dull", "so good"] * 6, "label": SHORT}, "review"),
    "an index of pandas": ({"": list(range(12)), "note": SENTENCES}, "note"),
    "a script without spaces": ({"标题": ["新闻"] * 12, "内容": [f"今天天气很好我们去公园走走{i}" for i in range(12)]}, "内容"),
    "the whole example as a text": (
        {"instruction": ASKED, "output": SENTENCES, "text": [f"Q: {q} A: {s}" for q, s in zip(ASKED, SENTENCES)]},
        "text",
    ),
    "single words": ({"text": SHORT, "n": list(range(12))}, "text"),
    "an empty column of a usual name": ({"text": [""] * 12, "story": SENTENCES}, "story"),
    "an empty usual name": ({"text": [""] * 12, "content": SENTENCES}, "content"),
}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", ONE)
def test_the_one_column_of_text_is_found_and_named(tmp_path, kind, name):
    columns, want = ONE[name]
    found = read_documents([write(tmp_path, kind, columns)])
    assert found.texts == columns[want]
    (used,) = found.columns
    assert used.roles.text == (want,)
    unnamed = "Unnamed: 0" if kind == "csv" else ""  # what a table's reader calls a column without a name
    assert used.roles.unused == tuple(c or unnamed for c in columns if c != want)
    assert f"the text is column {want!r}" in used.sentence


def test_metadata_in_a_dict_is_not_the_text(tmp_path):
    columns = {"text": SENTENCES, "meta": [{"source": "a page on markets and apples", "lines": [1, 2]}] * 12}
    found = read_documents([write(tmp_path, "jsonl", columns)])
    assert found.texts == SENTENCES
    assert found.notes == [f"{tmp_path / 'train.jsonl'}: the text is column 'text' (not used: meta); --text chooses another"]


@pytest.mark.parametrize(
    "columns", [{"id": IDS}, {"id": ROWS, "n": list(range(12))}, {"key": ROWS}, {"url": ROWS, "uuid": ROWS}]
)
def test_an_id_is_never_a_text(tmp_path, columns):
    with pytest.raises(UnknownNameError, match="no column holds text"):
        read_documents([write(tmp_path, "jsonl", columns)])


def test_two_columns_are_no_document(tmp_path):
    path = write(tmp_path, "jsonl", {"prompt": ASKED, "answer": SENTENCES})
    with pytest.raises(DataError, match="a language model is trained on one column"):
        read_documents([path], text="prompt,answer")


def test_a_column_that_fills_late_is_noticed(tmp_path):
    many = {"text": SENTENCES * 90, "answer": [""] * 1050 + ["So it is."] * 30}
    path = write(tmp_path, "jsonl", many)
    for read in (
        lambda text: read_documents([path], text=text),
        lambda text: list(StreamSource(f"datasets:{tmp_path}", text)()),
    ):
        with pytest.raises(DataError, match="column 'answer' is empty in the first 1000 rows and holds values later"):
            read(None)
        assert read("text")


# --- streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", [*ONE, "prompt and answer", "alpaca", "messages beside an id", "a pair in a dict"])
def test_a_stream_is_read_like_a_file(tmp_path, kind, name):
    columns = ONE[name][0] if name in ONE else {**SEVERAL, **LISTS, **NESTED}[name]
    if kind == "csv" and name in NESTED:
        pytest.skip("a table of strings")
    path = write(tmp_path, kind, columns)
    if name in ONE:
        assert [text for text, _ in StreamSource(f"datasets:{tmp_path}", None)()] == read_documents([path]).texts
        return
    refused = []
    for read in (lambda: read_documents([path]), lambda: StreamSource(f"datasets:{tmp_path}", None)):
        with pytest.raises(DataError) as error:
            read()
        refused.append(str(error.value).split(f"{tmp_path}", 1)[1].split(": ", 1)[1])
    assert refused[0] == refused[1]


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_first_row_does_not_decide(tmp_path, empty):
    columns = {"id": ROWS, "body_text": [empty, *SENTENCES[1:]]}
    path = write(tmp_path, "jsonl", columns)
    task = pretraining(byte_tokenizer(), [f"datasets:{tmp_path}"], length=16)
    assert "row-0" not in bytes(t for row in task.validation for t in row["input_ids"] if t < 256).decode()
    assert task.columns[0].roles.text == read_documents([path]).columns[0].roles.text == ("body_text",)


# --- classification -------------------------------------------------------------------------------------------------------

PAIRS = {
    "premise and hypothesis": ({"hypothesis": ASKED, "premise": SENTENCES, "label": SHORT}, ("premise", "hypothesis")),
    "numbered": (
        {"nr": list(range(12)), "sentence1": SENTENCES, "sentence2": ASKED, "label": SHORT}, ("sentence1", "sentence2"),
    ),
    "lettered": ({"text_a": SENTENCES, "text_b": SHORT, "label": SHORT}, ("text_a", "text_b")),
    "question and sentence": ({"question": ASKED, "sentence": SENTENCES, "label": SHORT}, ("question", "sentence")),
    "as in MRPC": (
        {"Quality": [0, 1] * 6, "#1 ID": list(range(12)), "#2 ID": list(range(12)), "#1 String": SENTENCES, "#2 String": ASKED},
        ("#1 String", "#2 String"),
    ),
    "as in QQP": (
        {"id": ROWS, "qid1": list(range(12)), "qid2": list(range(12)), "question1": ASKED, "question2": ASKED[::-1],
         "is_duplicate": [0, 1] * 6},
        ("question1", "question2"),
    ),
    "as in SNLI": (
        {"gold_label": SHORT, "sentence1_parse": [f"( {s} )" for s in SENTENCES], "sentence2_parse": ["( b )"] * 12,
         "sentence1": SENTENCES, "sentence2": ASKED, "pairID": ROWS},
        ("sentence1", "sentence2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_found(tmp_path, kind, name):
    columns, want = PAIRS[name]
    found = read_examples([write(tmp_path, kind, columns)])
    assert found.columns[0].roles.text == want
    assert list(found.each()) == list(zip(*(columns[c] for c in want)))
    assert len(found.classes) == 2


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"premise": SENTENCES, "hypothesis": ASKED}, "which column holds the label"),
        (
            {"premise": SENTENCES * 5, "hypothesis": ["he walks in a place called A", "he walks in a place called B"] * 30},
            "label",
        ),
        ({"text": SENTENCES, "remark": ASKED}, "which column holds the label"),
        ({"source": SENTENCES, "target": ASKED}, "which column holds the label"),
        ({"text": SENTENCES, "id": ROWS}, "which column holds the label"),
        ({"title": SENTENCES, "abstract": ASKED, "label": SHORT}, "--text title --text abstract reads two as a pair"),
        ({"comment": ASKED, "parent": [s * 2 for s in SENTENCES], "label": SHORT}, "which column holds the text"),
        ({"id": IDS, "label": SHORT}, "which column holds the text"),
        ({"x1": list(range(12)), "x2": list(range(12)), "label": SHORT}, "which column holds the text"),
        ({"premise": SENTENCES, "choice1": ASKED, "choice2": ASKED[::-1], "label": SHORT}, "which column holds the text"),
    ],
)
def test_a_text_is_no_label_and_an_id_no_text(tmp_path, kind, columns, message):
    with pytest.raises(UnknownNameError, match=message) as error:
        read_examples([write(tmp_path, kind, columns)])
    assert "--label" in str(error.value) or "--text" in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_lists_are_no_text_to_classify(tmp_path, kind):
    with pytest.raises(DataError, match="must hold text or numbers; got a"):
        read_examples([write(tmp_path, kind, {"id": IDS, "messages": TURNS, "label": SHORT})])


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ({"text": SENTENCES, "word": ["ab", "cd"] * 6, "place": ["Rome", "Oslo"] * 6, "target": [0, 1] * 6}, "text", "target"),
        ({"title": ["A day", "A night"] * 6, "content": SENTENCES, "label": SHORT}, "content", "label"),
        ({"question": ASKED, "answer": SHORT}, "question", "answer"),
        ({"id": ROWS, "remark": SENTENCES, "verdict": SHORT}, "remark", "verdict"),
        ({"text": SENTENCES, "topic": ASKED, "class": SHORT}, "text", "class"),
        ({"text": SENTENCES, "annotator_a": SHORT, "annotator_b": SHORT, "label": SHORT}, "text", "label"),
    ],
)  # fmt: skip
def test_single_texts_stay_single(tmp_path, columns, text, label):
    found = read_examples([write(tmp_path, "csv", columns)])
    assert (found.columns[0].roles.text, found.columns[0].roles.label) == ((text,), label)
    rest = [c for c in columns if c not in (text, label)]
    assert all(c in found.notes[0] for c in rest) if rest else found.notes == ()


def test_columns_by_name(tmp_path):
    path = write(tmp_path, "csv", {"a": SENTENCES, "b": ASKED, "c": SENTENCES[::-1], "label": SHORT})
    assert read_examples([path], text="b").texts == ASKED
    assert list(read_examples([path], text="c,a").each()) == list(zip(SENTENCES[::-1], SENTENCES))
    for wrong in ("a,b,c", "a,a"):
        with pytest.raises(DataError, match="two different ones for a pair"):
            read_examples([path], text=wrong)
    with pytest.raises(UnknownNameError, match="no column 'd'"):
        read_examples([path], text="a,d")
    odd = tmp_path / "odd.csv"
    odd.write_text('"a,b",label\nfine,1\ngood,0\n')
    assert read_examples([odd], text="a,b").texts == ("fine", "good"), "a column with a comma in its name"


def test_pairs_and_single_texts_do_not_mix(tmp_path):
    (tmp_path / "one").mkdir()
    pairs = write(tmp_path, "csv", PAIRS["numbered"][0])
    single = write(tmp_path / "one", "csv", {"text": SENTENCES, "label": SHORT})
    for files in ([pairs, single], [single, pairs]):
        with pytest.raises(DataError, match=r"train.csv has pairs of texts \(sentence1, sentence2\).* has single texts"):
            read_examples(files)


def test_a_pair_with_an_empty_text_is_left_out(tmp_path):
    columns = {**PAIRS["numbered"][0], "sentence2": ["", "\u200b", *ASKED[2:]]}
    found = read_examples([write(tmp_path, "jsonl", columns)])
    assert len(found) == 10
    assert "2 rows of" in found.notes[-1]


def test_a_shipped_sample_is_named_as_it_was_given():
    (used,) = read_examples(["lowdim:sentence-polarity"]).columns
    assert used.sentence == "lowdim:sentence-polarity: the text is column 'text' and the label 'label'"
