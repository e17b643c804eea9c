"""What is handed over: its form, its size, and that it gives the trained model again."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowdim
import tiny
from images import save_vit
from lowdim import models
from lowdim.adapters import LoRA
from lowdim.comparison.handing_over import form_of_winner, handed_over_bytes, weights_in, write_winner


class Net(nn.Module):
    """A module without a configuration."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(16, 16), nn.Linear(16, 16)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(torch.relu(self.conv(x)).flatten(1))))


def trained(base):
    """A copy with an adapter that has learned something."""
    adapted = lowdim.adapt(copy.deepcopy(base), LoRA(rank=2))
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_(std=0.1)
    return adapted


def test_a_module_of_ones_own_is_handed_over_as_its_tensors_and_its_adapter(tmp_path):
    base, x = Net().eval(), torch.randn(5, 1, 4, 4)
    adapted = trained(base)
    want, before = adapted.model(x), base(x)
    assert not torch.allclose(want, before, atol=1e-2)
    assert form_of_winner(adapted, None) == "state"
    forecast = handed_over_bytes(adapted, base, None)
    written = write_winner(adapted, tmp_path / "winner", base, source=None)
    assert written.format == "state"
    again = Net().eval()
    again.load_state_dict(load_file(tmp_path / "winner" / "model.safetensors"))
    assert torch.allclose(again(x), want, atol=1e-5)
    assert torch.equal(written.reload()(x), again(x))
    assert torch.allclose(lowdim.load_adapter(copy.deepcopy(base), tmp_path / "winner" / "adapter").model(x), want, atol=1e-5)
    assert 'load_file("winner/model.safetensors")' in written.how_to_load
    assert 'lowdim.load_adapter(model, "winner/adapter")' in written.how_to_load
    # The header of model.safetensors alone is not in the forecast.
    tensors = sum(p.numel() * 4 for p in base.parameters())
    header = (tmp_path / "winner" / "model.safetensors").stat().st_size - tensors
    assert 0 < header < 1000
    assert weights_in(tmp_path / "winner") == forecast + header


def test_a_trained_module_without_an_adapter_and_with_tied_weights(tmp_path):
    base, x = Net(tied=True).eval(), torch.randn(5, 1, 4, 4)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.first.weight.normal_()
    want = model(x)
    written = write_winner(model, tmp_path / "winner", base, source=None)
    assert "strict=False" in written.how_to_load
    assert not (tmp_path / "winner" / "adapter").exists()
    again = Net(tied=True).eval()
    again.load_state_dict(load_file(tmp_path / "winner" / "model.safetensors"), strict=False)
    assert torch.equal(again(x), want)
    assert torch.equal(written.reload()(x), want)


def test_the_form_is_an_adapter_only_where_others_have_the_base():
    pytest.importorskip("peft")
    adapted, source = trained(tiny.llama()), models.resolve("stories260k")
    assert form_of_winner(adapted, source) == "peft"
    assert form_of_winner(adapted, None) == "merged", "nobody else can load the base"
    assert form_of_winner(tiny.llama(), source) == "merged"


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_an_image_classifier_takes_its_processor_along(form, tmp_path):
    pytest.importorskip("peft")
    place = save_vit(tmp_path / "base", labels=3)
    base = models.load_model(str(place), "image", num_labels=3).eval()
    processor = models.load_image_processor(str(place))
    model, source = (trained(base), models.resolve(str(place))) if form == "peft" else (base, None)
    pixels = torch.randn(2, 3, 16, 16)
    want = (model.model if form == "peft" else model)(pixel_values=pixels).logits
    written = write_winner(
        model, tmp_path / "winner", base, source=source, processor=processor, inputs={"pixel_values": pixels}
    )
    assert written.format == form
    assert (tmp_path / "winner" / "preprocessor_config.json").is_file()
    assert torch.allclose(written.reload().eval()(pixel_values=pixels).logits, want, atol=1e-5)
    assert written.largest_difference < 1e-5
