"""What a training run is given and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lowdim.errors import Options
from lowdim.methods import WARMUP
from lowdim.results import Result

__all__ = ["PENALTY", "SUBSPACE", "FitResult", "FitSettings"]

PENALTY = "penalty"  # the log key of a method's penalty, next to the task loss
SUBSPACE = "subspace_"  # prefix of a projected optimizer's log keys


@dataclass(frozen=True, kw_only=True)
class FitSettings(Options):
    """Settings of the training loop that do not depend on the method."""

    steps: int
    batch_size: int = 16
    lr: float = 1e-3
    warmup: float = WARMUP  # share of the steps
    schedule: str = "linear"  # any name that transformers.get_scheduler knows
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    clips_itself: bool = False  # the optimizer clips itself: it frees gradients before the trainer could clip them
    bf16: bool = False  # autocast; the weights keep their dtype
    group_by_length: bool = False  # batches of rows of like length
    seed: int = 0
    save_steps: int = 0  # 0: no checkpoints
    pause_at: int | None = None  # the step after which the training pauses, to go on from a small checkpoint
    log_steps: int = 1
    eval_steps: int = 0  # 0: score the validation part at the end only
    watch: bool = False  # log norms of full and projected gradients
    report_to: str = "none"


@dataclass
class FitResult(Result):
    """The result of one run: the loss of each logged step, its time and memory, and why it ended.

    `losses` are those of the task, and `penalties` the terms that the method added to them (empty if it adds none).
    `evaluations` are `(step, loss in nats per token)` of the validation part, `subspaces` the log of a projected optimizer,
    `spikes` the steps whose loss jumped.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    seconds_per_step: float = math.nan
    peak_bytes: int | None = None
    failure: str | None = None
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    subspaces: list[dict[str, float]] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each logged step: its loss."""
        return [{"step": step, "loss": loss} for step, loss in zip(self.steps, self.losses)]

    @property
    def summary(self) -> str:
        """One line."""
        if self.failure:
            return self.failure
        return f"{self.steps[-1]} steps, last loss {self.losses[-1]:.4g}" if self.steps else "no step was logged"

    def read(self, history: list[dict[str, Any]]) -> None:
        """Read the numbers from a trainer's history, which includes the earlier part of a resumed run."""
        logged = [entry for entry in history if "loss" in entry]
        scored = [entry for entry in history if "eval_loss" in entry]
        self.steps = [int(entry["step"]) for entry in logged]
        self.losses = [float(entry["loss"]) for entry in logged]
        self.penalties = [float(entry[PENALTY]) for entry in logged if PENALTY in entry]
        self.evaluations = [(int(entry["step"]), float(entry["eval_loss"])) for entry in scored]
        self.subspaces = [{"step": entry["step"], **_subspace(entry)} for entry in logged if _subspace(entry)]
        self.grad_norms = [float(entry["grad_norm"]) for entry in logged if "grad_norm" in entry]


def _subspace(entry: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix(SUBSPACE): float(value) for key, value in entry.items() if key.startswith(SUBSPACE)}
