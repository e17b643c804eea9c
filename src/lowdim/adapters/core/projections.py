"""Kinds of random projections `P (D, d)` with nearly orthogonal columns of unit length: how each is drawn, kept and applied."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lowdim.linalg import FastfoodDraws, fastfood_draws, fastfood_size, wide
from lowdim.linalg.fastfood import fastfood_op

__all__ = ["KINDS", "Projection"]

#: What a projection keeps, by name. Numbers are kept as bits, because model.to(torch.bfloat16) would round them.
Parts = dict[str, Tensor]


class Projection(Protocol):
    """One kind of projection; it holds no numbers itself."""

    def blank(self, total: int, dimension: int) -> Parts:
        """The parts without numbers."""
        ...

    def draw(self, total: int, dimension: int, generator: torch.Generator) -> Any:
        """New draws, on the CPU."""
        ...

    def keep(self, draws: Any, total: int, dimension: int) -> Parts:
        """Draws as parts; ValueError for those of another size."""
        ...

    def draws(self, parts: Parts, total: int, dimension: int) -> Any:
        """Parts as draws."""
        ...

    def apply(self, theta: Tensor, parts: Parts, total: int, energy: float) -> Tensor:
        """`P θ (total,)`, float32 or better, differentiable in `θ`."""
        ...


class _Fastfood:
    """`P = S H G Π H B`, in O(L) memory; see `lowdim.linalg.fastfood`."""

    def blank(self, total: int, dimension: int) -> Parts:
        kinds = {"signs": torch.int8, "permutation": torch.int32, "gaussian": torch.int32}
        return {name: torch.empty(fastfood_size(total), dtype=dtype) for name, dtype in kinds.items()}

    def draw(self, total: int, dimension: int, generator: torch.Generator) -> FastfoodDraws:
        return fastfood_draws(total, generator)

    def keep(self, draws: FastfoodDraws, total: int, dimension: int) -> Parts:
        size = fastfood_size(total)
        if len(draws) != size:
            raise ValueError(f"must have length {size}; got {len(draws)}")
        return {"signs": draws.signs.to(torch.int8), "permutation": draws.permutation.int(), "gaussian": _bits(draws.gaussian)}

    def draws(self, parts: Parts, total: int, dimension: int) -> FastfoodDraws:
        return FastfoodDraws(parts["signs"], parts["permutation"], _numbers(parts["gaussian"]))

    def apply(self, theta: Tensor, parts: Parts, total: int, energy: float) -> Tensor:
        gaussian = _numbers(parts["gaussian"])
        return fastfood_op(theta.to(gaussian.device), parts["signs"], parts["permutation"], gaussian, total, energy)


class _Dense:
    """Entries N(0, 1), each column divided by its norm; O(D d) memory."""

    def blank(self, total: int, dimension: int) -> Parts:
        return {"matrix": torch.empty(total, dimension, dtype=torch.int32)}

    def draw(self, total: int, dimension: int, generator: torch.Generator) -> Tensor:
        matrix = torch.randn(total, dimension, generator=generator)
        return matrix.div_(torch.linalg.vector_norm(matrix, dim=0))

    def keep(self, draws: Tensor, total: int, dimension: int) -> Parts:
        _check_shape(draws, total, dimension)
        return {"matrix": _bits(draws.to_dense())}

    def draws(self, parts: Parts, total: int, dimension: int) -> Tensor:
        return _numbers(parts["matrix"])

    def apply(self, theta: Tensor, parts: Parts, total: int, energy: float) -> Tensor:
        matrix = _numbers(parts["matrix"])
        return matrix.to(theta.dtype) @ theta.to(matrix.device)


class _Sparse:
    """Each entry not zero with probability `1/√D`, then ±1, each column divided by its norm; about `d √D` numbers."""

    def blank(self, total: int, dimension: int) -> Parts:
        empty = torch.empty(0, dtype=torch.int64)
        return {"places": empty, "columns": empty.clone(), "values": torch.empty(0, dtype=torch.int32)}

    def draw(self, total: int, dimension: int, generator: torch.Generator) -> Tensor:
        counts = torch.zeros(dimension, dtype=torch.int64)
        while bool((empty := counts == 0).any()):  # a column of zeros is drawn again
            trials = torch.full((int(empty.sum()),), float(total))
            counts[empty] = torch.binomial(trials, torch.full_like(trials, total**-0.5), generator=generator).long()
        columns = torch.arange(dimension)
        places = torch.empty(0, dtype=torch.int64)  # column · D + row, without repetition
        while len(missing := columns.repeat_interleave(counts - torch.bincount(places // total, minlength=dimension))):
            rows = torch.randint(total, (len(missing),), generator=generator)
            places = torch.cat([places, missing * total + rows]).unique()
        signs = torch.randint(0, 2, (len(places),), generator=generator).mul_(2).sub_(1)
        where, column = places % total, places // total
        values = signs / counts[column].float().sqrt()
        return _coo(where, column, values, total, dimension)

    def keep(self, draws: Tensor, total: int, dimension: int) -> Parts:
        _check_shape(draws, total, dimension)
        matrix = draws.to_sparse_coo().coalesce()
        where, column = matrix.indices()
        return {"places": where.clone(), "columns": column.clone(), "values": _bits(matrix.values())}

    def draws(self, parts: Parts, total: int, dimension: int) -> Tensor:
        return _coo(parts["places"], parts["columns"], _numbers(parts["values"]), total, dimension)

    def apply(self, theta: Tensor, parts: Parts, total: int, energy: float) -> Tensor:
        values = _numbers(parts["values"]).to(theta.dtype)
        chosen = theta.to(values.device).index_select(0, parts["columns"])
        return chosen.new_zeros(total).index_add(0, parts["places"], chosen * values)


KINDS: dict[str, Projection] = {"fastfood": _Fastfood(), "dense": _Dense(), "sparse": _Sparse()}


def _coo(rows: Tensor, columns: Tensor, values: Tensor, total: int, dimension: int) -> Tensor:
    places = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(places, values, (total, dimension), check_invariants=False).coalesce()


def _check_shape(draws: Tensor, total: int, dimension: int) -> None:
    if tuple(draws.shape) != (total, dimension):
        raise ValueError(f"must have shape {(total, dimension)}; got {tuple(draws.shape)}")


def _bits(numbers: Tensor) -> Tensor:
    numbers = wide(numbers).contiguous()
    return numbers.view(torch.int64 if numbers.dtype == torch.float64 else torch.int32)


def _numbers(bits: Tensor) -> Tensor:
    return bits.view(torch.float64 if bits.dtype == torch.int64 else torch.float32)
