"""DeltaProduct as a token mixer: projections, short convolutions, the recurrence, and a gated norm of each head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_choice, check_float, check_int
from lowdim.layers.core.tokens import check_state, check_token, check_tokens
from lowdim.layers.delta_product.convolution import ShortConvolution
from lowdim.layers.delta_product.cost import chunked_core, layer_cost, recurrent_core
from lowdim.layers.delta_product.fla import from_fla
from lowdim.linalg import Cost, compute_dtype, delta_product, draw_uniform, stream, unit_rows, wide, without_autocast

__all__ = ["DeltaProduct", "DeltaProductState"]

#: Gain of the Xavier initialisation of all matrices.
_GAIN = 2**-2.5


class DeltaProductState(NamedTuple):
    """What the next token needs of those before it.

    `recurrent (batch, value heads, head_dim, head_v_dim)` in float32 or better; `conv_q`, `conv_k`, `conv_v`
    `(batch, conv_size - 1, channels)` are the last inputs of the convolutions, None without convolutions.
    """

    recurrent: Tensor
    conv_q: Tensor | None = None
    conv_k: Tensor | None = None
    conv_v: Tensor | None = None


class _Inputs(NamedTuple):
    """What a recurrence reads, `(batch, length or length · n, heads, ...)`, and the next inputs of the convolutions."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    past: tuple[Tensor | None, ...]


class DeltaProduct(nn.Module):
    """A linear RNN that takes `num_householder` steps of online gradient descent for each token: constant memory for decoding.

    Formula: `q, k, v` are projections of `x`, each through a causal convolution of each channel and SiLU; `q` and `k` of each
    head are divided by their length; `beta = sigmoid(b_proj(x))`, doubled with `allow_neg_eigval`;
    `g = −exp(A_log) softplus(a_proj(x) + dt_bias)`. Then `lowdim.linalg.delta_product`, an RMS norm over each head's output,
    times `SiLU(g_proj(x))`, and `o_proj`. `k`, `v` and `beta` have `num_householder` sets for each token, ordered (micro-step,
    head, channel).

    Args:
        hidden_size: entries of a token.
        num_heads: heads of queries and keys.
        num_v_heads: heads of values, rates, gates and the state, a multiple of `num_heads`; each query and key serves that many
            consecutive ones. None is `num_heads`.
        head_dim: entries of a query or key of one head.
        expand_v: entries of a value, times `head_dim`.
        num_householder: steps for each token, `n`: transitions of rank n beyond the diagonal. Two solve the word problem of S3.
        use_forget_gate: a decay of the state for each token.
        use_output_gate: multiply the output of each head by `SiLU(g_proj(x))`.
        allow_neg_eigval: eigenvalues in [−1, 1] instead of [0, 1]; needed to track states.
        use_short_conv: convolutions before the SiLU; without, SiLU only.
        conv_size: taps of the convolutions.
        norm_eps: inside the root of the norm.
        chunk_size: tokens for each triangular system of `forward`; None runs token by token.
        seed: of the initial numbers; None uses `generator`, or torch's default one.

    Raises:
        ValueError: an option out of its range, `head_dim · expand_v` not an integer.

    Example:
        >>> import torch
        >>> from lowdim.layers import DeltaProduct
        >>> mixer = DeltaProduct(16, num_heads=2, head_dim=8, seed=0)
        >>> x = torch.randn(3, 10, 16)
        >>> y, state = mixer(x[:, :9], return_state=True)
        >>> last, state = mixer.step(x[:, 9], state)
        >>> torch.allclose(last, mixer(x)[:, 9], atol=1e-5)
        True

    Leave `A_log` and `dt_bias` out of weight decay (`no_weight_decay()` names them). Not for tasks that copy long passages word
    by word: the state has a fixed size.

    Source: Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", arXiv 2502.10297.
    """

    A_log: Tensor
    dt_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        head_dim: int = 256,
        expand_v: float = 2.0,
        num_householder: int = 2,
        use_forget_gate: bool = True,
        use_output_gate: bool = True,
        allow_neg_eigval: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        chunk_size: int | None = 32,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "head_dim": head_dim, "conv_size": conv_size}
        for name, value in {**sizes, "num_householder": num_householder}.items():
            check_int(name, value, 1)
        if chunk_size is not None:
            check_int("chunk_size", chunk_size, 1)
        check_float("expand_v", expand_v, 0.0, low_open=True)
        check_float("norm_eps", norm_eps, 0.0)
        if not math.isclose(head_dim * expand_v, round(head_dim * expand_v)):
            raise ValueError(f"head_dim * expand_v must be an integer; got {head_dim} * {expand_v} = {head_dim * expand_v}")
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        check_int("num_v_heads", self.num_v_heads, 1)
        if self.num_v_heads % num_heads:
            raise ValueError(f"num_v_heads must be a multiple of num_heads={num_heads}; got {num_v_heads}")
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.head_v_dim, self.num_householder, self.norm_eps = round(head_dim * expand_v), num_householder, norm_eps
        self.use_forget_gate, self.use_output_gate, self.allow_neg_eigval = use_forget_gate, use_output_gate, allow_neg_eigval
        self.use_short_conv, self.conv_size, self.chunk_size = use_short_conv, conv_size, chunk_size

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        self._widths = {"q": keys, "k": num_householder * keys, "v": num_householder * values}
        for name, width in self._widths.items():
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, width, bias=False, **made))
        self.b_proj = nn.Linear(hidden_size, num_householder * self.num_v_heads, bias=False, **made)
        if use_short_conv:
            for name, width in self._widths.items():
                self.add_module(f"{name}_conv", ShortConvolution(width, conv_size, **made))
        if use_forget_gate:
            self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False, **made)
            exact = compute_dtype(self.b_proj.weight.dtype)  # exponents, so float32 or better
            for name in ("A_log", "dt_bias"):
                self.register_parameter(name, nn.Parameter(torch.empty(self.num_v_heads, device=device, dtype=exact)))
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, values, bias=False, **made)
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=norm_eps, **made)
        self.o_proj = nn.Linear(values, hidden_size, bias=False, **made)
        self.reset_parameters(generator if seed is None else stream(seed, "delta-product"))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices Xavier uniform with gain `2 ** -2.5`, convolutions uniform in ±1/√taps, decays as in Mamba, norm 1."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                bound = _GAIN * math.sqrt(6 / (module.in_features + module.out_features))
                draw_uniform(module.weight, bound, generator)
            elif isinstance(module, ShortConvolution):
                draw_uniform(module.weight, 1 / math.sqrt(self.conv_size), generator)
        nn.init.ones_(self.o_norm.weight)
        if self.use_forget_gate:
            with torch.no_grad():
                for parameter in (self.A_log, self.dt_bias):
                    draw_uniform(parameter, 0.5, generator)
                    parameter.add_(0.5).clamp_min_(1e-8)
                self.A_log.mul_(16).log_()
                dt = (self.dt_bias * math.log(0.1 / 0.001) + math.log(0.001)).exp().clamp_min(1e-4)
                self.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())  # softplus gives dt again

    # Sequences.

    def forward(
        self,
        x: Tensor,  # (batch, length, hidden_size)
        state: DeltaProductState | None = None,
        *,
        attention_mask: Tensor | None = None,  # (batch, length)
        return_state: bool = False,
    ) -> Any:
        """`y (batch, length, hidden_size)`, or `(y, state)` with the state after the last token.

        Args:
            state: before the first token; None is `initial_state(batch)`.
            attention_mask: tokens where it is 0 are not seen by the others, as in rows that are padded on the left.
        """
        check_tokens(x, self.hidden_size, attention_mask)
        if state is not None:
            self._check_state(state, x.shape[0])
        y, state = self._mix(x, state, attention_mask, self.chunk_size)
        return (y, state) if return_state else y

    def initial_state(self, batch: int) -> DeltaProductState:
        """The state of sequences that have not begun: zeros."""
        check_int("batch", batch, 0)
        weight = self.o_proj.weight
        parts = [
            None if want is None else torch.zeros(want[0], dtype=want[1], device=weight.device)
            for want in self._parts(batch).values()
        ]
        return DeltaProductState(*parts)  # type: ignore[arg-type]

    def step(
        self,
        x_t: Tensor,  # (batch, hidden_size)
        state: DeltaProductState,
    ) -> tuple[Tensor, DeltaProductState]:
        """`(y_t, state)` for one token; the given state is not modified."""
        check_token(x_t, self.hidden_size)
        self._check_state(state, x_t.shape[0])
        y, state = self._mix(x_t[:, None], state, None, None)
        return y[:, 0], state

    def transition(
        self,
        x: Tensor,  # (batch, length, hidden_size)
    ) -> Tensor:
        """Each token's transition matrix of the state, `(batch, length, value heads, head_dim, head_dim)`: for diagnosis.

        Formula: `exp(g_t) (I − b_n k_n k_nᵀ) ... (I − b_1 k_1 k_1ᵀ)`.
        """
        check_tokens(x, self.hidden_size)
        found = self._inputs(x, None, None)
        k, beta = unit_rows(wide(found.k)), found.beta
        eye = torch.eye(self.head_dim, dtype=k.dtype, device=k.device)
        with without_autocast(x.device.type):
            k, beta = (t.unflatten(1, (-1, self.num_householder)) for t in (k, beta[..., None, None]))  # (B, T, n, H, ...)
            product = eye.expand(*k.shape[:2], k.shape[3], -1, -1)
            for i in range(self.num_householder):
                key = k[:, :, i, :, :, None]
                product = product - (beta[:, :, i] * key) @ (key.mT @ product)
            return product if found.g is None else found.g[..., None, None].exp() * product

    def _mix(
        self, x: Tensor, state: DeltaProductState | None, mask: Tensor | None, chunk_size: int | None
    ) -> tuple[Tensor, DeltaProductState]:
        if mask is not None:
            x = x.masked_fill(mask[..., None] == 0, 0)
        found = self._inputs(x, state, mask)
        o, recurrent = delta_product(
            *found[:5],
            num_householder=self.num_householder,
            initial_state=None if state is None else state.recurrent,
            normalize_qk=True,
            chunk_size=chunk_size,
        )
        with without_autocast(x.device.type):
            o = F.rms_norm(o, (self.head_v_dim,), self.o_norm.weight.to(o.dtype), self.norm_eps)
        if self.use_output_gate:
            o = o * F.silu(wide(self.g_proj(x))).unflatten(-1, (self.num_v_heads, -1))
        y = self.o_proj(o.flatten(2).to(self.o_proj.weight.dtype))
        return y, DeltaProductState(recurrent, *found.past)

    def _inputs(self, x: Tensor, state: DeltaProductState | None, mask: Tensor | None) -> _Inputs:
        """Queries, keys and values after convolution and SiLU, rates and decays, in float32 or better."""
        n, group = self.num_householder, self.num_v_heads // self.num_heads
        mixed, past = [], []
        for name, before in zip("qkv", (None, None, None) if state is None else state[1:], strict=True):
            y, now = self.get_submodule(f"{name}_proj")(x), None
            if self.use_short_conv:
                y, now = self.get_submodule(f"{name}_conv")(y, before)
            mixed.append(wide(F.silu(y)))
            past.append(now)
        batch, length = x.shape[:2]
        q = mixed[0].view(batch, length, self.num_heads, -1)
        k = mixed[1].reshape(batch, length * n, self.num_heads, -1)
        v = mixed[2].reshape(batch, length * n, self.num_v_heads, -1)
        if group > 1:
            q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
        beta = wide(self.b_proj(x)).sigmoid() * (2 if self.allow_neg_eigval else 1)
        g = None
        if self.use_forget_gate:
            g = -wide(self.A_log).exp() * F.softplus(wide(self.a_proj(x)) + wide(self.dt_bias))
        if mask is not None:
            hidden = mask[..., None] == 0
            beta, g = beta.masked_fill(hidden, 0), None if g is None else g.masked_fill(hidden, 0)
        return _Inputs(q, k, v, beta.reshape(batch, length * n, -1), g, tuple(past))

    def _parts(self, batch: int) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
        """Shape and dtype of each part of a state."""
        dtype = self.o_proj.weight.dtype
        shape = (batch, self.num_v_heads, self.head_dim, self.head_v_dim)
        parts: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {"recurrent": (shape, compute_dtype(dtype))}
        for name, width in self._widths.items():
            parts[f"conv_{name}"] = ((batch, self.conv_size - 1, width), dtype) if self.use_short_conv else None  # type: ignore[assignment]
        return parts

    def _check_state(self, state: DeltaProductState, batch: int) -> None:
        check_state(state, self._parts(batch))

    # Files of others, cost, and what training needs to know.

    def load_fla(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> Self:
        """Copy the weights of a `GatedDeltaProduct` of flash-linear-attention; the layer keeps its own dtype.

        Args:
            state_dict: their tensors; those whose name begins with `prefix` are read, without it.

        Raises:
            ValueError: a bias of a convolution (there is none here), tensors missing or left over, or of another shape (named).
        """
        self.load_state_dict(from_fla(state_dict, prefix, self.state_dict()))
        return self

    def cost(self, batch: int, length: int, *, mode: str = "chunk", itemsize: int = 4) -> Cost:
        """The cost of one pass over `batch` sequences of `length` tokens, from shapes alone.

        Args:
            mode: `chunk` (in chunks of `chunk_size`, or the default 32) or `recurrent` (token by token).
        """
        check_int("batch", batch, 0)
        check_int("length", length, 0)
        check_choice("mode", mode, ("chunk", "recurrent"))
        heads, K, V, n = self.num_v_heads, self.head_dim, self.head_v_dim, self.num_householder
        if mode == "recurrent":
            core = recurrent_core(batch * length * heads, K, V, n, gated=self.use_forget_gate)
        else:
            core = chunked_core(batch * heads, length, self.chunk_size or 32, K, V, n)
        widths = [(m.in_features, m.out_features) for m in self.children() if isinstance(m, nn.Linear)]
        channels = sum(m.weight.shape[0] for m in self.children() if isinstance(m, ShortConvolution))
        return layer_cost(
            widths,
            channels,
            self.conv_size if channels else 0,
            core,
            tokens=batch * length,
            parameters=sum(p.numel() for p in self.parameters()),
            itemsize=itemsize,
        )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: they are exponents and times."""
        return {"A_log", "dt_bias"} if self.use_forget_gate else set()

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, num_v_heads={self.num_v_heads}, "
            f"head_dim={self.head_dim}, head_v_dim={self.head_v_dim}, num_householder={self.num_householder}"
        )
