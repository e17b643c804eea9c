"""Packing text into blocks: nothing lost, nothing twice, from files and from streams; bad text is refused."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowdim.errors import DataError, UnknownNameError
from lowdim.train.packing import packed, pretraining
from lowdim.train.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
TEXT = "\n".join(f"line {number} of a text that is long enough" for number in range(400))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def rows(part):
    return [row["input_ids"] for row in part]


def tokens(text):
    return list(text.encode())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=150), st.integers(1, 40))
def test_blocks_hold_the_documents_in_order(documents, length):
    want = [token for document in documents for token in [*tokens(document), END]]
    got = list(packed(documents, TOKENIZER, length))
    assert all(len(block) == length for block in got)
    flat = [token for block in got for token in block]
    assert flat == want[: len(flat)]
    assert 0 <= len(want) - len(flat) < length


def test_a_file_is_one_document(file, tmp_path):
    task = pretraining(TOKENIZER, [file], length=32, cache=tmp_path / "cache")
    whole = [*tokens(TEXT), END]
    want = [whole[i : i + 32] for i in range(0, len(whole) - 31, 32)]
    held = rows(task.validation) + rows(task.test)
    assert rows(task.validation) + rows(task.test) == want[-len(held) :]
    assert sorted(rows(task.train)) == sorted(want[: -len(held)])
    assert len(task.validation) == len(task.test) == len(want) // 20
    assert task.kind == "pretrain"
    batch = task.collate([task.train[0], task.train[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 32)


def test_pieces_of_a_large_file_join(tmp_path, monkeypatch):
    """Cut into pieces in the middle of lines and of characters, the tokens are the same."""
    from lowdim.train import text_files

    path = tmp_path / "long.txt"
    path.write_text("äöü€ " * 500 + "\n" + "x" * 900 + "\nend", encoding="utf-8")
    whole = pretraining(TOKENIZER, [path], length=16, cache=tmp_path / "a")
    monkeypatch.setattr(text_files, "_PIECE", 7)
    cut = pretraining(TOKENIZER, [path], length=16, cache=tmp_path / "b")
    assert rows(cut.train) == rows(whole.train)
    assert rows(cut.test) == rows(whole.test)


def test_packed_files_are_kept_and_follow_the_contents(file, tmp_path):
    def kept():
        return {path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*generator*.arrow")}

    pretraining(TOKENIZER, [file], length=32, cache=tmp_path / "cache")
    first = kept()
    assert len(first) == 1
    pretraining(TOKENIZER, [file], length=32, cache=tmp_path / "cache")
    assert kept() == first
    file.write_text(TEXT.upper(), encoding="utf-8")
    other = pretraining(TOKENIZER, [file], length=32, cache=tmp_path / "cache")
    assert bytes(rows(other.test)[0]).isupper()


def test_the_order_follows_the_seed(file, tmp_path):
    parts = [pretraining(TOKENIZER, [file], length=32, seed=seed, cache=tmp_path / "cache") for seed in (0, 0, 1)]
    assert rows(parts[0].train) == rows(parts[1].train)
    assert rows(parts[0].train) != rows(parts[2].train)
    assert sorted(rows(parts[0].train)) == sorted(rows(parts[2].train))


def test_the_limit_and_a_test_file(file, tmp_path):
    other = tmp_path / "held.txt"
    other.write_text("held out text " * 30)
    task = pretraining(TOKENIZER, [file], length=32, limit=5, evaluation=other, cache=tmp_path / "cache")
    assert len(task.train) == 5
    assert rows(task.test)[0] == tokens("held out text " * 30)[:32]


def test_rows_of_a_table_are_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, "text": f"document number {i}"}) for i in range(200)))
    task = pretraining(TOKENIZER, [path], length=8, cache=tmp_path / "cache")
    flat = [token for row in sorted(rows(task.train) + rows(task.validation) + rows(task.test)) for token in row]
    assert flat.count(END) >= 195


# --- streams --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for part in range(2):
        lines = (json.dumps({"n": i, "content": f"document {part} {i:04d} of the stream"}) for i in range(800))
        (folder / f"train-{part}.jsonl").write_text("\n".join(lines))
    return f"datasets:{folder}"


def test_a_source_of_datasets_is_streamed(source):
    task = pretraining(TOKENIZER, [source], length=64)
    assert not hasattr(task.train, "__len__")
    first = rows(itertools.islice(iter(task.train), 100))
    assert first == rows(itertools.islice(iter(task.train), 100))  # the same again: a resumed run skips what it has seen
    held = rows(task.validation) + rows(task.test)
    assert len(task.validation) == len(task.test) == 64
    assert not {tuple(r) for r in held} & {tuple(r) for r in rows(itertools.islice(iter(task.train), 900))}
    assert list(task.sizes()) == ["validation", "test"]
    assert (
        "content" in bytes(t for t in held[0] if t < 256).decode()
        or "document" in bytes(t for t in held[0] if t < 256).decode()
    )


def test_a_stream_begins_again(source):
    task = pretraining(TOKENIZER, [source], length=64, limit=10)
    seen = [tuple(row) for row in rows(itertools.islice(iter(task.train), 45))]
    assert len(set(seen)) == 10


def test_files_can_be_streamed(file):
    task = pretraining(TOKENIZER, [file], length=32, streaming=True)
    assert rows(task.validation)[0] == tokens(TEXT)[:32]
    assert len(rows(itertools.islice(iter(task.train), 3))) == 3


def test_sample_batches_of_a_stream(source):
    import torch

    task = pretraining(TOKENIZER, [source], length=64)
    batches = list(task.sample_batches(2, 3, torch.device("cpu")))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(3, 64), (3, 64)]


# --- what is refused ------------------------------------------------------------------------------------------------------


def test_bad_text(tmp_path):
    cases = {
        "empty.txt": (b"", "is empty"),
        "spaces.txt": (b" \n ", "is empty"),
        "binary.txt": (b"abc\0\1\2def" * 20, "is not text: it holds zero bytes"),
        "latin.txt": ("é".encode("latin-1") * 100, "is not UTF-8"),
        "short.txt": (b"too short", r"gives 0 blocks of 64 tokens; at least 3 are needed"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        for streaming in (False, True):
            with pytest.raises(DataError, match=message):
                pretraining(TOKENIZER, [path], length=64, cache=tmp_path / "cache", streaming=streaming)
    with pytest.raises(DataError, match="no such file"):
        pretraining(TOKENIZER, [tmp_path / "nowhere.txt"], length=64)
    (tmp_path / "long.txt").write_text(TEXT)
    with pytest.raises(DataError, match="is shorter than a block"):
        pretraining(TOKENIZER, [tmp_path / "long.txt"], length=64, evaluation=tmp_path / "short.txt", cache=tmp_path / "cache")


def test_a_large_file_is_checked_while_it_is_read(tmp_path, monkeypatch):
    from lowdim.train import text_files

    monkeypatch.setattr(text_files, "_LARGE", 10)
    path = tmp_path / "late.txt"
    path.write_bytes(b"fine " * 200 + b"\xff\xff")
    with pytest.raises(DataError, match="is not UTF-8: near byte 1000"):
        pretraining(TOKENIZER, [path], length=16, cache=tmp_path / "cache")


def test_bad_sources(file, source, tmp_path):
    with pytest.raises(DataError, match="files or a source of datasets; got both"):
        pretraining(TOKENIZER, [file, source])
    with pytest.raises(DataError, match="one source of datasets at a time"):
        pretraining(TOKENIZER, [source, source])
    with pytest.raises(DataError, match="cannot be read"):
        pretraining(TOKENIZER, [f"datasets:{tmp_path / 'nowhere'}"])
    with pytest.raises(UnknownNameError, match=r"--text.*nearest: content"):
        pretraining(TOKENIZER, [source], text="contents")
    with pytest.raises(DataError, match="streaming=False is for files"):
        pretraining(TOKENIZER, [source], streaming=False)


def test_what_the_model_reads_at_once(file, tmp_path):
    task = pretraining(TOKENIZER, [file], length=64, most=16, cache=tmp_path / "cache")
    assert task.max_length == 16
    assert "blocks have 16 tokens, not 64" in task.notes[0]
