"""Run a recipe: one model, one method, one folder of results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import lowdim
from lowdim import models
from lowdim.catalogue import variant
from lowdim.errors import CheckpointError, LowdimError, listed
from lowdim.files import write_text
from lowdim.linalg import many_processes
from lowdim.locking import exclusive
from lowdim.methods import Applied, Setup, Strategy, strategy_for, with_options, with_ranks
from lowdim.records import RunRecord, WatchRecord, claim
from lowdim.train.baselines import baseline_record
from lowdim.train.environment import environment
from lowdim.train.fingerprint import fingerprint_of
from lowdim.train.finished import finished, load_run, weight_bytes, written
from lowdim.train.keeping import Kept, kept_by
from lowdim.train.layer_watch import LayerWatch, NothingToWatchError
from lowdim.train.loading import load_base, load_task, recipe_processor
from lowdim.train.loop import FitResult, FitSettings, check_tracker, fit
from lowdim.train.measuring import Measured, doubts, measure, refuse_broken, samples
from lowdim.train.metrics import Metric, metric_for
from lowdim.train.neighbours import padding_note
from lowdim.train.recipes import Recipe, load_recipe
from lowdim.train.saving import check_adapter, make_small, save_plain, whole_state
from lowdim.train.tasks.base import Task

__all__ = ["load_run", "run_recipe"]

_RECIPE = "recipe.yaml"


def run_recipe(
    recipe: Recipe, *, resume: bool = False, say: Callable[[str], None] = lambda line: None, callbacks: tuple[Any, ...] = ()
) -> dict[str, Any]:
    """Train a recipe; returns the record that is written to `run.json` (`lowdim.records.RunRecord`).

    Writes `recipe.yaml`, `run.json`, `adapter/` (or `model/` for methods without an adapter) and, with `save_steps`,
    `checkpoints/`. Resuming from a checkpoint gives the same bits as a run that was never interrupted; a finished run stays
    as it is.

    Raises:
        FileExistsError: the folder already holds a run, and `resume` is False.
        InUseError: another command works on the folder.
        CheckpointError: it holds the run of another recipe, base model, tokenizer or data, or is damaged.
        LowdimError: the loss became NaN or infinite.
    """
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes that torchrun or accelerate has started
    with exclusive(recipe.out) if first else nullcontext():
        run = _prepare(recipe, resume, first, say)
        base = _read(run)
        if resume and (earlier := finished(run.folder, base.fingerprint)) is not None:
            run.say(f"{run.folder} holds the finished run; nothing is left to do")
            return earlier.to_dict()
        start = _start(run, base)
        result = _train(run, start, resume, callbacks)
        return _write(run, start, result)


@dataclass(frozen=True)
class _Run:
    """A checked recipe and its claimed folder."""

    recipe: Recipe
    strategy: Strategy
    folder: Path
    accumulation: int
    first: bool  # of several processes: the one that writes
    say: Callable[[str], None]


@dataclass(frozen=True)
class _Base:
    """What the run builds on."""

    task: Task
    metric: Metric
    kept: Kept | None
    processor: Any  # a tokenizer, or an image processor
    model: nn.Module
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class _Start:
    """A prepared model, and its data."""

    base: _Base
    applied: Applied
    lr: float
    before: Measured
    watch: LayerWatch | None
    cut: list[dict[str, Any]]  # scores of the untrained model at the method's smaller sizes
    trained: int  # counted at the start: some methods train fewer parameters over time


def _prepare(recipe: Recipe, resume: bool, first: bool, say: Callable[[str], None]) -> _Run:
    """Check everything that can be checked without a model, and claim the folder."""
    strategy = strategy_for(with_ranks(with_options(variant(recipe.method), recipe.options), recipe.ranks))
    if strategy.variant.nested and (reason := strategy.variant.unfit(recipe.task)) is not None:
        raise ValueError(f"method {recipe.method}: {reason}")
    strategy.check_layerwise(recipe.layerwise)
    strategy.check_quantize(recipe.quantize)
    strategy.check_optimizer(recipe.optimizer)
    _check_blocks(recipe, strategy)
    metric_for(recipe.task, recipe.metric)
    check_tracker(recipe.report_to)
    if first:
        _claim(Path(recipe.out), recipe, resume)
    return _Run(recipe, strategy, Path(recipe.out), accumulate(recipe), first, say if first else lambda line: None)


def _check_blocks(recipe: Recipe, strategy: Strategy) -> None:
    """Raise ValueError if the method would replace the layers that the recipe has chosen."""
    for key in ("ffn", "mixer"):
        if getattr(recipe, key) is not None and strategy.kind not in ("full", "optimizer"):
            raise ValueError(
                f"{key} {getattr(recipe, key)} chooses layers that are trained as they are, and method {recipe.method} puts "
                f"others in a model: use full or an optimizer, or leave out {key}"
            )


def _read(run: _Run) -> _Base:
    """Read data and model."""
    recipe = run.recipe
    processor = recipe_processor(recipe)
    task = load_task(recipe, processor)
    for kind, line in task.remarks():
        run.say(f"{kind}: {line}")
    torch.manual_seed(recipe.seed)
    model = load_base(recipe, task.num_labels, processor, task.problem)
    files = (recipe.data, recipe.eval, recipe.validation, recipe.keep, recipe.replaces and recipe.replaces.name)
    fingerprint = fingerprint_of(model, processor, task, *files)
    models.name_classes(model, task.classes)
    return _Base(
        task=task,
        metric=task.metric(recipe.metric),
        kept=kept_by(recipe, processor, task.max_length),
        processor=processor,
        model=model,
        fingerprint=fingerprint,
    )


def _start(run: _Run, base: _Base) -> _Start:
    """Score the untrained model, and prepare it for the method."""
    recipe, strategy, task, model = run.recipe, run.strategy, base.task, base.model
    head = models.head_modules(model, recipe.task)
    answers = not head or not getattr(model, "new_modules", head)
    if recipe.pretrained and head:
        from lowdim.train.head import fit_head

        answers = fit_head(model, head, task) is not None or answers
    lr = recipe.lr if recipe.lr is not None else strategy.variant.rates_for(recipe.from_scratch)[0]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    model.to(device)
    if (note := padding_note(model, task)) is not None:
        task.notes = (*task.notes, note)
        run.say(f"note: {note}")
    before = measure(model, task, base.metric, base.kept, answers=answers)
    cut = task.at_sizes(model, task.smaller(model, [strategy.variant]), base.metric)
    if math.isnan(before.validation):
        refuse_broken(model, recipe.model)
    run.say(f"before: {_told(before, base.metric)}")
    if (constant := task.baseline(task.validation, base.metric)) is not None:
        run.say(f"on the validation part, {constant.sentence}")
    setup = Setup(
        lr=lr,
        steps=recipe.steps,
        head=head,
        batches=task.sample_batches(strategy.sample_batches(recipe.steps), recipe.batch_size, device),
        loss_fn=task.loss_for(strategy.variant),
        warmup=0.0 if recipe.schedule == "constant" else recipe.warmup,
        seed=recipe.seed,
        scratch=recipe.from_scratch,
        layerwise=recipe.layerwise,
        accumulate=run.accumulation,
        max_norm=recipe.max_grad_norm,
        master_weights=recipe.master_weights,
        optimizer=recipe.optimizer,
    )
    applied = strategy.apply(model, setup)
    for note in applied.notes:
        run.say(f"note: {note}")
    trained = applied.trained()
    run.say(f"{strategy.variant.label}: {trained:,} trained parameters, learning rate {lr:g}")
    return _Start(base, applied, lr, before, _watch(run, applied.model), cut, trained)


def _watch(run: _Run, model: nn.Module) -> LayerWatch | None:
    """Measures the layers while the model trains, if the recipe wants it.

    Raises:
        ValueError: the method trains no layers that could be measured.
    """
    if not run.recipe.watch:
        return None
    try:
        watch = LayerWatch(model, interval=run.recipe.watch, seed=run.recipe.seed)
    except NothingToWatchError as error:
        raise ValueError(f"watch {run.recipe.watch}: method {run.recipe.method} has {error}; leave out watch") from None
    left = f"; not {listed(watch.left_out)}" if watch.left_out else ""
    run.say(f"every {run.recipe.watch} steps {len(watch.layers)} layers are measured{left}")
    return watch


def _train(run: _Run, start: _Start, resume: bool, callbacks: tuple[Any, ...]) -> FitResult:
    """Write the recipe, and train."""
    recipe = run.recipe
    if run.first and not _holds(run.folder / _RECIPE, recipe):
        text = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
        write_text(run.folder / _RECIPE, text)
    clips = run.strategy.clips_itself(recipe.layerwise)
    settings = dataclasses.replace(fit_settings(recipe, start.lr), gradient_accumulation=run.accumulation, clips_itself=clips)
    place = run.folder / "checkpoints"
    return fit(
        start.applied,
        start.base.task,
        settings,
        place,
        resume=resume,
        measure_memory=True,
        callbacks=callbacks,
        say=run.say,
        fingerprint=start.base.fingerprint,
        layer_watch=start.watch,
    )


def _write(run: _Run, start: _Start, result: FitResult) -> dict[str, Any]:
    """Score the trained model, and write it with its record.

    Raises:
        LowdimError: the loss, or an output, is not finite; or what was written does not give the trained model's outputs.
    """
    base, applied, variant = start.base, start.applied, run.strategy.variant
    task, metric = base.task, base.metric
    small = not result.failure and make_small(applied)  # what is scored is what will be written
    if small:
        run.say(f"note: {run.folder / 'model'} is written in compressed form; from_pretrained loads it after import lowdim")
    after = Measured(math.nan) if result.failure else measure(applied.model, task, metric, base.kept)
    if after.test is None:
        reason = result.failure or "the trained model's outputs are not finite"
        raise LowdimError(
            f"{reason}; try a smaller learning rate than {start.lr:g}. No trained model was written to {run.folder}"
        )
    run.say(f"after: {_told(after, metric)}")
    constant = task.baseline(task.test, metric)
    doubted = doubts(metric, start.before, after, constant)
    note = task.finish(applied.model, models.head_modules(applied.model, run.recipe.task))
    doubted += [] if note is None else [note]
    for doubt in doubted:
        run.say(f"note: {doubt}")
    rows = task.at_sizes(applied.model, [(row["layers"], row["dimensions"]) for row in start.cut], metric)
    by_size = [{**row, "before": earlier["score"]} for row, earlier in zip(rows, start.cut, strict=True)]
    for row in by_size:
        size = f"{row['layers']} layers, {row['dimensions']} dimensions"
        run.say(f"test {metric.title} at {size}: {row['before']:.4f} before, {row['score']:.4f} after")
    replacement = task.replacement(applied.model)
    if replacement is not None:
        run.say(f"the old index: {replacement.report.summary}")
    record = RunRecord(
        method=variant.name,
        label=variant.label,
        recipe=run.recipe.model_dump(),
        config=json.loads(json.dumps(applied.options, default=list)),
        lr=start.lr,
        seed=run.recipe.seed,
        trained_parameters=start.trained,
        metric=metric.name,
        before=start.before.validation,
        before_test=None if start.before.test is None else start.before.test.value,
        validation=after.validation,
        test=after.test.value,
        by_class=after.by_class,
        samples=samples(start.before, after),
        kept=None if start.before.kept is None or after.kept is None else [start.before.kept, after.kept],
        by_size=by_size,
        replacement=None if replacement is None else replacement.to_dict(),
        data={**task.data_record(), **({"baseline": baseline_record(constant)} if constant else {})},
        losses=list(result.losses),
        loss_steps=result.steps,
        evaluations=[list(row) for row in result.evaluations],
        subspaces=[dict(row) for row in result.subspaces],
        spikes=result.spikes,
        seconds_per_step=result.seconds_per_step,
        measured_peak_bytes=result.peak_bytes,
        environment=environment(),
        lowdim=lowdim.__version__,
        penalties=list(result.penalties),
        ranks=applied.ranks(),
        capped_ranks=applied.capped_ranks,
        notes=[*applied.notes, *doubted],
        fingerprint=base.fingerprint,
        watch=None if start.watch is None else _watched(start.watch),
    )
    whole = whole_state(applied.model)
    if run.first:
        if applied.adapted is not None:
            applied.adapted.save(run.folder / "adapter")
            if whole is None and not many_processes():
                recipe, processor = run.recipe, base.processor
                check_adapter(
                    applied.model,
                    run.folder / "adapter",
                    lambda: load_base(recipe, task.num_labels, processor, task.problem),
                )
            if task.kind == "instruct":  # the base's own tokenizer may lack the template that was trained with
                base.processor.save_pretrained(run.folder / "adapter")
        else:
            save_plain(applied.model, run.folder / "model", base.processor, whole, joint=task.joint, small=small)
        if replacement is not None:
            replacement.write(run.folder / "index")
        record = dataclasses.replace(record, files=written(run.folder), file_bytes=weight_bytes(run.folder))
        record.write(run.folder)
    return record.to_dict()


def _watched(watch: LayerWatch) -> WatchRecord:
    return WatchRecord(
        interval=watch.interval,
        k=watch.k,
        threshold=watch.threshold,
        kept=watch.kept,
        not_measured=watch.left_out,
        rows=watch.history,
    )


def _told(found: Measured, metric: Metric) -> str:
    """The scores in one line."""
    test = "" if found.test is None else f", test {metric.title} {found.test.value:.4f}"
    kept = "" if found.kept is None else f", loss on the text to keep {found.kept:.4f}"
    return f"validation {metric.title} {found.validation:.4f}{test}{kept}"


def _holds(path: Path, recipe: Recipe) -> bool:
    """Whether the file is this recipe, which someone may have annotated."""
    return path.is_file() and load_recipe(path) == recipe


def accumulate(recipe: Recipe) -> int:
    """Forward passes of an optimizer step on each device.

    Raises:
        ValueError: the batch cannot be split evenly over the devices.
    """
    if recipe.total_batch is None:
        return recipe.gradient_accumulation
    world = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = recipe.batch_size * world
    if recipe.total_batch % at_once:
        raise ValueError(
            f"total_batch must be a multiple of batch_size x processes = {recipe.batch_size} x {world}; "
            f"got {recipe.total_batch}"
        )
    return recipe.total_batch // at_once


def fit_settings(recipe: Recipe, lr: float) -> FitSettings:
    """What a recipe says of the training loop, at this rate."""
    return FitSettings(
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        lr=lr,
        warmup=recipe.warmup,
        schedule=recipe.schedule,
        max_grad_norm=recipe.max_grad_norm,
        gradient_accumulation=recipe.gradient_accumulation,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=recipe.bf16,
        group_by_length=recipe.group_by_length,
        seed=recipe.seed,
        save_steps=recipe.save_steps,
        eval_steps=recipe.eval_steps,
        watch=recipe.from_scratch,
        report_to=recipe.report_to,
    )


def _claim(folder: Path, recipe: Recipe, resume: bool) -> None:
    earlier = claim(folder, _RECIPE, "run", resume)
    if earlier is None:
        return
    now, old = recipe.model_dump(), load_recipe(earlier).model_dump()
    differs = [key for key in now if old[key] != now[key] and key not in ("out", "save_steps", "report_to")]
    if differs:
        shown = ", ".join(f"{key} was {old[key]!r} and is {now[key]!r}" for key in differs)
        raise CheckpointError(f"--resume: {folder} was made with a different recipe: {shown}")
