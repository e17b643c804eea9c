"""One process for an output: the lock is taken, refused, given back, and ends with its process; dead files are cleared."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from lowdim.checksums import check_files, checksums
from lowdim.errors import CheckpointError, InUseError
from lowdim.files import read_json, whole_folder, write_bytes, write_json
from lowdim.locking import exclusive
from lowdim.records import claim
from lowdim.temporary import clear_temporaries, is_temporary, temporary_file, temporary_folder

HOLD = """
import sys, time
from lowdim.locking import exclusive
from lowdim.temporary import temporary_file, temporary_folder
from pathlib import Path
out = Path(sys.argv[1])
with exclusive(out), temporary_folder(out / "sub") as folder:
    handle, name = temporary_file(out / "file")
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_full_disk_is_named_and_leaves_no_lock(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    message = r"could not write .*out \(No space left on device\); nothing was changed"
    with pytest.raises(OSError, match=message), exclusive(tmp_path / "new" / "out"):
        pytest.fail("the lock was not taken")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with exclusive(tmp_path / "new" / "out"):
        assert (tmp_path / "new").is_dir()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder and writes two temporaries in it."""
    (tmp_path / "out").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def take(path):
    with exclusive(path):
        pass


def test_another_process_is_refused_until_the_first_is_dead(tmp_path, holder):
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    for name in (out, tmp_path / "." / "out", tmp_path / "link", out / ".." / "out"):  # one folder under four names
        with pytest.raises(
            InUseError, match=rf"is in use by another lowdim command \(process {holder.pid} on .*or name another"
        ):
            take(name)
    clear_temporaries(out)
    assert len([p for p in out.iterdir() if is_temporary(p)]) == 2, "a live process keeps its temporary files"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".out.lowdim.lock").exists()
    with exclusive(out):
        clear_temporaries(out)
        assert list(out.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]


def test_the_same_thread_may_ask_again_and_another_may_not(tmp_path):
    refused = []

    def other():
        try:
            take(tmp_path / "out")
        except InUseError as error:
            refused.append(str(error))

    with exclusive(tmp_path / "out"):
        take(tmp_path / "out")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        take(tmp_path / "elsewhere")
    assert "in use" in refused[0]
    take(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_command_leaves_no_folders(tmp_path):
    with pytest.raises(ValueError, match="mine"), exclusive(tmp_path / "a" / "b" / "out"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []
    with exclusive(tmp_path / "a" / "b" / "out"):
        write_bytes(tmp_path / "a" / "b" / "out" / "x", b"1")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written(tmp_path):
    (tmp_path / "out").mkdir()
    tmp_path.chmod(0o555)
    try:
        with exclusive(tmp_path / "out"):
            assert [p.name for p in (tmp_path / "out").iterdir()] == [".lowdim.lock"]
            assert claim(tmp_path / "out", "recipe.yaml", "run", False) is None
    finally:
        tmp_path.chmod(0o755)
    assert list((tmp_path / "out").iterdir()) == []


def test_only_dead_temporaries_are_removed(tmp_path):
    out = tmp_path / "out"
    (out / "runs" / "lora").mkdir(parents=True)
    dead = [
        out / ".run.json.abcdef12.tmp",
        out / "runs" / "lora" / ".weights.safetensors.0a_9zzzz.tmp",
        tmp_path / ".out.abcdefgh.tmp",
    ]
    for path in dead[:2]:
        path.write_bytes(b"part")
    dead[2].mkdir()
    (dead[2] / "model.safetensors").write_bytes(b"part")
    kept = [
        out / "notes.tmp",
        out / ".notes.tmp",
        out / ".run.json.ABCDEF12.tmp",
        tmp_path / ".other.abcdefgh.tmp",
        tmp_path / ".out.x.abcdefgh.tmp",
    ]
    for path in kept:
        path.write_bytes(b"mine")
    handle, name = temporary_file(out / "x")
    with temporary_folder(out) as draft:
        clear_temporaries(out)
        assert draft.exists()
        assert os.path.exists(name)
    os.close(handle)
    assert [p for p in dead if p.exists()] == []
    assert all(p.exists() for p in kept)


def test_a_claim_is_not_hindered_by_what_a_kill_left(tmp_path):
    (tmp_path / ".recipe.yaml.abcdef12.tmp").write_text("model: ")
    assert claim(tmp_path, "recipe.yaml", "run", True) is None
    (tmp_path / "mine.tmp").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no run"):
        claim(tmp_path, "recipe.yaml", "run", True)


def test_a_killed_export_into_an_empty_folder_leaves_it_empty(tmp_path, monkeypatch):
    """The files of a new model appear at once, also where the folder was there before."""
    out, seen, replace = tmp_path / "out", [], os.replace
    out.mkdir()

    def record(source, target):
        seen.append(os.fspath(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    with whole_folder(out) as draft:
        (draft / "a").write_text("1")
        (draft / "b").write_text("2")
    assert seen == [str(out)]
    assert sorted(p.name for p in out.iterdir()) == ["a", "b"]


def test_every_flipped_bit_of_a_sealed_file_is_noticed_or_harmless(tmp_path):
    value = {"loss": 0.125, "losses": [1.5, None, -2], "name": "größer", "nested": {"a": {"b": [True]}}}
    path = write_json(tmp_path / "x.json", value, sealed=True)
    assert read_json(path) == value
    data, refused = path.read_bytes(), 0
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            read = read_json(path)
        except CheckpointError:
            refused += 1
        else:
            assert {k: read[k] for k in value} == value, f"bit {bit} was read as {read}"
    assert refused > len(data) * 4
    with pytest.raises(CheckpointError, match=r"x\.json is damaged, or was edited.*restore it from a copy"):
        read_json(write_json(path, {**json.loads(data), "loss": 0.25}))


def test_files_are_checked_one_by_one(tmp_path):
    write_bytes(tmp_path / "a" / "x", b"1" * 100)
    write_bytes(tmp_path / "y", b"2")
    expected = checksums(tmp_path, without=["y"])
    assert list(expected) == ["a/x"]
    check_files(tmp_path, expected, "try again")
    write_bytes(tmp_path / "a" / "x", b"1" * 99 + b"3")
    with pytest.raises(CheckpointError, match=r"a/x is damaged: its content does not match its checksum; try again"):
        check_files(tmp_path, expected, "try again")
    (tmp_path / "a" / "x").unlink()
    with pytest.raises(CheckpointError, match=r"a/x is missing; try again"):
        check_files(tmp_path, expected, "try again")
