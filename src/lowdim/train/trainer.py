"""The trainer of `fit`. It imports transformers, so `fit` imports this module only when it runs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lowdim.calibrate import LossFn, row_count
from lowdim.methods import Applied
from lowdim.optim import ProjectedOptimizer
from lowdim.pretrained.guard import writes_checkpoints
from lowdim.train.by_length import GroupedByLength
from lowdim.train.checkpoints import MANIFEST, checkpoint_errors, complete, discard, newest_checkpoint, rotate, step_of
from lowdim.train.mixin import PenaltyLog
from lowdim.train.settings import SUBSPACE, FitSettings
from lowdim.train.watch_callback import WatchCallback

__all__ = ["MethodTrainer", "arguments"]

_COMPANION = "companion.pt"  # in a checkpoint


class MethodTrainer(PenaltyLog, Trainer):
    """`transformers.Trainer` with the optimizer, loss and companion of a method.

    The loss of a step is the mean over all items (rows, or tokens that count) of its micro-batches on all processes: a
    micro-batch with fewer items weighs less.

    Args:
        applied: the model that a strategy has prepared.
        lr: the peak rate.
        watch: log a projected optimizer's numbers about the gradients.
        count_items: batch -> the items over which its loss is a mean; None: one in each batch.
        lengths: of the training rows, to put rows of like length into a batch; None: in any order.
        loss_fn: `loss_fn(model, batch)`, the mean loss; None: that of `transformers.Trainer`.
        fingerprint: what the run builds on, kept in each checkpoint.
        others: options of `transformers.Trainer`.

    Attributes:
        kept: the number of complete checkpoints.
        last_step: where the training ends.
    """

    kept = 2

    def __init__(
        self,
        applied: Applied,
        lr: float,
        *,
        watch: bool = False,
        count_items: Callable[[Any], int] | None = None,
        lengths: Sequence[int] | None = None,
        loss_fn: LossFn | None = None,
        fingerprint: Mapping[str, str] | None = None,
        **others: Any,
    ):
        self.applied, self.applied_lr, self.watch = applied, lr, watch
        self.fingerprint = fingerprint or {}
        self.count_items = count_items or (lambda batch: 1)
        self.lengths, self.loss_fn = lengths, loss_fn
        self._step_items, self._step_rows = 1, 1  # of all micro-batches of the step, on all processes
        super().__init__(model=applied.model, **others)
        self.remove_callback(PrinterCallback)
        # Every loss here is a mean over the batch, and is weighted here. Many classifiers accept any keyword and so seem to
        # divide by the items of all accumulated batches, but do not.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        return GroupedByLength(self.lengths, self.args.per_device_train_batch_size, self.args.seed)

    @property
    def last_step(self) -> int:
        """The step at which the training ends."""
        return self.args.max_steps

    def create_optimizer(self, model: Any = None) -> Any:
        """The method's own optimizer, with its companion."""
        if self.optimizer is None:
            self.optimizer = self.applied.start(self.applied_lr)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of a step; counts their items.

        Raises:
            FloatingPointError: no label of the step counts, so that its loss is not a number.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [sum(map(self.count_items, samples)), sum(map(row_count, samples))]
        summed: Any = self.accelerator.reduce(torch.tensor(counts, device=self.args.device), "sum")
        self._step_items, self._step_rows = summed.tolist()
        if samples and not self._step_items:
            raise FloatingPointError(f"no label counts in the batch of step {self.state.global_step + 1}: all are -100")
        return samples, None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss, in training with the method's penalty, weighted by the share of the step's items in this batch.

        The penalty is weighted by the share of the rows: one of the parameters alone counts once in a step, and one of the
        model's outputs is a mean over the rows, whether their labels count or not.
        """
        usual: Any = super().compute_loss
        if return_outputs or not model.training:
            return usual(model, inputs, return_outputs, **kwargs)
        items = self.count_items(inputs)
        processes = self.accelerator.num_processes  # gradients are averaged over them
        weight, of_penalty = items * processes / self._step_items, row_count(inputs) * processes / self._step_rows
        if not items:  # its mean would be 0/0
            inputs = {**inputs, "labels": inputs["labels"].clamp(min=0)}
        loss_fn = self.loss_fn or (lambda called, batch: usual(called, batch, **kwargs))
        losses = self.applied.loss(inputs, loss_fn, model)
        self.note(losses, weight, of_penalty)
        return losses.task * weight + losses.penalty * of_penalty

    def check_total(self, total: torch.Tensor) -> None:
        """Raise FloatingPointError for a loss that is not finite, or a penalty that is not, before the optimizer uses it."""
        if not bool(torch.isfinite(total)):
            raise FloatingPointError(f"the loss became {float(total):g} at step {self.state.global_step + 1}")

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the trainer would walk through all parameters in each step, for a figure that nothing reads."""
        return 0

    def plain_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log also the method's penalty, and a projected optimizer's numbers if they are watched."""
        if "loss" in logs:
            optimizer = self.plain_optimizer()
            if self.watch and isinstance(optimizer, ProjectedOptimizer):
                logs.update({f"{SUBSPACE}{name}": value for name, value in _unclipped(optimizer.log(), logs).items()})
        super().log(logs, *args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        adapted = self.applied.adapted
        with writes_checkpoints(self.applied.model, None if adapted is None else adapted.save):
            super()._save(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.applied.companion is not None and self.args.should_save:
            torch.save(self.applied.companion.state_dict(), Path(output_dir) / _COMPANION)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, WatchCallback) and self.args.should_save:
                callback.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with checkpoint_errors(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoint_errors(checkpoint):
            if checkpoint is not None and not self.is_fsdp_enabled:
                _check_complete(Path(checkpoint))
            super()._load_optimizer_and_scheduler(checkpoint)
            if self.applied.companion is not None and checkpoint is not None:
                self.applied.companion.load_state_dict(torch.load(Path(checkpoint) / _COMPANION, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoint_errors(checkpoint):
            super()._load_rng_state(checkpoint)
        self._logged_step = self.state.global_step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.last_step:  # resumed from the last checkpoint: the trainer would add a step
            self._load_rng_state(kwargs["resume_from_checkpoint"])
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def resume_point(self, folder: Path) -> str | None:
        """The newest checkpoint, checked; what a kill has left of older ones is removed."""
        newest = newest_checkpoint(folder, self.fingerprint)
        if newest is not None and self.args.should_save:
            if not (Path(newest) / MANIFEST).exists():  # killed just before it, or written by an earlier version
                complete(Path(newest), self.fingerprint)
            rotate(folder, self.kept, step_of(Path(newest)))
        return newest

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        place = folder / f"checkpoint-{step}"
        if self.args.should_save and place.exists():
            discard(place)  # a killed process has left a part of it
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                complete(place, self.fingerprint)
                rotate(folder, self.kept, step)
        except Exception as error:  # a full disk: torch, safetensors and the system each raise their own error
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            if shutil.disk_usage(folder).free < 2**20:
                reason = os.strerror(errno.ENOSPC)
            discard(place)
            earlier = "; continue from the one before with --resume" if newest_checkpoint(folder) else ""
            raise OSError(errno.ENOSPC, f"could not write a checkpoint to {folder} ({reason}){earlier}") from error


def arguments(settings: FitSettings, steps: int, folder: Path) -> TrainingArguments:
    """The settings as transformers' arguments."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * steps),
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
        save_total_limit=None,  # the trainer would rotate by the clock
        report_to=settings.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_broadcast_buffers=False,  # frozen bases are the same on all processes, and large
    )


def _check_complete(checkpoint: Path) -> None:
    """Raise FileNotFoundError if a part is missing that the trainer would silently ignore."""
    for pattern in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):  # one random state per process
        if not list(checkpoint.glob(pattern)):
            raise FileNotFoundError(f"{pattern.replace('*', '')} is missing")


def _unclipped(numbers: dict[str, float], logs: dict[str, float]) -> dict[str, float]:
    """Norms before the trainer clipped the full gradients, which it reports as `grad_norm`."""
    norm, seen = logs.get("grad_norm"), numbers.get("true_grad_norm")
    if not norm or not seen:
        return numbers
    names = ("true_grad_norm", "projected_norm")
    return {name: value * norm / seen if name in names else value for name, value in numbers.items()}
