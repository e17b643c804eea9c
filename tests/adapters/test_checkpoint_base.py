"""Which models take an adapter's file: the base in any dtype, adapted or not, and no other; files of version 1, too."""

import json

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import LoRA
from lowdim.adapters.core.files import layout
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors, write_tensors
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model


def test_loading_into_an_adapted_or_another_model(saved):
    adapted, folder = saved
    x, plain, once = sample_input(), small_model()(sample_input()), adapted.model(sample_input())
    lowdim.load_adapter(adapted.model, folder)  # beside the first: a second time the same change, before the tanh
    first = adapted.model.body["first"]
    assert relative_error(first(x), 2 * first.base(x) - first.plain(x)) < 1e-5
    assert not torch.allclose(adapted.model(x), once)
    assert not torch.allclose(once, plain)
    with pytest.raises(CheckpointError, match=r"body\.first, which the model lacks"):
        lowdim.load_adapter(nn.Sequential(nn.Linear(8, 12)), folder)


def test_a_float32_base_takes_an_adapter_of_its_bfloat16_self(tmp_path):
    half = small_model(dtype=torch.bfloat16)
    adapted = lowdim.adapt(half, LoRA(rank=1), dtype=torch.float32)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_()
    adapted.save(tmp_path)
    whole = small_model(dtype=torch.bfloat16).float()
    loaded = lowdim.load_adapter(whole, tmp_path)
    assert loaded.layers["body.first"].update.A.dtype == torch.float32
    assert relative_error(whole(sample_input()), half(sample_input(dtype=torch.bfloat16))) < 3e-2


FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("origin", FLOATS[:3], ids=str)
@pytest.mark.parametrize("trained", FLOATS, ids=str)
@pytest.mark.parametrize("loaded", FLOATS, ids=str)
def test_the_base_model_in_any_dtype(origin, trained, loaded, tmp_path):
    """A checkpoint in `origin`, loaded as `trained` for the training and as `loaded` afterwards."""
    torch.manual_seed(3)
    weights = (torch.randn(64, 48) * 0.02).to(origin)
    weights[0, :8] *= 1e-4  # subnormal in float16

    def base(dtype, change=0.0):
        layer = nn.Linear(48, 64)
        layer.weight = nn.Parameter((weights.float() * (1 + change)).to(origin).to(dtype))
        return nn.Sequential(layer)

    lowdim.adapt(base(trained), LoRA(rank=1)).save(tmp_path)
    lowdim.load_adapter(base(loaded), tmp_path)
    for change in (0.05, -0.02):
        with pytest.raises(CheckpointError, match="the weight of layer 0 differs"):
            lowdim.load_adapter(base(loaded, change), tmp_path)


def test_a_file_of_version_1_loads(saved):
    """Its digest was of the tensors alone, and its fingerprints were digests alone."""
    adapted, folder = saved
    path = folder / "adapter.safetensors"
    tensors, metadata = read_tensors(path)
    about = json.loads(metadata["lowdim"])
    about.update(version=1, digest=layout.digest_of(tensors))
    for entry in about["layers"].values():
        entry["fingerprint"] = entry["fingerprint"].split(":")[0]
    write_tensors(path, tensors, {"lowdim": json.dumps(about)})
    (folder / "adapter.json").write_text(json.dumps(about))
    model = small_model()
    lowdim.load_adapter(model, folder)
    assert torch.equal(model(sample_input()), adapted.model(sample_input()))
    with pytest.raises(CheckpointError, match=r"the weight of layer body\.first differs \(check_base"):
        lowdim.load_adapter(small_model(seed=1), folder)
    with pytest.raises(CheckpointError, match=r"it is float16 here: try the model in float32 or bfloat16"):
        lowdim.load_adapter(small_model(seed=1).half(), folder)
