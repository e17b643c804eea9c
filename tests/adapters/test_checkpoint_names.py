"""An adapter's files hold modules of any name, also of the names that lowdim uses itself."""

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import LaMDA, LoRA


def parts(**children):
    """A module with children of any name; nn.ModuleDict has no `update`."""
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


class Deep(nn.Module):
    """Modules of the user's with the names that lowdim uses itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = parts(update=parts(base=nn.Linear(8, 8)), lora_A=nn.Linear(8, 8))
        self.update = parts(
            update=parts(update=parts(A=nn.Linear(8, 8), update=nn.Linear(8, 8))), original_module=nn.Linear(8, 8)
        )
        self.lowdim_shared = parts(steps=nn.Linear(8, 8))
        self.shared = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.tanh(self.base.lora_A(torch.tanh(self.base.update.base(x))))
        x = self.update.original_module(x)
        for layer in self.update.update.update.children():
            x = torch.tanh(layer(x))
        return self.shared(self.lowdim_shared.steps(x))


@pytest.mark.parametrize("method", [LoRA(rank=2, target_modules=["base", "lora_A"]), LaMDA(rank=2, target_modules=["base"])])
@pytest.mark.parametrize(
    "kept", [["update.update"], ["original_module"], ["lowdim_shared", "shared"], ["update.update.update.update"]]
)
def test_any_name_of_a_module_survives(method, kept, tmp_path):
    adapted = lowdim.adapt(Deep(), method, modules_to_save=kept)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.step()
    adapted.save(tmp_path)
    twin, x = Deep(), torch.randn(3, 8)
    loaded = lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(x), adapted.model(x))
    assert not torch.equal(twin(x), Deep()(x))
    other = lowdim.adapt(Deep(), method, modules_to_save=kept)
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other.model(x), adapted.model(x))
    assert {key: value.tolist() for key, value in loaded.state_dict().items()} == {
        key: value.tolist() for key, value in adapted.state_dict().items()
    }
