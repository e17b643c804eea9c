"""How a frozen weight is kept in 8 or 4 bits: torchao's int8 and int4, bitsandbytes' nf4. What is stored, and read back."""

from __future__ import annotations

import importlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.errors import MissingExtraError, check_choice
from lowdim.linalg import dequantize_affine, dequantize_blockwise, dequantize_nibbles, has_numbers, pack_nibbles

__all__ = ["SCHEMES", "Scheme", "scheme_named"]


class Scheme(ABC):
    """One way to keep a matrix `(out, in)` in few bits.

    Attributes:
        name: as users write it.
        extra: of the package that quantizes.
        what: for texts.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    what: ClassVar[str]

    @abstractmethod
    def store(self, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a matrix `(out, in)` in float32; `weight` holds the codes.

        Raises:
            MissingExtraError: the package that quantizes is not installed.
        """

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of `store`."""

    @abstractmethod
    def values(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix `(out, in)` that the tensors stand for."""

    @abstractmethod
    def check(self) -> None:
        """Raise MissingExtraError if the package that quantizes is not installed."""

    def _package(self, package: str, module: str) -> Any:
        try:
            with _quiet():
                return importlib.import_module(module)
        except ImportError as error:
            raise MissingExtraError(package, self.extra, f"quantize={self.name}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchao logs of kernels for other machines when it is imported first."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class Int8(Scheme):
    """torchao's int8: `w = code · scale`, a scale for each row, codes in −127 … 127."""

    name, extra, what = "int8", "quantized", "torchao int8, a scale for each row"

    def check(self) -> None:
        """Torchao."""
        self._package("torchao", "torchao.quantization")

    def store(self, matrix: Tensor) -> dict[str, Tensor]:
        """As `torchao.quantization.Int8WeightOnlyConfig()` does."""
        ao = self._package("torchao", "torchao.quantization")
        found = ao.Int8Tensor.from_hp(matrix, granularity=ao.PerRow())
        return {"weight": found.qdata, "scales": found.scale.reshape(-1, 1)}

    def layout(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """A byte for each weight."""
        return {"weight": ((out_features, in_features), torch.int8), "scales": ((out_features, 1), torch.float32)}

    def values(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`code · scale`."""
        return dequantize_affine(stored["weight"], stored["scales"], None, group_size=shape[1], dtype=dtype)


class Int4(Scheme):
    """torchao's int4: `w = (code − zero) scale`, codes in 0 … 15, a scale and a zero for each 128, 64 or 32 weights of a row.

    The largest of these that divides the row is taken; a row that none divides is filled up with zeros to a multiple of 32.
    """

    name, extra, what = "int4", "quantized", "torchao int4, a scale and a zero for each 128 weights"

    def check(self) -> None:
        """Torchao."""
        self._package("torchao", "torchao.quantization")

    def store(self, matrix: Tensor) -> dict[str, Tensor]:
        """As torchao's asymmetric int4 does, two codes in a byte."""
        ao = self._package("torchao", "torchao.quantization.quant_primitives")
        out_features, in_features = matrix.shape
        size, width = self._groups(in_features)
        padded = F.pad(matrix, (0, width - in_features)) if width > in_features else matrix
        block, how = (1, size), {"quant_min": 0, "quant_max": 15}
        kinds = {"scale_dtype": torch.float32, "zero_point_dtype": torch.uint8, "eps": 1e-6}
        scale, zero = ao.choose_qparams_affine(padded, ao.MappingType.ASYMMETRIC, block, torch.uint8, **how, **kinds)
        codes = ao.quantize_affine(padded, block, scale, zero, torch.uint8, **how)
        packed = pack_nibbles(codes).view(out_features, width // 2)
        return {"weight": packed, "scales": scale.reshape(-1, 1), "zeros": zero.reshape(-1, 1)}

    def layout(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Half a byte for each weight."""
        size, width = self._groups(in_features)
        groups = (out_features * width // size, 1)
        codes = ((out_features, width // 2), torch.uint8)
        return {"weight": codes, "scales": (groups, torch.float32), "zeros": (groups, torch.uint8)}

    def values(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`(code − zero) scale`."""
        size, width = self._groups(shape[1])
        how = {"group_size": size, "dtype": dtype}
        flat = dequantize_nibbles(stored["weight"].reshape(-1), stored["scales"], stored["zeros"], **how)
        return flat.view(shape[0], width)[:, : shape[1]]

    @staticmethod
    def _groups(in_features: int) -> tuple[int, int]:
        """Weights that share a scale, and the length of a row that is filled up."""
        size = next((size for size in (128, 64, 32) if in_features % size == 0), 32)
        return size, -(-in_features // size) * size


class NF4(Scheme):
    """bitsandbytes' nf4: 16 quantiles of a normal distribution, times the largest magnitude of 64 weights (in 8 bits itself).

    Source: Dettmers et al., "QLoRA", NeurIPS 2023, arXiv 2305.14314 (with double quantization).
    """

    name, extra, what = "nf4", "bitsandbytes", "bitsandbytes nf4 with double quantization"
    block: ClassVar[int] = 64
    outer: ClassVar[int] = 256

    def check(self) -> None:
        """Bitsandbytes."""
        self._package("bitsandbytes", "bitsandbytes.functional")

    def store(self, matrix: Tensor) -> dict[str, Tensor]:
        """As `bitsandbytes.nn.Linear4bit(..., quant_type="nf4", compress_statistics=True)` does."""
        bnb = self._package("bitsandbytes", "bitsandbytes.functional")
        packed, state = bnb.quantize_4bit(matrix.contiguous(), blocksize=self.block, quant_type="nf4", compress_statistics=True)
        return {
            "weight": packed,
            "scales": state.absmax,
            "outer": state.state2.absmax,
            "table": state.state2.code,
            "offset": state.offset.reshape(1),
        }

    def layout(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Half a byte for each weight."""
        total = out_features * in_features
        blocks = math.ceil(total / self.block)
        return {
            "weight": ((math.ceil(total / 2), 1), torch.uint8),
            "scales": ((blocks,), torch.uint8),
            "outer": ((math.ceil(blocks / self.outer),), torch.float32),
            "table": ((256,), torch.float32),
            "offset": ((1,), torch.float32),
        }

    def values(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`quantile[code] · absmax`; in a forecast nothing but the result."""
        absmax = dequantize_blockwise(stored["scales"], stored["outer"], stored["table"], self.outer).add_(stored["offset"])
        packed = stored["weight"]
        if not has_numbers(packed):
            return torch.empty(shape, dtype=dtype, device=packed.device)
        self._package("bitsandbytes", "bitsandbytes")
        kept = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        total = shape[0] * shape[1]
        # On CPUs with AVX-512, bitsandbytes 0.50 reads the magnitudes of other blocks where a row is not whole blocks, so
        # that such a weight is read as one row; and a row of an odd length needs a compiler.
        asked = shape if shape[1] % self.block == 0 else (1, total + total % 2)
        found = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, self.block, "nf4", asked, kept)
        return found.reshape(-1)[:total].view(shape).to(dtype)


#: By name.
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (Int8(), Int4(), NF4())}


def scheme_named(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        UnknownNameError: there is none.

    Example:
        >>> from lowdim.modules import scheme_named
        >>> scheme_named("int4").layout(2, 64)["weight"]
        ((2, 32), torch.uint8)
    """
    check_choice("quantize", name, SCHEMES)
    return SCHEMES[name]
