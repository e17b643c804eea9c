"""`lowdim.adapt(..., ranks=...)`: a rank of its own for each layer, kept in files and in PEFT's."""

import copy
import json

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import LoRA, registered_methods
from lowdim.errors import UnknownNameError
from lowdim.export import export

METHODS = {
    "LoRA": {}, "ALLoRA": {}, "SoRA": {}, "LaMDA": {}, "SVFit": {}, "LoLDU": {}, "CorDA": {}, "LoRASB": {"lr": 0.1},
    "LoRAXS": {},
}  # fmt: skip
#: Trained numbers of a layer `(out, in)` at a rank.
TRAINED = {
    **dict.fromkeys(("LoRA", "ALLoRA", "CorDA"), lambda o, i, r: r * (o + i)),
    "SoRA": lambda o, i, r: r * (o + i + 1),
    "LaMDA": lambda o, i, r: r * r + r * o,
    "SVFit": lambda o, i, r: r,
    "LoLDU": lambda o, i, r: r,
    "LoRASB": lambda o, i, r: r * r,
    "LoRAXS": lambda o, i, r: r * r,
}
SHAPES = {"0": (24, 16), "2": (10, 24)}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 10)).double()


def batches():
    torch.manual_seed(1)
    return [torch.randn(64, 16, dtype=torch.float64) for _ in range(2)]


def adapted(name, ranks, model=None):
    method = registered_methods()[name](rank=4, **METHODS[name])
    samples = batches() if method.needs else None
    return lowdim.adapt(
        model or net(), method, ranks=ranks, batches=samples, loss_fn=lambda m, x: m(x).square().mean()
    )  # fmt: skip


def test_every_method_with_ranks_by_layer_is_here():
    owners = {
        name
        for name, cls in registered_methods().items()
        if cls.__module__.startswith("lowdim.") and cls.ranks_by_layer is not False
    }
    assert owners == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_layers_have_their_own_rank_and_keep_it(name, tmp_path):
    ranks = {"0": 7, "2": 2}
    found = adapted(name, ranks)
    for layer, rank in ranks.items():
        trained = sum(p.numel() for p in found.layers[layer].update.parameters() if p.requires_grad)
        assert trained == TRAINED[name](*SHAPES[layer], rank)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in found.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    want = found.model(batches()[0])
    found.save(tmp_path / "one")
    again = lowdim.load_adapter(net(), tmp_path / "one")
    assert again.layer_ranks == ranks
    assert torch.allclose(again.model(batches()[0]), want, rtol=1e-9, atol=1e-9)
    again.save(tmp_path / "two")
    assert (tmp_path / "two" / "adapter.json").read_text() == (tmp_path / "one" / "adapter.json").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_without_ranks_nothing_changes(name):
    plain, given = adapted(name, None), adapted(name, {"0": 4, "2": 4})
    assert plain.layer_ranks == {}
    for key, value in plain.state_dict().items():
        assert torch.equal(value, given.state_dict()[key])


def test_peft_gets_the_ranks(tmp_path):
    found = adapted("LoRA", {"0": 7, "2": 2})
    with torch.no_grad():
        found.layers["0"].update.B.normal_()
    export(found, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {2, 7}


def test_a_rank_above_what_the_method_allows_is_refused_or_capped():
    with pytest.raises(ValueError, match="layer 2"):
        adapted("LaMDA", {"2": 11})
    found = lowdim.adapt(net(), registered_methods()["LaMDA"](rank=4), ranks={"2": 11, "0": 5}, cap_rank=True)
    assert found.capped_ranks == {"2": 10}
    assert found.layer_ranks == {"0": 5}


def test_refusals():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnknownNameError, match="ranks: layer must be one of 0, 2; got '1'"):
        lowdim.adapt(model, LoRA(rank=4), ranks={"1": 2})
    with pytest.raises(ValueError, match=r"ranks\['0'\] must be an int >= 1; got 0"):
        lowdim.adapt(model, LoRA(rank=4), ranks={"0": 0})
    for name, options in (
        ("NOLA", {}),
        ("RandLoRA", {"rank": 4}),
        ("SAID", {"dimension": 8}),
        ("LaMDA", {"rank_choices": (2, 4)}),
    ):
        with pytest.raises(ValueError, match=f"ranks: {name} has one rank for all layers"):
            lowdim.adapt(model, registered_methods()[name](**options), ranks={"0": 2})
    assert list(model.state_dict()) == list(before), "and the model is as it was"
