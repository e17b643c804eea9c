"""Families of compression at equal bytes, after equal tuning: `lowdim compare --compress`."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lowdim.comparison.judge import judge
from lowdim.compress import last_report
from lowdim.errors import CheckpointError, LowdimError, check_choice, check_int, is_machine_failure
from lowdim.jobs import compressor
from lowdim.jobs.budgets import Budget, fit_budget
from lowdim.jobs.tuning import train
from lowdim.locking import exclusive
from lowdim.modules import base_layers, pack_linear
from lowdim.pipeline.pruning import SHARES, helped, pruned
from lowdim.pipeline.recipe import PipelineRecipe
from lowdim.pipeline.subject import Subject, load_subject
from lowdim.pretrained import stored_bytes
from lowdim.records import FamiliesRecord, FamilyRun, LevelRecord, claim
from lowdim.report import write_families
from lowdim.results import json_value
from lowdim.surgery import matrix_shape
from lowdim.units import format_bytes

__all__ = ["FAMILIES", "FamilySettings", "compare_families"]

#: Systems that are fitted to a budget, then the baselines: pruning, which is fitted too, and two of a fixed size.
FAMILIES = ("lord", "pela", "welore", "lr2vq", "magnitude", "int8", "int4")
_FIXED = ("int8", "int4")
_RATES = (5e-5, 5e-4, 1.5e-4)  # as many as are asked for


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """A comparison of compressions.

    Attributes:
        model, data, task, text, label, max_length, samples, held_out: as in a pipeline's recipe.
        methods: of `FAMILIES`, or `"magnitude+uniform"` and `"magnitude+farms"`: pruning at one share of every layer, and at
            shares that follow the layers' tail exponents.
        budgets: shares of the dense model, or sizes.
        steps: of tuning, the same for all, on every number that a method keeps in floating point; 0: none.
        rates: how many learning rates are tried for each method and budget, by the validation part at the first seed, 1 to 3.
        seeds: of the samples that methods look at, and of the order in tuning.

    Raises:
        UnknownNameError, ValueError: a method that is none of them, a number out of range, a budget that is none.
    """

    model: str
    data: tuple[str, ...]
    task: str = "causal-lm"
    text: str | None = None
    label: str | None = None
    methods: tuple[str, ...] = FAMILIES
    budgets: tuple[str, ...] = ("0.9x", "0.7x", "0.5x")
    steps: int = 50
    batch_size: int = 8
    rates: int = 2
    seeds: int = 3
    max_length: int = 128
    samples: int = 128
    held_out: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for method in self.methods:
            check_choice("--methods with --compress", method, (*FAMILIES, *SHARES))
        if not self.methods or not self.budgets:
            raise ValueError("--methods and --budget must name at least one each")
        for budget in self.budgets:
            Budget.parse(budget)
        check_int("--steps", self.steps, 0)
        check_int("--rates", self.rates, 1, len(_RATES))
        check_int("--seeds", self.seeds, 1)

    def recipe(self) -> PipelineRecipe:
        """What loads the model and its task."""
        names = ("model", "task", "text", "label", "max_length", "samples", "held_out", "seed")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given |= {"data": list(self.data), "steps": [{"step": "quantize"}]}  # a recipe has a step; none is done here
        return PipelineRecipe(**given)


def compare_families(
    settings: FamilySettings,
    out: str | Path,
    *,
    resume: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> FamiliesRecord:
    """Compress a model by each method to each budget, tune for the same number of steps, and judge by the held-out rows.

    The folder gets `families.json` and `report.html`, which are written anew after each run.

    Args:
        resume: go on; runs that are recorded are not repeated.
        say: called with a line for each run and each verdict.

    Raises:
        CheckpointError: the folder holds a comparison with other settings.
        FileExistsError: it holds something else, or one and `resume` is False.

    Example:
        >>> import tempfile
        >>> from lowdim.pipeline.families import FamilySettings, compare_families
        >>> small = dict(model="stories260k", data=("lowdim:shakespeare",), max_length=32, samples=8, held_out=8)
        >>> settings = FamilySettings(**small, methods=("pela", "int8"), budgets=("0.8x",), steps=0, seeds=1)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     record = compare_families(settings, f"{place}/out")
        >>> [run.method for run in record.runs], record.levels[0].best  # one seed shows nothing
        (['pela', 'int8'], None)
    """
    out = Path(out)
    with exclusive(out):
        found = claim(out, FamiliesRecord.file, "comparison of compressions", resume)
        earlier = None if found is None else FamiliesRecord.read(out)
        now = json_value(dataclasses.asdict(settings))
        if earlier is not None and earlier.settings != now:
            differ = [key for key in now if now[key] != earlier.settings.get(key)]
            raise CheckpointError(
                f"{out} holds a comparison that differs in {', '.join(differ)}; name another folder with --out"
            )
        return _Comparison(settings, out, command, say).go(earlier)


class _Comparison:
    """The dense model, its task, and the runs."""

    def __init__(self, settings: FamilySettings, out: Path, command: str, say: Callable[[str], None]):
        self.settings, self.out, self.command, self.say = settings, out, command, say
        self.subject: Subject = load_subject(settings.recipe())
        self.dense = self.subject.dense()
        self.whole = stored_bytes(self.dense)

    def go(self, record: FamiliesRecord | None) -> FamiliesRecord:
        record = record or self._new()
        known = {(run.method, run.budget, run.seed) for run in record.runs}
        rates: dict[tuple[str, str], float | None] = {(r.method, r.budget): r.lr for r in record.runs if r.seed == 0}
        for method, budget in self._cells():
            for seed in range(self.settings.seeds):
                if (method, budget, seed) in known:
                    continue
                run = self._run(method, budget, seed, rates.get((method, budget)))
                rates.setdefault((method, budget), run.lr)
                record = self._keep(record, run)
        for level in record.levels:
            self.say(f"{level.budget}: {level.headline}")
        return record

    def _cells(self) -> list[tuple[str, str]]:
        """Every method at every budget; those of a fixed size once."""
        fitted = [m for m in self.settings.methods if m not in _FIXED]
        cells = [(method, budget) for budget in self.settings.budgets for method in fitted]
        return [*cells, *((method, "") for method in self.settings.methods if method in _FIXED)]

    def _new(self) -> FamiliesRecord:
        task, metric = self.subject.task, self.subject.metric
        score = task.evaluate(self.dense, task.test, metric)
        return FamiliesRecord(
            **self.subject.heading(self.dense, self.command),
            title=f"{self.subject.label}: compressions at equal bytes",
            judged=metric.judged or metric.name,
            settings=json_value(dataclasses.asdict(self.settings)),
            dense_bytes=self.whole,
            dense_score=score if math.isfinite(score) else None,
        )

    def _run(self, method: str, budget: str, seed: int, lr: float | None) -> FamilyRun:
        start = time.perf_counter()
        named = {"method": method, "budget": budget, "seed": seed}
        try:
            model, size, notes = self._compressed(method, budget, seed)
            task, metric = self.subject.task, self.subject.metric
            before = task.evaluate(model, task.test, metric)
            if self.settings.steps:
                lr = self._rate(model, seed) if lr is None else lr
                self._tune(model, lr, seed)
            found = task.score(model, task.test, metric)
            if not found.values or not all(map(math.isfinite, found.values)):
                raise LowdimError("its score is not finite")
        except (LowdimError, ValueError, TypeError) as error:
            if is_machine_failure(error):  # no verdict on the method: the run is made again when the comparison goes on
                raise
            return FamilyRun(**named, failure=str(error)[:500], seconds=round(time.perf_counter() - start, 2))
        return FamilyRun(
            **named, lr=lr if self.settings.steps else None, size=size, before=before if math.isfinite(before) else None,
            score=found.value, values=list(found.values), notes=notes, seconds=round(time.perf_counter() - start, 2),
        )  # fmt: skip

    def _compressed(self, method: str, budget: str, seed: int) -> tuple[Any, int, list[str]]:
        """The model, its bytes, and what to look at."""
        model = copy.deepcopy(self.dense)
        if method in _FIXED:
            pack_linear(model, method)
            return model, stored_bytes(model), []
        if method == "magnitude":
            return pruned(model, self.whole, Budget.parse(budget).of(self.whole))
        if method in SHARES:
            return pruned(model, self.whole, Budget.parse(budget).of(self.whole), SHARES[method])
        system = compressor(method)
        given = _options(method, model)
        batches = self.subject.batches(model, seed=self.settings.seed + seed)
        config = fit_budget(system, given, model, batches, Budget.parse(budget)).config
        model = system.function(model, config, *((batches,) if system.needs_batches else ()))
        return model, stored_bytes(model), list(last_report(model).notes)

    def _rate(self, model: Any, seed: int) -> float:
        """The rate with the best score on the validation part."""
        rates = _RATES[: self.settings.rates]
        if len(rates) == 1:
            return rates[0]
        task, metric = self.subject.task, self.subject.metric
        scores: dict[float, float] = {}
        for rate in rates:
            trial = copy.deepcopy(model)
            try:
                self._tune(trial, rate, seed)
                scores[rate] = task.evaluate(trial, task.validation, metric)
            except LowdimError as error:
                if is_machine_failure(error):
                    raise
        finite = {rate: score for rate, score in scores.items() if math.isfinite(score)}
        if not finite:
            raise LowdimError(f"tuning diverged at every rate that was tried: {', '.join(f'{rate:g}' for rate in rates)}")
        return (max if metric.higher_is_better else min)(finite, key=finite.__getitem__)

    def _tune(self, model: Any, lr: float, seed: int) -> None:
        trained = [p.requires_grad_(True) for p in model.parameters() if p.is_floating_point()]
        how = {"batch_size": self.settings.batch_size, "seed": self.settings.seed + seed}
        train(model, trained, self.subject.task, self.settings.steps, lr, **how)
        model.eval()

    def _keep(self, record: FamiliesRecord, run: FamilyRun) -> FamiliesRecord:
        runs = [*record.runs, run]
        levels = [self._judged(budget, runs) for budget in self.settings.budgets]
        notes = list(dict.fromkeys(f"{r.method} at {r.budget}: {note}" for r in runs if not r.seed for note in r.notes))
        record = dataclasses.replace(record, runs=runs, levels=levels, notes=notes)
        record.write(self.out)
        write_families(record.to_dict(), self.out / "report.html")
        result = run.failure or f"{self.subject.metric.title} {run.score:.4g}, {format_bytes(run.size)}"
        self.say(f"{run.method} {run.budget or 'of fixed size'}, seed {run.seed + 1}: {result}")
        if not run.seed:
            for note in run.notes:
                self.say(f"   note: {note}")
        return record

    def _judged(self, budget: str, runs: list[FamilyRun]) -> LevelRecord:
        """The verdict over the methods whose runs with every seed are below the budget."""
        allowed = Budget.parse(budget).of(self.whole)
        table: dict[str, list[list[float]]] = {}
        not_judged: dict[str, str] = {}
        for method in self.settings.methods:
            own = [r for r in runs if r.method == method and r.budget in (budget, "")]
            failed = next((r.failure for r in own if r.failure), None)
            if failed:
                not_judged[method] = failed
            elif len(own) < self.settings.seeds:
                not_judged[method] = "not finished"
            elif max(r.size for r in own) > allowed:
                not_judged[method] = f"takes {format_bytes(max(r.size for r in own))}"
            else:
                table[method] = [r.values for r in own]
        level = LevelRecord(budget=budget, allowed=allowed, headline="", not_judged=not_judged)
        if not table:
            return dataclasses.replace(level, headline="no method meets this budget.")
        if len(table) == 1:
            only = next(iter(table))
            return dataclasses.replace(level, headline=f"only {only} meets this budget.", may_be_best=[only], leader=only)
        found = judge(list(table), np.array(list(table.values())))
        others = ", ".join(found.may_be_best)
        headline = (
            f"{found.best} is shown to be the best."
            if found.best
            else f"no method is shown to be the best; it may be {others}."
        )
        if found.one_seed:
            headline = f"{found.leader} has the best mean; one seed shows nothing."
        return dataclasses.replace(
            level,
            headline=headline + helped(found, self.subject.metric.judged or self.subject.metric.name),
            means=dict(zip(found.names, found.means)),
            half_widths={name: found.difference(name, found.leader)[1] for name in found.names if name != found.leader},
            leader=found.leader,
            best=found.best,
            may_be_best=list(found.may_be_best),
        )


def _options(method: str, model: nn.Module) -> dict[str, Any]:
    """What a method needs for this model: LR²VQ's subvectors must divide the inputs of every layer."""
    if method != "lr2vq":
        return {}
    layers = base_layers(model)
    size = math.gcd(8, *(matrix_shape(layer)[1] for layer in layers.values()))
    return {"subvector_size": size, "clustering_dim": size}  # without training, a smaller dimension only costs
