"""Forecast the memory of several methods on one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowdim.catalogue import Variant
from lowdim.catalogue import methods as choose
from lowdim.errors import UnknownNameError, check_choice, check_int
from lowdim.methods import OPTIMIZERS, RANKS, strategy_for
from lowdim.models.blocks import check_blocks, with_blocks
from lowdim.models.forms import TASKS
from lowdim.modules import SCHEMES
from lowdim.results import Result

__all__ = ["FitOutcome", "PlanOutcome", "PlanSettings", "fit_plan", "plan", "touched_layers"]

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The settings of a forecast.

    Attributes:
        model: a folder, a hub id, or a built-in name.
        methods: names, families or `all`, with commas.
        task: a task of `lowdim run`, such as `"classify"` or `"image"`; images have the size
            and the channels of the model's configuration.
        length: tokens in a sequence.
        dtype: of the weights.
        gradient_checkpointing: recompute activations in the backward pass.
        rank: instead of each method's own, if it has one.
        layerwise: free each gradient at once, with optimizers that support it.
        accumulate: forward passes of an optimizer step.
        tokenizer: `bytes`, a folder or a hub id, whose vocabulary the model gets; for `pretrain`.
        classes: outputs of the head; for `classify`, `image` and `tokens` (`regress` has one).
        master_weights: keep float32 copies of trained 16-bit weights.
        quantize: `"int8"`, `"int4"` or `"nf4"`: the base's linear weights are kept in few bits.
        optimizer: `"adamw"` or `"adamw8bit"`, of methods without an optimizer of their own.
        bf16: compute in bfloat16 by autocast; the weights keep their dtype.
        ranks: `"uniform"`, or `"farms"`: ranks by layer from the tail exponents of the weights, which are loaded for it.
        ffn, mixer: other parts of the blocks, as in `lowdim.train.Recipe`; for `pretrain`.
        devices: spread the model over so many by FSDP2; the batch and all bytes are those of one of them.
        budget: bytes, of each device.
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
    quantize: str | None = None
    optimizer: str = "adamw"
    bf16: bool = False
    ranks: str = "uniform"
    ffn: str | None = None
    mixer: str | None = None
    devices: int = 1
    budget: int | None = None

    def __post_init__(self) -> None:
        check_choice("--task", self.task, TASKS)
        check_choice("--dtype", self.dtype, _DTYPES)
        check_choice("--optimizer", self.optimizer, OPTIMIZERS)
        check_choice("--ranks", self.ranks, RANKS)
        if self.ranks != "uniform" and self.task == "pretrain":
            raise ValueError(f"--ranks {self.ranks} follows from trained weights; --task pretrain starts from random ones")
        if self.quantize is not None:
            check_choice("--quantize", self.quantize, SCHEMES)
            if self.task == "pretrain":
                raise ValueError(f"--quantize {self.quantize} is for a pre-trained base; --task pretrain trains all weights")
        if self.bf16 and self.dtype != "float32":
            raise ValueError(f"--bf16 is for float32 weights, which it computes with in bfloat16; got --dtype {self.dtype}")
        if self.bf16 and self.devices > 1:
            raise ValueError(f"--bf16 is forecast on one device: FSDP2 casts in its own way; got --devices {self.devices}")
        if self.master_weights and self.dtype == "float32":
            raise ValueError("--master-weights is for 16-bit weights; got --dtype float32, of which no copy is needed")
        check_int("--batch-size", self.batch_size, 1)
        check_int("--length", self.length, 1)
        check_int("--accumulate", self.accumulate, 1)
        check_int("--classes", self.classes, 2)
        check_int("--devices", self.devices, 1)
        if self.rank is not None:
            check_int("--rank", self.rank, 1)
        check_blocks(self.ffn, self.mixer)
        for name in ("ffn", "mixer"):
            if getattr(self, name) is not None and self.task != "pretrain":
                raise ValueError(f"--{name} is for --task pretrain; got {getattr(self, name)!r} for {self.task}")
        if self.tokenizer is not None and self.task != "pretrain":
            raise ValueError(f"--tokenizer is for --task pretrain; got {self.tokenizer!r} for {self.task}")
        if self.tokenizer == "characters":
            raise ValueError("--tokenizer characters depends on the text, which plan does not read; name bytes or a folder")

    @property
    def outputs(self) -> int:
        """Outputs of the head."""
        return 1 if self.task == "regress" else self.classes

    def chosen(self) -> list[Variant]:
        """The methods that make sense for the task."""
        return [v for v in choose(self.methods) if self._unfit(v) is None]

    def _unfit(self, variant: Variant) -> str | None:
        """Why a method is left out."""
        if (self.ffn or self.mixer) and variant.kind not in ("full", "optimizer"):
            return "it would replace the layers that --ffn or --mixer has chosen"
        return variant.unfit(self.task)

    def by_layer(self) -> list[Variant]:
        """The chosen methods whose ranks by layer come from FARMS."""
        return [v for v in self.chosen() if self.ranks == "farms" and strategy_for(v).ranks_by_layer()]

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
            if (reason := self._unfit(v)) is not None:
                reasons.setdefault(reason, []).append(v.label)
        lines = [f"left out: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]
        if unchanged := self.unchanged():
            lines.append(f"--rank does not change {', '.join(unchanged)}: they have no rank")
        by_layer = {v.name for v in self.by_layer()}
        alike = [v.label for v in self.chosen() if v.name not in by_layer and v.ranks == "uniform"]
        if self.ranks != "uniform" and alike:
            lines.append(f"--ranks does not change {', '.join(alike)}: they have no rank by layer")
        plain = [v.label for v in self.chosen() if v.kind != "optimizer"]
        if self.layerwise and plain:
            lines.append(f"--layerwise does not change {', '.join(plain)}: only lowdim.optim methods update layer by layer")
        own = [v.label for v in self.chosen() if v.kind == "optimizer"]
        if self.optimizer != "adamw" and own:
            lines.append(f"--optimizer does not change {', '.join(own)}: they are optimizers themselves")
        return lines


@dataclass(frozen=True)
class PlanOutcome(Result):
    """Forecasts of the methods that can train the model, why the others cannot, and which weights no adapter reaches."""

    forecasts: tuple[Any, ...]
    refused: tuple[tuple[Variant, str], ...]
    unreached: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """A row for each forecast."""
        return [row for forecast in self.forecasts for row in forecast.rows()]

    @property
    def summary(self) -> str:
        """One line."""
        return f"{len(self.forecasts)} methods forecast, {len(self.refused)} cannot train the model"


@dataclass(frozen=True)
class FitOutcome(Result):
    """How each method fits the budget, the smallest change first; the rest is as in `PlanOutcome`."""

    fits: tuple[Any, ...]
    refused: tuple[tuple[Variant, str], ...]
    unreached: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """A row for each method."""
        return [row for found in self.fits for row in found.rows()]

    @property
    def summary(self) -> str:
        """One line."""
        return f"{sum(found.fits for found in self.fits)} of {len(self.fits)} methods fit"


def plan(
    settings: PlanSettings, *, say: Callable[[str], None] = lambda line: None, done: Callable[[], None] = lambda: None
) -> PlanOutcome:
    """Forecast the peak memory of training by each method, without allocating the model.

    Args:
        say, done: called with a line before, and after, each forecast.

    Raises:
        UnknownNameError, ValueError: an unknown name or a value out of range.

    Example:
        >>> from lowdim.jobs import PlanSettings, plan
        >>> [f.method for f in plan(PlanSettings(model="stories260k", methods="lora", length=32)).forecasts]
        ['lora']
    """
    from lowdim.plan import forecast

    config, forecasts, refused = _configuration(settings), [], []
    for variant in _methods(settings, say):
        say(f"forecasting {variant.label}")
        try:
            forecasts.append(
                forecast(config, settings.at_rank(variant), budget_bytes=settings.budget, **_how(settings, variant))
            )
        except (ValueError, TypeError) as error:
            refused.append((variant, str(error)))
        done()
    return PlanOutcome(tuple(forecasts), tuple(refused), _unreached(settings, config))


def fit_plan(
    settings: PlanSettings, *, say: Callable[[str], None] = lambda line: None, done: Callable[[], None] = lambda: None
) -> FitOutcome:
    """The smallest change of the settings with which each method fits the budget.

    Args:
        say, done: called with a line before, and after, each method.

    Raises:
        UnknownNameError, ValueError: an unknown name, a value out of range, no budget, or a dtype that `lowdim run` does not
            train in.

    Example:
        >>> from lowdim.jobs import PlanSettings, fit_plan
        >>> settings = PlanSettings(model="stories260k", methods="full", batch_size=8, budget=30 * 2**20)
        >>> [found.flags for found in fit_plan(settings).fits]
        ['--batch-size 1 --accumulate 8']
    """
    from lowdim.plan import fit

    if settings.budget is None:
        raise ValueError("--fit needs --budget, the memory that there is, such as 24GiB")
    if settings.dtype == "float16":
        raise ValueError("--fit is for what lowdim run trains: --dtype float32 or bfloat16; got float16")
    config, fits, refused = _configuration(settings), [], []
    for variant in _methods(settings, say):
        say(f"fitting {variant.label}")
        try:
            fits.append(fit(config, settings.at_rank(variant), settings.budget, **_how(settings, variant)))
        except (ValueError, TypeError) as error:
            refused.append((variant, str(error)))
        done()
    fits.sort(key=lambda found: (found.missing_bytes, len(found.changes), found.forecast.total))
    return FitOutcome(tuple(fits), tuple(refused), _unreached(settings, config))


def _methods(settings: PlanSettings, say: Callable[[str], None] = lambda line: None) -> list[Variant]:
    """The chosen methods, those with ranks by layer with the exponents of the model's weights.

    Raises:
        ValueError: ranks by layer are asked for, and no method has them, or there are no weights to measure.
    """
    named = [v for v in settings.chosen() if v.ranks == "farms"]
    for variant in named:
        strategy_for(variant).check_ranks()
    by_layer = {v.name for v in (*settings.by_layer(), *named)}
    if settings.ranks == "farms" and not by_layer:
        raise ValueError(f"--ranks farms needs a method with a rank in each layer, such as lora; got {settings.methods}")
    if not by_layer:
        return settings.chosen()
    say("measuring tail exponents")
    exponents = _exponents(settings)
    return [v.by_farms(exponents) if v.name in by_layer else v for v in settings.chosen()]


def _exponents(settings: PlanSettings) -> dict[str, float]:
    """Those of the model's weights, as they will be trained on."""
    import torch

    from lowdim import models
    from lowdim.methods.exponents import layer_exponents

    try:
        how: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "quantize": settings.quantize}
        model = models.load_model(settings.model, settings.task, num_labels=settings.outputs, **how)
    except UnknownNameError as error:
        raise ValueError(f"--ranks farms measures weights, and a configuration alone has none: {error}") from None
    found = layer_exponents(model, models.head_modules(model, settings.task))
    found.refuse_few()
    return found.alphas


def _unreached(settings: PlanSettings, config: Any) -> str:
    """Which weights the adapters among the methods cannot reach; nothing for models whose class does not fit the task."""
    from lowdim.plan import unreached

    if all(variant.kind != "adapter" for variant in settings.chosen()):
        return ""
    try:
        return unreached(config, task=settings.task, num_labels=settings.outputs)
    except (ValueError, TypeError):
        return ""


def _how(settings: PlanSettings, variant: Variant) -> dict[str, Any]:
    """The settings as keywords of `forecast`."""
    import torch

    return {
        "batch_size": settings.batch_size,
        "sequence_length": settings.length,
        "task": settings.task,
        "num_labels": settings.outputs,
        "dtype": getattr(torch, settings.dtype),
        "gradient_checkpointing": settings.gradient_checkpointing,
        "layerwise": settings.layerwise and variant.kind == "optimizer",
        "accumulate": settings.accumulate,
        "master_weights": settings.master_weights,
        "quantize": settings.quantize,
        "optimizer": "adamw" if variant.kind == "optimizer" else settings.optimizer,
        "devices": settings.devices,
        "bf16": settings.bf16,
    }


def touched_layers(settings: PlanSettings) -> list[tuple[Variant, list[Any]]]:
    """Which modules each method's patterns match, with shapes and trained numbers."""
    from lowdim.plan import shows

    config = _configuration(settings)
    chosen = [settings.at_rank(variant) for variant in _methods(settings)]
    return [(v, list(shows(config, v, task=settings.task, num_labels=settings.outputs))) for v in chosen]


def _configuration(settings: PlanSettings) -> Any:
    """The model's configuration, with the vocabulary of the tokenizer that is named."""
    from lowdim import models
    from lowdim.train.loading import recipe_tokenizer

    config = models.load_config(settings.model)
    if settings.tokenizer is not None:
        models.fit_vocabulary(config, recipe_tokenizer(settings.model, settings.tokenizer, (), None))
    if settings.ffn is not None or settings.mixer is not None:
        with_blocks(config, settings.ffn, settings.mixer)
    return config


def _with_rank(variant: Variant, rank: int) -> Variant | None:
    from lowdim.methods import strategy_for

    return strategy_for(variant).at_rank(rank)
