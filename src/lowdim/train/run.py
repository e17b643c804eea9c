"""Run a recipe: one model, one method, one folder of results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import lowdim
from lowdim import models
from lowdim.catalogue import Variant, variant
from lowdim.errors import CheckpointError, LowdimError
from lowdim.files import whole_folder, write_text
from lowdim.linalg import is_sharded
from lowdim.methods import Applied, Setup, Strategy, strategy_for, with_options
from lowdim.records import RUN, RunRecord, claim
from lowdim.train.environment import environment
from lowdim.train.loop import FitResult, FitSettings, check_tracker, fit
from lowdim.train.metrics import Metric, metric_for
from lowdim.train.neighbours import padding_note
from lowdim.train.recipes import Recipe, load_recipe
from lowdim.train.tasks import Task, classification, language_modelling

__all__ = ["load_run", "run_recipe"]


def run_recipe(
    recipe: Recipe, *, resume: bool = False, say: Callable[[str], None] = lambda line: None, callbacks: tuple[Any, ...] = ()
) -> dict[str, Any]:
    """Train a recipe; returns the record that is written to `run.json` (`lowdim.records.RunRecord`).

    Writes `recipe.yaml`, `run.json`, `adapter/` (or `model/` for methods without an adapter) and, with `save_steps`,
    `checkpoints/`. Resuming from a checkpoint gives the same bits as a run that was never interrupted.

    Raises:
        FileExistsError: the folder already holds a run, and `resume` is False.
        CheckpointError: it holds the run of another recipe.
        LowdimError: the loss became NaN or infinite.
    """
    run = _prepare(recipe, resume, say)
    start = _load(run)
    result = _train(run, start, resume, callbacks)
    return _write(run, start, result)


@dataclass(frozen=True)
class _Run:
    """A checked recipe and its claimed folder."""

    recipe: Recipe
    strategy: Strategy
    metric: Metric
    folder: Path
    accumulation: int
    first: bool  # of the processes that torchrun or accelerate has started: the one that writes
    say: Callable[[str], None]


@dataclass(frozen=True)
class _Start:
    """A prepared model, and its data."""

    task: Task
    tokenizer: Any
    applied: Applied
    lr: float
    before: float
    trained: int  # counted at the start: some methods train fewer parameters over time


def _prepare(recipe: Recipe, resume: bool, say: Callable[[str], None]) -> _Run:
    """Check everything that can be checked without a model, and claim the folder."""
    strategy = strategy_for(with_options(variant(recipe.method), recipe.options))
    strategy.check_layerwise(recipe.layerwise)
    metric = metric_for(recipe.task, recipe.metric)
    check_tracker(recipe.report_to)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        _claim(Path(recipe.out), recipe, resume)
    return _Run(recipe, strategy, metric, Path(recipe.out), accumulate(recipe), first, say if first else lambda line: None)


def _load(run: _Run) -> _Start:
    """Read data and model, score the untrained model, and prepare it for the method."""
    recipe, strategy = run.recipe, run.strategy
    tokenizer = recipe_tokenizer(recipe.model, recipe.tokenizer, recipe.data, recipe.text)
    task = load_task(recipe, tokenizer)
    for note in task.notes:
        run.say(f"note: {note}")
    torch.manual_seed(recipe.seed)
    model = load_base(recipe, task.num_labels, tokenizer)
    head = models.head_modules(model, recipe.task)
    if recipe.pretrained and recipe.task == "classify":
        from lowdim.train.head import fit_head

        fit_head(model, head, task)
    lr = recipe.lr if recipe.lr is not None else strategy.variant.rates_for(recipe.from_scratch)[0]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    model.to(device)
    if (note := padding_note(model, task)) is not None:
        task.notes = (*task.notes, note)
        run.say(f"note: {note}")
    before = task.evaluate(model, task.validation, run.metric)
    run.say(f"before: validation {run.metric.name} {before:.4f}")
    setup = Setup(
        lr=lr,
        steps=recipe.steps,
        head=head,
        batches=task.sample_batches(strategy.sample_batches(recipe.steps), recipe.batch_size, device),
        loss_fn=task.loss_fn,
        warmup=0.0 if recipe.schedule == "constant" else recipe.warmup,
        seed=recipe.seed,
        scratch=recipe.from_scratch,
        layerwise=recipe.layerwise,
        accumulate=run.accumulation,
        max_norm=recipe.max_grad_norm,
    )
    applied = strategy.apply(model, setup)
    for note in applied.notes:
        run.say(f"note: {note}")
    trained = applied.trained()
    run.say(f"{strategy.variant.label}: {trained:,} trained parameters, learning rate {lr:g}")
    return _Start(task, tokenizer, applied, lr, before, trained)


def _train(run: _Run, start: _Start, resume: bool, callbacks: tuple[Any, ...]) -> FitResult:
    """Write the recipe, and train."""
    recipe = run.recipe
    if run.first:
        text = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
        write_text(run.folder / "recipe.yaml", text)
    clips = run.strategy.clips_itself(recipe.layerwise)
    settings = dataclasses.replace(_settings(recipe, start.lr), gradient_accumulation=run.accumulation, clips_itself=clips)
    place = run.folder / "checkpoints"
    return fit(start.applied, start.task, settings, place, resume=resume, measure_memory=True, callbacks=callbacks, say=run.say)


def _write(run: _Run, start: _Start, result: FitResult) -> dict[str, Any]:
    """Score the trained model, and write it with its record.

    Raises:
        LowdimError: the loss, or an output, is not finite.
    """
    task, applied, variant = start.task, start.applied, run.strategy.variant
    validation = math.nan if result.failure else task.evaluate(applied.model, task.validation, run.metric)
    if not math.isfinite(validation):
        reason = result.failure or "the trained model's outputs are not finite"
        raise LowdimError(
            f"{reason}; try a smaller learning rate than {start.lr:g}. No trained model was written to {run.folder}"
        )
    record = RunRecord(
        method=variant.name,
        label=variant.label,
        recipe=run.recipe.model_dump(),
        config=json.loads(json.dumps(applied.options, default=list)),
        lr=start.lr,
        seed=run.recipe.seed,
        trained_parameters=start.trained,
        metric=run.metric.name,
        before=start.before,
        validation=validation,
        test=task.evaluate(applied.model, task.test, run.metric),
        data={"name": task.name, **task.sizes(), "notes": list(task.notes), "labels": list(task.classes)},
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
        notes=list(applied.notes),
    )
    whole = whole_state(applied.model)
    if run.first:
        if applied.adapted is not None:
            applied.adapted.save(run.folder / "adapter")
        else:
            save_plain(applied.model, run.folder / "model", start.tokenizer, whole)
        record.write(run.folder)
    return record.to_dict()


def load_task(recipe: Recipe, tokenizer: Any) -> Task:
    """The recipe's data, tokenised."""
    keywords: dict[str, Any] = {
        "evaluation": recipe.eval,
        "text": recipe.text,
        "max_length": recipe.max_length,
        "most": models.longest_text(recipe.model),
        "seed": recipe.seed,
        "limit": recipe.limit,
    }
    if recipe.task == "classify":
        return classification(tokenizer, recipe.data, label=recipe.label, **keywords)
    if recipe.task == "pretrain":
        from lowdim.train.packing import pretraining

        length = keywords.pop("max_length")
        return pretraining(tokenizer, recipe.data, length=length, streaming=recipe.streaming, **keywords)
    return language_modelling(tokenizer, recipe.data, **keywords)


def recipe_tokenizer(model: str, name: str | None, data: Sequence[str], text: str | None) -> Any:
    """A tokenizer by name: `bytes`, `characters` (of the data), a folder or hub id; None uses the model's own.

    Raises:
        UnknownNameError: it cannot be found, or the model has none.
        DataError: `characters` for a text that is not known in advance.
    """
    from lowdim.train.packing import training_text
    from lowdim.train.tokenizers import byte_tokenizer, character_tokenizer

    if name == "bytes":
        return byte_tokenizer()
    if name == "characters":
        return character_tokenizer(training_text(data, text))
    return models.load_tokenizer(name or model)


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


def load_base(recipe: Recipe, num_labels: int, tokenizer: Any) -> nn.Module:
    """The model that the recipe starts from: pre-trained, or random weights drawn from its seed."""
    dtype = getattr(torch, recipe.dtype)
    if not recipe.from_scratch:
        return models.load_model(
            recipe.model, recipe.task, num_labels=num_labels, seed=recipe.seed, dtype=dtype, pad_token_id=tokenizer.pad_token_id
        )
    fitted = tokenizer if recipe.tokenizer is not None else None
    model = random_model(recipe.model, recipe.task, recipe.seed, fitted, num_labels=num_labels)
    if tokenizer.pad_token_id is not None:
        models.declare_padding(model, tokenizer.pad_token_id)
    return model.to(dtype)


def random_model(name: str, task: str, seed: int, tokenizer: Any = None, *, num_labels: int = 2) -> nn.Module:
    """A model of this shape with weights drawn from the seed, and the tokenizer's vocabulary if one is given."""
    config = models.load_config(name)
    if tokenizer is not None:
        models.fit_vocabulary(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(config, task, num_labels=num_labels)


def load_run(folder: str | Path) -> tuple[Any, Recipe, Variant]:
    """The trained model of a finished run (an `Adapted`, or a plain model), its recipe and its method.

    Raises:
        CheckpointError: the folder holds no finished run.
    """
    from lowdim.adapters import load_adapter

    folder = Path(folder)
    record = RunRecord.read(folder)
    try:
        recipe = Recipe(**record.recipe)
        labels = max(2, len(record.data["labels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / RUN} is not the record of a recipe run") from error
    chosen = with_options(variant(recipe.method), recipe.options)
    if not (folder / "adapter").is_dir():
        raise CheckpointError(f"{folder} holds no adapter; its model is in {folder / 'model'}, ready to use")
    base = load_base(recipe, labels, recipe_tokenizer(recipe.model, recipe.tokenizer, recipe.data, recipe.text))
    return load_adapter(base, folder / "adapter"), recipe, chosen


def whole_state(model: nn.Module) -> dict[str, Any] | None:
    """All tensors of a sharded model (FSDP2), on the first process; None if nothing is sharded.

    Every process must call it.
    """
    if not any(is_sharded(p) for p in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_plain(model: Any, folder: Path, tokenizer: Any, whole: dict[str, Any] | None = None) -> None:
    """Save a whole model for other tools; `whole` holds its tensors if it is sharded.

    Raises:
        LowdimError: a sharded model has structured layers, which can be made plain only in one process.
    """
    from lowdim.export import export
    from lowdim.layers.core.swap import structured_layers

    if whole is None:
        export(model, folder, "merged", tokenizer=tokenizer)
        return
    structured = next(iter(structured_layers(model)), None)
    if structured is not None:
        raise LowdimError(
            f"layer {structured} is structured and sharded over processes, so no plain model is written; "
            f"continue from the checkpoints in {folder.parent} in one process (--resume), which writes it"
        )
    with whole_folder(folder) as draft:
        model.save_pretrained(draft, state_dict=whole)
        tokenizer.save_pretrained(draft)


def _settings(recipe: Recipe, lr: float) -> FitSettings:
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
        seed=recipe.seed,
        save_steps=recipe.save_steps,
        eval_steps=recipe.eval_steps,
        watch=recipe.from_scratch,
        report_to=recipe.report_to,
    )


def _claim(folder: Path, recipe: Recipe, resume: bool) -> None:
    earlier = claim(folder, "recipe.yaml", "run", resume)
    if earlier is None:
        return
    now, old = recipe.model_dump(), load_recipe(earlier).model_dump()
    differs = [key for key in now if old[key] != now[key] and key not in ("out", "save_steps", "report_to")]
    if differs:
        shown = ", ".join(f"{key} was {old[key]!r} and is {now[key]!r}" for key in differs)
        raise CheckpointError(f"--resume: {folder} was made with a different recipe: {shown}")
