"""One training run: `transformers.Trainer` over a model that a strategy has made ready."""

from __future__ import annotations

import errno
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowdim.errors import CheckpointError, check_choice
from lowdim.files import read_json
from lowdim.methods import Applied
from lowdim.models import quiet
from lowdim.train.attendant import attendant
from lowdim.train.garbage import own_garbage

if TYPE_CHECKING:
    from lowdim.train.tasks import Task

__all__ = ["FitResult", "FitSettings", "fit"]

_COMPANION = "companion.pt"  # in a checkpoint
_SUBSPACE = "subspace_"  # before the names of what a projected optimizer logs


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How long and how fast: everything about the loop that does not depend on the method."""

    steps: int
    batch_size: int = 16
    lr: float = 1e-3
    warmup: float = 0.1  # share of the steps
    schedule: str = "linear"  # any name that transformers.get_scheduler knows
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    clips_itself: bool = False  # the optimizer clips what it projects: it frees gradients before anyone could clip them
    bf16: bool = False  # autocast; weights stay as they are
    seed: int = 0
    save_steps: int = 0  # 0: no checkpoints
    log_steps: int = 1
    eval_steps: int = 0  # 0: score the validation part at the end only
    watch: bool = False  # log norms of full and projected gradients
    report_to: str = "none"


@dataclass
class FitResult:
    """What one run gave: the loss of each logged step, its time and memory, and why it ended.

    `evaluations` are `(step, loss in nats a token)` of the validation part, `subspaces` what a projected optimizer logged,
    `spikes` the steps whose loss jumped.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    seconds_per_step: float = math.nan
    peak_bytes: int | None = None
    failure: str | None = None
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    subspaces: list[dict[str, float]] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)


def fit(
    applied: Applied,
    task: Task,
    settings: FitSettings,
    folder: Path,
    *,
    resume: bool = False,
    measure_memory: bool = False,
    callbacks: tuple[Any, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Train `applied.model` on the task's training part.

    Args:
        folder: where the trainer keeps its checkpoints, if any.
        resume: go on from the newest checkpoint in `folder`.
        measure_memory: record the peak of one real step (the third), which makes that step slower.
        say: is told of spikes and scores while the training goes on.

    Returns:
        A `FitResult`; a loss that is not finite ends the run and is reported as `failure`, not raised.

    Raises:
        UnknownNameError: `report_to` is no tracker that transformers knows.
        ImportError: that tracker is not installed.
        OSError: a checkpoint cannot be written; the ones before it are whole.
    """
    check_tracker(settings.report_to)
    with own_garbage():
        return _fit(applied, task, settings, folder, resume, measure_memory, callbacks, say)


def _fit(
    applied: Applied,
    task: Task,
    settings: FitSettings,
    folder: Path,
    resume: bool,
    measure_memory: bool,
    callbacks: tuple[Any, ...],
    say: Callable[[str], None],
) -> FitResult:
    from transformers import TrainingArguments

    result = FitResult()
    recorder = _recorder(result, applied, measure_memory)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * settings.steps),
        max_grad_norm=0.0 if settings.clips_itself else settings.max_grad_norm,
        weight_decay=0.0,
        bf16=settings.bf16,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_strategy="steps",
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2 if settings.save_steps else None,
        report_to=settings.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_broadcast_buffers=False,  # frozen bases are the same everywhere, and large
    )
    trainer = _trainer_class()(
        applied,
        settings.lr,
        model=applied.model,
        args=arguments,
        train_dataset=task.train,
        data_collator=task.collate,
        callbacks=[recorder],
    )
    trainer.watch = settings.watch
    for callback in (attendant(trainer, task, settings, result, say), *callbacks):
        trainer.add_callback(callback)
    _silence(trainer)
    try:
        with quiet():  # a progress bar for each checkpoint that is written, otherwise
            trainer.train(resume_from_checkpoint=_newest(folder) if resume else None)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        # The second: a decomposition of a gradient that is not finite.
        result.failure = str(error)
    finally:
        recorder.close()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]  # includes what a resumed run did before
    result.steps = [int(entry["step"]) for entry in history]
    result.losses = [float(entry["loss"]) for entry in history]
    told = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    result.evaluations = [(int(entry["step"]), float(entry["eval_loss"])) for entry in told]
    result.subspaces = [{"step": e["step"], **_subspace(e)} for e in history if _subspace(e)]
    result.grad_norms = [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry]
    if recorder.times:
        result.seconds_per_step = statistics.median(recorder.times)
    applied.finish()
    applied.model.zero_grad(set_to_none=True)
    return result


def _trainer_class() -> Any:
    """The Trainer with the strategy's optimizer and regularizer; made late, so that importing lowdim.train stays cheap."""
    from transformers import Trainer

    class StrategyTrainer(Trainer):
        def __init__(self, applied: Applied, lr: float, **kwargs: Any):
            self.applied, self.applied_lr = applied, lr
            self.watch = False
            super().__init__(**kwargs)
            # Every loss here is a mean over the batch. Many classifiers take any keyword and so seem to divide by the items of
            # all accumulated batches, but do not; the trainer would then leave their gradient as many times too large.
            self.model_accepts_loss_kwargs = False

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = self.applied.start(self.applied_lr)
            return self.optimizer

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            usual: Any = super().compute_loss
            if return_outputs or not model.training:
                return usual(model, inputs, return_outputs, **kwargs)
            return self.applied.loss(inputs, lambda called, batch: usual(called, batch, **kwargs), model).total

        def plain_optimizer(self) -> Any:
            """Without the wrapper that accelerate puts around it."""
            return getattr(self.optimizer, "optimizer", self.optimizer)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            numbers = getattr(self.plain_optimizer(), "log", None)
            if "loss" in logs and numbers is not None and self.watch:
                logs.update({f"{_SUBSPACE}{name}": value for name, value in _unclipped(numbers(), logs).items()})
            super().log(logs, *args, **kwargs)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            if self.applied.companion is not None and self.args.should_save:
                torch.save(self.applied.companion.state_dict(), Path(output_dir) / _COMPANION)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            with _reading(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            with _reading(checkpoint):
                if checkpoint is not None and not self.is_fsdp_enabled:
                    _check_complete(Path(checkpoint))
                super()._load_optimizer_and_scheduler(checkpoint)
                if self.applied.companion is not None and checkpoint is not None:
                    self.applied.companion.load_state_dict(torch.load(Path(checkpoint) / _COMPANION, weights_only=True))

        def _load_rng_state(self, checkpoint: str | None) -> None:
            with _reading(checkpoint):
                super()._load_rng_state(checkpoint)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            try:
                super()._save_checkpoint(*args, **kwargs)
            except Exception as error:  # a full disk: torch, safetensors and the system each have an error of their own for it
                folder = Path(str(self.args.output_dir))
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
                if shutil.disk_usage(folder).free < 2**20:
                    reason = os.strerror(errno.ENOSPC)
                shutil.rmtree(folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
                earlier = "; go on from the one before with --resume" if _newest(folder) else ""
                raise OSError(errno.ENOSPC, f"could not write a checkpoint to {folder} ({reason}){earlier}") from error

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if not bool(torch.isfinite(loss)):  # before the optimizer makes weights of it
                raise FloatingPointError(f"the loss became {float(loss):g} at step {self.state.global_step + 1}")
            return loss

    return StrategyTrainer


def _recorder(result: FitResult, applied: Applied, measure: bool) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        """Step times, and one reading of the memory."""

        measured_step = 3  # of this process, so a resumed run is measured, too; the first two allocate and warm up

        def __init__(self) -> None:
            self.begun = 0
            self.times: list[float] = []
            self.start = 0.0
            self.peak: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun += 1
            if measure and self.begun == self.measured_step:
                from lowdim.plan import PeakMemory

                self.peak = PeakMemory(applied.model, kwargs.get("optimizer"))
                self.peak.__enter__()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.start
            if self.peak is not None:
                self.peak.__exit__(None, None, None)
                result.peak_bytes, self.peak = self.peak.bytes, None
            elif self.begun >= self.measured_step:
                self.times.append(seconds)

        def close(self) -> None:
            if self.peak is not None:  # the step was left by an exception; a profiler that stays open breaks the next run
                self.peak.__exit__(None, None, None)
                self.peak = None

    return Recorder()


def _check_complete(checkpoint: Path) -> None:
    """Raise FileNotFoundError where a part is missing that the trainer would silently do without."""
    for pattern in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):  # one random state a process
        if not list(checkpoint.glob(pattern)):
            raise FileNotFoundError(f"it has no {pattern.replace('*', '')}")


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """What goes wrong while a checkpoint is read is its damage, and says how to go on."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch, safetensors, zip files and the system each have an error of their own for it
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{checkpoint} cannot be read ({reason}); remove that folder, and --resume goes on from the checkpoint before it"
        ) from error


def _unclipped(numbers: dict[str, float], logs: dict[str, float]) -> dict[str, float]:
    """Norms as they were before the trainer clipped the full gradients, which it tells as `grad_norm`."""
    norm, seen = logs.get("grad_norm"), numbers.get("true_grad_norm")
    if not norm or not seen:
        return numbers
    names = ("true_grad_norm", "projected_norm")
    return {name: value * norm / seen if name in names else value for name, value in numbers.items()}


def _subspace(entry: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix(_SUBSPACE): float(value) for key, value in entry.items() if key.startswith(_SUBSPACE)}


def check_tracker(name: str) -> None:
    """Whether transformers can report to this tracker.

    Raises:
        UnknownNameError: it has no tracker of this name.
        ImportError: the tracker is not installed.
    """
    if name in ("none", "all"):
        return
    from transformers.integrations import integration_utils

    check_choice("report_to", name, ["none", "all", *integration_utils.INTEGRATION_TO_CALLBACK])
    if name not in integration_utils.get_available_reporting_integrations():
        raise ImportError(f"report_to: {name!r} is not installed")


def _silence(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _newest(folder: Path) -> str | None:
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    complete = [p for p in found if _whole(p / "trainer_state.json")]
    return str(max(complete, key=lambda p: int(p.name.rpartition("-")[2]))) if complete else None


def _whole(state: Path) -> bool:
    """Whether a checkpoint was finished: the trainer writes this file last."""
    try:
        return bool(read_json(state))
    except CheckpointError:
        return False
