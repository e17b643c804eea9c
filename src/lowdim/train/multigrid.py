"""Multigrid training: mini-batches that are small in time and space and large in number first, and full-sized in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from lowdim.errors import check_float, check_int, shown
from lowdim.lazy import lazy_names
from lowdim.train.multigrid_data import GridDataset, MultigridBatchSampler, ShortCycleBatchSampler, batch_count, resample
from lowdim.train.multigrid_norm import SubBatchNorm, convert_batch_norm, set_bn_splits

if TYPE_CHECKING:
    from lowdim.train.multigrid_trainer import MultigridCallback

__all__ = [
    "GridDataset",
    "MultigridBatchSampler",
    "MultigridCallback",
    "MultigridSchedule",
    "ShortCycleBatchSampler",
    "SubBatchNorm",
    "convert_batch_norm",
    "resample",
    "set_bn_splits",
]

__getattr__ = lazy_names("lowdim.train", {"MultigridCallback": "multigrid_trainer"})

_HALF = math.sqrt(0.5)


class MultigridSchedule:
    """Shapes of the mini-batches, learning rates and epochs of a training run on clips, images or any gridded data.

    The baseline trains with batches `B × T × S × S` (clips, frames, height, width), divides the rate at epochs
    `e_0 = 0 < … < e_K` and ends at `E`. The *long cycle* goes through the shapes `T_i = round(T f_t)`, `S_i = round(S f_s)` in
    each of the baseline's stages but the last, with equally many iterations each, and trains the last stage at the full shape.
    The *short cycle* changes the crop from one iteration to the next: `round(S s_1)`, `round(S s_2)`, `S_i`. The smaller the
    clips, the more of them are in a batch, `b = round(T S² / (t s²))` times `B`, so a step costs and holds about what the
    baseline's does. An epoch is one pass over the data at any shape. All is then stretched to `epoch_factor · E` epochs.

    The rate follows the long cycle's batch linearly: `base_lr · gamma^stage · b`; the short cycle leaves it alone.

    Args:
        batch_size: `B`, clips of all devices together, >= 1.
        num_frames, crop_size: `T` and `S`, >= 1. Images have one frame.
        lr_steps: epochs at which the baseline multiplies its rate by `gamma`, increasing, the first 0.
        max_epoch: `E`, more than the last of them.
        base_lr: the baseline's rate, > 0; 1 if `lr` is to be a factor, as for `MultigridCallback`.
        gamma: factor of the rate from stage to stage, > 0.
        long_cycle, short_cycle: which to use. Without both, the schedule is the baseline.
        epoch_factor: multigrid's epochs over the baseline's, > 0.
        long_cycle_factors: `(f_t, f_s)` of each shape, in (0, 1]; the last is (1, 1).
        short_cycle_factors: `s_1` and `s_2`, in (0, 1].
        bn_base_size: clips over which batch normalisation takes its statistics, >= 1.
        num_devices: on which a batch is spread, >= 1.
        sampling_rate: the baseline's stride between frames, >= 1.
        warmup_epochs, warmup_start_lr: the rate rises linearly from this one to the schedule's at the end of the warm-up, >= 0.

    Attributes:
        entries: of the long cycle: `(stage, (b, frames, crop), end epoch)`; empty without it.
        max_epoch: epochs of this schedule. lr_steps, relative_lrs: from which epoch on the rate is `base_lr` times what.

    Raises:
        ValueError: options outside their ranges, or factors that leave a shape without clips, frames or pixels.

    Example:
        >>> from lowdim.train import MultigridSchedule
        >>> kinetics = MultigridSchedule(batch_size=64, num_frames=32, crop_size=224, lr_steps=(0, 94, 154, 196), max_epoch=239)
        >>> kinetics.shape(0), kinetics.shape(kinetics.max_epoch - 1)
        ((512, 8, 158), (64, 32, 224))
        >>> kinetics.max_epoch, round(kinetics.relative_cost(), 4)
        (358, 0.2915)

    Multigrid makes fewer updates. It pays where the baseline's accuracy has long been saturated; a run of a few epochs loses
    accuracy. The model must take any size: pool adaptively before the head.

    Source: Wu et al., "A Multigrid Method for Efficiently Training Video Models", arXiv 1912.00998.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_frames: int,
        crop_size: int,
        lr_steps: Sequence[int],
        max_epoch: int,
        base_lr: float = 1.0,
        gamma: float = 0.1,
        long_cycle: bool = True,
        short_cycle: bool = True,
        epoch_factor: float = 1.5,
        long_cycle_factors: Sequence[tuple[float, float]] = ((0.25, _HALF), (0.5, _HALF), (0.5, 1), (1, 1)),
        short_cycle_factors: Sequence[float] = (0.5, _HALF),
        bn_base_size: int = 8,
        num_devices: int = 1,
        sampling_rate: int = 1,
        warmup_epochs: float = 0.0,
        warmup_start_lr: float = 0.0,
    ):
        options = {name: value for name, value in locals().items() if name != "self"}
        for name in ("batch_size", "num_frames", "crop_size", "max_epoch", "bn_base_size", "num_devices", "sampling_rate"):
            check_int(name, options[name], 1)
        for name in ("base_lr", "gamma", "epoch_factor"):
            check_float(name, options[name], 0.0, low_open=True)
        for name in ("warmup_epochs", "warmup_start_lr"):
            check_float(name, options[name], 0.0)
        self._options = {name: _listed(value) for name, value in options.items()}
        self._longs, self._shorts = _factors(long_cycle_factors), _short_factors(short_cycle_factors)
        self._base = (batch_size, num_frames, crop_size)
        steps = _checked_steps(lr_steps, max_epoch)
        self.base_lr = base_lr
        self.entries: list[tuple[int, tuple[int, int, int], int]] = []
        self.max_epoch, self.lr_steps = max_epoch, steps
        self.relative_lrs = [gamma**j for j in range(len(steps))]
        if long_cycle:
            self._cycle(steps, max_epoch, gamma, epoch_factor)
        elif short_cycle:
            self.max_epoch = int(max_epoch * epoch_factor)
            self.lr_steps = [int(step * epoch_factor) for step in steps]
        if self.max_epoch < 1:
            raise ValueError(f"epoch_factor={epoch_factor} leaves no epoch of max_epoch={max_epoch}")
        for epoch in [0, *(end for _, _, end in self.entries[:-1])]:
            if epoch < self.max_epoch:
                self._check_shape(epoch)

    def _cycle(self, steps: list[int], end: int, gamma: float, factor: float) -> None:
        """The long cycle: entries, epochs and rates."""
        _, frames, crop = self._base
        if len(steps) < 2:
            raise ValueError(
                f"the long cycle runs between steps of the rate: lr_steps needs at least two entries; got {steps}. Add one at "
                "which the baseline lowers its rate, or set long_cycle=False"
            )
        shapes, averages = [], []
        for f_t, f_s in self._longs:
            t, s = round(frames * f_t), round(crop * f_s)
            if t < 1 or s < 1:
                raise ValueError(f"long_cycle_factors ({f_t:g}, {f_s:g}) leave a clip of {t} frames and {s} pixels")
            sizes = [crop * f for f in self._shorts] if self._options["short_cycle"] else []
            batches = [round(frames * crop**2 / (t * side * side)) for side in (*sizes, s)]
            shapes.append((batches[-1], t, s))
            averages.append(sum(batches) / len(batches))
        # In the authors' order of operations: ends are rounded to whole epochs, and where one falls on a half, another order
        # would round it to the other side.
        stages, total, iterations = [], sum(averages), 0.0
        for j, (start, stop) in enumerate(pairwise(steps)):
            for shape, average in zip(shapes, averages, strict=True):
                length = (stop - start) * average / total
                iterations += length / average
                stages.append((j, shape, length))
        saving = steps[-1] / iterations
        stages.append((len(steps) - 1, shapes[-1], (end - steps[-1]) / saving * averages[-1]))
        stretch = end * factor / sum(length for _, _, length in stages)
        ends = accumulate(length * stretch for _, _, length in stages)
        self.entries = [(j, shape, round(stop)) for (j, shape, _), stop in zip(stages, ends, strict=True)]
        self.max_epoch = self.entries[-1][2]
        self.lr_steps = [0] + [stop for _, _, stop in self.entries]
        self.lr_steps[-1] = (self.lr_steps[-2] + self.lr_steps[-1]) // 2
        rates = [gamma**j * shape[0] for j, shape, _ in self.entries]
        self.relative_lrs = [*rates[:-1], rates[-2], rates[-1]]

    def _check_shape(self, epoch: int) -> None:
        for phase, batch in enumerate(self.short_cycle_batch_sizes(epoch)):
            if batch < 1 or self.crop(epoch, phase) < 1:
                raise ValueError(
                    f"short_cycle_factors={self._shorts} leave batches of {batch} clips of {self.crop(epoch, phase)} pixels "
                    f"where the long cycle's crop is {self.shape(epoch)[2]}; choose factors that are not above the long cycle's"
                )

    def shape(self, epoch: int) -> tuple[int, int, int]:
        """Clips of a batch, frames and crop of the long cycle, which are those of the short cycle's last phase.

        Raises:
            ValueError: an epoch outside [0, max_epoch - 1].
        """
        check_int("epoch", epoch, 0, self.max_epoch - 1)
        batch, frames, crop = self._base
        if not self.entries:
            return batch, frames, crop
        b, frames, crop = next(shape for _, shape, end in self.entries if epoch < end)
        return b * batch, frames, crop

    def short_cycle_batch_sizes(self, epoch: int) -> tuple[int, int, int]:
        """Clips of the batches of the three phases; without the short cycle they are equal."""
        batch, _, crop = self.shape(epoch)
        if not self._options["short_cycle"]:
            return batch, batch, batch
        first, second = (batch * round((crop / (f * self._base[2])) ** 2) for f in self._shorts)
        return first, second, batch

    def crop(self, epoch: int, phase: int) -> int:
        """Height and width of the clips in a phase: 0, 1 or 2."""
        check_int("phase", phase, 0, 2)
        crop = self.shape(epoch)[2]
        return round(self._shorts[phase] * self._base[2]) if phase < 2 and self._options["short_cycle"] else crop

    def lr(self, epoch: float) -> float:
        """The rate at a point of the run: epochs done, with their fraction.

        Raises:
            ValueError: not in [0, max_epoch].
        """
        check_float("epoch", epoch, 0.0, self.max_epoch)
        end, start = self._options["warmup_epochs"], self._options["warmup_start_lr"]
        if epoch < end:
            return start + epoch * (self._stepped(end) - start) / end
        return self._stepped(epoch)

    def _stepped(self, epoch: float) -> float:
        return self.base_lr * self.relative_lrs[max(j for j, step in enumerate(self.lr_steps) if step <= epoch)]

    def bn(self, epoch: int) -> tuple[int, int]:
        """Over how many devices batch norm must take its statistics, and into how many parts it divides a device's batch.

        One of the two is 1: they make statistics of about `bn_base_size` clips. Both follow the long cycle only.
        """
        share = self.shape(epoch)[0] / self._options["num_devices"] / self._options["bn_base_size"]
        return (int(1 / share), 1) if share < 1 else (1, int(share))

    def max_sampling_rate(self, epoch: int) -> int:
        """The largest stride between frames: with it fewer frames cover the baseline's span."""
        return self._options["sampling_rate"] * (self._base[1] // self.shape(epoch)[1])

    def relative_cost(self) -> float:
        """Pixels of all clips of the run over those of the baseline: the share of its arithmetic."""
        total = 0.0
        for epoch in range(self.max_epoch):
            sizes, frames = self.short_cycle_batch_sizes(epoch), self.shape(epoch)[1]
            pixels = sum(batch * self.crop(epoch, phase) ** 2 for phase, batch in enumerate(sizes))
            total += frames * pixels / sum(sizes)
        return total / (self._options["max_epoch"] * self._base[1] * self._base[2] ** 2)

    def iterations(self, num_clips: int, *, drop_last: bool = False) -> int:
        """Batches of the whole run over data of `num_clips` clips.

        Raises:
            ValueError: no clips.
        """
        check_int("num_clips", num_clips, 1)
        return sum(batch_count(num_clips, self.short_cycle_batch_sizes(epoch), drop_last) for epoch in range(self.max_epoch))

    def to_dict(self) -> dict[str, Any]:
        """Options and what follows from them, as JSON."""
        entries = [[stage, list(shape), end] for stage, shape, end in self.entries]
        found = {"entries": entries, "max_epoch": self.max_epoch, "lr_steps": self.lr_steps, "relative_lrs": self.relative_lrs}
        return {"options": dict(self._options), **found, "relative_cost": self.relative_cost()}

    def __repr__(self) -> str:
        batch, frames, crop = self._base
        return f"MultigridSchedule({batch} x {frames} x {crop}, {len(self.entries)} entries, {self.max_epoch} epochs)"


def _checked_steps(steps: Any, end: int) -> list[int]:
    listed = list(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else []
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in listed)
    if not listed or not whole or listed[0] != 0 or any(a >= b for a, b in pairwise(listed)):
        raise ValueError(f"lr_steps must be increasing epochs that start with 0, such as (0, 8, 10); got {shown(steps)}")
    if end <= listed[-1]:
        raise ValueError(f"max_epoch must be above the last of lr_steps, {listed[-1]}; got {end}")
    return listed


def _factors(factors: Any) -> list[tuple[float, float]]:
    good = isinstance(factors, Sequence) and len(factors) > 0
    good = good and all(isinstance(pair, Sequence) and len(pair) == 2 and all(map(_is_share, pair)) for pair in factors)
    if not good or tuple(factors[-1]) != (1, 1):
        raise ValueError(
            "long_cycle_factors must be pairs (of the frames, of the crop) in (0, 1], the last of them (1, 1); "
            f"got {shown(factors)}"
        )
    return [tuple(pair) for pair in factors]


def _short_factors(factors: Any) -> tuple[float, float]:
    if not (isinstance(factors, Sequence) and len(factors) == 2 and all(map(_is_share, factors))):
        raise ValueError(f"short_cycle_factors must be two numbers in (0, 1]; got {shown(factors)}")
    return factors[0], factors[1]


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, (list, tuple)) else value
