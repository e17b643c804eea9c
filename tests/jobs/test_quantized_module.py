"""`lowdim.compare(model=module, quantize=...)`: the module is copied, its base quantized, its head kept."""

import pytest
import torch
from torch import nn

import lowdim
from lowdim.modules import QuantizedLinear, quantized_scheme

pytest.importorskip("torchao")


def test_a_module_of_ones_own_is_copied_and_stays_dense(tmp_path):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=draw)
    rows = list(zip(x, (x[:, 0] > 0).long()))
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    task = lowdim.train.own_task(
        rows,
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        values=lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
        head=("2",),
    )
    how = {"steps": 3, "rates": 1, "sizes": 1, "seeds": 1, "batch_size": 8}
    found = lowdim.compare(task=task, model=model, methods="lora", quantize="int8", out=tmp_path / "out", **how)
    assert quantized_scheme(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = found.load_winner().model
    assert isinstance(loaded[0].plain, QuantizedLinear)
    assert type(loaded[2]) is nn.Linear
