"""Multigrid training under `transformers.Trainer`: the rate and the parts of batch norm, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lowdim.surgery import unwrap
from lowdim.train.callback_base import callback_base
from lowdim.train.multigrid_data import MultigridBatchSampler, batch_sizes, refuse_synchronised
from lowdim.train.multigrid_norm import SubBatchNorm, set_bn_splits

if TYPE_CHECKING:
    from lowdim.train.multigrid import MultigridSchedule

__all__ = ["MultigridCallback"]


class MultigridCallback(callback_base()):
    """A `transformers.TrainerCallback` that sets the rate, and the parts of sub-batch norm, before each step.

    The rate of each parameter group is `schedule.lr(epoch)` times the rate with which the optimizer was made, so the schedule
    has `base_lr=1.0`. The trainer's `get_train_dataloader` returns
    `DataLoader(GridDataset(data), batch_sampler=sampler, …)`, its arguments have `num_train_epochs=1` (one pass over the
    sampler is the whole run) and `lr_scheduler_type="constant"`. A run that is resumed continues where it was.

    Args:
        schedule: of the run.
        sampler: the `MultigridBatchSampler(…, whole_run=True)` of the training data.

    Raises:
        TypeError: another sampler. ValueError: one that is not for the whole run or has another schedule; when training
            begins, arguments of the trainer that would change the schedule, or batches that do not divide into the parts of a
            `SubBatchNorm`.
        NotImplementedError: several processes, or batch norm that would have to be synchronised over devices.

    Example:
        >>> from lowdim.train import MultigridBatchSampler, MultigridCallback, MultigridSchedule
        >>> schedule = MultigridSchedule(batch_size=8, num_frames=8, crop_size=32, lr_steps=(0, 3), max_epoch=4)
        >>> sampler = MultigridBatchSampler(range(2048), schedule, whole_run=True)
        >>> callback = MultigridCallback(schedule, sampler)  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, schedule: MultigridSchedule, sampler: MultigridBatchSampler):
        if not isinstance(sampler, MultigridBatchSampler):
            raise TypeError(f"sampler must be a MultigridBatchSampler; got {type(sampler).__name__}")
        if not sampler.whole_run:
            raise ValueError("sampler must have whole_run=True: a Trainer reads the number of steps of an epoch only once")
        if sampler.schedule is not schedule:
            raise ValueError("sampler must have been made with this schedule; it has another")
        self.schedule, self.sampler = schedule, sampler
        self._epoch = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would not follow the schedule, before the first step."""
        if args.world_size > 1:
            raise NotImplementedError(
                f"multigrid under Trainer runs in one process; got {args.world_size}, which would have batches of different "
                "shapes at the same step"
            )
        wanted = {"gradient_accumulation_steps": 1, "lr_scheduler_type": "constant"}
        for name, value in wanted.items():
            if (got := getattr(args, name)) != value:
                raise ValueError(
                    f"TrainingArguments.{name} must be {value!r} for multigrid training; got {getattr(got, 'value', got)!r}"
                )
        if state.max_steps > len(self.sampler):
            raise ValueError(
                f"the trainer would take {state.max_steps} steps, but the schedule has {len(self.sampler)}: set "
                "num_train_epochs=1, since one pass over the sampler is the whole run"
            )
        for epoch in range(self.schedule.max_epoch):
            refuse_synchronised(self.schedule, epoch)
        self._check_parts(unwrap(kwargs["model"]))
        self._epoch = -1

    def _check_parts(self, model: nn.Module) -> None:
        """Batches must divide, or the run would end at the first that does not."""
        names = [name for name, module in model.named_modules() if isinstance(module, SubBatchNorm)]
        if not names:
            return
        clips, drop_last = len(self.sampler.sampler), self.sampler.drop_last
        for epoch in range(self.schedule.max_epoch):
            parts, planned = self.schedule.bn(epoch)[1], self.schedule.short_cycle_batch_sizes(epoch)
            if wrong := [size for size in batch_sizes(clips, planned, drop_last) if size % parts]:
                hint = (
                    "choose another batch_size or bn_base_size" if wrong[0] in planned else "set drop_last=True in the sampler"
                )
                raise ValueError(
                    f"layer {names[0]}: in epoch {epoch} a batch of {wrong[0]} cannot be divided into {parts} parts; {hint}"
                )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The rate of this step, and the parts of its epoch."""
        epoch = self.sampler.epoch_of(state.global_step)
        if int(epoch) != self._epoch:
            self._epoch = int(epoch)
            set_bn_splits(unwrap(kwargs["model"]), self.schedule.bn(self._epoch)[1])
        rate = self.schedule.lr(epoch)
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = rate * group["initial_lr"]
