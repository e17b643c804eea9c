"""Damaged checkpoints are not read, and models that would not read back are not written."""

import json

import pytest
import torch
from compressed_models import compressed, load, logits
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from lowdim.compress import LowRankLinear
from lowdim.errors import CheckpointError, LowdimError
from lowdim.layers import Monarch, swap_linear
from lowdim.pretrained import save_compressed

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")


def flip(path, tensor):
    """One bit of one tensor."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
    data[8 + size + start] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.A", "model.embed_tokens.weight"])
def test_a_flipped_bit_is_found(tensor, tmp_path):
    save_compressed(compressed(), tmp_path / "small")
    flip(tmp_path / "small" / "model.safetensors", tensor)
    with pytest.raises(CheckpointError, match=f"model.safetensors is damaged: tensor {tensor} differs from what was written"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_tensor_that_was_left_out_is_missed(tmp_path):
    save_compressed(compressed(), tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.B"]
    save_file(tensors, file, header)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.B"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_truncated_file_is_refused(tmp_path):
    save_compressed(compressed(), tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: q.update(version=2), "in version 2; this lowdim reads version 1; update it"),
        (
            lambda q: q["layers"].popitem(),
            "config.json is damaged: its layers are not those that model",
        ),
        (lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update(alpha=2.0), "config.json is damaged"),
        (lambda q: q.update(depth=2), "version 1 with 'depth'"),
        (lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update({"class": "LowRankLinera"}), "layer class 'LowRankLinera'"),
        (
            lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update({"rank": 99}),
            r"up_proj: rank must be an int in \[1, 32\]",
        ),
        (
            lambda q: q["layers"].update({"model.layers.0.mlp.sideways": {"class": "LowRankLinear"}}),
            "'model.layers.0.mlp.sideways'",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(change, match, tmp_path):
    save_compressed(compressed(), tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_what_does_not_read_back_is_not_left_behind(tmp_path, monkeypatch):
    from lowdim.pretrained.quantizer import LowdimQuantizer

    model, honest = compressed(), LowdimQuantizer.get_state_dict_and_metadata

    def rounded(self, model):
        state, _ = honest(self, model)
        return {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in state.items()}, {}

    monkeypatch.setattr(LowdimQuantizer, "get_state_dict_and_metadata", rounded)
    with pytest.raises(LowdimError, match=r"does not read back as it was written: model\."):
        save_compressed(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"must be a transformers model; got Sequential.*load_compressed"):
        save_compressed(nn.Sequential(LowRankLinear(4, 4, rank=1)), tmp_path / "x")
    model = swap_linear(tiny.llama(), Monarch, ["up_proj"], nblocks=2)
    with pytest.raises(LowdimError, match=r"layer model\.layers\.0\.mlp\.up_proj is a Monarch, which a file cannot describe"):
        save_compressed(model, tmp_path / "x")
    save_compressed(model, tmp_path / "dense", dense=True)
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "x").exists()
