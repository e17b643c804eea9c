"""Any projector with any inner rule and residual rule: composed by hand, run by the one driver."""

import pytest
import torch
from torch import nn

from lowdim.linalg import stream
from lowdim.optim import (
    AdafactorRule,
    AdamW8bitRule,
    AdamW16bitRule,
    AdamWRule,
    DCTProjector,
    ErrorFeedback,
    Identity,
    NoResidual,
    NormScaledResidual,
    Parts,
    ProjectedOptimizer,
    QuantizedSVDProjector,
    SVDProjector,
    state_bytes,
)

PROJECTORS = {
    "identity": Identity(),
    "svd": SVDProjector(3, 3, 0.5),
    "svd-turned": SVDProjector(3, 3, 0.5, rotates=True),
    "int4": QuantizedSVDProjector(3, 3, 0.5, group_size=16),
    "dct": DCTProjector(3, 2),
}
INNER = {
    "adamw": AdamWRule(),
    "adamw-torch": AdamWRule(eps=1e-8, eps_mode="inside"),
    "16bit": AdamW16bitRule(),
    "8bit": AdamW8bitRule(min_size=8),
    "adafactor": AdafactorRule(),
}
RESIDUALS = {"none": NoResidual(), "fira": NormScaledResidual(), "feedback": ErrorFeedback(), "feedback-8": ErrorFeedback(8)}


class Composed(ProjectedOptimizer):
    method = "composed"

    def __init__(self, params, parts, lr, **options):
        self.chosen = parts
        super().__init__(params, {"lr": lr, "rank": 3, "weight_decay": 0.01, "update_interval": 3}, **options)

    def parts(self, group, ndim):
        return self.chosen if ndim == 2 else Parts(Identity(), AdamWRule())


def matrices():
    draw = stream(0, "combinations")
    shapes = ((12, 7), (7, 12), (9, 9))
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in shapes]


def train(parts, steps, params, optimizer):
    """Each matrix is drawn to a target of its own."""
    losses = []
    for _ in range(steps):
        draw = stream(1, "targets")
        loss = sum(((p - torch.randn(p.shape, generator=draw, dtype=p.dtype)) ** 2).mean() for p in params)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("residual", list(RESIDUALS))
@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("projector", list(PROJECTORS))
def test_it_trains_forecasts_its_state_and_resumes(projector, inner, residual):
    if projector == "identity" and residual != "none":
        pytest.skip("nothing is left outside of the whole space")
    chosen = Parts(PROJECTORS[projector], INNER[inner], RESIDUALS[residual], rotate=projector in ("svd-turned", "dct"))
    params = matrices()
    optimizer = Composed(params, chosen, lr=0.03)
    losses = train(chosen, 8, params, optimizer)
    assert state_bytes(optimizer) == sum(chosen.nbytes(tuple(p.shape), p.dtype) for p in params)
    other = [nn.Parameter(p.detach().clone()) for p in params]
    again = Composed(other, chosen, lr=0.03)
    again.load_state_dict(optimizer.state_dict())
    losses += train(chosen, 32, params, optimizer)
    train(chosen, 32, other, again)
    assert all(torch.equal(a, b) for a, b in zip(params, other))
    assert losses[-1] < 0.9 * losses[0], losses[::8]
    assert all(torch.isfinite(p).all() for p in params)
