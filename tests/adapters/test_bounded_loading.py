"""An adapter file of a few bytes cannot make its reader allocate gigabytes, whatever numbers its description holds."""

import json

import pytest
import torch

import lowdim
from golden import adapters, bases
from lowdim.adapters.core.files import layout
from lowdim.adapters.core.files.bounds import BoundedAllocation
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors, write_tensors

CHOSEN = [
    "lora",
    "lora-conv2d",
    "lamda",
    "randlora-sparse",
    "sora",
    "svfit",
    "loldu",
    "nola",
    "said",
    "s2ft",
    "flora",
    "sara",
    "increlora",
]


def places(value, path=()):
    """The paths of all integers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path


def changed(value, path, number):
    if not path:
        return number
    return {**value, path[0]: changed(value[path[0]], path[1:], number)}


@pytest.mark.parametrize("name", [name for name in adapters.CASES if name in CHOSEN])
@pytest.mark.parametrize("number", [10**8, 10**12, 2**62])
def test_numbers_out_of_all_proportion(tmp_path, name, number):
    """The digest is right, as an enemy's would be."""
    folder = adapters.load(name)[0].save(tmp_path / "a")
    (folder / "adapter.json").unlink()
    tensors, metadata = read_tensors(folder / "adapter.safetensors")
    description = json.loads(metadata["lowdim"])
    description.pop("digest")
    first = next(iter(description["layers"]), None)
    found = [("config", *path) for path in places(description["config"])]
    found += [("layers", first, "meta", *path) for path in places(description["layers"][first]["meta"])] if first else []
    limit = 2**20
    for path in found:
        content = changed(description, path, number)
        content["digest"] = layout.digest_of(tensors, content)
        write_tensors(folder / "adapter.safetensors", tensors, {"lowdim": json.dumps(content)})
        model, _ = bases.read(adapters.CASES[name].base)
        try:
            adapted = lowdim.load_adapter(model, folder)
        except CheckpointError:
            continue
        assert all(p.numel() < limit for p in adapted.model.parameters()), path


def test_the_bound_follows_the_file_and_the_model():
    assert BoundedAllocation({}, []).most_entries == 2**24
    bounded = BoundedAllocation({"a": torch.zeros(10)}, [(4096, 4096)])
    assert bounded.most_entries == 64 * 4096 * 4096
    bounded.most_entries = 100
    with bounded:
        assert torch.zeros(10, 10).numel() == 100
        for make in (
            lambda: torch.zeros(10, 11),
            lambda: torch.empty(101),
            lambda: torch.randn(101),
            lambda: torch.arange(101),
            lambda: torch.randperm(101),
            lambda: torch.full((101,), 1.0),
        ):
            with pytest.raises(ValueError, match="it asks for a tensor of 1"):
                make()
        bounded.left = 2
        torch.zeros(1), torch.zeros(1)
        with pytest.raises(ValueError, match="far more tensors than its file holds"):
            torch.zeros(1)
    torch.zeros(101)
