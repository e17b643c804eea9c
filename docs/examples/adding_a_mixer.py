"""A token mixer with one number of state a feature, whole by a product with its powers and token by token (S4D's real case)."""

import torch
from torch import nn

from lowdim.errors import check_int
from lowdim.linalg import Cost, draw_uniform, stream
from lowdim.testing.mixer_case import MixerCase


class DiagonalRecurrence(nn.Module):
    """`h_t = a ⊙ h_{t−1} + x_t`, `y_t = gain ⊙ h_t`, `a = sigmoid(decay)`; `decay, gain (features,)`.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", arXiv 2206.11893.
    """

    def __init__(self, features, *, seed=0, device=None, dtype=None):
        super().__init__()
        check_int("features", features, 1)
        self.features = features
        self.decay = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.gain = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        draw = stream(seed, "diagonal recurrence")
        for parameter in (self.decay, self.gain):
            draw_uniform(parameter, 1.0, draw)

    def initial_state(self, batch):
        return self.decay.new_zeros(batch, self.features)

    def step(self, x, state):  # (batch, features) each
        self._check_state(x, state)
        state = self.decay.sigmoid() * state + x
        return self.gain * state, state

    def forward(self, x, state=None, *, attention_mask=None, return_state=False):  # (batch, length, features)
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be (batch, length, {self.features}); got shape {tuple(x.shape)}")
        if attention_mask is not None:
            if attention_mask.shape != x.shape[:2]:
                raise ValueError(f"attention_mask must be {tuple(x.shape[:2])}; got shape {tuple(attention_mask.shape)}")
            x = x.masked_fill(attention_mask[..., None] == 0, 0)
        t = torch.arange(x.shape[1], device=x.device)
        lag, a = t[:, None] - t, self.decay.sigmoid()[:, None, None]
        h = torch.einsum("htj,bjh->bth", (a ** lag.clamp(min=0)).tril(), x)
        if state is not None:
            self._check_state(x[:, 0], state)
            h = h + a[:, 0, 0] ** (t[:, None] + 1) * state[:, None]
        return (self.gain * h, h[:, -1]) if return_state else self.gain * h

    def _check_state(self, x, state):
        if state.shape != x.shape:
            raise ValueError(f"state must be {tuple(x.shape)}; got shape {tuple(state.shape)}")

    def cost(self, batch, length, *, itemsize=4):
        flops = 2 * batch * length * (length + 1) * self.features
        traffic = itemsize * self.features * (2 + length * length + 3 * batch * length)
        return Cost(2 * self.features, flops, 2 * flops, traffic, 2 * traffic)


class TestDiagonalRecurrence(MixerCase):
    mixer_class = DiagonalRecurrence

    def reference(self, mixer, x):
        h, out = torch.zeros_like(x[:, 0]), []
        for token in x.unbind(1):
            h = h / (1 + (-mixer.decay).exp()) + token
            out.append(mixer.gain * h)
        return torch.stack(out, 1)

    def expected_cost(self, batch, length):
        flops = 2 * batch * self.features * length**2 + 2 * batch * self.features * length  # the powers, then the gain
        numbers = 2 * self.features + self.features * length**2 + 3 * batch * length * self.features
        return Cost(2 * self.features, flops, 2 * flops, 4 * numbers, 8 * numbers)
