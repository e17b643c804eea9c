"""What LoRAM refuses: channels, groups, masks, numbers, selections, and models that do not fit on the way back."""

import pytest
import torch
from loram_models import GROUPS, deep, trained
from torch import nn

import lowdim
from lowdim.adapters import ChannelGroup, LoRAM, gqa_channels, recover_lora, select_channels
from lowdim.errors import CheckpointError


@pytest.mark.parametrize("kept", [[], [2, 1], [1, 1], [-1, 0], [0.5], [[0], [1]], [True, False]])
def test_bad_channels(kept):
    with pytest.raises(ValueError, match="kept must be"):
        ChannelGroup(["0"], ["2"], kept)


def test_bad_groups():
    with pytest.raises(ValueError, match="at least one producer"):
        ChannelGroup([], [], [0])
    with pytest.raises(ValueError, match="list of module names; got '0'"):
        ChannelGroup("0", ["2"], [0])
    with pytest.raises(ValueError, match="layer 0 is among the producers of two groups"):
        LoRAM(groups=[ChannelGroup(["0"], [], [0]), ChannelGroup(["0"], ["2"], [1])])
    with pytest.raises(ValueError, match="ChannelGroup objects"):
        LoRAM(groups=["0"])
    with pytest.raises(ValueError, match="layer 0 has 16 output channels; the group keeps channel 16"):
        LoRAM(groups=[ChannelGroup(["0"], ["2"], [0, 16])]).shrink(deep())
    with pytest.raises(ValueError, match="layer 2 has 16 input channels; the group keeps channel 16"):
        LoRAM(groups=[ChannelGroup([], ["2"], [0, 16])]).shrink(deep())
    with pytest.raises(ValueError, match=r"no module 'fc1' \(nearest: "):
        LoRAM(groups=[ChannelGroup(["fc1"], ["2"], [0])]).shrink(deep())
    with pytest.raises(TypeError, match="1 is ReLU"):
        LoRAM(groups=[ChannelGroup(["1"], ["2"], [0])]).shrink(deep())


def test_bad_masks(tmp_path):
    for bad in (torch.ones(3, 12), torch.ones(3, dtype=torch.bool), [[True]]):
        with pytest.raises(ValueError, match=r"masks\['4'\] must be a bool matrix"):
            LoRAM(masks={"4": bad})
    with pytest.raises(ValueError, match=r"mask of layer 4 has shape \(12, 3\); its weight \(3, 12\)"):
        LoRAM(masks={"4": torch.ones(12, 3, dtype=torch.bool)}).shrink(deep())
    with pytest.raises(ValueError, match="no module 'head'"):
        LoRAM(masks={"head": torch.ones(3, 12, dtype=torch.bool)}).shrink(deep())
    for bits in ("AA==", "?", 3):
        with pytest.raises(CheckpointError, match="packed mask"):
            LoRAM(masks={"4": {"shape": [3, 12], "bits": bits}})
    with pytest.raises(ValueError, match="not both"):
        LoRAM(ratio=0.5, groups=GROUPS)


def test_bad_numbers():
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            LoRAM(ratio=bad)
        with pytest.raises(ValueError, match="ratio"):
            select_channels(deep(), ["0"], ["2"], bad)
    with pytest.raises(ValueError, match="alpha"):
        LoRAM(alpha=0)
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 0.*NaN"):
        lowdim.adapt(nn.Sequential(layer), LoRAM(rank=1, ratio=0.5))


def test_bad_selections():
    model = deep()
    with pytest.raises(ValueError, match="prunes all 16 blocks"):
        select_channels(model, ["0"], ["2"], 0.99)
    with pytest.raises(ValueError, match="block must divide the 16 channels; got 5"):
        select_channels(model, ["0"], ["2"], 0.5, block=5)
    with pytest.raises(ValueError, match="equal in number"):
        select_channels(model, ["0"], ["4"], 0.5)
    with pytest.raises(ValueError, match="equal in number"):
        select_channels(model, [], [], 0.5)
    with pytest.raises(ValueError, match="criterion must be one of"):
        select_channels(model, ["0"], ["2"], 0.5, "size")
    for given in ({}, {"batches": [torch.randn(2, 6)]}, {"loss_fn": lambda m, b: m(b).sum()}):
        with pytest.raises(ValueError, match="needs batches and loss_fn"):
            select_channels(model, ["0"], ["2"], 0.5, "taylor", **given)
    with pytest.raises(ValueError, match="no module 'fc'"):
        select_channels(model, ["fc"], ["2"], 0.5)
    with pytest.raises(ValueError, match="num_heads must be a multiple"):
        gqa_channels([0], 6, 4, 2)
    with pytest.raises(ValueError, match="kept_kv_heads must be at least 0 and below the 2"):
        gqa_channels([2], 4, 2, 2)


def test_shapes_that_do_not_fit_when_going_back():
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    for args in (
        (A, torch.ones(4, 3), 3, 4),
        (A, B, 5, 4),
        (A, B, 3, 5),
        (A, B, 5, 4, torch.tensor([0, 1])),
        (A, B, 2, 4, torch.tensor([0, 1, 2])),
        (A, B, 5, 4, torch.tensor([0, 2, 1])),
        (A, B, 3, 6, None, torch.tensor([0, 1, 2])),
        (A[0], B, 3, 4),
    ):
        with pytest.raises(ValueError, match=r"kept|channels|rank"):
            recover_lora(*args)
    adapted = trained(deep(), LoRAM(rank=2, groups=GROUPS))
    other = deep()
    other[2] = nn.Linear(16, 9)
    with pytest.raises(ValueError, match=r"layer 2 \(9, 16\): kept_out"):
        adapted.recover(other)
    with pytest.raises(ValueError, match="the whole model has no layer '4'"):
        adapted.recover(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12)))
    with pytest.raises(ValueError, match="already has an adapter"):
        adapted.recover(lowdim.adapt(deep(), LoRAM(rank=1)).model)
    adapted.merge()
    with pytest.raises(ValueError, match="merged"):
        adapted.recover(deep())
