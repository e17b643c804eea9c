"""Default settings of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowdim.comparison import CompareSettings

__all__ = ["compare_settings"]

#: Without data and task: a small language model, whose methods differ clearly, in a run of less than four minutes on two cores.
_DEMO = {
    "methods": ("full", "lora", "galore", "lamda", "randlora", "lora-xs", "svfit"),
    "steps": 60,
    "max_length": 64,
    "time_limit": 220.0,
}
#: Task classify without data: sentences of film reviews.
_SENTENCES = {"rates": 2, "steps": 20, "max_length": 40, "time_limit": 255.0}
_LANGUAGE = ("causal-lm", "instruct", "pretrain")  # tasks of the small language model, if none is named


def compare_settings(
    *,
    model: str | None = None,
    task: str | None = None,
    data: Iterable[str] | None = None,
    methods: Iterable[str] = (),
    **given: Any,
) -> CompareSettings:
    """The settings of `lowdim.comparison.compare`, with None replaced by the task's defaults.

    Without data, a language model is tuned on the shipped text; `task="classify"` takes the shipped sentences of film reviews.

    Args:
        model: None: the small language model for its tasks, else the small encoder.
        task: None: classify for data of one's own.
        given: fields of `CompareSettings`; None means the default.

    Raises:
        UnknownNameError, ValueError: from `CompareSettings`.

    Example:
        >>> from lowdim.jobs import compare_settings
        >>> settings = compare_settings()
        >>> settings.model, settings.task, settings.data, settings.steps
        ('stories260k', 'causal-lm', ('lowdim:shakespeare',), 60)
        >>> compare_settings(task="classify").data
        ('lowdim:sentence-polarity',)
        >>> compare_settings(data=["reviews.csv"]).model
        'minilm'
    """
    from lowdim.comparison import CompareSettings
    from lowdim.models.architectures import is_shape

    usual: dict[str, Any] = {}
    if data is None and task is None and model in (None, "stories260k"):
        task, usual = "causal-lm", _DEMO
    task = task or "classify"
    model = model or ("stories260k" if task in _LANGUAGE else "minilm")
    if data is None:
        usual = _SENTENCES if task == "classify" else usual
        data = ("lowdim:sentence-polarity" if task == "classify" else "lowdim:shakespeare",)
    if task == "pretrain" and given.get("tokenizer") is None and is_shape(model):
        given["tokenizer"] = "bytes"
    chosen = {name: value for name, value in {**given, "methods": tuple(methods) or None}.items() if value is not None}
    return CompareSettings(model=model, task=task, data=tuple(data), **{**usual, **chosen})
