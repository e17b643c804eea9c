"""The comparison itself: forecast, trials on the validation part, seeds on the test part, table, report, winner."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import lowdim
from lowdim import models
from lowdim.catalogue import Variant, methods
from lowdim.compare.live import LiveTable
from lowdim.compare.result import mark, remarks, summarise
from lowdim.compare.runs import Contest, Run, finished_record, perform
from lowdim.compare.settings import DEFAULT_METHODS, TRAINING_METHODS, CompareSettings
from lowdim.compare.trivial import trivial_rows
from lowdim.compare.verdict import verdict
from lowdim.compare.winner import export_winner
from lowdim.errors import CheckpointError, DataError, LowdimError, WrittenModelError
from lowdim.files import read_json, write_json
from lowdim.garbage import isolated_gc
from lowdim.linalg import derive_seed
from lowdim.locking import exclusive
from lowdim.outputs import check_replaceable
from lowdim.records import ComparedRun, ComparisonRecord, MethodRecord, MetricRecord, ModelRecord, claim
from lowdim.train.baselines import Majority, majority
from lowdim.train.environment import environment
from lowdim.train.fingerprint import check_fingerprint, fingerprint_of
from lowdim.train.loading import load_task, random_model, recipe_tokenizer
from lowdim.train.metrics import Metric, metric_for
from lowdim.train.neighbours import padding_note
from lowdim.train.recipes import Recipe
from lowdim.train.tasks import Task
from lowdim.units import format_bytes, format_seconds

__all__ = ["compare"]

_PAGE = "report.html"


def compare(
    settings: CompareSettings,
    out: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Find the best method for a model, data and memory budget.

    Every method gets the same number of learning-rate trials on the validation part, then the same number of seeds at its
    chosen rate; the test part is used once per seed. Candidates that do not fit the budget are left out in advance.

    Args:
        out: folder of the results: `comparison.json`, `report.html`, `runs/…/run.json`, `winner/`.
        resume: continue the comparison in `out`; finished runs are kept, an interrupted run starts over.

    Returns:
        The record that is written to `comparison.json`.

    Raises:
        DataError, UnknownNameError: from the data or the model.
        BudgetError: no method fits.
        FileExistsError: `out` holds another comparison.
        InUseError: another command works on it.
        CheckpointError: the base model, tokenizer or data has changed since, or a file is damaged.
    """
    with exclusive(out):
        return _compare(settings, Path(out), resume, console or Console(), command)


def _compare(settings: CompareSettings, folder: Path, resume: bool, console: Console, command: str) -> dict[str, Any]:
    begun = time.monotonic()
    earlier = _claim(folder, settings, resume)
    metric = metric_for(settings.task, settings.metric)
    usual = TRAINING_METHODS if settings.task == "pretrain" else DEFAULT_METHODS
    named = methods(",".join(settings.methods) or usual)
    unfit = {v.name: reason for v in named if (reason := v.unfit(settings.task)) is not None}
    chosen = named if settings.methods else [v for v in named if v.name not in unfit]
    if len(unfit) == len(named):
        raise ValueError(
            f"--methods {','.join(settings.methods)} is for --task classify"
            if settings.task == "causal-lm"
            else f"--methods {','.join(settings.methods)}: adapters need a trained model; --task pretrain has none"
        )
    console.print(f"Reading {', '.join(settings.data)}", highlight=False, markup=False)
    tokenizer = recipe_tokenizer(settings.model, settings.tokenizer, settings.data, settings.text)
    task = _task(settings, tokenizer)
    for kind, line in task.remarks():
        console.print(f"  [{'yellow' if kind == 'note' else 'dim'}]{kind}[/] {escape(line)}", highlight=False)
    for variant in chosen:
        if variant.name in unfit:
            console.print(f"  [yellow]left out[/] {variant.label}: {unfit[variant.name]}", highlight=False)
    forecasts, skipped = _forecast(settings, task, [v for v in chosen if v.name not in unfit], tokenizer, console)
    skipped |= unfit
    bench = _contest(settings, task, metric, folder, tokenizer, console)
    check_fingerprint(bench.parts, earlier, folder)
    described = {**settings.to_dict(), "command": command, "fingerprint": bench.parts}
    write_json(folder / "settings.json", described, sealed=True)
    able = [v for v in chosen if v.name not in skipped]
    rates = {v.name: v.rates_for(bench.scratch)[: settings.trials] for v in able}
    trials = [Run(v, "trial", i, rate, settings.seed) for v in able for i, rate in enumerate(rates[v.name])]
    constant = majority(task, task.test)
    done = _run_all(settings, bench, able, trials, begun=begun, console=console)
    rows = [
        summarise(v, metric, done.trials(v), done.seeds(v), forecast=forecasts.get(v.name), reason=skipped.get(v.name))
        for v in chosen
    ]
    rows += trivial_rows(metric, constant, bench.untouched)
    best = mark(rows, metric)
    result = ComparisonRecord(
        title=f"{task.name}: {models.resolve(settings.model).label}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        lowdim=lowdim.__version__,
        command=command,
        environment=environment(),
        task=settings.task,
        metric=MetricRecord(metric.name, metric.higher_is_better),
        model=ModelRecord(
            models.resolve(settings.model).label,
            parameters=sum(p.numel() for p in bench.model.parameters()),
            dtype=str(next(bench.model.parameters()).dtype).removeprefix("torch."),
        ),
        data={**task.data_record(), **({"majority": constant.to_dict()} if constant else {})},
        settings=settings.to_dict(),
        budget_bytes=settings.budget,
        methods=rows,
        notes=[
            *done.notes,
            *done.of_methods(),
            *_constant(constant, best),
            *remarks(best, rows, done.rounds, higher=metric.higher_is_better),
        ],
    )
    lost: WrittenModelError | None = None
    if best is not None:
        pick, why = verdict(best, rows, metric)
        try:
            result.winner = export_winner(bench, settings, tokenizer, pick, folder, why)
        except WrittenModelError as error:  # the comparison itself is complete
            lost = error
            result.notes.append(f"the winner was not written: {error}")
    result.seconds = round(time.monotonic() - begun, 1)
    result = _finish(result, folder, console)
    if best is None:
        reasons = "; ".join(f"{row.label}: {row.reason}" for row in rows if not row.trivial)
        raise LowdimError(f"no method finished ({reasons}); the runs are in {folder / 'runs'}")
    if lost is not None:
        raise WrittenModelError(f"the comparison in {folder} is complete, but its winner was not written: {lost}") from lost
    return result.to_dict()


def _claim(folder: Path, settings: CompareSettings, resume: bool) -> dict[str, str]:
    """Check that the folder can be used; returns what its earlier comparison was built on."""
    earlier = claim(folder, "settings.json", "comparison", resume)
    if earlier is None:
        return {}
    old = read_json(earlier)
    if not isinstance(old, dict):
        raise CheckpointError(f"{earlier} is not the settings of a comparison; name another folder with --out")
    for name in (ComparisonRecord.file, _PAGE):
        check_replaceable(folder / name)
    differs = settings.differs_from(old)
    if differs:
        shown = ", ".join(f"--{key.replace('_', '-')} was {old.get(key)!r}" for key in differs)
        raise ValueError(f"--resume: {folder} was made with different settings: {shown}")
    parts = old.get("fingerprint", {})
    return parts if isinstance(parts, dict) else {}


def _constant(constant: Majority | None, best: MethodRecord | None) -> list[str]:
    """What a constant answer scores by every metric, and what that says of the best method."""
    if constant is None:
        return []
    notes = [constant.sentence]
    if best is None or best.mean is None:
        return notes
    if constant.classes < 2:
        notes.append(f"all test texts have the class {constant.name!r}: no score on them says anything")
    elif all(hits == "".join(map(str, constant.hits)) for hits in best.hits):
        notes.append(f"{best.label} is right on the test texts of {constant.name!r} and on no other, as that answer is")
    return notes


def _task(settings: CompareSettings, tokenizer: Any) -> Task:
    if settings.label is not None and settings.task != "classify":
        raise DataError("--label is for --task classify; a language model has no labels")
    recipe = Recipe(
        model=settings.model,
        task=settings.task,  # type: ignore[arg-type]
        data=list(map(str, settings.data)),
        eval=None if settings.evaluation is None else str(settings.evaluation),
        text=settings.text,
        label=settings.label,
        max_length=settings.max_length,
        limit=settings.limit,
        seed=settings.seed,
    )
    return load_task(recipe, tokenizer)


def _forecast(
    settings: CompareSettings, task: Task, chosen: list[Variant], tokenizer: Any, console: Console
) -> tuple[dict[str, int], dict[str, str]]:
    """Peak bytes by method, and why some are left out. Batches have the length of the longest text."""
    from lowdim.plan import affordable, forecast

    longest = task.max_length
    if settings.task != "pretrain":
        longest = max(len(row) for part in (task.train, task.validation) for row in part["input_ids"])
    config = models.load_config(settings.model)
    if settings.tokenizer is not None:
        models.fit_vocabulary(config, tokenizer)
    found, skipped, outlooks = {}, {}, []
    for variant in chosen:
        try:
            outlook = forecast(
                config,
                variant,
                batch_size=settings.batch_size,
                sequence_length=longest,
                task=settings.task,
                num_labels=task.num_labels,
                steps=settings.steps,
                budget_bytes=settings.budget,
                device="cuda" if torch.cuda.is_available() else "cpu",
            )
        except (ValueError, TypeError) as error:
            skipped[variant.name] = str(error)
        else:
            found[variant.name] = outlook.total
            outlooks.append(outlook)
            if settings.budget is not None and outlook.total > settings.budget:
                skipped[variant.name] = (
                    f"needs {format_bytes(outlook.total)} at the peak by forecast; "
                    f"the budget is {format_bytes(settings.budget)}"
                )
        if variant.name in skipped:
            console.print(f"  [yellow]left out[/] {variant.label}: {escape(skipped[variant.name])}", highlight=False)
    if len(skipped) == len(chosen):
        if settings.budget is not None and outlooks:
            affordable(outlooks, settings.budget)  # raises: nothing fits
        raise LowdimError(f"no method can be run: {'; '.join(f'{k}: {v}' for k, v in skipped.items())}")
    return found, skipped


def _contest(settings: CompareSettings, task: Task, metric: Metric, folder: Path, tokenizer: Any, console: Console) -> Contest:
    from lowdim.train.head import fit_head

    scratch = settings.task == "pretrain"
    if scratch:
        model = random_model(settings.model, "causal-lm", settings.seed, tokenizer if settings.tokenizer else None)
    else:
        model = models.load_model(
            settings.model, settings.task, num_labels=task.num_labels, seed=settings.seed, pad_token_id=tokenizer.pad_token_id
        )
    parts = fingerprint_of(model, tokenizer, task, settings.data, settings.evaluation)
    head = models.head_modules(model, settings.task)
    if torch.cuda.is_available():
        model.cuda()
    if (note := padding_note(model, task)) is not None:
        task.notes = (*task.notes, note)
        console.print(f"  [yellow]note[/] {escape(note)}", highlight=False)
    able = settings.task != "classify" or not getattr(model, "new_modules", head)  # a new head has no answers yet
    untouched = task.score(model, task.test, metric) if able else None
    score = fit_head(model, head, task)
    if score is not None:
        console.print(
            f"The head starts as a logistic regression on the frozen model's features: validation accuracy {score:.3f}",
            highlight=False,
            soft_wrap=True,
        )
    # Everything that decides a run's numbers, and nothing else (such as the number of seeds).
    decisive = {k: v for k, v in settings.to_dict().items() if k not in ("seeds", "trials", "time_limit", "budget", "methods")}
    digest = hashlib.blake2b(json.dumps([decisive, parts], sort_keys=True).encode(), digest_size=8)
    return Contest(
        model=model,
        task=task,
        head=head,
        metric=metric,
        steps=settings.steps,
        batch_size=settings.batch_size,
        folder=folder,
        fingerprint=digest.hexdigest(),
        parts=parts,
        scratch=scratch,
        untouched=untouched,
    )


@dataclass
class _Done:
    """The finished runs in order, the number of rounds of seeds, and notes for the report."""

    runs: list[ComparedRun] = field(default_factory=list)
    rounds: int = 0
    notes: list[str] = field(default_factory=list)

    def trials(self, variant: Variant) -> list[ComparedRun]:
        """The method's trials, which choose its rate."""
        return self._of(variant, "trial")

    def seeds(self, variant: Variant) -> list[ComparedRun]:
        """The method's seeds, which are scored on the test part."""
        return self._of(variant, "seed")

    def of_methods(self) -> list[str]:
        """What the methods noted, such as layers with a smaller rank; each note once."""
        return list(dict.fromkeys(f"{run.label}: {note}" for run in self.runs for note in run.notes or ()))

    def _of(self, variant: Variant, phase: str) -> list[ComparedRun]:
        return [run for run in self.runs if run.method == variant.name and run.phase == phase]


def _run_all(
    settings: CompareSettings, bench: Contest, able: list[Variant], trials: list[Run], *, begun: float, console: Console
) -> _Done:
    """Rounds of one trial per method, then of one seed, so that all have as many at a time limit."""
    done = _Done()
    planned = [*(run.variant for run in trials), *able * settings.seeds]
    limit = settings.time_limit

    def fits(live: LiveTable, variants: Sequence[Variant]) -> bool:
        """Whether a run of each of these methods ends before the limit, as far as earlier runs tell."""
        return limit is None or time.monotonic() - begun + live.seconds_of(variants) <= limit

    with LiveTable(console, bench.metric, planned, bench.steps) as live:
        rounds = [[run for run in trials if run.index == i] for i in range(max((run.index for run in trials), default=-1) + 1)]
        for index, group in enumerate(rounds):
            todo = [run for run in group if finished_record(bench, run) is None]
            if index and todo and not fits(live, [*(run.variant for run in todo), *able]):  # each method's seed follows
                live.leave_out([run.variant for late in rounds[index:] for run in late])
                done.notes.append(_late(limit, f"{index} of {len(rounds)} learning rates of each method"))
                break
            done.runs += [_one(bench, run, live) for run in group]
        rates = {v.name: _best_rate(done.trials(v), bench.metric) for v in able}
        ready = [v for v in able if rates[v.name] is not None]
        for index in range(settings.seeds):
            runs = [_seed_run(settings, v, index, rates[v.name]) for v in ready]
            todo = [run.variant for run in runs if finished_record(bench, run) is None]
            if index and todo and not fits(live, todo):
                done.notes.append(_late(limit, f"{index} of {settings.seeds} seeds"))
                break
            done.runs += [_one(bench, run, live) for run in runs]
            done.rounds += 1
    spent = time.monotonic() - begun
    if limit is not None and spent > limit:
        least = "every method is tried with at least one rate and one seed"
        done.notes.append(f"the time limit of {format_seconds(limit)} was exceeded ({format_seconds(spent)}): {least}")
    return done


def _seed_run(settings: CompareSettings, variant: Variant, index: int, rate: float | None) -> Run:
    """The same seed for every method: same order of data, so differences are paired."""
    assert rate is not None
    return Run(variant, "seed", index, rate, derive_seed(settings.seed, "run", index) % 2**31)


def _late(limit: float | None, what: str) -> str:
    return f"the time limit of {format_seconds(limit or 0.0)} left room for {what}"


def _one(bench: Contest, run: Run, live: LiveTable) -> ComparedRun:
    live.start(run)
    record = finished_record(bench, run)
    cached = record is not None
    if record is None:
        with isolated_gc():
            record = perform(bench, run, on_step=live.tick)
    live.finish(run, record, cached=cached)
    return record


def _best_rate(trials: Sequence[ComparedRun], metric: Metric) -> float | None:
    """The rate of the first trial with the best validation score; None where all failed."""
    best, found = None, None
    for run in trials:
        if run.validation is not None and run.failure is None and (best is None or metric.better(run.validation, best)):
            best, found = run.validation, run.lr
    return found


def _finish(result: ComparisonRecord, folder: Path, console: Console) -> ComparisonRecord:
    """Write and print the result; one that was written before, with the same numbers, stays as it is."""
    from lowdim.report import table, write

    earlier = _same(result, folder)
    if earlier is None:
        result.write(folder)
    result = earlier or result
    if earlier is None or not (folder / _PAGE).is_file():
        write(result.to_dict(), folder / _PAGE)
    console.print(table(result.to_dict(), width=console.width))
    for note in result.notes:
        console.print(f"[dim]-[/] {escape(note)}", highlight=False)
    winner = result.winner
    if winner is not None:
        console.print(f"[bold]{escape(winner.why)}[/]", highlight=False)
        place = f"winner  {folder / winner.folder} ({winner.format})"
        console.print(place, highlight=False, markup=False, soft_wrap=True)
    console.print(f"report  {folder / _PAGE}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"took    {format_seconds(result.seconds)}", highlight=False)
    return result


def _same(result: ComparisonRecord, folder: Path) -> ComparisonRecord | None:
    """The record in the folder, if it differs in time and command only."""
    if not (folder / result.file).is_file():
        return None
    earlier = ComparisonRecord.read(folder)
    now = ComparisonRecord.from_dict(json.loads(json.dumps(result.to_dict())), result.file)
    timed = {"created": earlier.created, "seconds": earlier.seconds, "command": earlier.command}
    return earlier if dataclasses.replace(now, **timed) == earlier else None


def quote(arguments: list[str]) -> str:
    """The command line, quoted, for the record."""
    return shlex.join(["lowdim", *arguments])
