"""Attaching, saving, loading, merging and converting take work in proportion to the number of layers.

Python calls are counted, not seconds: four times the layers may take about four times the calls; a walk over all modules for
each layer takes sixteen times as many.
"""

import sys
from functools import partial

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import AdapterSet, LaMDA, LoRA
from lowdim.compress import WeLoreConfig, load_compressed, welore
from lowdim.layers import Monarch, densify, swap_linear
from lowdim.modules import LowRankLinear
from lowdim.surgery import find_layers

FEW, MANY = 20, 80


def model(blocks):
    torch.manual_seed(0)
    return nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}) for _ in range(blocks)])


def calls(run):
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def adapted(blocks):
    return lowdim.adapt(model(blocks), LoRA(rank=2))


def several(blocks):
    adapters = AdapterSet(model(blocks))
    adapters.add("one", LoRA(rank=1))
    adapters.add("two", LoRA(rank=2))
    return adapters


def loaded(blocks, folder):
    adapted(blocks).save(folder / str(blocks))
    return partial(lowdim.load_adapter, model(blocks), folder / str(blocks))


def loaded_state(blocks):
    one = adapted(blocks)
    return partial(one.load_state_dict, one.state_dict())


def unmerged(blocks):
    one = adapted(blocks)
    one.merge()
    return one.unmerge


def compressed(blocks):
    state = swap_linear(model(blocks), LowRankLinear, rank=2).state_dict()
    return partial(load_compressed, model(blocks), state)


#: Name -> what makes the work ready for a number of blocks; only the work itself is counted.
WORK = {
    "adapt": lambda n, at: partial(lowdim.adapt, model(n), LoRA(rank=2)),
    "adapt, rebased": lambda n, at: partial(lowdim.adapt, model(n), LaMDA(rank=2)),
    "save": lambda n, at: partial(adapted(n).save, at / f"s{n}"),
    "load": loaded,
    "load a state": lambda n, at: loaded_state(n),
    "merge": lambda n, at: adapted(n).merge,
    "unmerge": lambda n, at: unmerged(n),
    "export": lambda n, at: partial(adapted(n).export, at / f"e{n}"),
    "trainable": lambda n, at: adapted(n).trainable,
    "add another": lambda n, at: partial(several(n).add, "three", LoRA(rank=1)),
    "combine": lambda n, at: partial(several(n).combine, "sum", {"one": 1.0, "two": 2.0}),
    "delete": lambda n, at: partial(several(n).delete, "one"),
    "merge several": lambda n, at: several(n).merge,
    "find by name": lambda n, at: partial(find_layers, model(n), [f"{i}.q" for i in range(n)]),
    "find by expression": lambda n, at: partial(find_layers, model(n), r"\d+\.q"),
    "convert": lambda n, at: partial(swap_linear, model(n), Monarch, nblocks=2),
    "densify": lambda n, at: partial(densify, swap_linear(model(n), Monarch, nblocks=2)),
    "compress": lambda n, at: partial(welore, model(n), WeLoreConfig(target=0.5, min_reduction=0)),
    "load compressed": lambda n, at: compressed(n),
}


@pytest.mark.parametrize("name", WORK)
def test_work_grows_with_the_number_of_layers(name, tmp_path):
    calls(WORK[name](2, tmp_path))  # what happens only once
    few, many = (calls(WORK[name](blocks, tmp_path)) for blocks in (FEW, MANY))
    assert many < 5 * few
