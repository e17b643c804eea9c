"""The comparison itself: the search on the validation part, the final on the test part, the table, the page, the winner."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import nn

import lowdim
from lowdim.comparison.by_layer import paired, ranks_record
from lowdim.comparison.clock import Clock
from lowdim.comparison.crew import Crew
from lowdim.comparison.finals import Finals, finalists_of
from lowdim.comparison.helped import rates_record
from lowdim.comparison.hiring import hired, limited_threads, threads_of
from lowdim.comparison.hunt import ALWAYS, Hunt
from lowdim.comparison.judging import judge_runs
from lowdim.comparison.live import LiveTable
from lowdim.comparison.measured_rates import measured_rates
from lowdim.comparison.result import remarks, samples_of
from lowdim.comparison.rows import forecast_of, rows_of_methods
from lowdim.comparison.runs import Contest
from lowdim.comparison.search import Search, rungs_of
from lowdim.comparison.setting_up import Field, choose_methods, find_sizes, make_contest
from lowdim.comparison.settings import CURVATURE, CompareSettings
from lowdim.comparison.tracking import Tracking
from lowdim.comparison.trivial import hits_of, trivial_rows, trivial_values
from lowdim.comparison.verdict import conclude
from lowdim.comparison.winner import export_winner, withdraw_winner
from lowdim.comparison.workbench import Workbench, workbench
from lowdim.comparison.writing import PAGE, finish
from lowdim.errors import CheckpointError, LowdimError, WrittenModelError
from lowdim.files import read_json, write_json
from lowdim.locking import exclusive
from lowdim.outputs import check_replaceable
from lowdim.records import ComparisonRecord, MethodRecord, MetricRecord, ModelRecord, claim
from lowdim.train.baselines import baseline_record
from lowdim.train.environment import environment
from lowdim.train.fingerprint import check_fingerprint
from lowdim.train.tasks.base import Baseline, Task

__all__ = ["compare", "quote", "run_comparison"]

Model = nn.Module | Callable[[], nn.Module]


def compare(settings: CompareSettings, out: str | Path, **how: Any) -> dict[str, Any]:
    """Find the best method; returns the record that is written to `comparison.json`.

    Args: see `run_comparison`.
    """
    return run_comparison(settings, out, **how)[0].to_dict()


def run_comparison(
    settings: CompareSettings,
    out: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    command: str = "",
    model: Model | None = None,
    task: Task | None = None,
) -> tuple[ComparisonRecord, Contest]:
    """Find the best method for a model, data and memory budget.

    Candidates are methods at a size and a learning rate. The search scores them on the validation part and lets the better half
    go on; the final trains each method's best candidate with new seeds, and scores the test part once per seed, until the
    best is shown to be better than every other. What does not fit the budget is left out in advance.

    Args:
        out: folder of the results: `comparison.json`, `report.html`, `runs/…/run.json`, `winner/`.
        resume: continue the comparison in `out`; finished runs are kept, and a candidate goes on from its checkpoint.
        model, task: Python objects in place of those that the settings name.

    Returns:
        The record that is written to `comparison.json`, and what all runs share.

    Raises:
        DataError, UnknownNameError: from the data or the model.
        BudgetError: no method fits.
        LowdimError: no method finished, the time limit was too short, or a worker was lost twice or cannot be reached.
        FileExistsError: `out` holds another comparison.
        InUseError: another command works on it.
        CheckpointError: the base model, tokenizer or data has changed since, or a file is damaged.
    """
    with exclusive(out), limited_threads(threads_of(settings)), hired(settings) as crew:
        folder, console, clock = Path(out), console or Console(), Clock(settings.time_limit, crew.size)
        earlier = _claim(folder, settings, resume)
        tracking = Tracking(settings.report_to, folder)

        def say(kind: str, line: str) -> None:
            style = "yellow" if kind in ("note", "left out") else "dim"
            console.print(f"  [{style}]{kind}[/] {escape(line)}", highlight=False)

        bench = workbench(
            settings, model=model, task=task, say=lambda line: console.print(line, highlight=False, markup=False)
        )  # fmt: skip
        if settings.group_by_length:
            bench.task.lengths()  # raises where rows have none
        entered = choose_methods(settings, bench)
        for kind, line in bench.task.remarks():
            say(kind, line)
        for each in entered.chosen:
            if each.name in entered.skipped:
                say("left out", f"{each.label}: {entered.skipped[each.name]}")
        crew.call()
        contest = make_contest(settings, bench, folder, say)
        contest.tracking = tracking
        find_sizes(settings, bench, contest, entered, clock, say)
        contest.cuts = contest.task.smaller(contest.model, entered.able.values())
        check_fingerprint(contest.parts, earlier, folder)
        described = {**settings.to_dict(), "command": command, "fingerprint": contest.parts}
        if entered.exponents:
            described["exponents"] = entered.exponents
        _begin(crew, contest, described)
        if settings.rates == CURVATURE:
            entered.measured = measured_rates(contest, entered.able, entered.sizes, settings.seed, clock, say)
        return _compare(settings, bench, contest, entered, crew, clock, console, command), contest


def _begin(crew: Crew, contest: Contest, described: dict[str, Any]) -> None:
    """Write the settings, by which workers know the folder; where they cannot begin, a new comparison leaves none."""
    file = contest.folder / "settings.json"
    new = not file.exists()
    write_json(file, described, sealed=True)
    try:
        crew.begin(contest)
    except Exception:
        if new:
            file.unlink()
            with contextlib.suppress(OSError):  # it may hold other files
                contest.folder.rmdir()
        raise


def _compare(
    settings: CompareSettings,
    bench: Workbench,
    contest: Contest,
    entered: Field,
    crew: Crew,
    clock: Clock,
    console: Console,
    command: str,
) -> ComparisonRecord:
    """The search, the final, and everything that is written about them."""
    task, metric, folder = contest.task, contest.metric, contest.folder
    constant = task.baseline(task.test, metric)
    trivial = trivial_values(constant, contest.untouched)
    hunt, found, finals = _search_and_final(settings, contest, entered, trivial, crew, clock, console)
    peak = forecast_of(bench, settings.steps, settings.batch_size)
    rows = rows_of_methods(entered, hunt, found, finals, peak)
    cut = [] if contest.untouched is None else task.at_sizes(contest.model, contest.cuts, metric)
    rows += trivial_rows(metric, constant, contest.untouched, cut)
    judged = judge_runs(finals.runs, trivial)
    pick, why, judgement = conclude(rows, judged, metric, settings.prefer)
    ranks = ranks_record(entered, rows, finals.runs, judged, metric.judged or metric.name)
    if ranks is not None and judgement is not None and ranks.sentence:
        judgement = dataclasses.replace(judgement, reasons=[*judgement.reasons, ranks.sentence])
    result = ComparisonRecord(
        title=f"{task.name}: {bench.label}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        lowdim=lowdim.__version__,
        command=command,
        environment=environment(),
        task=task.kind,
        metric=MetricRecord(metric.name, metric.higher_is_better),
        model=_described(contest),
        data={**task.data_record(), **({"baseline": baseline_record(constant)} if constant else {})},
        settings=settings.to_dict(),
        budget_bytes=settings.budget,
        methods=rows,
        notes=[
            *entered.notes,
            *_without_ranks(entered),
            *_scored_rows(hunt),
            *_ranked_by(contest),
            *hunt.notes,
            *finals.notes,
            *_of_methods(finals),
            *_constant(constant, pick),
            *remarks(rows),
        ],
        judgement=judgement,
        search=hunt.record(found),
        rates=rates_record(hunt, found),
        samples=samples_of(contest.untouched_samples, finals.runs),
        ranks=ranks,
    )
    lost: WrittenModelError | None = None
    if pick is None:
        withdraw_winner(folder)
    else:
        try:
            result.winner = export_winner(contest, pick, folder, why)
        except WrittenModelError as error:  # the comparison itself is complete
            lost = error
            result.notes.append(f"the winner was not written: {error}")
    result.seconds = round(clock.elapsed, 1)
    result = finish(result, folder, console)
    if contest.tracking is not None:
        contest.tracking.verdict(result)
    if judgement is None:
        reasons = "; ".join(f"{row.label}: {row.reason}" for row in rows if not row.trivial)
        raise LowdimError(f"no method finished ({reasons}); the runs are in {folder / 'runs'}")
    if lost is not None:
        raise WrittenModelError(f"the comparison in {folder} is complete, but its winner was not written: {lost}") from lost
    return result


def _search_and_final(
    settings: CompareSettings,
    contest: Contest,
    entered: Field,
    trivial: dict[str, Any],
    crew: Crew,
    clock: Clock,
    console: Console,
) -> tuple[Hunt, Search, Finals]:
    able, seed = entered.able, settings.seed
    rungs = (settings.steps,) if settings.search == "grid" else rungs_of(settings.steps)
    labels = {name: each.label for name, each in able.items()}
    always = tuple(dict.fromkeys((*ALWAYS, *paired(entered))))
    with LiveTable(console, contest.metric, labels, rungs, contest.search_metric) as live:
        trained = contest, able, entered.sizes, settings.usual_rates, seed, settings.search, clock, live, crew
        hunt = Hunt(*trained, measured=entered.measured, always=always)
        found = hunt.search()
        finals = Finals(contest, able, finalists_of(found, always), trivial, settings.seeds, seed, clock, live, crew)
        finals.play()
    return hunt, found, finals


def _claim(folder: Path, settings: CompareSettings, resume: bool) -> dict[str, str]:
    """Check that the folder can be used; returns what its earlier comparison was built on."""
    earlier = claim(folder, "settings.json", "comparison", resume)
    if earlier is None:
        return {}
    old = read_json(earlier)
    if not isinstance(old, dict):
        raise CheckpointError(f"{earlier} is not the settings of a comparison; name another folder with --out")
    for name in (ComparisonRecord.file, PAGE):
        check_replaceable(folder / name)
    if "rates" not in old:
        raise ValueError(
            f"--resume: {folder} was begun by an earlier lowdim, which searched in another way; its record and page stay "
            "as they are: compare again in another folder with --out"
        )
    differs = settings.differs_from(old)
    if differs:
        shown = ", ".join(f"--{key.replace('_', '-')} was {old.get(key)!r}" for key in differs)
        raise ValueError(f"--resume: {folder} was made with different settings: {shown}")
    parts = old.get("fingerprint", {})
    return parts if isinstance(parts, dict) else {}


def _described(contest: Contest) -> ModelRecord:
    parameters = list(contest.model.parameters())
    return ModelRecord(
        contest.label,
        parameters=sum(p.numel() for p in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
    )


def _without_ranks(entered: Field) -> list[str]:
    """Which methods have one row, where others have a second with ranks by layer."""
    return [f"no rank by layer, so one row each: {', '.join(entered.plain)}"] if entered.plain else []


def _scored_rows(hunt: Hunt) -> list[str]:
    """What of the validation part the rungs were scored on, where it is not all."""
    parts = {rung: rows for rung in hunt.rungs if (rows := hunt.rows(rung))}
    if not parts:
        return []
    total = len(hunt.bench.task.validation)
    shown = ", ".join(f"{rows} after {rung} steps" for rung, rows in parts.items())
    return [f"early rungs of the search were scored on a part of the {total} validation rows: {shown}"]


def _ranked_by(contest: Contest) -> list[str]:
    """What the search ranks by, where it is not the metric."""
    by = contest.search_metric
    if by is contest.metric:
        return []
    return [f"the search ranks candidates by {by.title} on the validation part: {contest.metric.title} is 0 for all at first"]


def _of_methods(finals: Finals) -> list[str]:
    """What the methods noted, such as layers with a smaller rank; each note once."""
    runs = [run for own in finals.runs.values() for run in own]
    return list(dict.fromkeys(f"{run.label}: {note}" for run in runs for note in run.notes or ()))


def _constant(constant: Baseline | None, best: MethodRecord | None) -> list[str]:
    """What a constant answer scores by every metric, and what that says of the best method."""
    if constant is None:
        return []
    notes = [constant.sentence]
    if best is None or best.mean is None:
        return notes
    if constant.degenerate:
        notes.append(f"all test rows have one answer ({constant.what} is always right): no score on them says anything")
    elif best.hits and all(hits and hits == hits_of(constant.score) for hits in best.hits):
        notes.append(f"{best.label} is right on the rows where {constant.what} is, and on no other")
    return notes


def quote(arguments: list[str]) -> str:
    """The command line, quoted, for the record."""
    return shlex.join(["lowdim", *arguments])
