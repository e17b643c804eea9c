"""Default settings of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowdim.compare import CompareSettings

__all__ = ["compare_settings"]

#: Without data: a sample of sentence polarity and a short run, to end within five minutes on two cores.
_DEMO = {"seeds": 3, "trials": 2, "steps": 20, "max_length": 40, "time_limit": 255.0}
_USUAL = {"seeds": 3, "trials": 3, "steps": 100, "max_length": 128, "time_limit": None}


def compare_settings(
    *,
    model: str = "minilm",
    task: str = "classify",
    data: Iterable[str] | None = None,
    methods: Iterable[str] = (),
    **given: Any,
) -> CompareSettings:
    """The settings of `lowdim.compare.compare`, with None replaced by the task's defaults.

    Without data, sentences with two labels are classified in a run of a few minutes; language models get the shipped text.

    Args:
        given: fields of `CompareSettings`; None means the default.

    Raises:
        UnknownNameError, ValueError: from `CompareSettings`.

    Example:
        >>> from lowdim.jobs import compare_settings
        >>> settings = compare_settings()
        >>> settings.data, settings.steps, settings.time_limit
        (('lowdim:sentence-polarity',), 20, 255.0)
        >>> compare_settings(model="stories260k", task="causal-lm", seeds=1).data
        ('lowdim:shakespeare',)
    """
    from lowdim.compare import CompareSettings
    from lowdim.models.architectures import SHAPES

    demo = data is None and task == "classify"
    if data is None:
        data = ("lowdim:sentence-polarity" if demo else "lowdim:shakespeare",)
    if task == "pretrain" and given.get("tokenizer") is None and model in SHAPES:
        given["tokenizer"] = "bytes"
    chosen = {name: value for name, value in given.items() if value is not None}
    usual = _DEMO if demo else _USUAL
    return CompareSettings(model=model, task=task, data=tuple(data), methods=tuple(methods), **{**usual, **chosen})
