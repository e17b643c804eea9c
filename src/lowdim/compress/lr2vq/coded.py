"""The tensors of a quantized weight, and the matrix that they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.compress.lr2vq.packing import code_bits, code_dtype, is_packed, pack_codes, packed_bytes, unpack_codes
from lowdim.errors import check_int
from lowdim.modules import Rebuildable
from lowdim.surgery import layer_dtype, matrix_shape

__all__ = ["Coded", "vq_bytes"]


def vq_bytes(numel: int, codebook_size: int, subvector_size: int, clustering_dim: int, element_size: int = 4) -> int:
    """The bytes of a quantized weight without its bias.

    Formula: `⌈n ⌈log₂ k⌉ / 8⌉ + e (k d̃ + m d̃)` with n = numel / m subvectors. The codes are the first term, and most of it.

    Args:
        numel: entries of the dense weight.
        element_size: bytes e of an entry of the tables.

    Raises:
        ValueError: a size below 1, m that does not divide `numel`.

    Example:
        >>> from lowdim.compress import vq_bytes
        >>> vq_bytes(4096 * 4096, 256, 8, 4), 4 * 4096 * 4096
        (2101376, 67108864)

    Source: arXiv 2211.11397.
    """
    for name, value in (
        ("numel", numel),
        ("codebook_size", codebook_size),
        ("subvector_size", subvector_size),
        ("clustering_dim", clustering_dim),
        ("element_size", element_size),
    ):
        check_int(name, value, 1)
    if numel % subvector_size:
        raise ValueError(f"subvector_size must divide numel={numel}; got {subvector_size}")
    codes = math.ceil(numel // subvector_size * code_bits(codebook_size) / 8)
    return codes + element_size * clustering_dim * (codebook_size + subvector_size)


class Coded(nn.Module, Rebuildable):
    """Basis, codebook, codes and bias, and the matrix that they stand for."""

    #: Keep the decoded weight between calls in evaluation mode without gradients: faster, in the dense layer's memory.
    cached: ClassVar[bool] = True

    codes: Tensor
    bias: nn.Parameter | None
    shape: tuple[int, int]

    def _set(self, basis: Tensor, codebook: Tensor, codes: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
        _check(basis, codebook, codes, shape, bias)
        self.shape = (int(shape[0]), int(shape[1]))
        self.basis, self.codebook = _parameter(basis), _parameter(codebook)
        self.bias = None if bias is None else _parameter(bias)
        kept = codes.detach().to(code_dtype(len(codebook)), copy=True)
        self.register_buffer("codes", kept)
        self._decoded: Any = None

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.codebook.shape[0]

    @property
    def subvector_size(self) -> int:
        """M."""
        return self.basis.shape[0]

    @property
    def clustering_dim(self) -> int:
        """d̃."""
        return self.basis.shape[1]

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """`P C[a]` for every subvector, `(out, in)`, differentiable by the basis and the codebook; computed in `dtype`."""
        table = _in(self.codebook, dtype) @ _in(self.basis, dtype).mT  # the effective codebook, (k, m)
        return F.embedding(self._unpacked().long(), table).view(self.shape)

    def decoded(self) -> Tensor:
        """`matrix()`, kept between calls in evaluation mode without gradients."""
        if self.training or torch.is_grad_enabled() or not self.cached or not self._is_plain():
            self._decoded = None
            return self.matrix()
        stamp = [(t.data_ptr(), t._version, t.dtype, t.device) for t in (self.basis, self.codebook, self.codes)]
        if self._decoded is not None and self._decoded[0] == stamp and self._same_tables(self._decoded[1]):
            return self._decoded[2]
        weight = self.matrix()
        self._decoded = stamp, (self.basis.detach().clone(), self.codebook.detach().clone()), weight
        return weight

    def compressed_bytes(self, element_size: int = 4) -> int:
        """`vq_bytes` of this layer: codes and tables, without the bias."""
        sizes = self.codebook_size, self.subvector_size, self.clustering_dim
        return vq_bytes(self.shape[0] * self.shape[1], *sizes, element_size)

    def description(self) -> dict[str, Any]:
        """The three sizes, and whether there is a bias."""
        return {
            "codebook_size": self.codebook_size,
            "subvector_size": self.subvector_size,
            "clustering_dim": self.clustering_dim,
            "bias": self.bias is not None,
        }

    def after_loading(self) -> None:
        """Unpack the codes."""
        self.codes = self._unpacked()

    def _unpacked(self) -> Tensor:
        """The codes, which are packed until `after_loading`; transformers reads the weights of some models before that."""
        if self.codes.ndim == 2:
            return self.codes
        return unpack_codes(self.codes, self.codebook_size, self._code_shape)

    @property
    def _code_shape(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1] // self.subvector_size

    def _is_plain(self) -> bool:
        """Whether the tensors have addresses and versions by which a change is noticed."""
        tensors = (self.basis, self.codebook, self.codes)
        if torch.compiler.is_compiling() or any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
            return False
        return not any(t.is_meta or t.is_inference() for t in tensors)

    def _same_tables(self, tables: tuple[Tensor, Tensor]) -> bool:
        """A write through `.data` has no version; on other devices than the CPU, comparing would wait for the device."""
        if self.basis.device.type != "cpu":
            return True
        return torch.equal(tables[0], self.basis) and torch.equal(tables[1], self.codebook)

    def train(self, mode: bool = True) -> Self:
        """As usual; the decoded weight is dropped."""
        self._decoded = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._decoded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Codes of fewer bits than their dtype are packed."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_packed(self.codebook_size) and self.codes.ndim == 2:
            destination[f"{prefix}codes"] = pack_codes(self.codes, self.codebook_size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        key = f"{prefix}codes"
        given = state_dict.get(key)
        if self.codes.ndim == 2 and isinstance(given, Tensor) and given.ndim == 1:
            state_dict[key] = unpack_codes(given, self.codebook_size, self._code_shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _blank(
        cls, layer: nn.Module, codebook_size: int, subvector_size: int, clustering_dim: int, bias: bool | None = None
    ) -> dict[str, Any]:
        """The tensors of `_set` on the meta device; a bias where `layer` has one, unless `bias` says otherwise."""
        out, columns = matrix_shape(layer)
        for name, value in (("codebook_size", codebook_size), ("subvector_size", subvector_size)):
            check_int(name, value, 1)
        check_int("clustering_dim", clustering_dim, 1, subvector_size)
        if columns % subvector_size:
            raise ValueError(f"subvector_size must divide its {columns} columns; got {subvector_size}")
        own = getattr(layer, "bias", None) is not None
        dtype, meta = layer_dtype(layer), torch.device("meta")
        return {
            "basis": torch.empty(subvector_size, clustering_dim, dtype=dtype, device=meta),
            "codebook": torch.empty(codebook_size, clustering_dim, dtype=dtype, device=meta),
            "codes": torch.empty(out, columns // subvector_size, dtype=code_dtype(codebook_size), device=meta),
            "shape": (out, columns),
            "bias": torch.empty(out, dtype=dtype, device=meta) if (own if bias is None else bias) else None,
        }

    def _expect_packed(self) -> Self:
        """Have room for the codes as files hold them, until `after_loading`."""
        if is_packed(self.codebook_size):
            size = packed_bytes(self.codes.numel(), self.codebook_size)
            self.codes = torch.empty(size, dtype=torch.uint8, device="meta")
        return self

    @classmethod
    def _recognised(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        if not {"basis", "codebook", "codes"} <= tensors.keys():
            return None
        (m, d), k = tensors["basis"].shape, len(tensors["codebook"])
        return {"codebook_size": k, "subvector_size": m, "clustering_dim": d, "bias": "bias" in tensors}

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        sizes = f"codebook_size={self.codebook_size}, subvector_size={self.subvector_size}"
        own = super().extra_repr() or f"{self.shape[0]} x {self.shape[1]}, bias={self.bias is not None}"
        return f"{own}, {sizes}, clustering_dim={self.clustering_dim}"


def _check(basis: Tensor, codebook: Tensor, codes: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
    if basis.ndim != 2 or codebook.ndim != 2 or basis.shape[1] != codebook.shape[1] or basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"basis must be (m, d) with d <= m, and codebook (k, d); got {tuple(basis.shape)} and {tuple(codebook.shape)}"
        )
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise TypeError(f"codes must be integers; got {codes.dtype}")
    out, columns = shape
    if columns % len(basis) or tuple(codes.shape) != (out, columns // len(basis)):
        raise ValueError(
            f"codes must have shape ({out}, {columns} / {len(basis)}), one for each subvector of a weight {tuple(shape)}; got "
            f"{tuple(codes.shape)}"
        )
    if not codes.is_meta and codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < len(codebook)):
        raise ValueError(f"codes must be in [0, {len(codebook) - 1}]; got {int(codes.min())} to {int(codes.max())}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"bias must have shape ({out},); got {tuple(bias.shape)}")


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))


def _in(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None else values.to(dtype)
