"""`--ratios farms`: shares by layer from exponents, at one share of all together."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from lowdim.compress import WINAConfig
from lowdim.diagnose import farms
from lowdim.errors import UnknownNameError
from lowdim.jobs import compressor
from lowdim.jobs.ratios import check_ratios, ratios_by_layer, with_ratios
from lowdim.surgery import matrix_shape


def linear_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}


def test_shares_are_alpha_prunings_block_by_block():
    model = tiny.llama(3)
    layers = linear_layers(model)
    shares, notes = ratios_by_layer(model, layers, 0.4)
    assert notes == []
    rows = min(min(matrix_shape(layer)) for layer in layers.values()) // 2
    alphas = np.array(list(farms({n: la.weight for n, la in layers.items()}, rows=rows, method="peak").alphas.values()))
    means = alphas.reshape(3, -1).mean(1)
    q = 0.8 + 0.4 * (means - means.min()) / (means.max() - means.min())
    sizes = np.array([math.prod(matrix_shape(layer)) for layer in layers.values()]).reshape(3, -1).sum(1)
    want = q * 0.4 * sizes.sum() / (q * sizes).sum()
    assert list(shares) == list(layers)
    np.testing.assert_allclose(np.array(list(shares.values())).reshape(3, -1), np.repeat(want[:, None], 7, 1), rtol=1e-12)


def test_layers_that_cannot_be_measured_keep_the_share_of_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 4), nn.Linear(4, 30), nn.Linear(30, 30))
    shares, notes = ratios_by_layer(model, linear_layers(model), 0.5)
    assert shares["1"] == shares["2"] == 0.5
    assert shares["0"] + shares["3"] == pytest.approx(1.0)
    assert notes[0].startswith("not measured by FARMS, and so at 0.5: layer 1: its smaller side is 4")
    with pytest.raises(ValueError, match="ratios by layer need at least two layers: no layer can be measured; layer 1"):
        ratios_by_layer(model, {"1": model[1]}, 0.5)


def test_the_config_gets_a_share_for_each_layer():
    model, method = tiny.llama(2), compressor("wina")
    config, _ = with_ratios(method, WINAConfig(sparsity=0.5), model)
    assert config.sparsity == ratios_by_layer(model, linear_layers(model), 0.5)[0]
    assert config == method.build({"sparsity": config.sparsity})


def test_refusals():
    wina, lord = compressor("wina"), compressor("lord")
    with pytest.raises(UnknownNameError, match="--ratios must be one of uniform, farms"):
        check_ratios("farm", wina, WINAConfig())
    with pytest.raises(ValueError, match="lord has no ratio by layer; wina has"):
        check_ratios("farms", lord, lord.build({}))
    with pytest.raises(ValueError, match="got one for each"):
        check_ratios("farms", wina, WINAConfig(sparsity={"up_proj": 0.5}))
    with pytest.raises(ValueError, match="--budget finds the sparsity of each layer itself"):
        check_ratios("farms", wina, WINAConfig(), budget="0.5x")
    check_ratios("uniform", lord, lord.build({}), budget="0.5x")
