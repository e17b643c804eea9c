"""An adapter's two files: what they say, what comes back from them, and what a save replaces, refuses or warns of."""

import json
import os

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import LaMDA, LoRA, SVFit
from lowdim.adapters.core.files import layout
from lowdim.files import read_tensors
from lowdim.testing.small_model import sample_input, small_model


def test_two_files_that_say_what_they_are(saved):
    _, folder = saved
    assert sorted(os.listdir(folder)) == ["adapter.json", "adapter.safetensors"]
    about = json.loads((folder / "adapter.json").read_text())
    assert about["format"] == "lowdim-adapter"
    assert about["method"] == "LoRA"
    assert about["config"]["rank"] == 2
    assert about["lowdim"] == lowdim.__version__
    assert about["modules_to_save"] == ["score"]
    assert about["layers"]["body.first"]["shape"] == [12, 8]
    assert about["base_model"] == {"class": "_Small", "name_or_path": None}


def test_heads_come_back_and_train(saved):
    adapted, folder = saved
    model = small_model()
    loaded = lowdim.load_adapter(model, folder)
    assert torch.equal(model(sample_input()), adapted.model(sample_input()))
    assert set(loaded.trainable()) == set(adapted.trainable())
    assert model.score.weight.requires_grad
    assert not model.body["first"].base.weight.requires_grad
    assert loaded.seed == adapted.seed
    assert loaded.fingerprints == adapted.fingerprints


def test_saving_again_replaces_the_whole(saved):
    adapted, folder = saved
    with torch.no_grad():
        adapted.model.score.weight.zero_()
    adapted.save(folder)
    model = small_model()
    lowdim.load_adapter(model, folder)
    assert not model.score.weight.any()


def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch):
    adapted, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        adapted.model.score.weight.zero_()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout, "write_tensors", fail)
    with pytest.raises(OSError, match=r"No space left on device.*nothing was changed"):
        adapted.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    model = small_model()
    lowdim.load_adapter(model, folder)
    assert model.score.weight.any()


@pytest.mark.parametrize("method", [LaMDA(rank=2), SVFit(rank=3)])
def test_residuals_are_recomputed_from_the_base_model(tmp_path, method):
    adapted = lowdim.adapt(small_model(), method)
    adapted.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    assert not any(key.endswith(("C0", "base.weight")) for key in tensors)
    model = small_model()
    loaded = lowdim.load_adapter(model, tmp_path)
    for name, layer in loaded.layers.items():
        assert torch.equal(layer.base.weight, adapted.layers[name].base.weight)
        assert torch.equal(layer.delta(), adapted.layers[name].delta())


def test_a_module_whose_state_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"scale": 2}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4))
    adapted = lowdim.adapt(model, LoRA(rank=1, target_modules=["0"]), modules_to_save=["1"])
    with pytest.raises(ValueError, match="module 1 cannot be saved whole: _extra_state of its state is a dict"):
        adapted.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_trained_beside_the_adapter_and_not_saved_is_said(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, LoRA(rank=1))
    adapted.save(tmp_path / "quiet")
    model.score.weight.requires_grad_(True)
    for write in (adapted.save, adapted.export):
        with pytest.warns(UserWarning, match=r"^score\.weight can be trained and will not be saved .* modules_to_save"):
            write(tmp_path / "loud")
