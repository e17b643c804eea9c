"""What LoRAM prunes: the chosen channels, masks, and a small copy that shares nothing with the model."""

import copy
import json

import torch
from loram_models import GROUPS, deep

from lowdim.adapters import LoRAM, select_channels
from lowdim.adapters.loram.channels import channel_scores
from lowdim.testing.closeness import relative_error


def test_shrinking_leaves_the_model_and_shares_nothing():
    model = deep().eval()
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    masked = LoRAM(rank=2, groups=GROUPS[:1], masks={"4": torch.ones(3, 12, dtype=torch.bool)})
    small = masked.shrink(model)
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not small[0].training
    assert not small[2].weight.requires_grad
    assert small[4].weight.requires_grad


def test_channels_and_a_mask_on_one_layer():
    model, mask = deep(), torch.zeros(16, 6, dtype=torch.bool)
    small = LoRAM(rank=2, groups=GROUPS[:1], masks={"0": mask}).shrink(model)
    assert small[0].weight.shape == (5, 6)
    assert not small[0].weight.any()


def test_masks_and_groups_go_through_json():
    masks = {"2": torch.rand(12, 16) < 0.3, "4": torch.rand(3, 12) < 0.3}
    method = LoRAM(groups=GROUPS, masks=masks)
    text = json.dumps(method.config())
    again = LoRAM.from_config(json.loads(text))
    assert again == method
    assert all(torch.equal(again.masks[name], mask) for name, mask in masks.items())
    assert again != LoRAM(groups=GROUPS, masks={**masks, "4": ~masks["4"]})
    assert again != LoRAM(groups=GROUPS[:1], masks=masks)
    assert len(json.dumps(LoRAM(masks={"a": torch.ones(64, 64, dtype=torch.bool)}).config())) < 1000


def test_random_and_several_batches():
    model = deep()
    first = select_channels(model, ["0"], ["2"], 0.5, "random", seed=1)
    assert torch.equal(first, select_channels(model, ["0"], ["2"], 0.5, "random", seed=1))
    assert not torch.equal(first, select_channels(model, ["0"], ["2"], 0.5, "random", seed=2))
    x = torch.randn(6, 6)
    loss = lambda model, x: model(x).square().sum()  # noqa: E731
    whole = channel_scores(model, ["0"], ["2"], "taylor", [x], loss)
    parts = channel_scores(model, ["0"], ["2"], "taylor", iter([x[:4], x[4:]]), loss)
    assert relative_error(parts, whole) < 1e-5, "gradients are summed over batches of any size before taking magnitudes"
    assert torch.equal(select_channels(model, ["0"], ["2"], 0.0), torch.arange(16))
