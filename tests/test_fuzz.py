"""Damaged files end in one typed error or in the right numbers; `make fuzz` is the long run."""

import random

import pytest

from fuzz.damage import damaged
from fuzz.readers import READERS
from fuzz.run import sweep

COUNT = 10_000
_WEIGHT = sum(reader.weight for reader in READERS.values())


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_answered_rightly(name):
    assert list(sweep(name, 12 * READERS[name].weight)) == []


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
    assert len(set(found)) > 120


def test_a_reader_that_accepts_other_numbers_or_fails_bare_is_found(monkeypatch):
    """The sweep itself: without the checksum, it finds files that are accepted with other numbers."""
    from lowdim.adapters.core.files import checkpoint

    monkeypatch.setattr(checkpoint, "digest_of", lambda *args, **kwargs: "same", raising=True)
    assert any("other numbers" in finding.what for finding in sweep("adapter", 60))
