"""The steps of a pipeline in their order: each is measured, recorded and kept, so that a run can go on after it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowdim.checksums import checksum
from lowdim.errors import CheckpointError, LowdimError
from lowdim.locking import exclusive
from lowdim.pipeline import measuring
from lowdim.pipeline.recipe import PipelineRecipe
from lowdim.pipeline.steps import Done, take
from lowdim.pipeline.subject import Subject, load_subject
from lowdim.pretrained import save_compressed
from lowdim.pretrained.checksums import checksums
from lowdim.records import PipelineRecord, StepRecord, claim
from lowdim.report import write_pipeline
from lowdim.units import format_bytes

__all__ = ["run_pipeline"]

_STATE, _EXPORT = "checkpoints", "model"


def run_pipeline(
    recipe: PipelineRecipe,
    *,
    resume: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> PipelineRecord:
    """Do the steps of a recipe, and measure the model before the first and after each.

    The folder `recipe.out` gets `pipeline.json`, `report.html`, the exported model as `model`, and until then the model after
    the newest step in `checkpoints`.

    Args:
        resume: go on after the last finished step of an earlier run of this recipe; steps that were not begun may differ.
        say: called with lines about the data, and one for each step.

    Returns:
        The record.

    Raises:
        FileExistsError: the folder holds something else, or an earlier run and `resume` is False.
        CheckpointError: the recipe of the earlier run differs in what is done already, or its files are damaged.
        InUseError: another command works on the folder.
        LowdimError, ValueError, TypeError: a step cannot be done; its number and kind are named, and earlier steps are kept.

    Example:
        >>> import pathlib, tempfile
        >>> from lowdim.pipeline import PipelineRecipe, run_pipeline
        >>> with tempfile.TemporaryDirectory() as place:
        ...     recipe = PipelineRecipe(
        ...         model="stories260k", data="lowdim:shakespeare", samples=16, held_out=8, max_length=32, out=f"{place}/out",
        ...         steps=[{"step": "decompose", "method": "pela", "budget": "0.8x"}, {"step": "export"}])
        ...     record = run_pipeline(recipe)
        ...     [step.step for step in record.steps], (pathlib.Path(place) / "out" / "model" / "config.json").is_file()
        (['dense', 'decompose', 'export'], True)
    """
    out = Path(recipe.out)
    with exclusive(out):
        earlier = claim(out, PipelineRecord.file, "pipeline", resume)
        record = None if earlier is None else PipelineRecord.read(out)
        if record is not None:
            _check_same(record, recipe, out)
            if len(record.steps) == len(recipe.steps) + 1:
                say(f"all {len(recipe.steps)} steps are finished")
                write_pipeline(record.to_dict(), out / "report.html")
                return record
        return _Run(recipe, out, command, say).go(record)


class _Run:
    """One run: what is loaded once and used by every step."""

    def __init__(self, recipe: PipelineRecipe, out: Path, command: str, say: Callable[[str], None]):
        self.recipe, self.out, self.command, self.say = recipe, out, command, say
        self.subject: Subject = load_subject(recipe)
        for kind, line in self.subject.task.remarks():
            say(f"{kind}: {line}")

    def go(self, record: PipelineRecord | None) -> PipelineRecord:
        """All steps that are not finished."""
        model = self.subject.dense()
        self.batch = measuring.first_batch(self.subject.batches(model), model)
        self.reference = measuring.block_outputs(model, self.batch)
        if record is None or not record.steps:
            record = self._new(model)
            record.write(self.out)  # from now on the folder is known as this pipeline's
            record = self._keep(record, 0, self._measured(Done(model, "the model as it is"), "dense", 0.0, record, 0))
        else:
            self.say(f"continuing after step {len(record.steps) - 1}")
        done = len(record.steps)
        if done > 1:
            del model
            model = self._load(record)
        for number, step in enumerate(self.recipe.steps[done - 1 :], done):
            start = time.perf_counter()
            try:
                done = self._export(model, step, record) if step.step == "export" else take(step, model, self.subject)
            except (LowdimError, ValueError, TypeError) as error:
                raise _named(error, f"step {number} ({step.step}): {error}") from error
            seconds = time.perf_counter() - start
            model = done.model
            record = self._keep(record, number, self._measured(done, step.step, seconds, record, number))
        if record.export:
            shutil.rmtree(self.out / _STATE, ignore_errors=True)
        return record

    def _new(self, model: Any) -> PipelineRecord:
        steps = len(self.recipe.steps)
        return PipelineRecord(
            **self.subject.heading(model, self.command),
            title=f"{self.subject.label}, compressed in {steps} step{'' if steps == 1 else 's'}",
            finished=False,
            recipe=self.recipe.model_dump(),
        )

    def _measured(self, done: Done, kind: str, seconds: float, record: PipelineRecord, number: int) -> StepRecord:
        """The record of a step; the model is written first, and its files are what is measured."""
        subject, model = self.subject, done.model
        folder = self.out / (_EXPORT if kind == "export" else f"{_STATE}/{number:02d}-{kind}")
        if kind != "export":
            shutil.rmtree(folder, ignore_errors=True)  # of a step that was killed before it was recorded
            save_compressed(model, folder, subject.tokenizer)
            model = done.model = subject.again(folder)  # a run that goes on starts from this, too
        score = subject.task.score(model, subject.task.test, subject.metric)
        values = list(score.values)
        before = record.steps[0].values if record.steps else values
        speeds = measuring.speeds(model, self.batch, generates=subject.generates)
        ends = measuring.interval(score.value, values, subject.metric)
        return StepRecord(
            step=kind,
            what=done.what,
            seconds=round(seconds, 3),
            score=_finite(score.value),
            interval=[_finite(end) for end in ends],
            change=[_finite(number) for number in measuring.change(values, before, subject.metric)],
            disk_bytes=measuring.disk_bytes(folder),
            memory_bytes=measuring.memory_bytes(model),
            cache_bytes=measuring.cache_bytes(model, self.batch) if subject.generates else None,
            tokens_per_second={size: round(speed, 2) for size, speed in speeds.items()},
            block_errors=measuring.block_errors(measuring.block_outputs(model, self.batch), self.reference),
            layers=done.layers,
            options=done.options,
            notes=done.notes,
            losses=[_finite(loss) for loss in done.losses],
            values=values,
            checksum=_sum(model),
        )

    def _keep(self, record: PipelineRecord, number: int, step: StepRecord) -> PipelineRecord:
        """Record a step and forget the model before it."""
        steps = [*record.steps, step]
        last = number == len(self.recipe.steps)
        export = _EXPORT if step.step == "export" else None
        record = dataclasses.replace(record, steps=steps, finished=last, export=export)
        record.write(self.out)
        write_pipeline(record.to_dict(), self.out / "report.html")
        for folder in (self.out / _STATE).glob("*"):
            if not folder.name.startswith(f"{number:02d}-") and step.step != "export":
                shutil.rmtree(folder)
        name = self.subject.metric.title
        score = "not finite" if step.score is None else f"{step.score:.4g}"
        self.say(f"{number}. {step.step}: {step.what}")
        self.say(f"   {name} {score}, {format_bytes(step.disk_bytes)} on disk")
        for note in step.notes:
            self.say(f"   note: {note}")
        return record

    def _load(self, record: PipelineRecord) -> Any:
        number, step = len(record.steps) - 1, record.steps[-1]
        folder = self.out / _STATE / f"{number:02d}-{step.step}"
        reason = f"{folder}, which holds the model after step {number}, is missing or damaged; start again in another folder"
        try:
            model = self.subject.again(folder)
        except Exception as error:  # transformers raises various errors for a damaged folder
            raise CheckpointError(f"{reason} ({' '.join(str(error).split())[:200]})") from error
        if _sum(model) != step.checksum:
            raise CheckpointError(reason)
        return model

    def _export(self, model: Any, step: Any, record: PipelineRecord) -> Done:
        folder = self.out / _EXPORT
        shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed before it was recorded
        dense = step.format == "dense"
        kept = {"metric": record.metric, "recipe": record.recipe, "steps": [s.to_dict() for s in record.steps]}
        save_compressed(model, folder, self.subject.tokenizer, record=kept, dense=dense)
        self.subject.add_packaging(folder)
        loads = "transformers loads it" + ("" if dense else " after `import lowdim`")
        return Done(self.subject.again(folder), f"written {folder.name}: {loads}", options={"format": step.format})


def _check_same(record: PipelineRecord, recipe: PipelineRecipe, out: Path) -> None:
    """Raise unless an earlier run did the same so far."""
    now, then = recipe.model_dump(), dict(record.recipe)
    done = len(record.steps) - 1
    differ = [key for key in now if key not in ("out", "steps") and now[key] != then.get(key)]
    differ += [f"step {i + 1}" for i in range(done) if [*now["steps"], *[None] * done][i] != then["steps"][i]]
    if differ:
        raise CheckpointError(
            f"{out} holds a pipeline whose recipe differs in {', '.join(differ)}; name another folder with --out"
        )


def _sum(model: Any) -> str:
    """Of the model's tensors by name; files hold them in any order."""
    found = checksums(model.state_dict())
    return checksum([f"{name} {found[name]}\n".encode() for name in sorted(found)])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _named(error: Exception, message: str) -> Exception:
    """The same kind of error with the step in its message."""
    try:
        return type(error)(message)
    except TypeError:
        return LowdimError(message)
