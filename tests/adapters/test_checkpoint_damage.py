"""Adapter files that are damaged, mixed or foreign, or do not fit the model, are refused and leave it as it was."""

import json

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import AdaptedLayer
from lowdim.adapters.core.files import layout
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors, write_tensors
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model


def _rewrite(folder, change, tensors=None):
    """The files with a changed description, written as lowdim writes them."""
    path = folder / "adapter.safetensors"
    old, metadata = read_tensors(path)
    about = json.loads(metadata["lowdim"])
    change(about)
    about["digest"] = layout.digest_of(old, about)
    write_tensors(path, old if tensors is None else tensors, {"lowdim": json.dumps(about)})
    (folder / "adapter.json").write_text(json.dumps(about))


def test_two_files_of_different_saves_are_noticed(saved):
    adapted, folder = saved
    old = (folder / "adapter.safetensors").read_bytes()
    with torch.no_grad():
        adapted.model.score.weight.zero_()
    adapted.save(folder)
    (folder / "adapter.safetensors").write_bytes(old)  # as if killed between the two renames
    with pytest.raises(CheckpointError, match=r"does not belong to adapter\.safetensors"):
        lowdim.load_adapter(small_model(), folder)
    (folder / "adapter.json").unlink()
    model = small_model()
    lowdim.load_adapter(model, folder)  # the old tensors, complete
    assert model.score.weight.any()


def test_flipped_bits_are_noticed(saved):
    _, folder = saved
    path = folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="do not match its digest"):
        lowdim.load_adapter(small_model(), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(version=3), "format version 3; this lowdim reads up to 2"),
        (lambda about: about.update(version="1"), "is not a lowdim adapter"),
        (lambda about: about.update(format="other"), "is not a lowdim adapter"),
        (lambda about: about.update(method="LoRB"), "no method 'LoRB' is registered .nearest: LoRA"),
        (lambda about: about["config"].update(rank=0), "the configuration of LoRA is not valid: rank"),
        (lambda about: about["config"].update(colour=1), "no field colour"),
        (lambda about: about.pop("layers"), "its description lacks layers"),
        (
            lambda about: about["layers"].update({"body.third": about["layers"]["body.first"]}),
            r"adapts layer body\.third, which the model lacks",
        ),
        (lambda about: about.update(layers=[]), r"layers of its description: Input should be a valid dictionary"),
        (
            lambda about: about["layers"]["body.first"].pop("shape"),
            r"layers\.body\.first\.shape of its description: Field required",
        ),
        (
            lambda about: about["layers"]["body.first"].pop("meta"),
            r"layers\.body\.first\.meta of its description: Field required",
        ),
        (lambda about: about["layers"]["body.first"].pop("fingerprint"), r"body\.first\.fingerprint of its description"),
        (lambda about: about["layers"]["body.first"].update(shape=["a", 8]), r"body\.first\.shape\.0 of its description"),
        (lambda about: about["layers"]["body.first"].update(fingerprint=7), r"body\.first\.fingerprint of its description"),
        (lambda about: about.update(method=7), "method of its description: Input should be a valid string"),
        (lambda about: about.update(seed="0"), "seed of its description: Input should be a valid integer"),
        (lambda about: about.update(modules_to_save=[1]), r"modules_to_save\.0 of its description"),
        (lambda about: about.update(version=0), "versions begin with 1"),
        (lambda about: about["config"].update(alpha=10**400), "the configuration of LoRA is not valid"),
        (lambda about: about["config"].update(alpha=[1]), "the configuration of LoRA is not valid"),
        (lambda about: about["config"].update(target_modules=7, rank={}), "the configuration of LoRA is not valid"),
        (lambda about: about["layers"]["body.first"].update(shape=[9, 9]), r"of shape \(9, 9\); the model's is \(12, 8\)"),
        (lambda about: about["config"].update(rank=3), r"layer body\.first: LoRAUpdate does not fit the file: A"),
        (lambda about: about.update(modules_to_save=["tail"]), "holds module tail, which the model lacks"),
    ],
)
def test_descriptions_that_do_not_fit(saved, change, message):
    _, folder = saved
    _rewrite(folder, change)
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        lowdim.load_adapter(model, folder)
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_head_of_another_size_is_refused(saved):
    _, folder = saved
    model = small_model()
    model.score = nn.Linear(6, 5)
    with pytest.raises(CheckpointError, match=r"score\.bias has shape \(3,\) in the file and \(5,\) in the model"):
        lowdim.load_adapter(model, folder)
    assert not isinstance(model.body["first"], AdaptedLayer)


def test_foreign_folders(tmp_path, saved):
    with pytest.raises(CheckpointError, match="does not exist"):
        lowdim.load_adapter(small_model(), tmp_path / "none")
    write_tensors(tmp_path / "b/adapter.safetensors", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="was not written by lowdim"):
        lowdim.load_adapter(small_model(), tmp_path / "b")
    saved[0].export(tmp_path / "peft")
    model = small_model()
    lowdim.load_adapter(model, tmp_path / "peft")
    assert relative_error(model(sample_input()), saved[0].model(sample_input())) < 1e-5


def test_every_flipped_bit_of_the_description_is_noticed(saved):
    adapted, folder = saved
    path = folder / "adapter.safetensors"
    data = path.read_bytes()
    start = data.index(b"config")
    right = adapted.model(sample_input())
    for place in range(start, start + 120):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            path.write_bytes(bytes(changed))
            try:
                model = small_model()
                lowdim.load_adapter(model, folder)
            except CheckpointError as error:
                assert "adapter.safetensors" in str(error) or "adapter.json" in str(error)  # noqa: PT017
            else:
                assert torch.equal(model(sample_input()), right)


def test_a_changed_word_in_the_description_for_people_is_noticed(saved):
    _, folder = saved
    text = (folder / "adapter.json").read_text()
    assert '"alpha": 16' in text
    (folder / "adapter.json").write_text(text.replace('"alpha": 16', '"alpha": 17'))
    with pytest.raises(CheckpointError, match=r"adapter\.json does not belong .* remove it to load the tensors as they are"):
        lowdim.load_adapter(small_model(), folder)
