"""Damaged files end in one typed error or in the right numbers; `make fuzz` is the long run."""

import random
import time

import pytest
import torch
from safetensors.torch import load_file

from fuzz import run
from fuzz.damage import damaged
from fuzz.readers import READERS, Reader
from fuzz.run import sweep
from lowdim.files import read_tensors, write_tensors

COUNT = 10_000
_WEIGHT = sum(reader.weight for reader in READERS.values())


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.quick])
def test_a_damaged_file_is_answered_rightly(name):
    assert list(sweep(name, 6 * READERS[name].weight)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_answered_rightly(name):
    assert list(sweep(name, COUNT * READERS[name].weight // _WEIGHT, seed=1)) == []


@pytest.mark.parametrize("name", ["a.safetensors", "a.json", "a.yaml", "a.parquet", "a.csv"])
def test_damage_changes_nearly_every_file_and_is_the_same_each_time(name):
    data = (8).to_bytes(8, "little") + b'{"a": 1}' + bytes(range(200))
    found = [damaged(name, data, random.Random(i)) for i in range(200)]
    assert found == [damaged(name, data, random.Random(i)) for i in range(200)]
    assert sum(one != data for one in found) > 180
    assert len(set(found)) > 90


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda folder: read_tensors(folder / "a.safetensors")[0], "other numbers are accepted"),
        (lambda folder: load_file(folder / "a.safetensors"), "SafetensorError"),
        (lambda folder: time.sleep(60) if _damaged(folder) else {}, "nothing after 1 s"),
    ],
)
def test_the_sweep_finds_readers_that_check_nothing(monkeypatch, read, what):
    def make(folder):
        write_tensors(folder / "a.safetensors", {"a": torch.arange(20.0)})
        write_tensors(folder / "b.safetensors", {"a": torch.arange(20.0)})

    monkeypatch.setitem(READERS, "plain", Reader(make, ("a.safetensors",), read, sealed=True))
    monkeypatch.setattr(run, "LIMIT", 1)
    assert what in next(finding.what for finding in sweep("plain", 60) if "keys" not in finding.what)


def _damaged(folder):
    return (folder / "a.safetensors").read_bytes() != (folder / "b.safetensors").read_bytes()
