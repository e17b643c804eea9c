"""The module that an attention layer gets: orthogonal bases of its keys and values, and the rank of each head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lowdim.compress.matryoshka_kv.attention import attend, grouped, leading, restored
from lowdim.errors import shown
from lowdim.linalg import cayley
from lowdim.modules import Rebuildable

__all__ = ["NAME", "Block", "Heads", "MatryoshkaProjection"]

#: Under this name attention layers hold their projection.
NAME = "lowdim_kv"

#: Projected keys and values of the heads that share their ranks: `(batch, n, tokens, r)` and `(batch, n, tokens, s)`.
Block = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Heads:
    """KV heads that share both ranks, with their part of the bases."""

    index: Tensor | None  # (n,), None: all heads
    key_basis: Tensor  # (n, d, r)
    value_basis: Tensor  # (n, d, s)
    value_mean: Tensor  # (n, d)

    def of(self, states: Tensor) -> Tensor:
        """These heads' part of `(batch, num_kv_heads, ...)`."""
        return states if self.index is None else states.index_select(1, self.index)

    def compress(
        self,
        key: Tensor,  # (batch, num_kv_heads, tokens, d), after the rotary embedding
        value: Tensor,  # the same
    ) -> Block:
        """Projected keys and values."""
        return self.of(key) @ self.key_basis, (self.of(value) - self.value_mean[:, None]) @ self.value_basis


class MatryoshkaProjection(nn.Module, Rebuildable):
    """Bases and ranks of the keys and values of one attention layer; `matryoshka_kv` makes it.

    Formula: `U = cayley(raw)`, orthogonal, its columns from the most to the least important direction of a KV head. Of a head,
    `k U_k[:, :r]` and `(v - μ) U_v[:, :s]` are cached.

    Attributes:
        key_raw, value_raw: parameters `(num_kv_heads, head_dim, head_dim)`, float32 or better.
        value_mean: parameter `(num_kv_heads, head_dim)`.
        key_ranks, value_ranks: buffers `(num_kv_heads,)`, int64, each in [1, head_dim]; `set_ranks` changes them.

    Example:
        >>> from lowdim.compress import MatryoshkaProjection
        >>> projection = MatryoshkaProjection(2, 8)
        >>> projection.set_ranks(4, [2, 8])
        >>> projection.description()
        {'heads': 2, 'head_dim': 8, 'key_ranks': [4, 4], 'value_ranks': [2, 8]}

    Source: arXiv 2410.14731.
    """

    added = True

    key_raw: nn.Parameter
    value_raw: nn.Parameter
    value_mean: nn.Parameter
    key_ranks: Tensor
    value_ranks: Tensor

    def __init__(self, num_kv_heads: int, head_dim: int, *, layer: str = "", device: Any = None, dtype: Any = None):
        super().__init__()
        self.num_kv_heads, self.head_dim, self.layer = num_kv_heads, head_dim, layer
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for name in ("key_raw", "value_raw"):
            setattr(self, name, nn.Parameter(torch.zeros(num_kv_heads, head_dim, head_dim, device=device, dtype=dtype)))
        self.value_mean = nn.Parameter(torch.zeros(num_kv_heads, head_dim, device=device, dtype=dtype))
        for name in ("key_ranks", "value_ranks"):
            self.register_buffer(name, torch.full((num_kv_heads,), head_dim, dtype=torch.int64, device=device))
        self._planned: tuple[tuple[int, ...], tuple[int, ...]] = (head_dim,) * num_kv_heads, (head_dim,) * num_kv_heads
        self._read: tuple[Any, tuple[tuple[int, ...], tuple[int, ...]]] | None = None
        self._bases: dict[Any, tuple[Any, Any]] = {}
        self._moving = False
        self._handed: tuple[Tensor, list[Heads], list[Block]] | None = None

    # Bases

    def key_basis(self) -> Tensor:
        """Orthogonal bases of the keys, `(num_kv_heads, head_dim, head_dim)`, most important column first."""
        return self._basis("key_raw")

    def value_basis(self) -> Tensor:
        """Orthogonal bases of the values."""
        return self._basis("value_raw")

    def _basis(self, name: str) -> Tensor:
        raw = getattr(self, name)
        return self._kept(name, raw.dtype, lambda: cayley(raw))

    def _kept(self, name: str, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
        """What `make` gives, made again only after a parameter or a rank has changed; never kept where it has a gradient.

        Fused optimizers write to a parameter without raising its version: after a pass with gradients nothing is kept until
        `train` or `eval` is called.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._own().values()):
            self._moving = True
            self._bases.clear()
            return make()
        if self._moving:
            with torch.no_grad():
                return make()
        key, now = (name, dtype, torch.is_inference_mode_enabled()), self.state()
        if key not in self._bases or self._bases[key][0] != now:
            with torch.no_grad():
                self._bases[key] = now, make()
        return self._bases[key][1]

    def train(self, mode: bool = True) -> Self:
        """Between passes with gradients and here an optimizer may have changed the bases."""
        self._moving = False
        if mode:
            self._bases.clear()
        return super().train(mode)

    def _own(self) -> dict[str, Any]:
        return {**self._parameters, **self._buffers}

    def state(self) -> tuple[tuple[int, int], ...]:
        """Differs after a change of ranks or parameters."""
        return tuple([(t.data_ptr(), _version(t)) for t in self._own().values()])

    # Ranks

    @property
    def ranks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ranks of keys and of values by head, as Python numbers (a GPU is asked only after a change)."""
        key, value = self.key_ranks, self.value_ranks
        if key.is_meta:  # not loaded yet
            return self._planned
        now = [(t.data_ptr(), _version(t)) for t in (key, value)]
        if self._read is None or self._read[0] != now:
            self._read = now, (tuple(key.tolist()), tuple(value.tolist()))
        return self._read[1]

    def set_ranks(self, key_ranks: int | Sequence[int] | Tensor, value_ranks: int | Sequence[int] | Tensor) -> None:
        """Change the ranks: a number for all heads, or one for each.

        A cache that holds tokens refuses to go on afterwards: it was filled with the ranks of before.

        Raises:
            ValueError: a rank outside [1, head_dim], or not one for each head; the ranks are then as they were.
        """
        new = {name: self.checked(name, given) for name, given in (("key_ranks", key_ranks), ("value_ranks", value_ranks))}
        for name, value in new.items():
            buffer = cast(Tensor, getattr(self, name))
            buffer.copy_(torch.tensor(value, dtype=torch.int64))

    def checked(self, name: str, given: Any) -> list[int]:
        """One rank for each head, as `set_ranks` takes them under this name; raises ValueError otherwise."""
        values = given.tolist() if isinstance(given, Tensor) else given
        values = [values] * self.num_kv_heads if isinstance(values, int) else list(values)
        good = all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= self.head_dim for v in values)
        if not good or len(values) != self.num_kv_heads:
            where = f" (layer {self.layer})" if self.layer else ""
            raise ValueError(
                f"{name} must be one int in [1, {self.head_dim}] for each of {self.num_kv_heads} KV heads, or one for all; "
                f"got {shown(values)}{where}"
            )
        return values

    # What the cache and the attention call

    def heads(self, dtype: torch.dtype) -> list[Heads]:
        """The bases by blocks of heads with equal ranks, for states of this dtype."""
        return self._kept("heads", dtype, lambda: self._split(dtype))

    def hand_over(self, heads: list[Heads], blocks: list[Block]) -> Block:
        """Tell the next `attention` that it gets these blocks; what it will be called with instead of keys and values."""
        key, value = blocks[0]
        key._lowdim_kv = self  # type: ignore[attr-defined]
        self._handed = key, heads, blocks
        return key, value

    def attention(
        self,
        query: Tensor,  # (batch, heads, queries, head_dim)
        key: Tensor,  # (batch, num_kv_heads, tokens, head_dim), or what `hand_over` gave
        value: Tensor,
        **how: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output `(batch, queries, heads, head_dim)` and the weights, if `attend(..., **how)` gives them."""
        handed, self._handed = self._handed, None
        self.refuse_others(self, key, self.layer)
        if handed is None:
            return self._uncached(query, key, value, **how)
        first, parts, blocks = handed
        if first is not key:
            raise NotImplementedError(
                f"layer {self.layer}: the model changes the keys between its cache and its attention, which MatryoshkaCache "
                "does not allow"
            )
        outputs, weights, queries = [], [], query.shape[2]
        query = grouped(query, self.num_kv_heads)
        for heads, (keys, values) in zip(parts, blocks, strict=True):
            mixed, shares = attend(heads.of(query) @ heads.key_basis, keys, values, queries, **how)
            outputs.append(restored(mixed, heads.value_basis, heads.value_mean, queries))
            weights.append(shares)
        if len(parts) == 1:
            return outputs[0], weights[0]
        order = self._kept("order", torch.int64, lambda: self._order(query.shape[2] // queries))
        output = torch.cat(outputs, 2).index_select(2, order)
        return output, None if weights[0] is None else torch.cat(cast(list[Tensor], weights), 1).index_select(1, order)

    @staticmethod
    def refuse_others(module: MatryoshkaProjection | None, key: Tensor, layer: str) -> None:
        """Raise ValueError for what a cache gave that was made for another projection than this one."""
        owner = getattr(key, "_lowdim_kv", None)
        if owner is not None and owner is not module:
            raise ValueError(
                f"layer {layer} got its keys from a MatryoshkaCache that was made for another model, or it has no projection; "
                "make the cache by MatryoshkaCache(model) of this model"
            )

    def _uncached(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> tuple[Tensor, Tensor | None]:
        """Zeros take the place of what is left out, so that each step of a training may draw ranks of its own."""
        keys, values, mean = self._kept("uncached", query.dtype, lambda: self._zeroed(query.dtype))
        queries, projected = query.shape[2], grouped(query, self.num_kv_heads) @ keys
        mixed, weights = attend(projected, key @ keys, (value - mean[:, None]) @ values, queries, **how)
        return restored(mixed, values, mean, queries), weights

    def _zeroed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = leading(self.key_basis(), self.key_ranks), leading(self.value_basis(), self.value_ranks)
        return keys.to(dtype), values.to(dtype), self.value_mean.to(dtype)

    def layout(self) -> list[tuple[list[int], int, int]]:
        """`(heads, key rank, value rank)` of each block, in the order of the blocks."""
        found: dict[tuple[int, int], list[int]] = {}
        for head, pair in enumerate(zip(*self.ranks)):
            found.setdefault(pair, []).append(head)
        return [(heads, *pair) for pair, heads in found.items()]

    def _split(self, dtype: torch.dtype) -> list[Heads]:
        keys, values, mean = (t.to(dtype) for t in (self.key_basis(), self.value_basis(), self.value_mean))
        parts, layout = [], self.layout()
        for heads, r, s in layout:
            index = None if len(layout) == 1 else torch.tensor(heads, device=mean.device)
            mine = [t if index is None else t[index] for t in (keys, values, mean)]
            parts.append(Heads(index, mine[0][..., :r].contiguous(), mine[1][..., :s].contiguous(), mine[2]))
        return parts

    def _order(self, group: int) -> Tensor:
        """Where each query head is once the heads of all blocks are joined."""
        joined = [head for heads, _, _ in self.layout() for head in heads]
        places = [joined.index(head) * group + i for head in range(self.num_kv_heads) for i in range(group)]
        return torch.tensor(places, device=self.value_mean.device)

    # Files

    def description(self) -> dict[str, Any]:
        """Sizes and ranks."""
        key, value = self.ranks
        sizes = {"heads": self.num_kv_heads, "head_dim": self.head_dim}
        return {**sizes, "key_ranks": list(key), "value_ranks": list(value)}

    @classmethod
    def blank(cls, layer: nn.Module, *, heads: int, head_dim: int, key_ranks: Any, value_ranks: Any) -> Self:
        """A projection without numbers for an attention layer."""
        like = next(layer.parameters())
        made = cls(heads, head_dim, device=like.device, dtype=like.dtype)
        key, value = made.checked("key_ranks", key_ranks), made.checked("value_ranks", value_ranks)
        made._planned = tuple(key), tuple(value)
        return made

    @classmethod
    def enter(cls, model: nn.Module) -> None:
        """The layers of a loaded model call their projections."""
        from lowdim.compress.matryoshka_kv.interface import projections, turn_on

        for name, projection in projections(model).items():
            projection.layer = name
        turn_on(model)

    @classmethod
    def leave(cls, model: nn.Module) -> None:
        """The layers compute ordinary attention again."""
        from lowdim.compress.matryoshka_kv.interface import turn_off

        turn_off(model)

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        key, value = self.ranks
        return f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, key_ranks={key}, value_ranks={value}"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
