"""S4D: a diagonal state space as a token mixer, a long convolution in training and a recurrence in generation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_choice, check_float, check_int
from lowdim.layers.core.tokens import check_token, check_tokens
from lowdim.linalg import (
    Cost,
    compute_dtype,
    draw_normal,
    draw_uniform,
    power_states,
    power_sum,
    s4d_discrete,
    s4d_init,
    s4d_kernel,
    stream,
    wide,
    without_autocast,
)
from lowdim.linalg.state_space import DISCRETIZATIONS

__all__ = ["S4D"]


class S4D(nn.Module):
    """A diagonal state space for each feature, then a gated linear map: constant memory for generation.

    Formula: for each feature with `dt = exp(log_dt)`, `A = −exp(log_A_real) + i A_imag`, and `x' = A x + B u` in steps of dt::

        x ← Abar x + Bbar u_t
        y_t = 2 Re Σ C x + D u_t
        out = GLU(output_linear(dropout(GELU(y))))

    Sequences are convolved with `K[j] = 2 Re Σ C Bbar Abar^j` by FFT, which gives the same numbers.

    Args:
        d_model: features of a token, `H`.
        d_state: size of each feature's state, `N`, even; `N/2` complex numbers are stored.
        init: first diagonal: lin, inv, legs, quad, or (much worse) real, random; see `lowdim.linalg.s4d_init`.
        disc: zoh, bilinear, or dss, whose kernel depends on the length of the sequence: no states, no steps.
        dt_min: smallest first time step; drawn log-uniformly up to `dt_max`.
        dt_max: largest first time step: a feature remembers about `2 / dt` tokens at first.
        half_B: halve the first `B`, as in theory.
        b_clip: largest first `B` of legs; None keeps all.
        train_B: False keeps `B` as it is, as in the authors' minimal layer.
        bidirectional: a second kernel over the tokens that follow: no states, no steps.
        dropout: share of the features that are dropped, the same ones at every token of a sequence.
        seed: of the first numbers; `generator` wins over it, and without both torch's default one draws.

    Raises:
        ValueError: an option out of its range, an odd `d_state`.

    Example:
        >>> import torch
        >>> from lowdim.layers import S4D
        >>> mixer, x = S4D(6, 16, seed=0), torch.randn(2, 10, 6)
        >>> y, state = mixer(x[:, :9], return_state=True)
        >>> last, state = mixer.step(x[:, 9], state)
        >>> torch.allclose(last, mixer(x)[:, 9], atol=1e-5)
        True

    Train it with `param_groups`: A, B and dt want a small rate and no decay. Not for tasks whose transitions depend on the
    input: these do not.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", NeurIPS 2022, arXiv
    2206.11893.
    """

    B: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "lin",
        disc: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        half_B: bool = False,
        b_clip: float | None = 2.0,
        train_B: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("d_model", d_model, 1)
        check_choice("disc", disc, DISCRETIZATIONS)
        check_float("dt_min", dt_min, 0.0, low_open=True)
        check_float("dropout", dropout, 0.0, 1.0)
        if not dt_min <= dt_max < math.inf:
            raise ValueError(f"dt_max must be at least dt_min={dt_min}, and finite; got {dt_max}")
        self.d_model, self.d_state, self.init, self.disc = d_model, d_state, init, disc
        self.dt_min, self.dt_max, self.half_B, self.b_clip = dt_min, dt_max, half_B, b_clip
        self.train_B, self.bidirectional, self.dropout = train_B, bidirectional, dropout
        s4d_init("lin" if init == "random" else init, d_state, b_clip=b_clip)  # refuses what is out of range

        modes = (d_model, d_state // 2)
        self.output_linear = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype)
        made: dict[str, Any] = {"device": device, "dtype": self.output_linear.weight.dtype}
        exact = {**made, "dtype": compute_dtype(made["dtype"])}  # exponents, so float32 or better
        self.log_dt = nn.Parameter(torch.empty(d_model, **exact))
        self.log_A_real = nn.Parameter(torch.empty(modes, **exact))
        self.A_imag = nn.Parameter(torch.empty(modes, **exact))
        B = torch.empty(*modes, 2, **made)
        if train_B:
            self.register_parameter("B", nn.Parameter(B))
        else:
            self.register_buffer("B", B)
        self.C = nn.Parameter(torch.empty((2,) * bidirectional + (*modes, 2), **made))
        self.D = nn.Parameter(torch.empty(d_model, **made))
        self.reset_parameters(stream(seed, "s4d") if generator is None and seed is not None else generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """`A` and `B` by `init`, `dt` log-uniform, `C` and `D` normal, the output map as torch's default."""
        size = self.d_state * self.d_model if self.init == "random" else self.d_state  # random: drawn for each feature
        A, B = (t.view(-1, self.d_state // 2) for t in s4d_init(self.init, size, b_clip=self.b_clip, generator=generator))
        self.log_A_real.copy_((-A.real).log().expand(self.log_A_real.shape))
        self.A_imag.copy_(A.imag.expand(self.A_imag.shape))
        self.B.copy_(torch.view_as_real(B * (0.5 if self.half_B else 1.0)).expand(self.B.shape))
        draw_uniform(self.log_dt, 0.5, generator)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        self.log_dt.add_(0.5).mul_(high - low).add_(low)
        draw_normal(self.C, 0.5**0.5, generator)
        draw_normal(self.D, 1.0, generator)
        for tensor in (self.output_linear.weight, self.output_linear.bias):
            draw_uniform(tensor, self.d_model**-0.5, generator)

    # One token at a time.

    def step(
        self,
        u_t: Tensor,  # (batch, d_model)
        state: Tensor,  # (batch, d_model, d_state / 2), complex
    ) -> tuple[Tensor, Tensor]:
        """`(y_t, state)` of the whole layer for one token, for online inference; the given state is not modified."""
        y, state = self.step_linear(u_t, state)
        return self._output(y[:, None])[:, 0], state

    def step_linear(
        self,
        u_t: Tensor,  # (batch, d_model)
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`(y_t, state)` of `linear` for one token."""
        check_token(u_t, self.d_model)
        self._check_state(state, u_t.shape[0])
        with without_autocast(u_t.device.type):
            u = wide(u_t)
            A, B, C, dt = self._system()
            modes = s4d_discrete(A, B, dt, self.disc)
            state = modes.log_step.exp() * state + modes.gain * u[..., None]
            return 2 * (C * state).sum(-1).real + wide(self.D) * u, state

    def initial_state(self, batch: int) -> Tensor:
        """The state of sequences that have not begun: zeros, complex `(batch, d_model, d_state / 2)`."""
        self._needs_recurrence("a state")
        check_int("batch", batch, 0)
        dtype = compute_dtype(self.log_dt.dtype).to_complex()
        return torch.zeros(batch, self.d_model, self.d_state // 2, dtype=dtype, device=self.log_dt.device)

    # Sequences.

    def forward(
        self,
        u: Tensor,  # (batch, length, d_model)
        state: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,  # (batch, length)
        return_state: bool = False,
    ) -> Any:
        """`y (batch, length, d_model)`, or `(y, state)` with the state after the last token.

        Args:
            state: before the first token; None is `initial_state(batch)`.
            attention_mask: tokens where it is 0 are not seen by the others, as in rows that are padded on the left.
        """
        check_tokens(u, self.d_model, attention_mask)
        if attention_mask is not None:
            u = u.masked_fill(attention_mask[..., None] == 0, 0)
        found = self.linear(u, state, return_state=return_state)
        y, state = found if return_state else (found, None)
        y = self._output(y)
        return (y, state) if return_state else y

    def linear(
        self,
        u: Tensor,  # (batch, length, d_model)
        state: Tensor | None = None,
        *,
        chunk_size: int | None = None,
        return_state: bool = False,
    ) -> Any:
        """The convolution and `D` alone, in float32 or better: `y (batch, length, d_model)`, or `(y, state)`.

        Args:
            chunk_size: convolve that many tokens at a time and carry the state; None convolves all at once.

        Raises:
            ValueError: a state or chunks with `disc="dss"` or a bidirectional layer.
        """
        check_tokens(u, self.d_model)
        if state is not None or return_state or chunk_size is not None:
            self._needs_recurrence("chunks" if chunk_size is not None else "a state")
        if state is not None:
            self._check_state(state, u.shape[0])
        if chunk_size is not None:
            check_int("chunk_size", chunk_size, 1)
        pieces = [u] if chunk_size is None else list(u.split(chunk_size, 1))
        out = []
        for i, piece in enumerate(pieces):
            y, state = self._convolve(piece, state, carry=return_state or i + 1 < len(pieces))
            out.append(y)
        y = out[0] if len(out) == 1 else torch.cat(out, 1)
        return (y, state) if return_state else y

    def kernel(self, length: int) -> Tensor:
        """The convolution kernel `(d_model, length)`, or `(2, d_model, length)` of a bidirectional layer."""
        A, B, C, dt = self._system()
        return s4d_kernel(A, B, C, dt, length, self.disc)

    def dense_weight(self, length: int) -> Tensor:
        """The Toeplitz matrices of `linear`, `(d_model, length, length)`, with `D` on their diagonals: for tests and plots."""
        K = self.kernel(length)
        past, future = K if self.bidirectional else (K, torch.zeros_like(K))
        t = torch.arange(length, device=K.device)
        lines = torch.cat([future[:, : length - 1].flip(1), past], 1)
        return lines[:, t[:, None] - t + length - 1] + torch.diag_embed(wide(self.D)[:, None].expand(-1, length))

    # Training and cost.

    def param_groups(self, lr: float, *, ssm_lr: float = 1e-3, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Groups for an optimizer: A, B and dt at `ssm_lr` without decay, all others at `lr` with `weight_decay`."""
        exact = self.no_weight_decay()
        slow = [p for name, p in self.named_parameters() if name in exact]
        rest = [p for name, p in self.named_parameters() if name not in exact]
        return [{"params": rest, "lr": lr, "weight_decay": weight_decay}, {"params": slow, "lr": ssm_lr, "weight_decay": 0.0}]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay."""
        return {"log_dt", "log_A_real", "A_imag"} | ({"B"} if self.train_B else set())

    def cost(self, batch: int, length: int, *, itemsize: int = 4) -> Cost:
        """The cost of one pass over `batch` sequences of `length` tokens, from shapes alone.

        Formula: with `E = d_model · d_state / 2` and FFTs of `2 length`, each `2.5 n log2 n`: `8 E length` for the kernel (two
        of them if bidirectional), an FFT of the kernel and two of each sequence, their product, `D` and the output map.
        """
        check_int("batch", batch, 0)
        check_int("length", length, 1)
        H, L, kernels = self.d_model, length, 1 + self.bidirectional
        E, transforms = H * (self.d_state // 2), H * (2 * batch + 1)
        fft = 2.5 * 2 * L * math.log2(2 * L)
        products = 6 * batch * H * (L + 1) + 2 * batch * L * H + 4 * batch * L * H**2
        flops = math.ceil(8 * kernels * E * L + fft * transforms + products)
        numbers = (5 + 2 * kernels) * E + 2 * kernels * H * L + 5 * batch * H * L + 4 * (L + 1) * transforms + 2 * H**2 + 2 * H
        return Cost(sum(p.numel() for p in self.parameters()), flops, 2 * flops, itemsize * numbers, 2 * itemsize * numbers)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, init={self.init!r}, disc={self.disc!r}, "
            f"bidirectional={self.bidirectional}, dropout={self.dropout}"
        )

    # Parts.

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`A, B, C` complex and `dt`, in float32 or better."""
        A = torch.complex(-wide(self.log_A_real).exp(), wide(self.A_imag))
        B, C = (torch.view_as_complex(wide(t).contiguous()) for t in (self.B, self.C))
        return A, B, C, wide(self.log_dt).exp()

    def _convolve(self, u: Tensor, state: Tensor | None, *, carry: bool) -> tuple[Tensor, Tensor | None]:
        """One convolution by FFT, with what an earlier state adds; the next state if it is carried on."""
        length = u.shape[1]
        with without_autocast(u.device.type):
            u = wide(u)
            A, B, C, dt = self._system()
            K = s4d_kernel(A, B, C, dt, length, self.disc)
            if self.bidirectional:
                K = torch.cat([K[0], K[1].flip(-1)], -1)  # circular: the second acts on what follows
            spectrum = torch.fft.rfft(K, n=2 * length).T * torch.fft.rfft(u, n=2 * length, dim=1)
            y = torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length] + wide(self.D) * u
            if state is None and not carry:
                return y, None
            modes = s4d_discrete(A, B, dt, self.disc)
            after = modes.gain * power_states(u, modes.log_step) if carry else None
            if state is not None:
                y = y + 2 * power_sum(C * modes.log_step.exp() * state, modes.log_step, length).mT
                after = None if after is None else after + (length * modes.log_step).exp() * state
            return y, after

    def _output(self, y: Tensor) -> Tensor:
        """GELU, dropout of whole features, and the gated linear map."""
        y = F.gelu(y)
        if self.training and self.dropout:
            y = F.dropout1d(y.mT, self.dropout).mT
        return F.glu(self.output_linear(y.to(self.output_linear.weight.dtype)), -1)

    def _needs_recurrence(self, what: str) -> None:
        if self.disc == "dss" or self.bidirectional:
            reason = "bidirectional=True" if self.bidirectional else "disc='dss'"
            raise ValueError(
                f"{what} must not be asked of a layer with {reason}: it has no recurrence, so no state and no steps"
            )

    def _check_state(self, state: Tensor, batch: int) -> None:
        self._needs_recurrence("a state")
        shape, dtype = (batch, self.d_model, self.d_state // 2), compute_dtype(self.log_dt.dtype).to_complex()
        found = (tuple(state.shape), state.dtype) if isinstance(state, Tensor) else type(state).__name__
        if found != (shape, dtype):
            raise ValueError(f"state must be {shape} in {dtype}; got {found}")
