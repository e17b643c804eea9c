"""The settings of a comparison, saved with its results, so that `--resume` can refuse to mix two."""

from __future__ import annotations

from dataclasses import InitVar, asdict, dataclass
from typing import Any

from lowdim.errors import check_choice, check_int, shown
from lowdim.methods import OPTIMIZERS, RANKS
from lowdim.models import TASKS
from lowdim.modules import SCHEMES

__all__ = ["CURVATURE", "DEFAULT_METHODS", "EQUAL", "PREFER", "SEARCH", "CompareSettings"]

DEFAULT_METHODS = "linear-probe,lora,full,lamda,randlora,galore"
#: For pretraining, where adapters on random weights make no sense.
TRAINING_METHODS = "full,training"


#: `--rates`: the usual ones, and one that is measured.
CURVATURE = "curvature"
_USUAL_RATES = 3
#: What methods of one size have in common.
EQUAL = ("parameters", "flops", "memory", "none")
SEARCH = ("halving", "grid")
#: What decides between methods that may all be the best.
PREFER = ("memory", "time", "size", "score")
#: What a setting was before it could be set.
_LATER = {"optimizer": "adamw", "ranks": "uniform", "bf16": False, "group_by_length": False}


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """One comparison. The fields that decide the numbers are compared on `--resume`; `seeds`, `out` and limits may grow.

    Attributes:
        evaluation, validation: separate test and validation files.
        tokenizer: `"bytes"`, `"characters"`, a folder or hub id; for pretraining.
        text, label: names of the columns.
        methods: names and families; empty for the usual ones.
        budget: bytes; methods that need more are left out.
        metric: None for the task's usual one.
        label_separator, answer_pattern, keep: as in `lowdim.train.Recipe`.
        seeds: rounds of the final at most; each trains every finalist once.
        rates: learning rates of each method in the search, 1 to 5; `"curvature"`: three, and one that is measured from the
            curvature of the loss. `trials` is its former name.
        sizes: ranks of each method in the search.
        equal: what methods of one size have in common: `"parameters"`, `"flops"` (of structured layers that are trained from
            random weights), `"memory"` (the forecast peak) or `"none"`.
        search: `"halving"`, or `"grid"`, which trains every candidate to its end.
        prefer: what decides between methods that may all be the best: `"memory"`, `"time"`, `"size"` or `"score"`.
        time_limit: seconds for all of it, the search included.
        seed: of the split and of everything that is drawn.
        limit: training rows at most.
        quantize: `"int8"`, `"int4"` or `"nf4"`: the base's linear weights are kept in few bits, and methods that train them are
            left out.
        optimizer: `"adamw"` or `"adamw8bit"`, of methods without an optimizer of their own.
        bf16: train in bfloat16 by autocast, in which the search scores, too; the weights keep their dtype, in which the final
            scores.
        group_by_length: put rows of like length into a batch.
        ranks: `"uniform"`, or `"farms"`: every adapter with ranks by layer has a second row, `NAME+farms`, whose ranks follow
            from the layers' tail exponents.
        threads: of each training, on which the last digits of its numbers depend; None: all of this process's, an equal share
            of them for each worker, one with `ray`.
        workers: processes that train, each with a device of its own where there are several; with `ray`, runs at once at most.
        ray: the address of a Ray cluster that trains, or `"local"`.
        report_to: a tracker known to transformers.
        pretrained: whether a module of one's own has trained weights; where it has not, the rates are those for training from
            scratch, and structured layers draw their own weights.
        given: what came as a Python object and not by name: `"model"`, `"task"`. `model` is then a label, `data` may be empty.
    """

    model: str
    data: tuple[str, ...]
    evaluation: str | None = None
    validation: str | None = None
    task: str = "classify"
    tokenizer: str | None = None
    text: str | None = None
    label: str | None = None
    label_separator: str | None = None
    methods: tuple[str, ...] = ()
    budget: int | None = None
    metric: str | None = None
    answer_pattern: str | None = None
    keep: str | None = None
    seeds: int = 3
    rates: int | str = _USUAL_RATES
    sizes: int = 2
    equal: str = "parameters"
    search: str = "halving"
    prefer: str = "memory"
    steps: int = 100
    batch_size: int = 16
    max_length: int = 128
    time_limit: float | None = None
    seed: int = 0
    limit: int | None = None
    threads: int | None = None
    quantize: str | None = None
    optimizer: str = "adamw"
    bf16: bool = False
    group_by_length: bool = False
    ranks: str = "uniform"
    workers: int | None = None
    ray: str | None = None
    report_to: str = "none"
    pretrained: bool = True
    given: tuple[str, ...] = ()
    trials: InitVar[int | None] = None

    def __post_init__(self, trials: int | None) -> None:
        if trials is not None:
            object.__setattr__(self, "rates", trials)
        if isinstance(self.text, (list, tuple)):
            object.__setattr__(self, "text", ",".join(self.text))
        if "task" not in self.given:
            check_choice("--task", self.task, TASKS)
        for name, low in (("seeds", 1), ("steps", 3), ("batch_size", 1), ("max_length", 4)):
            check_int(f"--{name.replace('_', '-')}", getattr(self, name), low)
        for name in ("threads", "workers"):
            if getattr(self, name) is not None:
                check_int(f"--{name}", getattr(self, name), 1)
        if isinstance(self.rates, str) and self.rates != CURVATURE:
            raise ValueError(f'--rates must be an int in [1, 5], or "{CURVATURE}"; got {shown(self.rates)}')
        check_int("--rates", self.usual_rates, 1, 5)
        check_int("--sizes", self.sizes, 1, 4)
        for name, allowed in (("equal", EQUAL), ("search", SEARCH), ("prefer", PREFER)):
            check_choice(f"--{name}", getattr(self, name), allowed)
        if self.equal == "flops" and self.task != "pretrain" and self.pretrained:
            raise ValueError(f"--equal flops is for structured layers from random weights (--task pretrain); got {self.task}")
        check_choice("--optimizer", self.optimizer, OPTIMIZERS)
        check_choice("--ranks", self.ranks, RANKS)
        if self.ranks != "uniform" and (self.task == "pretrain" or not self.pretrained):
            raise ValueError(f"--ranks {self.ranks} follows from trained weights; here they are random")
        if self.quantize is not None:
            check_choice("--quantize", self.quantize, SCHEMES)
            if self.task == "pretrain" or not self.pretrained:
                raise ValueError(
                    f"--quantize {self.quantize} is for a pre-trained base, which stays as it is; random weights are trained"
                )
        if self.tokenizer is not None and self.task != "pretrain":
            raise ValueError(f"--tokenizer is for --task pretrain; got {self.tokenizer!r} for {self.task}")
        if self.label_separator is not None and self.task != "classify":
            raise ValueError(f"--label-separator is for --task classify; got {self.label_separator!r} for {self.task}")
        if not self.pretrained and "model" not in self.given:
            raise ValueError(
                "pretrained=False is for a model that is a module; --task pretrain trains a named one from scratch"
            )
        if not self.data and "task" not in self.given:
            raise ValueError("--data must name at least one file")

    @property
    def usual_rates(self) -> int:
        """How many of each method's own rates the search begins with."""
        return _USUAL_RATES if isinstance(self.rates, str) else self.rates

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def differs_from(self, other: dict[str, Any]) -> list[str]:
        """The settings of an earlier comparison in the same folder that would have given other numbers."""
        free = {"seeds", "time_limit", "budget", "methods", "prefer", "report_to", "workers", "ray"}
        own = self.to_dict()
        return [key for key, value in own.items() if key not in free and other.get(key, _LATER.get(key)) != value]
