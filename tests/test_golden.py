"""Files that an earlier lowdim wrote are read, and give the numbers that they gave then (`golden/make.py` wrote them)."""

import pytest
import torch

from golden import adapters, curves, layers, optimizers
from lowdim.catalogue import entries
from lowdim.files import read_json, read_tensors

#: Largest error relative to the largest wanted entry, by the dtype of what was stored; whole numbers must be equal. Draws and
#: decompositions that are made again may differ by a rounding on another processor; a changed formula differs by far more.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert (got[name].dtype, got[name].shape) == (expected.dtype, expected.shape), name
        if expected.dtype not in TOLERANCES:
            assert torch.equal(got[name], expected), name
            continue
        error = float((got[name] - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCES[expected.dtype], f"{name}: relative error {error:.3g}"


@pytest.mark.parametrize("name", adapters.CASES)
def test_a_stored_adapter_answers_and_goes_on_as_it_did(name):
    adapted, batch, want = adapters.load(name)
    assert_close(adapters.answers(adapted, batch, adapters.CASES[name].merges), want)


@pytest.mark.parametrize("name", adapters.CASES)
def test_a_stored_adapter_is_saved_as_it_was(name, tmp_path, monkeypatch):
    monkeypatch.chdir(adapters.FOLDER / name)  # the names of aTLAS's task vector files are relative
    folder = adapters.load(name)[0].save(tmp_path)
    (tensors, about), (stored, wanted) = (
        read_tensors(place / "adapter.safetensors") for place in (folder, adapters.FOLDER / name)
    )
    assert tensors.keys() == stored.keys()
    assert all(tensors[key].dtype == stored[key].dtype and torch.equal(tensors[key], stored[key]) for key in stored)
    assert about.keys() == wanted.keys()
    description, before = (read_json(place / "adapter.json") for place in (folder, adapters.FOLDER / name))
    assert description == {**before, "lowdim": description["lowdim"]}


def test_every_adapter_of_the_catalogue_has_a_stored_one():
    systems = {row.slug for row in entries() if row.family == "adapters" and row.available}
    variants = {v.name for row in entries() if row.slug in systems for v in row.variants} | {"lora"}
    assert systems | variants <= {path.name for path in adapters.FOLDER.iterdir()}


@pytest.mark.parametrize("name", optimizers.CASES)
def test_a_stored_optimizer_goes_on_as_it_did(name):
    assert_close(*optimizers.load(name))


@pytest.mark.parametrize("name", layers.CASES)
def test_a_stored_layer_answers_as_it_did(name):
    assert_close(*layers.load(name))


@pytest.mark.parametrize("name", sorted(path.stem for path in curves.FOLDER.glob("*.json")))
def test_a_short_run_gives_the_stored_numbers(name):
    """To the bit where it was stored on this processor with these versions, to 1e-5 elsewhere."""
    got, want = curves.curve(name), read_json(curves.place(name))
    tolerance = 0.0 if got.pop("environment") == want.pop("environment") else 1e-5
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert curves.flat(got[key]) == pytest.approx(curves.flat(value), rel=tolerance, abs=0), key
