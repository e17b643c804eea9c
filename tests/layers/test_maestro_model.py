"""Maestro on a whole model: decomposing, merging, smaller ranks, and the statistics of BatchNorm."""

import pytest
import torch
from maestro_net import data, net
from torch import nn

from lowdim.errors import NoMatchingModuleError
from lowdim.layers import MaestroConv2d, MaestroLinear, MaestroSampler, maestro_decompose, maestro_merge, maestro_recalibrate


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
    ).double()


def test_decompose_and_merge_keep_the_function():
    model, x = cnn().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    want = model(x)
    assert maestro_decompose(model) is model
    kinds = [type(m) for m in model]
    assert kinds[0] is kinds[4] is MaestroConv2d
    assert kinds[3] is nn.Conv2d  # grouped
    assert kinds[6] is MaestroLinear
    assert torch.allclose(model(x), want)
    assert maestro_merge(model) is model
    assert [type(m) for m in model] == [type(m) for m in cnn()]
    assert torch.allclose(model(x), want)


def test_decompose_only_what_is_named():
    model = maestro_decompose(cnn(), target_modules=["6"])
    assert [type(m) for m in model if isinstance(m, (MaestroConv2d, MaestroLinear))] == [MaestroLinear]
    model = cnn()
    with pytest.raises(ValueError, match="layer 3: conv must have groups=1; got 8"):
        maestro_decompose(model, target_modules=["0", "3"])
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(NoMatchingModuleError, match="matches no module"):
        maestro_decompose(model, target_modules=["convolution"])
    with pytest.raises(NoMatchingModuleError, match="no layer is left"):
        maestro_decompose(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))


def test_decompose_leaves_heads_and_tied_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
            self.classifier = nn.Linear(4, 2)
            self.out.weight = self.embed.weight

    model = maestro_decompose(Model())
    assert [name for name, m in model.named_modules() if isinstance(m, MaestroLinear)] == ["body"]


def test_merge_chooses_the_smaller():
    """Dense where rank (in + out) > in out; equal stays."""
    model = nn.Sequential(MaestroLinear(12, 6), MaestroLinear(6, 12), MaestroLinear(12, 6), MaestroConv2d(2, 8, 2)).double()
    model[0].rank, model[1].rank, model[2].rank, model[3].rank = 4, 5, 0, 4
    x = torch.randn(3, 12, dtype=torch.float64)
    image = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    want, kernel = model[:3](x), model[3](image)
    model.eval()
    maestro_merge(model)
    assert [type(m) for m in model] == [MaestroLinear, nn.Linear, MaestroLinear, MaestroConv2d]
    assert [m.U.shape[1] for m in model if not isinstance(m, nn.Linear)] == [4, 0, 4]
    assert torch.allclose(model[:3](x), want)
    assert torch.allclose(model[3](image), kernel)
    assert not model[1].training
    model[3].rank = 4
    assert type(maestro_merge(MaestroLinear(4, 4))) is nn.Linear
    assert type(maestro_merge(nn.Sequential(MaestroConv2d(2, 8, 2))[0])) is nn.Conv2d


def test_any_smaller_rank_without_retraining():
    """Deployment: ranks of a trained family, chosen by hand, and merged."""
    model, (x, _) = net(), data(0)
    with MaestroSampler(model).sampled({"0": 2, "2": 1}):
        want = model(x)
    model[0].rank, model[2].rank = 2, 1
    assert torch.equal(model(x), want)
    maestro_merge(model)
    assert torch.allclose(model(x), want)
    assert sum(p.numel() for p in model.parameters()) == 2 * 12 + 1 * 11 + 18 + 5 + 6 + 3


def test_recalibration_gives_the_statistics_of_the_full_model():
    model = nn.Sequential(MaestroLinear(7, 5, dtype=torch.float64, seed=0), nn.BatchNorm1d(5).double(), nn.Dropout(0.5))
    sampler = MaestroSampler(model)
    batches = [data(step, 16)[0] for step in range(4)]
    for x in batches:
        with sampler.sampled({"0": 1}):
            model(x)
    spoilt = model[1].running_var.clone()
    model.train()
    model[2].eval()
    assert maestro_recalibrate(model, batches) is model
    outputs = [model[0](x).detach() for x in batches]
    assert torch.allclose(model[1].running_mean, torch.stack([y.mean(0) for y in outputs]).mean(0))
    assert torch.allclose(model[1].running_var, torch.stack([y.var(0) for y in outputs]).mean(0))
    assert not torch.allclose(model[1].running_var, spoilt)
    assert model[1].momentum == 0.1
    assert [m.training for m in model] == [True, True, False]
    again = model[1].running_mean.clone()
    maestro_recalibrate(model, [(x, None) for x in batches], lambda m, batch: m(batch[0]))
    assert torch.equal(model[1].running_mean, again)


def test_recalibration_without_anything():
    assert maestro_recalibrate(net(), []) is not None
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        maestro_recalibrate(model, [])
    assert model[0].momentum == 0.1
    assert maestro_recalibrate(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), []) is not None
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        maestro_recalibrate(model.eval(), [torch.zeros(2)])
    assert not model[0].training
    assert model[0].momentum == 0.1
