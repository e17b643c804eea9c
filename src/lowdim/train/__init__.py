"""Training through `transformers.Trainer`: data, tasks, recipes, callbacks, exact resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowdim.lazy import lazy_names

if TYPE_CHECKING:
    from lowdim.train.callbacks import AdaptedCallback
    from lowdim.train.loop import fit
    from lowdim.train.mixin import AdaptedTrainerMixin
    from lowdim.train.recipes import Recipe, load_recipe
    from lowdim.train.run import run_recipe
    from lowdim.train.settings import FitResult, FitSettings
    from lowdim.train.tasks import Task, classification, language_modelling
    from lowdim.train.tokenizers import byte_tokenizer, character_tokenizer

__all__ = [
    "AdaptedCallback",
    "AdaptedTrainerMixin",
    "FitResult",
    "FitSettings",
    "Recipe",
    "Task",
    "byte_tokenizer",
    "character_tokenizer",
    "classification",
    "fit",
    "language_modelling",
    "load_recipe",
    "run_recipe",
]

_HOMES = {
    "AdaptedCallback": "callbacks",
    "AdaptedTrainerMixin": "mixin",
    "FitResult": "settings",
    "FitSettings": "settings",
    "fit": "loop",
    "Task": "tasks",
    "classification": "tasks",
    "language_modelling": "tasks",
    "byte_tokenizer": "tokenizers",
    "character_tokenizer": "tokenizers",
    "Recipe": "recipes",
    "load_recipe": "recipes",
    "run_recipe": "run",
}

__getattr__ = lazy_names(__name__, _HOMES)
