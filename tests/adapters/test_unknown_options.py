"""An unknown option of a method, a configuration or a layer: the error names those there are."""

import pytest
from unusual_models import net

import lowdim
from lowdim.adapters import FLoRA, LaMDA, LoRA
from lowdim.compress import LoRDConfig
from lowdim.layers import Monarch, swap_linear


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        (FLoRA, {"rank": 4}, r"FLoRA has no option 'rank' \(nearest: ranks\); its options are ranks, "),
        (LoRA, {"r": 4, "lora_alpha": 2}, r"LoRA has no option 'r', 'lora_alpha' \(nearest: .*rank"),
        (LaMDA, {"ranks": 4}, r"LaMDA has no option 'ranks' \(nearest: rank"),
    ],
)
def test_an_unknown_option_names_the_methods_own(method, options, told):
    with pytest.raises(TypeError, match=told):
        method(**options)


def test_configurations_and_layers_name_their_options_too():
    for make in (lambda: LoRDConfig(param_ration=0.5), lambda: lowdim.train.FitSettings(learning_rate=0.1)):
        with pytest.raises(TypeError, match=r"has no option '(param_ration|learning_rate)'.*its options are "):
            make()
    for fresh in (True, False):
        with pytest.raises(TypeError, match=r"Monarch has no option 'blocks' \(nearest: nblocks\); its options are nblocks"):
            swap_linear(net(), Monarch, blocks=2, fresh=fresh)


@pytest.mark.parametrize("cls", lowdim.adapters.registered_methods().values(), ids=lambda cls: cls.__name__)
def test_every_method_names_its_options(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__} has no option 'no_such'.*its options are "):
        cls(no_such=1)
