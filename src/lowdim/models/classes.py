"""Which class loads a folder: the one whose `from_pretrained` gives a model of the same class again."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from lowdim.errors import UnknownNameError, nearest
from lowdim.models.sentence_classifier import SentenceClassifier

__all__ = ["class_named", "class_of", "encoder_of", "imported", "is_sentence_transformer", "loading_class"]

#: Tried in this order; the first that gives the model's own class for its configuration is named.
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModelForImageTextToText",
    "AutoModel",
)


def loading_class(model: nn.Module) -> tuple[str, str]:
    """Module and name of the class to import.

    Example:
        >>> from transformers import T5Config, T5Model
        >>> from lowdim.models.classes import loading_class
        >>> loading_class(T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)))
        ('transformers', 'AutoModel')
    """
    if isinstance(model, SentenceClassifier):
        return "transformers", "AutoModel"
    if is_sentence_transformer(model):
        return "sentence_transformers", "SentenceTransformer"
    import transformers

    kind = type(model)
    for name in _AUTO:
        if kind in _given_by(getattr(transformers, name, None), getattr(model, "config", None)):
            return "transformers", name
    exported = getattr(transformers, kind.__name__, None) is kind
    return ("transformers" if exported else kind.__module__), kind.__name__


def class_named(name: str) -> Any:
    """The model class of transformers that has this name.

    Raises:
        UnknownNameError: it has none.
    """
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        known = [other for other in dir(transformers) if other[:1].isupper() and "For" in other]
        raise UnknownNameError(f"{name!r} is no model class of transformers (nearest: {', '.join(nearest(name, known))})")
    return found


def class_of(config: Any, kind: str) -> Any | None:
    """The class of the model in a folder, if it is `kind` (a class of transformers, or one of its Auto classes); else None.

    Example:
        >>> from transformers import LlamaConfig
        >>> from lowdim.models.classes import class_of
        >>> class_of(LlamaConfig(architectures=["LlamaForCausalLM"]), "AutoModelForCausalLM").__name__
        'LlamaForCausalLM'
    """
    import transformers

    written = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, str(written[0]), None)
    asked = getattr(transformers, kind, None)
    wanted = _given_by(asked, config) if kind.startswith("AutoModel") else (asked,)
    return found if found is not None and found in wanted else None


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether it is a model of sentence-transformers, checked without importing it."""
    return any(kind.__module__.startswith("sentence_transformers.") for kind in type(model).__mro__)


def encoder_of(model: nn.Module) -> str:
    """The name of the transformers model inside one of sentence-transformers; empty for every other model."""
    if not is_sentence_transformer(model):
        return ""
    import transformers

    return next((name for name, part in model.named_modules() if isinstance(part, transformers.PreTrainedModel)), "")


def _given_by(auto: Any, config: Any) -> tuple[Any, ...]:
    """The classes that an Auto class gives for a configuration."""
    try:
        found = auto._model_mapping[type(config)]
    except (AttributeError, KeyError, ImportError, ValueError):
        return ()
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def imported(module: str, name: str) -> Any:
    """The class itself."""
    return getattr(importlib.import_module(module), name)
