"""What DCT-AdamW is given and holds: its parts and state, and which options, checkpoints and shapes are refused."""

import pytest
import torch
from torch import nn

from lowdim.optim import AdamWRule, DCTAdamW, DCTProjector, ErrorFeedback, Identity, NoResidual, NormScaledResidual, state_bytes


def test_state_is_indices_and_moments():
    """Spec's formula: 4 r + 2 L r q; against GaLore s r q less."""
    m, n, r = 64, 32, 8
    p = nn.Parameter(torch.zeros(m, n))
    p.grad = torch.randn(m, n)
    for options, more in (({}, 0), ({"error_feedback": True}, m * n * 4), ({"error_feedback": 8}, m * n + 2 * m * 4)):
        optimizer = DCTAdamW([p], rank=r, **options)
        optimizer.step()
        assert state_bytes(optimizer) == 4 * r + 2 * m * r * 4 + more


def test_parts_are_the_papers():
    optimizer = DCTAdamW([nn.Parameter(torch.zeros(8, 6))], rank=2, basis="dct2", norm=2, update_interval=5)
    group = optimizer.param_groups[0]
    parts = optimizer.parts(group, 2)
    assert parts.projector == DCTProjector(2, 5, "dct2", 2)
    assert parts.projector.scale == 1.0
    assert isinstance(parts.inner, AdamWRule)
    assert (parts.inner.eps_mode, parts.inner.eps, parts.decay, parts.rotate) == ("inside", 1e-8, "before", True)
    assert isinstance(parts.residual, NoResidual)
    assert optimizer.parts({**group, "error_feedback": True}, 2).residual == ErrorFeedback(max_dim=32000)
    assert optimizer.parts({**group, "error_feedback": 8}, 2).residual == ErrorFeedback(8, 32000)
    assert optimizer.parts({**group, "residual": "norm_scaled"}, 2).residual == NormScaledResidual(1.01)
    assert type(optimizer.parts({**group, "rotate": False}, 2).inner) is AdamWRule
    assert isinstance(optimizer.parts(group, 1).projector, Identity)
    assert isinstance(optimizer.parts({**group, "rank": None}, 2).projector, Identity)


def test_layerwise_accumulation_needs_no_residual():
    layered = DCTAdamW([nn.Parameter(torch.zeros(8, 6))], rank=2, layerwise=True, accumulate=2)
    assert layered.accumulate == 2
    for options in ({"error_feedback": True}, {"residual": "norm_scaled"}):
        with pytest.raises(ValueError, match=r"accumulate=2.*full gradient"):
            DCTAdamW([nn.Parameter(torch.zeros(8, 6))], rank=2, layerwise=True, accumulate=2, **options)


def test_a_checkpoint_of_other_feedback_is_refused():
    p = nn.Parameter(torch.zeros(8, 6))
    p.grad = torch.randn(8, 6)
    optimizer = DCTAdamW([p], rank=2, error_feedback=8)
    optimizer.step()
    saved = optimizer.state_dict()
    for options in ({"error_feedback": True}, {"basis": "dct2", "error_feedback": 8}):
        with pytest.raises(ValueError, match=next(iter(options))):
            DCTAdamW([p], rank=2, **options).load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 7}, "rank.*smaller side.*7"),
        ({"rank": (2, 2)}, "rank"),
        ({"update_interval": 0}, "update_interval"),
        ({"basis": "dct4"}, "basis.*nearest: dct"),
        ({"norm": 3}, "norm must be 1 or 2; got 3"),
        ({"norm": True}, "norm"),
        ({"rotate": 1}, "rotate"),
        ({"error_feedback": 4}, r"error_feedback must be False, True or 8 \(bits\); got 4"),
        ({"error_feedback": "on"}, "error_feedback"),
        ({"residual": "fira"}, "residual"),
        ({"residual": "norm_scaled", "error_feedback": True}, "error_feedback.*residual"),
        ({"limiter": 0.5}, "limiter"),
        ({"max_dim": 0}, "max_dim"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"accumulate": 2}, "layerwise"),
    ],
)
def test_wrong_hyperparameters(options, match):
    with pytest.raises(ValueError, match=match):
        DCTAdamW([nn.Parameter(torch.zeros(8, 6))], **{"rank": 2, **options})


def test_tensors_of_more_dimensions_are_refused():
    with pytest.raises(ValueError, match="more than two dimensions"):
        DCTAdamW([nn.Parameter(torch.zeros(8, 4, 3, 3))], rank=2)
    with pytest.raises(ValueError, match="rank"):
        DCTAdamW([nn.Parameter(torch.zeros(8))], rank=0)
