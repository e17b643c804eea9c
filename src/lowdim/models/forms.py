"""The form that a model takes for a task: the class of transformers that loads it, and its head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowdim.errors import check_choice

__all__ = ["FORMS", "TASKS", "Form", "form_of"]


@dataclass(frozen=True)
class Form:
    """How a model is loaded for a task.

    Attributes:
        auto: the Auto class of transformers.
        head: whether the model gets a new head, with an output for each class.
        inputs: what a batch holds: `"tokens"` or `"pixels"`.
        labels: `"row"`, `"token"` or `"block"`: what each label belongs to.
        scratch: whether training starts from random weights.
        problem: the model's `problem_type`; None lets it decide.
        pairs: whether a row is two texts or three, each with an embedding of its own (a model of sentence-transformers).
    """

    auto: str
    head: bool = False
    inputs: str = "tokens"
    labels: str = "row"
    scratch: bool = False
    problem: str | None = None
    pairs: bool = False

    @property
    def generates(self) -> bool:
        """Whether it is a language model."""
        return self.auto == "AutoModelForCausalLM"

    @property
    def pools(self) -> bool:
        """Whether a sentence encoder gets our head over the mean of its token states."""
        return self.auto == "AutoModelForSequenceClassification"

    def options(self, num_labels: int, problem: str | None = None) -> dict[str, Any]:
        """Keywords of `from_pretrained`, and fields of the configuration.

        Args:
            problem: in place of the form's own.
        """
        if not self.head:
            return {}
        kind = problem or self.problem
        return {"num_labels": num_labels, **({} if kind is None else {"problem_type": kind})}


FORMS: dict[str, Form] = {
    "classify": Form("AutoModelForSequenceClassification", head=True),
    "regress": Form("AutoModelForSequenceClassification", head=True, problem="regression"),
    "instruct": Form("AutoModelForCausalLM", labels="token"),
    "causal-lm": Form("AutoModelForCausalLM", labels="block"),
    "pretrain": Form("AutoModelForCausalLM", labels="block", scratch=True),
    "image": Form("AutoModelForImageClassification", head=True, inputs="pixels"),
    "embed": Form("AutoModel", pairs=True),
    "tokens": Form("AutoModelForTokenClassification", head=True, labels="token"),
}
#: The tasks of commands and recipes.
TASKS = tuple(FORMS)


def form_of(task: str) -> Form:
    """The form for a task.

    Raises:
        UnknownNameError: no such task.

    Example:
        >>> from lowdim.models.forms import form_of
        >>> form_of("image").inputs, form_of("regress").options(1)
        ('pixels', {'num_labels': 1, 'problem_type': 'regression'})
    """
    check_choice("task", task, TASKS)
    return FORMS[task]
