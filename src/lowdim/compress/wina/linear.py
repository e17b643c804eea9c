"""A linear layer that uses only some of its inputs, chosen for each token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.compress.wina.masks import check_sparsity, kept, scores_of, wina_mask
from lowdim.compress.wina.rows import above, largest, sum_of_rows, transposed
from lowdim.errors import check_choice, check_float, warn_caller
from lowdim.linalg import compute_dtype, gather, wide
from lowdim.linalg.eager import is_eager
from lowdim.modules import MaskedLinear

__all__ = ["CRITERIA", "RULES", "WINALinear"]

CRITERIA = ("wina", "teal")
RULES = ("topk", "threshold")
_GATHERED = (torch.float32, torch.float64)  # dtypes in which rows are summed faster than the dense product
_WORTH = 0.5  # sparsity from which they are, on every processor that was tried


class WINALinear(MaskedLinear):
    """A linear layer over the inputs that matter: `y = W (x ⊙ mask(x)) + bias`.

    The mask is chosen for each token by `|x_j| c_j`, with `c_j = ‖W[:, j]‖₂` (TEAL: 1). The norms only choose; they never scale
    `x`, and the bias is never masked. Of a sequence of L > 1 tokens (axis -2 of at least three) all but the last
    `int((1 - dense_prefix) L)` use every input; a single token is always sparse.

    One token on a CPU, in evaluation mode, without gradients and at a sparsity of at least 0.5, reads only the rows of a
    transposed copy of the weight that its mask names. The copy is made at the first such call, doubles the weight's memory, and
    is dropped by `train()`.

    Args:
        layer: an nn.Linear or transformers' Conv1D, whose parameters are shared.
        sparsity: share of the inputs that a token leaves out, in [0, 1).
        criterion: `"wina"` or `"teal"`.
        mask_by: `"topk"`: the `int(in (1 - sparsity))` largest scores; `"threshold"`: scores above `threshold`.
        threshold: see `wina_threshold`.
        dense_prefix: share of a sequence's first tokens that stay dense, in [0, 1].

    Attributes:
        column_norms: `(in,)`, in float32 or better; saved.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import WINALinear
        >>> layer = WINALinear.from_linear(nn.Linear(8, 4), 0.5).eval()
        >>> int(layer.mask(torch.randn(1, 8)).sum())
        4

    Source: arXiv 2505.19427. When not: training, and many tokens at once on a machine without a kernel for it, since then
    the product is as long as the dense one.
    """

    same_when_dense: ClassVar[bool] = False
    column_norms: Tensor

    def __init__(
        self,
        layer: nn.Module,
        *,
        sparsity: float,
        criterion: Literal["wina", "teal"] = "wina",
        mask_by: Literal["topk", "threshold"] = "topk",
        threshold: float | None = None,
        dense_prefix: float = 0.01,
    ):
        super().__init__(layer)
        check_sparsity("sparsity", sparsity)
        check_choice("criterion", criterion, CRITERIA)
        check_choice("mask_by", mask_by, RULES)
        check_float("dense_prefix", dense_prefix, 0.0, 1.0)
        if mask_by == "threshold" and threshold is None:
            raise ValueError("mask_by='threshold' needs a threshold; lowdim.compress.wina finds one from batches")
        if threshold is not None:
            check_float("threshold", threshold, 0.0)
        self.sparsity, self.criterion, self.mask_by = float(sparsity), criterion, mask_by
        self.threshold, self.dense_prefix = threshold, float(dense_prefix)
        self._rows: tuple[Tensor, tuple[int, int]] | None = None
        self._warned = False
        dtype = compute_dtype(self.weight.dtype)
        self.register_buffer("column_norms", torch.empty(self.in_features, dtype=dtype, device=self.weight.device))
        self.refresh()

    @classmethod
    def from_linear(cls, linear: nn.Module, sparsity: float, **options: Any) -> Self:
        """The layer with its weight and bias shared; keywords as for the class."""
        return cls(linear, sparsity=sparsity, **options)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the column norms again, after the weight has changed."""
        if self.criterion == "teal":
            norms = torch.ones_like(self.column_norms)
        else:
            norms = gather(wide(self.matrix).square().sum(0)).sqrt()
        self.column_norms = norms.to(dtype=compute_dtype(self.weight.dtype))
        self._norms_are_fresh()

    def mask(self, x: Tensor) -> Tensor:  # type: ignore[override]  # it depends on the input
        """Which inputs are used, `(..., in)`, boolean; tokens of the dense prefix use all."""
        if self.mask_by == "topk":
            found = wina_mask(x, self.column_norms, self.sparsity)
        else:
            found = scores_of(x, self.column_norms) > cast(float, self.threshold)
        length = x.shape[-2] if x.ndim > 2 else 1
        if length > 1:
            found[..., : length - int((1 - self.dense_prefix) * length), :] = True
        return found

    def dense_weight(self) -> Tensor:
        """The whole weight, `(out, in)`: the mask is on the inputs."""
        return self.matrix

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        if not is_eager() or not self._gathers(x):
            self._warn_if_stale()
            return F.linear(x * self.mask(x), self.matrix, self.bias)
        weight = cast(Tensor, self._parameters["weight"])  # for a small layer the search by __getattr__ takes long
        now = (weight.data_ptr(), weight._version)
        if self._rows is None or self._rows[1] != now:
            self._warn_if_stale()
            self._rows = (transposed(self.matrix.detach()), now)
        return self._gathered(x, self._rows[0])

    def train(self, mode: bool = True) -> Self:
        """Training mode drops the transposed copy of the weight."""
        if mode:
            self._rows = None
        return super().train(mode)

    def kept(self) -> int:
        """Inputs that a token uses by the sparsity."""
        return kept(self.in_features, self.sparsity)

    def copied_bytes(self) -> int:
        """Bytes of the transposed copy, if there is one now."""
        return 0 if self._rows is None else self._rows[0].nbytes

    def description(self) -> dict[str, Any]:
        """The settings."""
        names = ("sparsity", "criterion", "mask_by", "threshold", "dense_prefix")
        return {name: getattr(self, name) for name in names}

    def after_loading(self) -> None:
        """Norms that a loader rounded to 16 bits are taken again; those of the file are kept otherwise."""
        if self.column_norms.dtype != compute_dtype(self.weight.dtype):
            self.refresh()
        self._norms_are_fresh()

    def extra_repr(self) -> str:
        """Sizes and sparsity, for `print(model)`."""
        return f"{super().extra_repr()}, sparsity={self.sparsity:g}, criterion={self.criterion!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files are without the transposed copy of the weight."""
        return {**self.__dict__, "_rows": None}

    def _warn_if_stale(self) -> None:
        if self._is_stale():
            self._warned = True
            warn_caller(f"the weight of {self} has changed since its column norms were taken; call refresh()")

    def _is_stale(self) -> bool:
        """Whether this very weight has been written to since; a copy of the layer has another one, and its norms."""
        if self._warned or self.criterion == "teal" or torch.compiler.is_compiling():
            return False
        weight, version = self._seen
        return weight == id(self.weight) and version != self.weight._version

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts; the norms stay in float32 or better."""
        norms, was_stale = self.column_norms, self._is_stale()
        super()._apply(fn, recurse)
        wanted = torch.promote_types(compute_dtype(self.weight.dtype), norms.dtype)
        if self.column_norms.dtype != wanted and not norms.is_meta and not self.column_norms.is_meta:
            self.column_norms = norms.to(device=self.column_norms.device, dtype=wanted)
        self._norms_are_fresh()
        if was_stale:
            self._seen = id(self.weight), -1
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """A state dict brings the norms of its weight."""
        super()._load_from_state_dict(state_dict, prefix, *others)
        if f"{prefix}column_norms" in state_dict:
            self._norms_are_fresh()

    def _norms_are_fresh(self) -> None:
        self._seen, self._rows = (id(self.weight), self.weight._version), None

    def _gathers(self, x: Tensor) -> bool:
        """Whether this call reads only the rows that it uses: one token, where that is exact and faster."""
        weight = self._parameters.get("weight")  # None if it is computed, or a replica's
        return (
            type(weight) is nn.Parameter  # with plain data
            and weight.is_cpu
            and x.numel() == self.in_features
            and not self.training
            and self.sparsity >= _WORTH
            and type(x) is Tensor
            and x.is_cpu
            and x.dtype == weight.dtype
            and x.dtype in _GATHERED
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and not torch.is_autocast_enabled("cpu")
        )

    def _gathered(
        self,
        x: Tensor,  # one token
        rows: Tensor,  # (in, out)
    ) -> Tensor:
        token = x.detach().numpy().reshape(-1)
        scores = np.abs(token) * cast(Tensor, self._buffers["column_norms"]).numpy()
        if self.mask_by == "topk":
            chosen = largest(scores, kept(self.in_features, self.sparsity))
        else:
            chosen = above(scores, cast(float, self.threshold))
        found = sum_of_rows(rows, token, chosen)
        if self.bias is not None:
            found = found + self.bias
        return found.view(*x.shape[:-1], self.out_features)
