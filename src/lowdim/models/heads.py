"""The prediction head of a model: which modules are new for a task, and the names of its classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowdim.models.forms import form_of
from lowdim.models.sentence_classifier import SentenceClassifier
from lowdim.surgery import HEAD_NAMES

if TYPE_CHECKING:
    from torch import nn

__all__ = ["head_modules", "name_classes", "named_classes", "new_modules"]


def head_modules(model: nn.Module, task: str) -> tuple[str, ...]:
    """Names of the modules that are new for the task and always trained: the classification head; none for language models."""
    if not form_of(task).head:
        return ()
    heads = [name for name, _ in model.named_children() if name in HEAD_NAMES]
    return tuple(dict.fromkeys([*heads, *getattr(model, "new_modules", ())]))


def name_classes(model: nn.Module, classes: Sequence[str]) -> None:
    """Write the names of the classes into a model's configuration, so that its saved folder has them.

    A sentence encoder's configuration has no place for them; its classifier keeps them itself.
    """
    if isinstance(model, SentenceClassifier):
        model.classes = tuple(classes)
        return
    config: Any = getattr(model, "config", None)
    if classes and getattr(config, "num_labels", None) == len(classes):
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: index for index, name in enumerate(classes)}


def named_classes(model: Any) -> tuple[str, ...]:
    """The names that `name_classes` gave; empty where there are none.

    Example:
        >>> from types import SimpleNamespace
        >>> from lowdim.models.heads import named_classes
        >>> named_classes(SimpleNamespace(config=SimpleNamespace(id2label={0: "no", 1: "yes"})))
        ('no', 'yes')
    """
    if isinstance(model, SentenceClassifier):
        return model.classes
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    given = tuple(names[index] for index in sorted(names))
    return () if given == tuple(f"LABEL_{index}" for index in range(len(given))) else given


def new_modules(model: Any, missing: Iterable[str]) -> tuple[str, ...]:
    """Modules that the task needs and the checkpoint lacks: everything outside the backbone, and its pooler."""
    found = set()
    inner = _head_within(model)
    for key in missing:
        first, _, rest = key.partition(".")
        if inner and key.startswith(f"{inner}."):
            found.add(inner)
        elif first != model.base_model_prefix:
            found.add(first)
        elif rest.startswith("pooler."):
            found.add(f"{first}.pooler")
    return tuple(found)


def _head_within(model: Any) -> str:
    """The head of a model of timm, which is a part of what its wrapper holds; empty for every other model."""
    classifier = getattr(getattr(model, "timm_model", None), "get_classifier", None)
    head = classifier() if callable(classifier) else None
    return next((name for name, module in model.named_modules() if module is head), "") if head is not None else ""
