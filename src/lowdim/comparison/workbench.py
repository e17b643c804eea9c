"""What a comparison works on: a task with its data, and a model; named in settings, or given as Python objects."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowdim import models
from lowdim.calibrate import map_tensors
from lowdim.catalogue import Variant
from lowdim.errors import DataError, check_choice
from lowdim.models.forms import FORMS, form_of
from lowdim.modules import quantize_base
from lowdim.plan import faked
from lowdim.train.fingerprint import fingerprint_of, fingerprint_of_objects
from lowdim.train.loading import load_task, random_model, recipe_processor
from lowdim.train.metrics import Metric, metric_for
from lowdim.train.recipes import Recipe
from lowdim.train.tasks.base import Task

if TYPE_CHECKING:
    from lowdim.comparison.settings import CompareSettings
    from lowdim.plan import Forecast

__all__ = ["Workbench", "recipe_of", "workbench"]


@dataclass(kw_only=True)
class Workbench(ABC):
    """A task whose data is read, and a model that is loaded when it is needed.

    Attributes:
        label: of the model, for titles.
        source: where the model came from; None for a module of one's own.
        scratch: whether training starts from random weights.
    """

    task: Task
    metric: Metric
    label: str
    source: models.Source | None
    scratch: bool = False

    @property
    def processor(self) -> Any:
        """What makes inputs from raw rows: a tokenizer, an image processor, or None."""
        return self.task.processor

    @abstractmethod
    def load(self) -> nn.Module:
        """The untouched model, with the same weights at every call."""

    @abstractmethod
    def fingerprint(self, model: nn.Module) -> dict[str, str]:
        """Checksums of what decides the numbers besides the settings, by name."""

    @abstractmethod
    def forecast(self, variant: Variant, *, steps: int, batch_size: int, budget_bytes: int | None = None) -> Forecast:
        """The memory of training by a method.

        Raises:
            ValueError, TypeError: it cannot train this model, or cannot be forecast.
        """

    def head(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the modules that every method trains in full."""
        own = getattr(self.task, "head", None)
        return tuple(own) if own is not None else models.head_modules(model, self.task.kind)

    def answers(self, model: nn.Module) -> bool:
        """Whether the model can answer before it is trained: a new head has nothing to say."""
        head = self.head(model)
        return not head or not getattr(model, "new_modules", head)

    def unfit(self, variant: Variant) -> str | None:
        """Why a method makes no sense for the task; None if it does."""
        return variant.unfit(self.task.kind)


def workbench(
    settings: CompareSettings,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    task: Task | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Workbench:
    """Read the data, and find the model, without loading it.

    Args:
        model, task: in place of those that the settings name.
        say: called with a line before data is read.

    Raises:
        DataError, UnknownNameError: from the data or the model.
        ValueError: the model and the task do not go together; the message says what would.
    """
    if model is not None:
        if task is None:
            raise ValueError(
                f"task must be a Task for a model that is a module, such as lowdim.train.classification(tokenizer, files) or "
                f"lowdim.train.own_task(...); got the name {settings.task!r}"
            )
        return _Own.of(settings, model, task)
    source, given = models.resolve(settings.model), task is not None
    if task is None:
        metric_for(settings.task, settings.metric)  # raises, before anything is read
        task = _read(settings, say)
    elif task.kind not in models.TASKS:
        raise ValueError(
            f"model must be a module, or a function that builds one, for a task of one's own; got {settings.model!r}"
        )
    return _Named(
        task=task,
        metric=task.metric(settings.metric),
        label=source.label,
        source=source,
        scratch=task.kind == "pretrain",
        settings=settings,
        given=given,
    )


@dataclass(kw_only=True)
class _Named(Workbench):
    """A model by name."""

    settings: CompareSettings
    given: bool  # the task came as an object, with its data

    def load(self) -> nn.Module:
        settings, tokenizer = self.settings, self.processor
        if self.scratch:
            return random_model(settings.model, self.task.kind, settings.seed, tokenizer if settings.tokenizer else None)
        model = models.load_model(
            settings.model,
            self.task.kind,
            num_labels=self.task.num_labels,
            seed=settings.seed,
            pad_token_id=getattr(tokenizer, "pad_token_id", None),
            problem=self.task.problem,
            quantize=settings.quantize,
        )
        models.name_classes(model, self.task.classes)
        return model

    def fingerprint(self, model: nn.Module) -> dict[str, str]:
        settings = self.settings
        if self.given:
            return fingerprint_of_objects(model, self.task)
        files = (settings.data, settings.evaluation, settings.validation, settings.keep)
        return fingerprint_of(model, self.processor, self.task, *files)

    def forecast(self, variant: Variant, *, steps: int, batch_size: int, budget_bytes: int | None = None) -> Forecast:
        from lowdim.plan import forecast

        config = models.load_config(self.settings.model)
        if self.settings.tokenizer is not None:
            models.fit_vocabulary(config, self.processor)
        self.task.fit_config(config)
        return forecast(
            config,
            variant,
            batch_size=batch_size,
            task=self.task.kind,
            num_labels=self.task.num_labels,
            problem=self.task.problem,
            steps=steps,
            budget_bytes=budget_bytes,
            device=_device(),
            batch=_largest_batch(self.task, batch_size),
            quantize=self.settings.quantize,
            optimizer=_optimizer(self.settings, variant),
            bf16=self.settings.bf16,
        )


@dataclass(kw_only=True)
class _Own(Workbench):
    """A module of one's own."""

    make: Callable[[], nn.Module]
    settings: CompareSettings

    @classmethod
    def of(cls, settings: CompareSettings, model: nn.Module | Callable[[], nn.Module], task: Task) -> _Own:
        module = model if isinstance(model, nn.Module) else None
        if module is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                module = model()
        if not isinstance(module, nn.Module):
            raise TypeError(f"model must be a name, a module or a function that builds one; it gave a {type(module).__name__}")
        head = tuple(getattr(task, "head", ()))
        for name in head:
            _check_module(module, name)
        if settings.quantize is not None:
            module = quantize_base(copy.deepcopy(module), settings.quantize, keep=head)
        return cls(
            task=task,
            metric=task.metric(settings.metric),
            label=settings.model,
            source=None,
            scratch=not settings.pretrained,
            make=lambda: copy.deepcopy(module),
            settings=settings,
        )

    def load(self) -> nn.Module:
        return self.make()

    def answers(self, model: nn.Module) -> bool:
        return True

    def unfit(self, variant: Variant) -> str | None:
        if variant.kind == "probe" and not self.head(self.make()):
            return "a linear probe trains the head alone; name its modules with head="
        return variant.unfit(self.task.kind)

    def fingerprint(self, model: nn.Module) -> dict[str, str]:
        return fingerprint_of_objects(model, self.task)

    def forecast(self, variant: Variant, *, steps: int, batch_size: int, budget_bytes: int | None = None) -> Forecast:
        from lowdim.plan import forecast

        module = self.make()
        return forecast(
            module,
            variant,
            batch_size=batch_size,
            head=self.head(module),
            steps=steps,
            budget_bytes=budget_bytes,
            device=_device(),
            batch=_largest_batch(self.task, batch_size),
            loss_fn=self.task.loss_for(variant),
            optimizer=_optimizer(self.settings, variant),
            bf16=self.settings.bf16,
        )


def recipe_of(settings: CompareSettings) -> Recipe:
    """What the settings say of the model and the data."""
    if settings.label is not None and form_of(settings.task).generates:
        labelled = [task for task, form in FORMS.items() if not form.generates]
        raise DataError(f"--label is for --task {', '.join(labelled)}; got {settings.label!r} for {settings.task}")
    return Recipe(
        model=settings.model,
        task=settings.task,  # type: ignore[arg-type]
        data=list(map(str, settings.data)),
        eval=None if settings.evaluation is None else str(settings.evaluation),
        validation=None if settings.validation is None else str(settings.validation),
        tokenizer=settings.tokenizer,
        text=settings.text,
        label=settings.label,
        label_separator=settings.label_separator,
        metric=settings.metric,
        answer_pattern=settings.answer_pattern,
        keep=settings.keep,
        quantize=settings.quantize,  # type: ignore[arg-type]
        optimizer=settings.optimizer,  # type: ignore[arg-type]
        max_length=settings.max_length,
        limit=settings.limit,
        seed=settings.seed,
    )


def _read(settings: CompareSettings, say: Callable[[str], None]) -> Task:
    """The task that the settings name, with its data."""
    say(f"Reading {', '.join(settings.data)}")
    recipe = recipe_of(settings)
    return load_task(recipe, recipe_processor(recipe))


def _check_module(model: nn.Module, name: str) -> None:
    """Raise UnknownNameError if the model has no module of this name."""
    names = [each for each, _ in model.named_modules() if each]
    check_choice("head", name, names)


def _largest_batch(task: Task, batch_size: int) -> Callable[[], Any]:
    """A function that makes the batch that a step needs most memory for, without numbers: the longest rows together."""
    part: Any = task.train if isinstance(task.train, Sized) else task.validation
    rows = [part[i] for i in task.order(part)[-batch_size:]]
    batch = task.collate(rows + rows[-1:] * (batch_size - len(rows)))
    return lambda: map_tensors(batch, faked)


def _optimizer(settings: CompareSettings, variant: Variant) -> str:
    """What trains the method's parameters; one that is an optimizer itself has its own."""
    return "adamw" if variant.kind == "optimizer" else settings.optimizer


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
