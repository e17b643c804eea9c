import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from lowdim.errors import DataError
from lowdim.train.embedding_files import read_labels, read_mask, read_vectors

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
ROWS = pa.table({"id": range(6), "vector": list(X), "other": list(2 * X), "kind": list("aabbcc")})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    np.savez("x.npz", x=X, ids=np.arange(6))
    save_file({"x": torch.tensor(X), "half": torch.tensor(X).bfloat16(), "ids": torch.arange(6)}, "x.safetensors")
    pq.write_table(ROWS, "x.parquet")
    pq.write_table(ROWS.select(["id", "vector"]), "one.parquet")
    pq.write_table(pa.table({f"d{i}": X[:, i] for i in range(4)}), "flat.parquet")
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)
    pq.write_table(pa.table({"vector": fixed}), "fixed.parquet")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["x.npy", "x.npz", "x.npz:x", "x.safetensors:x", "x.parquet:vector", "one.parquet", "flat.parquet", "fixed.parquet"]
)
def test_every_format_gives_the_matrix(folder, name):
    found = read_vectors(name)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor(X))
    assert torch.equal(read_vectors(str(folder / name)), found)


def test_half_precision_and_other_byte_orders(folder):
    assert read_vectors("x.safetensors:half").dtype == torch.bfloat16
    np.save("big.npy", X.astype(">f4"))
    assert torch.equal(read_vectors("big.npy"), torch.tensor(X))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("none.npy", "does not exist"),
        (".", "is a folder"),
        ("x.npy:x", "holds one array"),
        ("x.npz:y", "nearest: "),
        ("x.safetensors", "holds 2 matrices"),
        ("x.parquet", "several columns of lists (vector, other)"),
        ("x.parquet:nothing", "must be one of"),
        ("x.parquet:kind", "neither a column of lists"),
        ("text.txt", "must be .npy, .npz, .safetensors or .parquet"),
        ("bad.npy", "not an array of numpy"),
        ("bad.parquet", "not a parquet file"),
        ("bad.safetensors", "damaged"),
        ("vector.npy", "must be a matrix"),
        ("whole.npy", "floating-point"),
        ("uneven.parquet", "must have one length; got 1, 2"),
        ("objects.npy", "not an array of numpy"),
    ],
)
def test_what_cannot_be_read_is_named(folder, name, word):
    for bad in ("text.txt", "bad.npy", "bad.parquet", "bad.safetensors"):
        (folder / bad).write_text("no such thing")
    np.save("vector.npy", X[0])
    np.save("whole.npy", np.ones((2, 2), dtype=np.int64))
    np.save("objects.npy", np.array([[None]]), allow_pickle=True)
    pq.write_table(pa.table({"v": [[1.0], [1.0, 2.0]]}), "uneven.parquet")
    with pytest.raises(ValueError) as error:
        read_vectors(name)
    assert word in str(error.value)


def test_labels_from_files_of_many_kinds(folder):
    np.save("l.npy", np.arange(6) // 2)
    (folder / "l.csv").write_text("text,label\n" + "".join(f"t{i},{i // 2}\n" for i in range(6)))
    (folder / "bare.csv").write_text("a\na\nb\nb\nc\nc\n")
    (folder / "l.txt").write_text("a\na\nb\nb\nc\nc\n")
    (folder / "l.jsonl").write_text("".join(f'{{"group": "{c}"}}\n' for c in "aabbcc"))
    assert read_labels("l.npy", 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert [str(label) for label in read_labels("l.csv", 6)] == ["0", "0", "1", "1", "2", "2"]
    for name in ("bare.csv", "l.txt", "l.jsonl", "x.parquet:kind"):
        assert read_labels(name, 6).tolist() == list("aabbcc"), name


@pytest.mark.parametrize(
    ("text", "word"),
    [("a\nb\n", "holds 2 labels; the embeddings have 3 rows"), ("a\n\nb\n", "label 2 is empty"), ("", "is empty")],
)
def test_labels_that_are_refused(folder, text, word):
    (folder / "l.txt").write_text(text)
    with pytest.raises(DataError, match=word):
        read_labels("l.txt", 3)


def test_columns_of_labels_that_are_refused(folder):
    (folder / "two.csv").write_text("first,second\na,b\nc,d\n")
    with pytest.raises(DataError, match="several columns"):
        read_labels("two.csv", 2)
    with pytest.raises(ValueError, match="must be one of first, second"):
        read_labels("two.csv:third", 2)
    assert read_labels("two.csv:second", 2).tolist() == ["b", "d"]
    np.save("square.npy", X)
    with pytest.raises(DataError, match="must be a vector"):
        read_labels("square.npy", 6)


def test_masks(folder):
    np.save("m.npy", np.array([True, False]))
    (folder / "m.txt").write_text("yes\nno\n")
    (folder / "w.txt").write_text("1\nmaybe\n")
    assert read_mask("m.npy", 2).tolist() == read_mask("m.txt", 2).tolist() == [True, False]
    with pytest.raises(DataError, match="'maybe'"):
        read_mask("w.txt", 2)


def test_a_first_line_that_may_be_a_head_or_a_label(tmp_path):
    file = tmp_path / "short.csv"
    file.write_text("label\na\nb\n")
    with pytest.raises(DataError, match="first is 'label': if it names the column, 2 labels follow and one is missing"):
        read_labels(str(file), 3)
    assert read_labels(str(file), 2).tolist() == ["a", "b"]
    text = file.with_suffix(".txt")
    text.write_text("label\na\nb\n")
    assert read_labels(str(text), 3).tolist() == ["label", "a", "b"]
