"""What a pipeline works on: a model with its task, and the model again from a folder."""

from __future__ import annotations

import copy
import math
import random
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim import models
from lowdim.errors import DataError
from lowdim.models.sources import quiet, resolve, transformers_module
from lowdim.pipeline.recipe import PipelineRecipe
from lowdim.pipeline.similarity import similarity
from lowdim.results import json_value
from lowdim.surgery import model_device
from lowdim.train.environment import environment
from lowdim.train.metrics import Metric
from lowdim.train.tasks.base import Task
from lowdim.train.tasks.causal_lm import language_modelling

__all__ = ["Subject", "load_subject"]

_BATCH = 8
#: What makes a folder one of sentence-transformers.
_PACKAGING = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")


@dataclass
class Subject:
    """The task of a pipeline and how its model is loaded.

    Attributes:
        task: with the rows on which steps are scored as its test part.
        metric: perplexity, or rank correlation.
    """

    recipe: PipelineRecipe
    tokenizer: Any
    task: Task
    metric: Metric

    @property
    def generates(self) -> bool:
        """Whether the model has a cache."""
        return self.recipe.task == "causal-lm"

    def dense(self) -> Any:
        """The model as it was before any step."""
        dtype = getattr(torch, self.recipe.dtype)
        if self.generates:
            pad = self.tokenizer.pad_token_id
            return models.load_model(self.recipe.model, "causal-lm", dtype=dtype, pad_token_id=pad).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)  # of a pooler that the checkpoint lacks, which is never read
            return models.load_by_class(self.recipe.model, "AutoModel").to(dtype).eval()

    def heading(self, model: nn.Module, command: str) -> dict[str, Any]:
        """What a `StudyRecord` says of the model, its task and the circumstances; all but the title."""
        source, parameters = self.recipe.model, sum(p.numel() for p in model.parameters())
        return {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "metric": self.metric.name,
            "higher_is_better": self.metric.higher_is_better,
            "model": {"name": source, "label": self.label, "class": type(model).__name__, "parameters": parameters},
            "data": json_value(self.task.data_record()),
            "environment": environment(),
        }

    @property
    def label(self) -> str:
        """The model's name in titles."""
        return resolve(self.recipe.model).label

    def again(self, folder: Path) -> Any:
        """The model that a step has written."""
        cls = getattr(transformers_module(), "AutoModelForCausalLM" if self.generates else "AutoModel")
        with quiet():
            return cls.from_pretrained(folder, dtype="auto").eval()

    def batches(self, model: nn.Module, *, seed: int | None = None, size: int = _BATCH) -> list[dict[str, Any]]:
        """Samples of the training part as inputs alone; with a seed, others."""
        task = self.task
        if seed is not None:
            task = copy.copy(task)
            order = list(range(len(task.train)))
            random.Random(f"{seed}/samples").shuffle(order)
            task.train = [task.train[i] for i in order]
        count = math.ceil(min(self.recipe.samples, len(task.train)) / size)
        rows = task.sample_batches(count, size, model_device(model))
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in rows]

    def add_packaging(self, folder: Path) -> None:
        """Copy what sentence-transformers needs besides the model."""
        source = Path(resolve(self.recipe.model).path)
        for name in _PACKAGING:
            if not self.generates and (source / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)


def load_subject(recipe: PipelineRecipe) -> Subject:
    """Read tokenizer and data; the model is loaded when it is needed.

    Raises:
        DataError: the data does not fit the task, or is shorter than a block.
        UnknownNameError: the model cannot be found.
    """
    tokenizer = models.load_tokenizer(recipe.model)
    how: dict[str, Any] = {"evaluation": recipe.eval, "text": recipe.text, "seed": recipe.seed}
    most = models.longest_text(recipe.model)
    if recipe.task == "causal-lm":
        task: Task = language_modelling(tokenizer, recipe.data, max_length=recipe.max_length, most=most, **how)
        metric = task.metric("perplexity")
    else:
        if not models.load_config(recipe.model).mean_pooled:
            raise DataError(
                f"--model {recipe.model}: task similarity needs a sentence-transformers model that averages its tokens"
            )
        length = recipe.max_length if most is None else min(recipe.max_length, most)
        task = similarity(tokenizer, recipe.data, label=recipe.label, max_length=length, **how)
        metric = task.metric("spearman")
    if recipe.held_out is not None and recipe.held_out < len(task.test):
        task.test = [task.test[i] for i in range(recipe.held_out)]
    return Subject(recipe, tokenizer, task, metric)
