"""What a score is worth: what a constant answer scores on the same texts, for every metric."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowdim.train.metrics import METRICS, Metric, classification_score

if TYPE_CHECKING:
    from lowdim.train.tasks import Task

__all__ = ["Majority", "majority", "worth"]


@dataclass(frozen=True)
class Majority:
    """Always answering the class that is most frequent in training.

    Attributes:
        name: of the class.
        share: of the part's texts that have it.
        scores: metric -> score of the constant answer on the part.
        hits: 1 or 0 for each text of the part.
        classes: number of classes that occur in the part.
    """

    name: str
    share: float
    scores: dict[str, float]
    hits: tuple[int, ...]
    classes: int

    def to_dict(self) -> dict[str, Any]:
        """For the record, without the answers."""
        return {"class": self.name, "share": self.share, "scores": self.scores}

    @property
    def sentence(self) -> str:
        """What the constant answer scores, in one sentence."""
        shown = ", ".join(f"{METRICS[name].title} {value:.3f}" for name, value in self.scores.items())
        return f"always answering {self.name!r} ({self.share:.1%} of the texts) gives {shown}"


def majority(task: Task, part: Any) -> Majority | None:
    """The constant answer on one part of a classification task; None for a language model or an unlabelled part."""
    if task.kind != "classify" or not len(part):
        return None
    labels = [int(label) for label in part["labels"]]
    most = Counter(int(label) for label in task.train["labels"]).most_common(1)[0][0]
    hits = tuple(int(label == most) for label in labels)
    names = [m.name for m in METRICS.values() if m.task == task.kind]
    scores = {name: classification_score(name, labels, [most] * len(labels)) for name in names}
    return Majority(str(task.classes[most]), sum(hits) / len(hits), scores, hits, len(set(labels)))


def worth(constant: Majority, score: float, metric: Metric) -> str | None:
    """A sentence where a score is not above that of the constant answer, or where no score can say anything."""
    if constant.classes < 2:
        return f"all texts have the class {constant.name!r}: no score on them says anything"
    least = constant.scores[metric.name]
    if score > least + 1e-12:
        return None
    tell = "; compare by --metric f1 or mcc, which give it no credit" if metric.name == "accuracy" else ""
    return f"{metric.title} {score:.3f} is not better than always answering {constant.name!r} ({least:.3f}){tell}"
