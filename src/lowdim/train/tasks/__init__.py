"""Tasks: what the rows of the data are, and what a model learns from them. One module for each task.

Each module has `load(recipe, processor, **keywords) -> Task`. `LOADERS` names them.
"""

from __future__ import annotations

import importlib
from typing import Any

from lowdim.errors import check_choice
from lowdim.models.forms import form_of
from lowdim.train.tasks.base import Baseline, Score, Task
from lowdim.train.tasks.causal_lm import LanguageModelling, language_modelling, stack_blocks
from lowdim.train.tasks.classify import Classification, classification
from lowdim.train.tasks.regress import Regression, regression

__all__ = [
    "LOADERS",
    "Baseline",
    "Classification",
    "LanguageModelling",
    "Regression",
    "Score",
    "Task",
    "classification",
    "language_modelling",
    "load",
    "regression",
    "stack_blocks",
]

#: Task -> the module of this package that loads it.
LOADERS = {
    "classify": "classify",
    "regress": "regress",
    "instruct": "instruct",
    "causal-lm": "causal_lm",
    "pretrain": "pretrain",
    "image": "image",
    "tokens": "tokens",
    "embed": "embed",
}


def load(recipe: Any, processor: Any, **keywords: Any) -> Task:
    """The task of a recipe, with its data read and prepared.

    Args:
        processor: the tokenizer, or image processor, of the recipe's model.
        keywords: `evaluation`, `validation`, `text`, `max_length`, `most`, `seed`, `limit`.

    Raises:
        DataError: the data does not fit the task; the message says what would.
        ValueError: an option of another task.
    """
    check_choice("task", recipe.task, LOADERS)
    if recipe.answer_pattern is not None and recipe.task != "instruct":
        raise ValueError(f"--answer-pattern is for the task instruct; the task is {recipe.task}")
    if recipe.keep is not None and not form_of(recipe.task).generates:
        raise ValueError(f"--keep is for language models (causal-lm, pretrain, instruct); the task is {recipe.task}")
    module = importlib.import_module(f"{__name__}.{LOADERS[recipe.task]}")
    return module.load(recipe, processor, **keywords)
