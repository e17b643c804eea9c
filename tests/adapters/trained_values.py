"""An adapter whose trained values have moved away from the start, for the tests of SaRA."""

import torch


def moved(adapted, seed=11):
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter))
    return adapted
