"""Forecast the memory of several methods on one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowdim.catalogue import Variant
from lowdim.catalogue import methods as choose
from lowdim.errors import check_choice, check_int
from lowdim.results import Result

__all__ = ["PlanOutcome", "PlanSettings", "plan", "touched_layers"]

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The settings of a forecast.

    Attributes:
        model: a folder, a hub id, or a built-in name.
        methods: names, families or `all`, with commas.
        task: `"classify"`, `"causal-lm"` or `"pretrain"`.
        length: tokens in a sequence.
        dtype: of the weights.
        gradient_checkpointing: recompute activations in the backward pass.
        rank: instead of each method's own, if it has one.
        layerwise: free each gradient at once, with optimizers that support it.
        accumulate: forward passes of an optimizer step.
        tokenizer: `bytes`, a folder or a hub id, whose vocabulary the model gets; for `pretrain`.
        classes: outputs of the head; for `classify`.
        master_weights: keep float32 copies of trained 16-bit weights.
        budget: bytes.
    """

    model: str
    methods: str = "all"
    task: str = "causal-lm"
    batch_size: int = 1
    length: int = 512
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    rank: int | None = None
    layerwise: bool = False
    accumulate: int = 1
    tokenizer: str | None = None
    classes: int = 2
    master_weights: bool = False
    budget: int | None = None

    def __post_init__(self) -> None:
        check_choice("--task", self.task, ("classify", "causal-lm", "pretrain"))
        check_choice("--dtype", self.dtype, _DTYPES)
        if self.master_weights and self.dtype == "float32":
            raise ValueError("--master-weights is for 16-bit weights; got --dtype float32, of which no copy is needed")
        check_int("--batch-size", self.batch_size, 1)
        check_int("--length", self.length, 1)
        check_int("--accumulate", self.accumulate, 1)
        check_int("--classes", self.classes, 2)
        if self.rank is not None:
            check_int("--rank", self.rank, 1)
        if self.tokenizer is not None and self.task != "pretrain":
            raise ValueError(f"--tokenizer is for --task pretrain; got {self.tokenizer!r} for {self.task}")
        if self.tokenizer == "characters":
            raise ValueError("--tokenizer characters depends on the text, which plan does not read; name bytes or a folder")

    def chosen(self) -> list[Variant]:
        """The methods that make sense for the task."""
        return [v for v in choose(self.methods) if v.unfit(self.task) is None]

    def at_rank(self, variant: Variant) -> Variant:
        """The method at the requested rank, if it has one.

        Raises:
            ValueError: the method does not allow this rank.
        """
        return (_with_rank(variant, self.rank) if self.rank is not None else None) or variant

    def unchanged(self) -> list[str]:
        """Labels of the chosen methods without a rank, which `rank` does not change."""
        return [] if self.rank is None else [v.label for v in self.chosen() if _with_rank(v, self.rank) is None]

    def notes(self) -> list[str]:
        """Which of the named methods are left out and why, and which of them an option does not change."""
        reasons: dict[str, list[str]] = {}
        for v in choose(self.methods):
            if (reason := v.unfit(self.task)) is not None:
                reasons.setdefault(reason, []).append(v.label)
        lines = [f"left out: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]
        if unchanged := self.unchanged():
            lines.append(f"--rank does not change {', '.join(unchanged)}: they have no rank")
        plain = [v.label for v in self.chosen() if v.kind != "optimizer"]
        if self.layerwise and plain:
            lines.append(f"--layerwise does not change {', '.join(plain)}: only lowdim.optim methods update layer by layer")
        return lines


@dataclass(frozen=True)
class PlanOutcome(Result):
    """Forecasts of the methods that can train the model, and why the others cannot."""

    forecasts: tuple[Any, ...]
    refused: tuple[tuple[Variant, str], ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each forecast."""
        return [row for forecast in self.forecasts for row in forecast.rows()]

    @property
    def summary(self) -> str:
        """One line."""
        return f"{len(self.forecasts)} methods forecast, {len(self.refused)} cannot train the model"


def plan(settings: PlanSettings, *, say: Callable[[str], None] = lambda line: None) -> PlanOutcome:
    """Forecast the peak memory of training by each method, without allocating the model.

    Args:
        say: called with a line before each forecast.

    Raises:
        UnknownNameError, ValueError: an unknown name or a value out of range.

    Example:
        >>> from lowdim.jobs import PlanSettings, plan
        >>> [f.method for f in plan(PlanSettings(model="stories260k", methods="lora", length=32)).forecasts]
        ['lora']
    """
    import torch

    from lowdim.plan import forecast

    config = _configuration(settings)
    forecasts, refused = [], []
    for variant in settings.chosen():
        say(f"forecasting {variant.label}")
        try:
            forecasts.append(
                forecast(
                    config,
                    settings.at_rank(variant),
                    batch_size=settings.batch_size,
                    sequence_length=settings.length,
                    task=settings.task,
                    num_labels=settings.classes,
                    dtype=getattr(torch, settings.dtype),
                    gradient_checkpointing=settings.gradient_checkpointing,
                    layerwise=settings.layerwise and variant.kind == "optimizer",
                    accumulate=settings.accumulate,
                    master_weights=settings.master_weights,
                    budget_bytes=settings.budget,
                )
            )
        except (ValueError, TypeError) as error:
            refused.append((variant, str(error)))
    return PlanOutcome(tuple(forecasts), tuple(refused))


def touched_layers(settings: PlanSettings) -> list[tuple[Variant, list[Any]]]:
    """Which modules each method's patterns match, with shapes and trained numbers."""
    from lowdim.plan import shows

    config = _configuration(settings)
    chosen = [settings.at_rank(variant) for variant in settings.chosen()]
    return [(v, list(shows(config, v, task=settings.task, num_labels=settings.classes))) for v in chosen]


def _configuration(settings: PlanSettings) -> Any:
    """The model's configuration, with the vocabulary of the tokenizer that is named."""
    from lowdim import models
    from lowdim.train.run import recipe_tokenizer

    config = models.load_config(settings.model)
    if settings.tokenizer is not None:
        models.fit_vocabulary(config, recipe_tokenizer(settings.model, settings.tokenizer, (), None))
    return config


def _with_rank(variant: Variant, rank: int) -> Variant | None:
    from lowdim.methods import strategy_for

    return strategy_for(variant).at_rank(rank)
