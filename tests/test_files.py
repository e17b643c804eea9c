import errno
import json
import os

import pytest
import torch

from lowdim import files
from lowdim.errors import CheckpointError
from lowdim.files import (
    read_json,
    read_json_object,
    read_tensors,
    syncing,
    whole_folder,
    write_bytes,
    write_json,
    write_pieces,
    write_tensors,
    write_text,
)


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    path = write_bytes(tmp_path / "a/b/c.bin", b"123")
    assert path.read_bytes() == b"123"
    write_text(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert os.listdir(path.parent) == ["c.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = write_bytes(tmp_path / "x", b"old")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match=r"could not write .*x \(No space left.*nothing was changed") as caught:
        write_bytes(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_an_interruption_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "x", b"old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_large_data_are_written_a_megabyte_at_a_time(tmp_path):
    data = os.urandom(5 * 2**19 + 3)
    assert write_bytes(tmp_path / "x", data).read_bytes() == data

    class Stream(list):
        def write(self, piece):
            self.append(len(piece))

    write_pieces(stream := Stream(), data)
    assert stream == [2**20, 2**20, 2**19 + 3]


def test_what_could_not_be_synced_is_an_error_and_the_others_are_synced(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    (tmp_path / "c").write_text("c")
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda number: seen.append(os.fstat(number).st_ino))
    with pytest.raises(FileNotFoundError, match="b"), syncing() as sync:  # noqa: PT012
        for name in "abc":
            sync(tmp_path / name)
    assert seen == [(tmp_path / name).stat().st_ino for name in "ac"]


def test_files_are_synced_while_the_next_is_written(tmp_path, monkeypatch):
    import threading

    seen, written = [], threading.Event()

    def fsync(number):
        assert written.wait(10)
        seen.append(threading.current_thread() is threading.main_thread())

    monkeypatch.setattr(files.os, "fsync", fsync)
    (tmp_path / "a").write_text("a")
    with syncing() as sync:
        sync(tmp_path / "a")
        assert seen == []
        written.set()
    assert seen == [False]


def test_json_names_no_infinities(tmp_path):
    path = write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1.5, float("inf")], "c": (1, 2), 3: "ä"})
    assert read_json(path) == {"a": None, "b": [1.5, None], "c": [1, 2], "3": "ä"}
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_damaged_json(tmp_path):
    path = write_json(tmp_path / "x.json", {"a": 1})
    path.write_text(path.read_text()[:-4])
    with pytest.raises(CheckpointError, match=r"x\.json is damaged"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="damaged"):
        read_json(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_json(tmp_path / "y.json")


def test_tensors_keep_dtype_layout_and_metadata(tmp_path):
    base = torch.arange(12.0)
    given = {
        "view": base.view(3, 4).T,
        "shared": base,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "int": torch.tensor(7),
        "grad": torch.ones(2, requires_grad=True),
    }
    path = write_tensors(tmp_path / "x.safetensors", given, {"who": json.dumps({"a": 1})})
    got, metadata = read_tensors(path)
    assert metadata == {"who": '{"a": 1}'}
    for key, value in given.items():
        assert torch.equal(got[key], value)
        assert got[key].dtype == value.dtype


def test_every_truncation_of_a_tensors_file_is_noticed(tmp_path):
    path = write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(8.0)})
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
            read_tensors(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(tmp_path / "none")
    path.write_bytes(b"PK\x03\x04 a pickle, say")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_tensors(path)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_whole_folder_appears_at_once(tmp_path):
    with whole_folder(tmp_path / "a" / "b") as draft:
        (draft / "in").mkdir()
        (draft / "in" / "x").write_bytes(b"1")
        assert not (tmp_path / "a" / "b").exists()
    assert tree(tmp_path) == {"a/b/in/x": b"1"}
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    with whole_folder(tmp_path / "a" / "b") as draft:
        (draft / "in").mkdir()
        (draft / "in" / "x").write_bytes(b"2")
        (draft / "y").write_bytes(b"3")
    assert tree(tmp_path) == {"a/b/in/x": b"2", "a/b/y": b"3"}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("mine"), KeyboardInterrupt()])
def test_a_folder_that_could_not_be_finished_is_as_it_was(tmp_path, there, error):
    if there:
        write_bytes(tmp_path / "b" / "x", b"old")
    before = tree(tmp_path)

    def write():
        with whole_folder(tmp_path / "b") as draft:
            (draft / "x").write_bytes(b"new")
            raise error

    message = r"could not write .*b \(No space left.*nothing was changed" if isinstance(error, OSError) else None
    with pytest.raises(type(error), match=message):
        write()
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["b"] if there else [])


def test_a_file_that_could_not_be_written_is_reported_once(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(
        OSError, match=r"^\[Errno 28\] could not write \S*/b \(No space left on device\); nothing was changed$"
    ) as caught:
        _write_one(tmp_path / "b")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def _write_one(folder):
    with whole_folder(folder) as draft:
        write_text(draft / "x", "new")


def test_a_folder_that_is_a_file(tmp_path):
    write_bytes(tmp_path / "b", b"old")
    with pytest.raises(FileExistsError, match="is a file; name a folder"), whole_folder(tmp_path / "b"):
        pass
    assert tree(tmp_path) == {"b": b"old"}


def test_safetensors_own_error_of_a_full_disk_is_one_of_the_system(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(OSError, match=r"could not write .*\(I/O error: No space left"), whole_folder(tmp_path / "b"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[" * 200_000 + "]" * 200_000, '{"a":' * 100_000, "9" * 5000, "\x00", "nul"])
def test_json_that_cannot_be_read_is_one_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"a\.json is damaged: it is not complete JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ('"a"', "str"), ("null", "NoneType")])
def test_a_file_that_must_hold_an_object(tmp_path, text, kind):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"must hold a JSON object; got {kind}"):
        read_json_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json_object(tmp_path / "a.json") == {"a": 1}
