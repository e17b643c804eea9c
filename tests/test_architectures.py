"""Shapes by name have the sizes of the models that they are named after."""

import pytest
import torch

from lowdim import models
from lowdim.errors import UnknownNameError
from lowdim.models.architectures import MODELS, SHAPES, is_shape, shape_config

pytest.importorskip("transformers")

#: As published with the weights.
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "qwen2.5-32b": 32_763_876_352,
    "llama-3.1-70b": 70_553_706_496,
    "mixtral-8x7b": 46_702_792_704,
}


def parameters(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters(name):
    config = shape_config(name)
    depth, counts = config.num_hidden_layers, []
    for layers in (1, 2):
        config = shape_config(name)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        counts.append(parameters(config))
    assert counts[0] + (depth - 1) * (counts[1] - counts[0]) == PARAMETERS[name]


def test_every_shape_has_a_configuration_and_no_weights():
    for name in (*SHAPES, *MODELS):
        assert is_shape(name)
        assert models.load_config(name).num_hidden_layers > 0
    assert set(MODELS) <= set(PARAMETERS)
    with pytest.raises(UnknownNameError, match="without weights"):
        models.load_model("llama-3.1-8b", "causal-lm")
