"""SST's factors between steps: clipped, normalised, written back, decomposed anew, saved."""

import pytest
import torch
from stale_buffers import spoil

from lowdim.files import read_tensors, write_tensors
from lowdim.layers import SSTLinear
from lowdim.linalg import stream


@pytest.mark.parametrize("change", ["write_back", "resample", "reinitialize"])
def test_the_dense_weight_does_not_change(change):
    layer = trained(SSTLinear(9, 7, rank=3, dtype=torch.float64))
    spoil(layer)
    weight = layer.dense_weight().detach()
    getattr(layer, change)()
    assert torch.allclose(layer.dense_weight(), weight, rtol=0, atol=1e-13)


def trained(layer, steps=6):
    """Far enough for the vectors to lose their orthogonality."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(steps):
        x = torch.randn(8, layer.in_features, generator=stream(0, "trained", step), dtype=torch.float64).to(layer.S.dtype)
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        layer.post_step()
    return layer


def orthogonality(layer):
    layer.write_back()
    eye = torch.eye(layer.S.numel(), dtype=torch.float64)
    return max(
        float((layer.U.double().mT @ layer.U.double() - eye).abs().max()), float((layer.Vh @ layer.Vh.mT - eye).abs().max())
    )


def test_orthogonality_is_lost_in_training_and_restored():
    layer = trained(SSTLinear(9, 7, rank=3, dtype=torch.float64))
    assert orthogonality(layer) > 1e-3
    assert not torch.allclose(layer.S.sort(descending=True).values, torch.linalg.svdvals(layer.dense_weight()), atol=1e-3)
    layer.resample(indices=[1, 2, 5])
    layer.reinitialize()
    assert orthogonality(layer) < 1e-13
    assert torch.allclose(layer.S, torch.linalg.svdvals(layer.dense_weight()), atol=1e-13)
    assert layer.active.tolist() == [1, 2, 5]


def test_post_step_clips_and_normalises_what_is_active():
    layer = SSTLinear(6, 5, rank=2, dtype=torch.float64)
    layer.resample(indices=[1, 3])
    with torch.no_grad():
        layer.S[2] = -0.5
        layer.S[1] = -0.1
        layer.U_active *= 3
        layer.Vh_active[0] *= 0.2
        layer.Vh_active[1] = 0
        layer.U[:, 0] *= 2
    S, U = layer.S.detach().clone(), layer.U.clone()
    layer.post_step()
    assert torch.equal(layer.S, S.clamp(min=0))
    assert torch.allclose(layer.U_active.norm(dim=0), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(layer.Vh_active.norm(dim=1), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.equal(layer.U, U), "frozen vectors are not touched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_through_a_round(dtype):
    """The decomposition runs in float32, and the round trip loses no more than rounding its factors does."""
    layer = SSTLinear(24, 16, rank=4, dtype=dtype)
    weight = layer.dense_weight().detach().float()
    for index in range(3):
        layer.resample(indices=range(index, index + 4))
        layer.post_step()
        layer.reinitialize()
    assert {t.dtype for t in layer.state_dict().values()} == {dtype, torch.int64}
    error = float((layer.dense_weight().detach().float() - weight).norm() / weight.norm())
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    layer.post_step()
    length = layer.U_active.detach().float().norm(dim=0)
    assert float((length - 1).abs().max()) < 4 * torch.finfo(dtype).eps


def test_state_dict_carries_all(tmp_path):
    layer = trained(SSTLinear(9, 7, rank=3, dtype=torch.float32, seed=1))
    layer.resample(indices=[0, 4, 6])
    trained(layer)
    assert set(layer.state_dict()) == {"S", "U_active", "Vh_active", "bias", "U", "Vh", "active"}
    write_tensors(tmp_path / "layer.safetensors", layer.state_dict())
    other = SSTLinear(9, 7, rank=3, seed=2)
    other.load_state_dict(read_tensors(tmp_path / "layer.safetensors")[0])
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    for one in (layer, other):
        one.resample(generator=torch.Generator().manual_seed(5))
        one.reinitialize()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())
