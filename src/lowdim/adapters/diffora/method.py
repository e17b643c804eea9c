"""DiffoRA: a matrix of gates over blocks and modules is trained, then decides which modules get a LoRA of their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.gated import GatedLoRAUpdate
from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.diffora.search import DifferentialMatrix, DiffoRAAdapted, Grid, search_steps
from lowdim.errors import check_float, check_int
from lowdim.linalg import draw_uniform, wide

__all__ = ["DiffoRA", "DiffoRAUpdate"]


class DiffoRAUpdate(GatedLoRAUpdate):
    """`scaling · gate · B A`: `A (rank, in)`, `B (out, rank)`; `gate` is 1 once the choice is made, and on a single layer.

    After the choice `A` and `B` may be another layer's parameters, or None; only the layer that owns them saves them.
    """

    def __init__(self, out_features: int, in_features: int, rank: int, scaling: float, *, own: bool, dtype: Any, device: Any):
        super().__init__(out_features, in_features, rank, scaling, dtype=dtype, device=device)
        self.register_buffer("origin", torch.empty(0, dtype=dtype, device=device), persistent=False)  # dtype and device
        self.matrix: tuple[DifferentialMatrix, int, int] | None = None  # in a tuple, so that it is not a child of this module
        self.own = True
        self.lost: str | None = None  # the prefix under which a state dict lacked A and B
        if not own:
            self.borrow(None)

    origin: Tensor

    def gates(self) -> Tensor:
        """`sigmoid(dam)` of this layer's cell, 0-dim."""
        if self.matrix is None or self.matrix[0].dam is None:
            return self.origin.new_ones(())
        matrix, row, column = self.matrix
        return torch.sigmoid(matrix.dam[row, column]).to(self.origin.dtype)  # type: ignore[index]

    def down(self) -> Tensor:
        """`A`; zeros where the layer has none."""
        return self.origin.new_zeros(1, self.in_features) if self.A is None else self.A

    def up(self) -> Tensor:
        """`gate · B`."""
        if self.B is None:
            return self.origin.new_zeros(self.out_features, 1)
        return super().up() if self.matrix is not None and self.matrix[0].dam is not None else self.B

    def forward(self, x: Tensor) -> Tensor:
        """`scaling · gate · B A x`."""
        return super().forward(x if self.A is not None else x.to(self.origin.dtype))

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """Fused; nothing where the layer has no update."""
        return y if self.A is None else super().add_to(y, x, inplace=inplace)

    def convolve(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Two convolutions."""
        return super().convolve(x if self.A is not None else x.to(self.origin.dtype), conv)

    @torch.no_grad()
    def exact(self) -> Tensor:
        """`dense()` in float32 or better."""
        A, B = self.low_rank_delta()
        return B @ A

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """`A` and `scaling · gate · B`."""
        return wide(self.down().detach()), wide(self.up() if self.B is None else self.B) * (self.scaling * wide(self.gates()))

    def connect(self, shared: nn.Module, name: str) -> None:
        """Connect to the layer's cell of the matrix."""
        assert isinstance(shared, DifferentialMatrix)
        self.matrix = (shared, *shared.cells[name])
        shared.updates[name] = self

    def borrow(self, other: DiffoRAUpdate | None) -> None:
        """Use another update's parameters, or none."""
        self.A: Any = None if other is None else other.A
        self.B: Any = None if other is None else other.B
        self.own = False

    def meta(self) -> dict[str, Any]:
        """Whether the file holds parameters of this layer."""
        return {} if self.own else {"own": False}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.own:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "A" not in state_dict and prefix + "B" not in state_dict and (self.matrix is not None or not self.own):
            self.lost = prefix if self.own else None  # the matrix, which is loaded next, knows whether it is missing
            return
        if not self.own:
            self.A = nn.Parameter(self.origin.new_empty(self.rank, self.in_features))
            self.B = nn.Parameter(self.origin.new_empty(self.out_features, self.rank))
            self.own = True
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class DiffoRA(Method):
    """A search decides which modules get their own LoRA; the others share one for each kind, or get none.

    Formula: `y = W x + Γ_ij · alpha/rank · B A x`, `Γ = sigmoid(dam)`, `dam (rows, columns)` with one row for each block and
    one column for each entry of `target_modules`. Search: `min_dam L_valid(ω*, dam)`, `ω* = argmin_ω L_train(ω, dam)`, by
    one step of each in turn. Then in each row the `max(1, ⌈select_ratio · modules⌉)` cells with the largest `dam` are kept.

    Args:
        rank: of each pair; it may exceed the layer's sides.
        alpha: numerator of the scale.
        dropout: on the update's input, while training.
        select_ratio: share of a block's modules that keep a pair of their own, in (0, 1].
        unrolled: differentiate through one step of the weights (exact, by double backward; twice the memory); False uses the
            gradient at the weights as they are.
        share: modules that were not selected use one common pair for each column; False leaves them without an update.
        target_modules: required: names or dotted suffixes, one for each column. `"all-linear"`, a regular expression, and
            an entry that matches several modules of a block, or goes beyond it, get a column for each path inside a block.

    Raises:
        ValueError: a hyperparameter out of range (here); target_modules missing (at adapt).

    Example:
        >>> import torch, lowdim
        >>> blocks = [torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4), "v": torch.nn.Linear(4, 4)}) for _ in range(2)]
        >>> model = torch.nn.ModuleList(blocks)
        >>> adapted = lowdim.adapt(model, lowdim.adapters.DiffoRA(rank=1, target_modules=["q", "v"]))
        >>> adapted.grid
        [['0.q', '0.v'], ['1.q', '1.v']]
        >>> adapted.discretize().tolist()  # nothing was searched: all logits are equal, and the first column is chosen
        [[True, False], [True, False]]
        >>> adapted.layers["0.v"].update.A is adapted.layers["1.v"].update.A
        True

    Search with `adapted.search_step(...)`, then `adapted.discretize()`, then train as any adapter. The search costs two to four
    times a plain step. Where all modules matter equally, or time is short, LoRA on all of them is simpler and as good.

    Source: "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation",
    arXiv 2502.08905.
    """

    adapted_type: ClassVar[type[DiffoRAAdapted]] = DiffoRAAdapted

    names_targets: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    select_ratio: float = 0.5
    unrolled: bool = False
    share: bool = True
    target_modules: Any = None

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_float("select_ratio", self.select_ratio, 0.0, 1.0, low_open=True)

    @classmethod
    def sample_batches(cls, steps: int) -> int:
        """Two for each step of the search, to train and to validate on; at most 256, which are then reused."""
        return min(256, max(4, 2 * search_steps(steps)))

    def shared(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> DifferentialMatrix:
        """The matrix of logits, in float32 or better."""
        if not self.target_modules:
            raise ValueError(f"target_modules is required: it names the columns of the matrix; got {self.target_modules!r}")
        weight: Any = next(iter(layers.values())).weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return DifferentialMatrix(_grid(layers, self.target_modules), dtype, weight.device)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> DiffoRAUpdate:
        """Allocate `A` and `B`."""
        own, scaling = stats.get("own", True), self.alpha / self.rank
        return DiffoRAUpdate(out_features, in_features, self.rank, scaling, own=own, dtype=dtype, device=device)

    def initialise(self, update: DiffoRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Draw `A`; `B` is zero, so the output does not change."""
        draw_uniform(update.A, 1 / math.sqrt(update.in_features), generator)


def _grid(names: Iterable[str], target_modules: str | Sequence[str]) -> Grid:
    """The module names by block and column."""
    entries = [] if isinstance(target_modules, str) else list(target_modules)
    blocks: dict[str, dict[str, str]] = {}
    order: dict[str, int] = {}  # column -> the first entry that it stands for
    named = {name: max((e for e in entries if _ends(name, e)), key=len, default="") for name in names}  # the most specific
    counts = Counter((_block(name)[0], entry) for name, entry in named.items())
    several = {entry for (_, entry), count in counts.items() if count > 1}
    for name, entry in named.items():
        block, inside = _block(name)
        # An entry that goes beyond the block, or matches several of its modules, stands for paths inside the block.
        column = entry if entry and entry not in several and (not inside or _ends(inside, entry)) else inside
        order.setdefault(column, entries.index(entry) if entry else len(order))
        blocks.setdefault(block, {})[column] = name
    columns = sorted(order, key=lambda column: order[column])
    rows = sorted(blocks, key=lambda block: block != "")  # stable: modules outside all blocks first, then in model order
    return [[blocks[row].get(column) for column in columns] for row in rows]


def _block(name: str) -> tuple[str, str]:
    """The path up to the last integer in it, and the rest."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1]), ".".join(parts[last + 1 :])


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)
