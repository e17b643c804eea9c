"""LaMDA and LaMDA++: a frozen spectral A, a trained square S, and a B that freezes column by column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.common import check_rank, top_triplets
from lowdim.adapters.core.guards import error_context
from lowdim.adapters.core.method import Method, Stats, open_field
from lowdim.adapters.core.thin import ThinUpdate
from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import draw_uniform, local, match, stream, wide
from lowdim.ranks import by_energy
from lowdim.surgery import dense_matrix, matrix_shape

__all__ = ["LaMDA", "LaMDAUpdate"]

_INITS = ("spectral", "random")
_SCHEDULES = ("paper", "code")


class LaMDAUpdate(ThinUpdate):
    """`scaling · B S A`: `A (rank, in)` frozen, `S (rank, rank)` trained, `B (out, rank)` trained until it is frozen.

    Columns `0 .. frozen_columns() - 1` of `B` are held: their gradient is zero, and `step()` puts their values back, so no
    momentum or decay of any optimizer moves them. `start` is `W₀ Aᵀ (out, rank)`, the part of the weight that the update
    replaces; it and the step counter `steps` are in the state dict, so a trainer's checkpoint continues the schedule.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        scaling: float,
        *,
        spectral: bool,
        rate: float,  # columns frozen per step
        delay: int = 0,  # steps before the first is frozen
        dtype: Any,
        device: Any,
    ):
        super().__init__(out_features, in_features, rank, scaling)
        self.spectral, self.rate, self.delay = spectral, rate, delay
        # Where B and S start as a part of the weight, decay would shrink that part.
        self.no_decay = frozenset({"B", "S"}) if spectral else frozenset()
        self.S = nn.Parameter(torch.empty(rank, rank, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        self.register_buffer("A", torch.empty(rank, in_features, dtype=dtype, device=device))
        self.register_buffer("C0", torch.empty(out_features, rank, dtype=dtype, device=device) if spectral else None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self._done = 0  # the value of `steps`, readable without a device synchronisation
        self._held: Tensor | None = None  # the frozen columns as they were before the optimizer's step

    A: Tensor
    C0: Tensor | None
    steps: Tensor

    def frozen_columns(self) -> int:
        """The number of columns of `B` that are frozen during the next optimizer step."""
        return min(self.rank, math.floor(self.rate * max(0, self._done + 1 - self.delay) + 1e-9))

    def down(self) -> Tensor:
        """`A`."""
        return self.A

    def inner(self, hidden: Tensor) -> Tensor:
        """`S h`."""
        return F.linear(hidden, self.S)

    def up(self) -> Tensor:
        """`B`, detached in its frozen columns."""
        frozen = self.frozen_columns()
        if frozen == 0 or not torch.is_grad_enabled():
            return self.B
        if frozen == self.rank:
            self._retire()
            return self.B.detach()
        held = self.B.detach()[:, :frozen]
        if self._held is None:
            self._held = held.clone()
        return torch.cat([held, self.B[:, frozen:]], dim=1)

    def start_up(self) -> Tensor | None:
        """`W₀ Aᵀ` after a spectral start."""
        return self.C0

    def rebase(self, weight: Tensor) -> Tensor | None:
        """`W₀ − (W₀ Aᵀ) A` after a spectral start: needs only `A`, so it is the same at attaching and at loading."""
        if self.C0 is not None:
            self.C0 = (wide(weight) @ wide(self.A).mT).to(self.C0)
        return super().rebase(weight)

    @torch.no_grad()
    def step(self) -> None:
        """Undo what the optimizer did to frozen columns, and advance the schedule."""
        if self._held is not None:
            local(self.B)[:, : self._held.shape[1]] = local(match(self._held, self.B))
        self._count(self._done + 1)
        if self.frozen_columns() == self.rank:
            self._retire()

    def meta(self) -> dict[str, Any]:
        """The rank, which LaMDA++ chooses."""
        return {"rank": self.rank}

    def saved(self) -> dict[str, Tensor]:
        """`A`, `S`, `B` and the step counter; `C0` follows from the weight."""
        return {key: value for key, value in self.state_dict().items() if key != "C0"}

    def restore(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Load a checkpoint and continue its schedule."""
        super().restore(tensors, weight)
        if self.frozen_columns() == self.rank:
            self._retire()

    def _count(self, done: int) -> None:
        self._done, self._held = done, None
        self.steps.fill_(done)

    def _retire(self) -> None:
        if self.B.requires_grad:
            self.B.requires_grad_(False)
            self.B.grad = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Whether B still needs a gradient is decided at the next forward, not here: a trainer loads the model before it
        # builds the optimizer, whose groups must be the same as in the interrupted run.
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "steps" in state_dict:
            self._count(int(state_dict[prefix + "steps"]))
            self.B.requires_grad_(True)


@dataclass(frozen=True)
class LaMDA(Method):
    """The input factor is frozen on the weight's top singular vectors, a square core is trained, the output factor freezes.

    Formula: `y = base(x) + c · B S A x`, `c = alpha / rank` (1 where alpha is None). `init="spectral"`: `W = U Σ Vᵀ`,
    `A = V[:, :r]ᵀ`, `B = U[:, :r]`, `S = diag(σ₁..σ_r) / c`, base weight `W − c·B S A`: the output does not change.
    During optimizer step `i` of `T = total_steps` the first `min(r, ⌊r·(i − w) / (freeze_fraction·T)⌋)` columns of `B` are
    frozen, with `w = warmup_steps`.

    Args:
        rank: inner size, with a spectral start in [1, min(out, in)].
        alpha: numerator of the scale; None means scale 1, which the spectral start needs.
        dropout: on the update's input, while training.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        init: `"spectral"`, or `"random"` (the released code): `A ~ U(±1/√in)`, `S ~ U(±1/√r)`, `B = 0`.
        freeze_fraction: share of the training after which all of `B` is frozen, in (0, 1].
        total_steps: optimizer steps of the training; None never freezes. `lowdim.train` fills it in; in another loop set it,
            and call `adapted.step()` after each optimizer step.
        freeze_schedule: `"paper"`, or `"code"` (`⌊i / (freeze_fraction·T)⌋` columns: the released rule, which hardly freezes).
        warmup_steps: steps of the rate's warm-up, in which no column freezes yet; None means 0. `lowdim.train` fills it in.
        rank_choices: LaMDA++: ranks to assign; layers with flat spectra get the larger ones (`lowdim.ranks.by_energy`, similar
            in spirit: the paper's exact formula was not available).

    Raises:
        ValueError: a hyperparameter out of range (here), or a rank beyond the layer (at attach).

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.LaMDA(rank=2, total_steps=10))
        >>> update = adapted.layers["0"].update
        >>> [update.frozen_columns() for _ in range(4) if adapted.step() is None]
        [1, 2, 2, 2]

    For the backward pass it keeps `A x` (rank numbers per token) where LoRA keeps `x`. Use LoRA instead if the task is
    far from the model's training data: `A` never leaves the old weight's top directions. Under DistributedDataParallel set
    `find_unused_parameters=True`, because `B` stops receiving gradients partway through training.

    Source: Azizi, Kundu, Pedram, "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
    EMNLP Findings 2024, arXiv 2406.12832.
    """

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Any = None
    init: str = "spectral"
    freeze_fraction: float = 0.3
    total_steps: int | None = None
    freeze_schedule: str = "paper"
    rank_choices: tuple[int, ...] | None = None
    warmup_steps: int | None = open_field()

    @property
    def bounded_rank(self) -> bool:  # type: ignore[override]  # which start decides
        """A spectral start needs as many singular vectors; a random one takes any rank."""
        return self.init == "spectral"

    @property
    def ranks_by_layer(self) -> bool:  # type: ignore[override]
        """LaMDA++ chooses them itself."""
        return self.rank_choices is None

    @classmethod
    def at_rank(cls, options: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """LaMDA++'s choices scale with the mean rank."""
        mean, choices = options.get("rank", cls.rank), options.get("rank_choices")
        scaled = {} if choices is None else {"rank_choices": tuple(max(1, round(c * rank / mean)) for c in choices)}
        return {**options, "rank": rank, **scaled}

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        if self.alpha is not None:
            check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_choice("init", self.init, _INITS)
        check_float("freeze_fraction", self.freeze_fraction, 0.0, 1.0, low_open=True)
        if self.total_steps is not None:
            check_int("total_steps", self.total_steps, 1)
        check_choice("freeze_schedule", self.freeze_schedule, _SCHEDULES)
        if self.warmup_steps is not None:
            check_int("warmup_steps", self.warmup_steps, 0)
        if self.rank_choices is not None:
            object.__setattr__(self, "rank_choices", tuple(self.rank_choices))
            if not self.rank_choices:
                raise ValueError("rank_choices must hold at least one rank; got ()")
            for choice in self.rank_choices:
                check_int("rank_choices", choice, 1)

    def prepare(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> dict[str, dict[str, Any]]:
        """LaMDA++: a rank for each layer; from shapes alone it is the largest choice."""
        if self.rank_choices is None:
            return {name: {} for name in layers}
        if not initialise:
            return {name: {"rank": max(self.rank_choices)} for name in layers}
        most = max(self.rank, *self.rank_choices)
        found, spectra = {}, []
        for name, layer in layers.items():
            weight = dense_matrix(layer).detach()
            count = min(most, *matrix_shape(layer))
            with error_context("LaMDA", name, layer):
                found[name] = top_triplets(weight, count, stream(seed, "LaMDA++", name))
            spectra.append(_spectrum(found[name][1], weight))
        ranks = by_energy(spectra, rank=self.rank, choices=self.rank_choices)
        return {name: {"rank": r, "triplets": found[name]} for name, r in zip(layers, ranks)}

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> LaMDAUpdate:
        """Allocate `A`, `S`, `B` and, for a spectral start, `C0`."""
        rank = stats.get("rank", self.rank)
        if self.bounded_rank:
            check_rank(rank, out_features, in_features)
        scaling = 1.0 if self.alpha is None else self.alpha / rank
        span = math.inf if self.total_steps is None else self.freeze_fraction * self.total_steps
        rate = (rank if self.freeze_schedule == "paper" else 1) / span
        spectral = self.init == "spectral"
        return LaMDAUpdate(
            out_features,
            in_features,
            rank,
            scaling,
            spectral=spectral,
            rate=rate,
            delay=self.warmup_steps or 0,
            dtype=dtype,
            device=device,
        )

    def initialise(self, update: LaMDAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Fill the factors from the weight's singular triplets, or at random."""
        r = update.rank
        if self.init == "random":
            draw_uniform(update.A, 1 / math.sqrt(update.in_features), generator)
            draw_uniform(update.S, 1 / math.sqrt(r), generator)
            return
        u, s, vh = stats["triplets"] if "triplets" in stats else top_triplets(weight, r, generator)
        update.A.copy_(vh[:r])
        update.B.copy_(u[:, :r])
        update.S.copy_(torch.diag(s[:r]) / update.scaling)


def _spectrum(top: Tensor, weight: Tensor) -> Tensor:
    """The top singular values and one more for the rest of `‖W‖_F²`, as the energy rule needs."""
    rest = (weight.double().square().sum() - top.double().square().sum()).clamp_min(0.0)
    return torch.cat([top.double(), rest.sqrt()[None]])
