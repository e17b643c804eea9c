"""The settings of a comparison, saved with its results, so that `--resume` can refuse to mix two."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowdim.errors import check_choice, check_int
from lowdim.models import TASKS

__all__ = ["DEFAULT_METHODS", "CompareSettings"]

DEFAULT_METHODS = "linear-probe,lora,full,lamda,randlora,galore"
#: For pretraining, where adapters on random weights make no sense.
TRAINING_METHODS = "full,training"


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """One comparison. The fields that decide the numbers are compared on `--resume`; `seeds`, `out` and limits may grow."""

    model: str
    data: tuple[str, ...]
    evaluation: str | None = None
    task: str = "classify"
    tokenizer: str | None = None  # bytes, characters, a folder, a hub id; for pretraining
    text: str | None = None
    label: str | None = None
    methods: tuple[str, ...] = ()
    budget: int | None = None  # bytes
    metric: str | None = None
    seeds: int = 3
    trials: int = 3
    steps: int = 100
    batch_size: int = 16
    max_length: int = 128
    time_limit: float | None = None  # seconds
    seed: int = 0
    limit: int | None = None  # training texts
    threads: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.text, (list, tuple)):
            object.__setattr__(self, "text", ",".join(self.text))
        check_choice("--task", self.task, TASKS)
        for name, low in (("seeds", 1), ("trials", 1), ("steps", 3), ("batch_size", 1), ("max_length", 4)):
            check_int(f"--{name.replace('_', '-')}", getattr(self, name), low)
        check_int("--trials", self.trials, 1, 5)
        if self.tokenizer is not None and self.task != "pretrain":
            raise ValueError(f"--tokenizer is for --task pretrain; got {self.tokenizer!r} for {self.task}")
        if not self.data:
            raise ValueError("--data must name at least one file")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def differs_from(self, other: dict[str, Any]) -> list[str]:
        """The settings of an earlier comparison in the same folder that would have given other numbers."""
        free = {"seeds", "time_limit", "budget", "methods"}
        own = self.to_dict()
        return [key for key, value in own.items() if key not in free and other.get(key) != value]
