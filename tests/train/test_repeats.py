"""Texts and documents that are the same but for case, spaces, Unicode form or tokens stand in one part only."""

import itertools
import json
import random

import pytest

from lowdim import models
from lowdim.errors import DataError
from lowdim.train.data import Examples, split
from lowdim.train.overlap import overlap_note, repeated_blocks
from lowdim.train.packing import pretraining
from lowdim.train.repeats import first_of_each, fold, same_tokens
from lowdim.train.splits import places
from lowdim.train.tasks import classification, language_modelling
from lowdim.train.tokenizers import byte_tokenizer

BYTES = byte_tokenizer()


def dump(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SAME = [
    "a café by the sea, too",
    "A Café by the Sea, too",
    "a  café by\tthe sea,\ntoo ",
    "a caf\u0065\u0301 by the sea, too",
    "a\u00a0café by\u2009the\u3000sea, too",
    "a ca\u200bfé by the sea\u2060, too\ufeff",
    "a ca\u00adfé by the sea, too",
    "ａ ｃａｆé ｂｙ ｔｈｅ ｓｅａ， ｔｏｏ",
    "a café by the sea , too",
    "A CAFÉ BY THE SEA, TOO",
]
OTHER = [
    "a cafe by the sea, too",
    "a café by the sea, tool",
    "a café by these a, too",
    "café by the sea, too",
    "1 12",
    "11 2",
    "112",
]


def test_what_is_the_same_text():
    assert len(set(map(fold, SAME))) == 1
    assert len({fold(SAME[0]), *map(fold, OTHER)}) == 1 + len(OTHER)
    assert fold("Straße") == fold("STRASSE")
    assert fold("ﬁlm №5") == fold("film No5")
    assert fold("今天 天气 很好。") == fold("今天天气很好 。")
    assert fold("\u200b \ufeff") == ""
    assert fold("\ud83d") == "\ud83d", "half a character is no error"


def test_texts_that_share_a_key_are_linked():
    keys = [(b"a", b"1"), (b"b", b"2"), (b"c", b"1"), (b"b", b"3"), (b"d", b"3"), (b"e",)]
    assert first_of_each(keys) == [0, 1, 0, 1, 1, 5]


def variants(count):
    """Texts in several spellings, each text with the same label."""
    rows = []
    for i in range(count):
        text = f"Film number {i} was a joy, all of it"
        rows += [text, text.lower(), text.replace(" ", "  "), text.replace(" ", "\u00a0") + "\u200b"]
    return [{"text": text, "label": "good" if i // 4 % 2 else "bad"} for i, text in enumerate(rows)]


def shown(tokenizer, part):
    return {fold(tokenizer.decode(row, skip_special_tokens=True)) for row in part["input_ids"]}


@pytest.fixture(scope="module")
def stories():
    return models.load_tokenizer("stories260k")


def test_no_text_is_in_two_parts(stories, tmp_path):
    task = classification(stories, [dump(tmp_path / "a.jsonl", variants(40))])
    parts = [shown(stories, part) for part in (task.train, task.validation, task.test)]
    assert sum(map(len, parts)) == 40 == sum(task.sizes().values())
    assert len(set.union(*parts)) == 40
    assert len(task.notes) == 1
    assert task.notes[0].startswith(
        "120 duplicate texts were left out, so that no text is in two parts (120 of them differ in "
    )
    assert task.test["input_ids"] == classification(stories, [tmp_path / "a.jsonl"]).test["input_ids"]


def test_nor_in_two_files(stories, tmp_path):
    rows = variants(40)
    files = [dump(tmp_path / f"{k}.jsonl", rows[k::4]) for k in range(4)]
    assert sum(classification(stories, files).sizes().values()) == 40
    task = classification(stories, [files[0]], evaluation=dump(tmp_path / "held.jsonl", rows[1:80:4]))
    assert task.sizes() == {"train": 16, "validation": 4, "test": 20}
    assert not shown(stories, task.test) & (shown(stories, task.train) | shown(stories, task.validation))
    assert task.notes == ("20 training texts are also in the test file and were left out of training",)
    with pytest.raises(DataError, match="every training text is also in the test file"):
        classification(stories, [files[0]], evaluation=files[3])


def test_pairs_that_share_one_text_are_no_repeats(stories, tmp_path):
    rows = [
        {"premise": f"a premise of twelve, number {i % 12}", "hypothesis": f"so it is {i}", "label": i % 2} for i in range(72)
    ]
    again = [{**row, "premise": row["premise"].upper(), "hypothesis": row["hypothesis"] + " "} for row in rows[:10]]
    swapped = [{**row, "premise": row["hypothesis"], "hypothesis": row["premise"]} for row in rows[:5]]
    task = classification(stories, [dump(tmp_path / "a.jsonl", rows + again + swapped)])
    assert sum(task.sizes().values()) == 77
    assert task.notes[0].startswith("10 duplicate pairs of texts were left out, so that no pair is in two parts (10 of them")
    held = dump(tmp_path / "held.jsonl", [*again, {"premise": rows[20]["premise"], "hypothesis": "not so", "label": 0}])
    task = classification(stories, [tmp_path / "a.jsonl"], evaluation=held)
    assert sum(task.sizes().values()) - 11 == 67
    assert "10 training texts are also in the test file" in task.notes[-1]


def test_labels_that_contradict_each_other_are_said():
    texts = [f"text {i}" for i in range(20)]
    twice = Examples((*texts, "Text 3", "text  4", "text 5"), (*([0, 1] * 10), 0, 0, 0), ("no", "yes"))
    assert split(twice).notes[-1] == (
        "2 duplicate texts have different labels, and the first was kept: 'text 3' is 'yes' and 'no'"
    )
    held = Examples(("TEXT 0", "text 1", "new", "New"), (1, 1, 0, 0), ("no", "yes"))
    assert split(Examples(tuple(texts), (0, 1) * 10, ("no", "yes")), test=held).notes == (
        "2 training texts are also in the test file and were left out of training",
        "1 of them have another label in the test file",
        "1 texts of the test file are duplicates, and each counts in the score",
    )


def test_equal_tokens_are_the_same_text():
    examples = Examples(tuple(f"text {i}" for i in range(30)), (0, 1) * 15, ("no", "yes"))
    tokens = [same_tokens([i % 20, 7]) for i in range(30)]
    found = places(examples, tokens=tokens)
    kept = [tokens[i] for i in (*found.train, *found.validation, *found.test)]
    assert len(kept) == len(set(kept)) == 20
    assert found.notes == ("10 texts that give the same tokens as another, after cutting, were left out, too",)
    assert same_tokens([3, 100, 5], unknown=100) == b"", "unknown words may differ"
    assert places(examples, tokens=[b""] * 30).notes == ()


def test_texts_that_are_equal_after_cutting(stories, tmp_path):
    start = "This is how every one of these long reviews of films begins, word for word. "
    rows = [{"text": f"{start}{i}", "label": i % 2} for i in range(40)] + [
        {"text": f"{i} films", "label": i % 2} for i in range(40)
    ]
    task = classification(stories, [dump(tmp_path / "a.jsonl", rows)], max_length=24)
    assert sum(task.sizes().values()) == 41
    assert "39 texts that give the same tokens as another" in task.notes[0]


def test_words_that_the_tokenizer_does_not_know(bert_folder, tmp_path):
    """A few texts that only differ in them are one text to the model; where most do, they are compared by their characters."""
    tokenizer = models.load_tokenizer(str(bert_folder))
    known = itertools.product(("one", "two", "three"), ("good", "bad", "dull"), ("plot", "story", "it"))
    rows = [{"text": f"the film {' '.join(words)}", "label": i % 2} for i, words in enumerate(known)]
    smiles = [{"text": f"the film was good {smile}", "label": i % 2} for i, smile in enumerate("😀😡")]
    task = classification(tokenizer, [dump(tmp_path / "few.jsonl", rows + smiles)])
    assert sum(task.sizes().values()) == 28
    assert [note.split(" ", 1)[1][:25] for note in task.notes] == ["texts that give the same ", "duplicate texts have diff"]
    many = [{"text": f"the film {i}", "label": i % 2} for i in range(60)]
    task = classification(tokenizer, [dump(tmp_path / "many.jsonl", many)])
    assert sum(task.sizes().values()) == 60
    assert task.notes == (
        "59 texts have the tokens of another text, since the tokenizer does not know the words that they differ in",
    )


# --- documents ------------------------------------------------------------------------------------------------------------

DOCUMENTS = [f"Document {i}: a mouse named N{i} went to the market and bought {i * 7} apples." for i in range(60)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_documents_are_read_once(stories, tmp_path, kind):
    rows = DOCUMENTS + [d.upper() for d in DOCUMENTS[:20]] + [d.replace(" ", "\u00a0 ") for d in DOCUMENTS[10:30]]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        dump(path, [{"text": row} for row in rows])
    elif kind == "csv":
        path.write_text("text\n" + "".join(f'"{row}"\n' for row in rows), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    once = language_modelling(stories, [dump(tmp_path / "once.jsonl", [{"text": d} for d in DOCUMENTS])], max_length=16)
    task = language_modelling(stories, [path], max_length=16)
    assert task.notes[0].startswith("40 duplicate documents")
    assert sorted(task.train["input_ids"]) == sorted(once.train["input_ids"])
    assert list(task.test["input_ids"]) == list(once.test["input_ids"])


def test_documents_of_the_test_file_are_not_trained_on(stories, tmp_path):
    files = [dump(tmp_path / f"{k}.jsonl", [{"text": d} for d in DOCUMENTS[k::2]]) for k in range(2)]
    held = dump(tmp_path / "held.jsonl", [{"text": d.lower()} for d in DOCUMENTS[:12]])
    task = language_modelling(stories, [*files, files[0]], evaluation=held, max_length=16)
    assert [note.split(" documents")[0] for note in task.notes] == ["30 duplicate", "12 training"]
    rest = dump(tmp_path / "rest.jsonl", [{"text": d} for d in DOCUMENTS[12::2] + DOCUMENTS[13::2]])
    whole = language_modelling(stories, [rest], evaluation=held, max_length=16)
    assert sorted(task.train["input_ids"]) == sorted(whole.train["input_ids"])
    with pytest.raises(DataError, match=r"every training document is also in .*held.jsonl, so nothing is left to train on"):
        language_modelling(stories, [held], evaluation=held, max_length=16)


def test_the_same_text_file_twice(stories, tmp_path):
    text = "\n".join(DOCUMENTS)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text.upper().replace("\n", "\n\n"))
    once = language_modelling(stories, [tmp_path / "a.txt"], max_length=16)
    task = language_modelling(stories, [tmp_path / "a.txt", tmp_path / "b.txt"], max_length=16)
    assert task.sizes() == once.sizes()
    assert task.notes[0].startswith("1 duplicate documents")
    with pytest.raises(DataError, match="every training document is also in"):
        language_modelling(stories, [tmp_path / "a.txt"], evaluation=tmp_path / "b.txt", max_length=16)
    packed = pretraining(BYTES, [tmp_path / "a.txt", tmp_path / "b.txt"], length=32, cache=tmp_path / "cache")
    assert packed.notes[0].startswith("1 duplicate documents")
    assert len(packed.train) == len(pretraining(BYTES, [tmp_path / "a.txt"], length=32, cache=tmp_path / "cache").train)


def numbers(rows):
    """The numbers of the documents in blocks of bytes."""
    text = bytes(t if t < 256 else 10 for row in rows for t in row).decode(errors="replace").lower()
    return [line.split(":")[0] for line in text.split("\n") if line.startswith("document ") and ":" in line]


@pytest.mark.parametrize("held", [False, True])
def test_packed_files_hold_each_document_once(tmp_path, held):
    path = dump(tmp_path / "a.jsonl", [{"text": d} for d in (*DOCUMENTS, *map(str.upper, DOCUMENTS), *DOCUMENTS)])
    evaluation = dump(tmp_path / "held.jsonl", [{"text": d + " "} for d in DOCUMENTS[:20]]) if held else None
    for _ in range(2):  # the second time from the cache
        task = pretraining(BYTES, [path], length=32, evaluation=evaluation, cache=tmp_path / "cache")
        assert [note.split(" documents")[0] for note in task.notes] == (
            ["120 duplicate", "20 training"] if held else ["120 duplicate"]
        )
        assert task.train.column_names == ["input_ids"]
        tokens = sum(
            len(row["input_ids"]) for part in (task.train, task.validation, *([] if held else [task.test])) for row in part
        )
        want = sum(len(d) + 1 for d in (DOCUMENTS[20:] if held else DOCUMENTS))
        assert want - 32 < tokens <= want
    other = dump(tmp_path / "held.jsonl", [{"text": d} for d in DOCUMENTS[:5]])
    if held:
        assert (
            "5 training documents" in pretraining(BYTES, [path], length=32, evaluation=other, cache=tmp_path / "cache").notes[1]
        )


def test_a_stream_never_trains_on_what_it_holds_out(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    dump(folder / "train.jsonl", [{"text": d} for d in (*DOCUMENTS, *map(str.upper, DOCUMENTS[:30]), *DOCUMENTS)])
    task = pretraining(BYTES, [f"datasets:{folder}"], length=32)
    held = numbers([row["input_ids"] for part in (task.validation, task.test) for row in part])
    assert len(held) == len(set(held)) > 20
    blocks = [row["input_ids"] for row in itertools.islice(iter(task.train), 10_000 // 32)]
    seen = {bytes(t for t in row if t < 256).lower() for row in blocks}
    assert not any(f"{number}:".encode() in text for number in held[:-1] for text in seen)
    assert "duplicates of the first 131,072 documents" in task.notes[-1]


# --- text that repeats itself within a document ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["again", "shuffled"])
def test_a_text_file_that_repeats_itself_is_noticed(stories, tmp_path, order):
    again = list(DOCUMENTS)
    if order == "shuffled":
        random.Random(0).shuffle(again)
    path = tmp_path / "a.txt"
    path.write_text("\n".join(DOCUMENTS + again))
    task = language_modelling(stories, [path], max_length=64)
    held = len(task.test) + len(task.validation)
    count = int(task.notes[0].removeprefix("at least half of the text of ").split(f" of {held} held-out blocks is in the")[0])
    assert count == held if order == "again" else count > held // 3
    packed = pretraining(BYTES, [path], length=64, cache=tmp_path / "cache")
    assert f"of {len(packed.validation) + len(packed.test)} held-out blocks" in packed.notes[0]
    path.write_text("\n".join(DOCUMENTS))
    assert language_modelling(stories, [path], max_length=64).notes == ()


def test_a_play_does_not_repeat_itself(stories):
    assert language_modelling(stories, ["lowdim:shakespeare"], max_length=64).notes == ()


def test_blocks_that_repeat_are_counted(monkeypatch):
    from lowdim.train import overlap

    draw = random.Random(1)
    train = [[draw.randrange(5000) for _ in range(40)] for _ in range(50)]
    text = list(itertools.chain.from_iterable(train))
    half = text[333:353] + [draw.randrange(5000) for _ in range(20)]
    most = text[333:363] + [draw.randrange(5000) for _ in range(10)]
    held = [text[17:57], most, half, [draw.randrange(5000) for _ in range(40)], text[-40:]]
    assert repeated_blocks(train, held, 12) == 3
    monkeypatch.setattr(overlap, "_AT_ONCE", 90)
    assert repeated_blocks(train, held, 12) == 3, "in pieces as in one"
    assert overlap_note(train, held, 5000)[0].startswith("at least half of the text of 3 of 5 held-out blocks")
    assert overlap_note(train, [[1] * 40], 5000) == []
    assert repeated_blocks(train, held, 40) == 2, "whole blocks only"
    assert repeated_blocks(train, held, 41) == 0
