"""Models that carry another library's adapter are refused until it is merged."""

import pytest
from torch import nn
from unusual_models import net

import lowdim
from lowdim.adapters import LoRA
from lowdim.layers import Monarch, swap_linear


class OwnLoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.lora_A, self.lora_B = base, nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)


def with_peft(kind):
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["0"]),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=["0"]),
        "vera": lambda: peft.VeraConfig(r=2, target_modules=["0"]),
        "ia3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    }
    if kind == "injected":
        return peft.inject_adapter_in_model(config["lora"](), net())
    return peft.get_peft_model(net(), config[kind]())


FOREIGN = {
    **{kind: lambda kind=kind: with_peft(kind) for kind in ("lora", "loha", "vera", "ia3", "injected")},
    "own": lambda: nn.Sequential(OwnLoRA(nn.Linear(8, 8))),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_with_another_librarys_adapter_is_refused_with_the_way_on(name, tmp_path):
    lowdim.adapt(net(), LoRA(rank=2)).save(tmp_path)
    model = FOREIGN[name]()
    flags = [p.requires_grad for p in model.parameters()]
    refused = pytest.raises(ValueError, match=r"already carries an adapter that lowdim did not make.*merge_and_unload")
    for use in (
        lambda: lowdim.adapt(model, LoRA(rank=2)),
        lambda: lowdim.adapt(model, lowdim.adapters.SAID(dimension=4)),
        lambda: lowdim.load_adapter(model, tmp_path),
        lambda: lowdim.adapters.AdapterSet(model),
        lambda: swap_linear(model, Monarch, nblocks=2),
    ):
        with refused:
            use()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_merged_peft_model_is_adapted():
    model = with_peft("lora").merge_and_unload()
    assert len(lowdim.adapt(model, LoRA(rank=2)).layers) == 3
