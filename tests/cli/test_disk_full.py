"""A full disk: one clear message, and nothing half-written."""

import errno
import json
import os
import subprocess

import pytest


def test_a_disk_that_is_full_when_a_file_is_put_in_place(call, refused, recipe, finished, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    call("report", finished, "--out", tmp_path / "page.html")
    old = (tmp_path / "page.html").read_bytes()
    monkeypatch.setattr(os, "replace", full)
    message = refused("report", finished, "--out", tmp_path / "page.html")
    assert "could not write" in message
    assert "No space left on device" in message
    assert (tmp_path / "page.html").read_bytes() == old
    assert "No space left" in refused("export", finished, tmp_path / "out")
    assert "No space left" in refused("run", recipe())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "page.html", "recipe.yaml"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def little_disk(tmp_path):
    """A file system of so many KiB."""
    made = []

    def make(size):
        place = tmp_path / f"disk{len(made)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a small file system")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_that_is_really_full(refused, recipe, finished, little_disk):
    disk = little_disk(128)
    message = refused("export", finished, disk / "merged", "--format", "merged")
    assert "could not write" in message
    assert "No space left on device" in message
    assert list(disk.iterdir()) == [], "nothing half-written"
    # An adapter of a run: the training is lost, and said so; the folder holds the recipe and no half of an adapter.
    message = refused("run", recipe(options={"rank": 32}), "--out", disk / "run")
    assert "could not write" in message
    assert not (disk / "run" / "adapter").exists()
    assert not list((disk / "run").glob(".*"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("size", [700, 2500])
def test_a_disk_that_fills_with_checkpoints(size, refused, call, recipe, little_disk):
    disk = little_disk(size)  # the first checkpoint does not fit, or the second does not
    path = recipe(save_steps=1, steps=4)
    message = refused("run", path, "--out", disk / "run")
    assert "could not write a checkpoint" in message
    assert "No space left on device" in message
    whole = sorted(p.name for p in (disk / "run" / "checkpoints").iterdir())
    assert whole == ([] if size < 1000 else ["checkpoint-1"])
    assert ("--resume" in message) == bool(whole)
    assert {p.name for p in (disk / "run").iterdir()} == {"recipe.yaml", "checkpoints"}
    if whole:
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert call("run", path, "--out", disk / "run", "--resume")[0] == 0
        assert json.loads((disk / "run" / "run.json").read_text())["loss_steps"] == [1, 2, 3, 4]
