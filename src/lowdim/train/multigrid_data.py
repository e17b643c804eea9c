"""What a multigrid run reads: batches whose items say their shape, the data that obeys, and clips of another size."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from lowdim.errors import check_int, shown

if TYPE_CHECKING:
    from lowdim.train.multigrid import MultigridSchedule

__all__ = [
    "GridDataset",
    "MultigridBatchSampler",
    "ShortCycleBatchSampler",
    "batch_count",
    "batch_sizes",
    "refuse_synchronised",
    "resample",
]


def resample(clips: Tensor, frames: int, crop: int, *, stride: int = 1, offset: int = 0) -> Tensor:
    """Some frames of clips in memory, resized: frames `offset, offset + stride, …`, height and width bilinearly to `crop`.

    Args:
        clips: `(N, C, T, H, W)`, floating or uint8.
        frames: how many to take, >= 1.
        crop: height and width of the result, >= 1.
        stride: between the frames, >= 1. Drawn from 1 to `T // frames`, some clips cover the whole span.
        offset: the first frame, >= 0.

    Returns:
        `(N, C, frames, crop, crop)`, of the input's dtype.

    Raises:
        ValueError: an input of another shape or dtype, or frames beyond the end of the clips.

    Example:
        >>> import torch
        >>> from lowdim.train import resample
        >>> resample(torch.rand(2, 3, 8, 32, 32), 4, 16, stride=2).shape
        torch.Size([2, 3, 4, 16, 16])
    """
    for name, value, low in (("frames", frames, 1), ("crop", crop, 1), ("stride", stride, 1), ("offset", offset, 0)):
        check_int(name, value, low)
    if clips.ndim != 5 or not (clips.is_floating_point() or clips.dtype == torch.uint8):
        raise ValueError(f"clips must be floating or uint8 of shape (N, C, T, H, W); got {clips.dtype} {tuple(clips.shape)}")
    last = offset + (frames - 1) * stride
    if last >= clips.shape[2]:
        raise ValueError(
            f"frames={frames} with stride={stride} from offset={offset} end at frame {last}, but the clips have "
            f"{clips.shape[2]} frames"
        )
    taken = clips[:, :, offset : last + 1 : stride]
    if taken.shape[-2:] == (crop, crop):
        return taken
    images = taken.flatten(1, 2)  # (N, C · frames, H, W)
    return F.interpolate(images, (crop, crop), mode="bilinear", align_corners=False).unflatten(1, taken.shape[1:3])


class GridDataset(Dataset[Any]):
    """Data whose items are asked for at a shape: `ds[(index, frames, crop)]` is `transform(dataset[index], frames, crop)`.

    Args:
        dataset: has a length; its items are whatever `transform` takes.
        transform: `(item, frames, crop) -> item`, such as a random resized crop; by default `resample` of the clip
            `(C, T, H, W)`, or of the first entry of a tuple, from its first frame on.

    Raises:
        TypeError: an index that is not such a triple, or without a transform an item that holds no clip.

    Example:
        >>> import torch
        >>> from lowdim.train import GridDataset
        >>> clip, label = GridDataset([(torch.rand(3, 8, 32, 32), 1)])[(0, 4, 16)]
        >>> tuple(clip.shape), label
        ((3, 4, 16, 16), 1)
    """

    def __init__(self, dataset: Any, transform: Callable[[Any, int, int], Any] | None = None):
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, item: tuple[int, int, int]) -> Any:
        if not isinstance(item, tuple) or len(item) != 3:
            raise TypeError(
                f"a GridDataset is indexed with (index, frames, crop), as MultigridBatchSampler gives them; got {shown(item)}"
            )
        index, frames, crop = item
        return (self.transform or _resampled)(self.dataset[index], frames, crop)

    def __len__(self) -> int:
        return len(self.dataset)


def _resampled(item: Any, frames: int, crop: int) -> Any:
    if isinstance(item, tuple) and item:
        return (_resampled(item[0], frames, crop), *item[1:])
    if not isinstance(item, Tensor) or item.ndim != 4:
        what = f"a tensor of shape {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
        raise TypeError(f"without a transform, items must be clips (C, T, H, W) or tuples that start with one; got {what}")
    return resample(item.unsqueeze(0), frames, crop).squeeze(0)


class ShortCycleBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of three sizes in turn, as lists of `(index, phase)`; phase 0, 1 or 2 says which crop a clip is to have.

    Args:
        sampler: gives the indices; has a length.
        batch_sizes: of the phases 0, 1 and 2, as `MultigridSchedule.short_cycle_batch_sizes` gives them.
        drop_last: leave out a last batch that is not full.

    Its length is what the authors' is, `ceil(len(sampler) / mean(batch_sizes))`, `floor` with `drop_last`: up to one or two
    batches wrong. `MultigridBatchSampler` counts exactly.

    Raises:
        TypeError: a sampler without a length. ValueError: not three positive sizes.

    Example:
        >>> from lowdim.train import ShortCycleBatchSampler
        >>> [len(batch) for batch in ShortCycleBatchSampler(range(12), (4, 2, 1))]
        [4, 2, 1, 4, 1]
    """

    def __init__(self, sampler: Any, batch_sizes: Sequence[int], drop_last: bool = False):
        sizes = tuple(batch_sizes) if isinstance(batch_sizes, Sequence) else ()
        if len(sizes) != 3 or not all(isinstance(b, int) and not isinstance(b, bool) and b > 0 for b in sizes):
            raise ValueError(f"batch_sizes must be three positive ints; got {shown(batch_sizes)}")
        self.sampler, self.batch_sizes, self.drop_last = _checked_sampler(sampler), sizes, drop_last

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch: list[tuple[int, int]] = []
        phase = 0
        for index in self.sampler:
            batch.append((index, phase))
            if len(batch) == self.batch_sizes[phase]:
                yield batch
                batch, phase = [], (phase + 1) % 3
        if batch and not self.drop_last:
            yield batch

    def __len__(self) -> int:
        share = 3 * len(self.sampler) / sum(self.batch_sizes)
        return math.floor(share) if self.drop_last else math.ceil(share)


class MultigridBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """The batches of a schedule, as lists of `(index, frames, crop)`: a worker process sees the shape in the item.

    Args:
        sampler: gives the indices of one epoch; has a length. `set_epoch` is passed on to it if it has one.
        schedule: of the run.
        drop_last: leave out the last batch of an epoch if it is not full. Sub-batch norm needs that, unless all divide.
        whole_run: one pass goes through all epochs of the schedule, as `transformers.Trainer` needs it: that reads the number
            of steps of an epoch once, and would cut longer ones short. A random sampler without a generator of its own then
            orders epoch `e` by the seed `torch.initial_seed() + e`, so that a resumed run sees the same batches.

    `len` is that of the epoch that `set_epoch` chose (at first 0), or of the whole run.

    Raises:
        TypeError: a sampler without a length. ValueError: an epoch that the schedule does not have, a step beyond its end.
        NotImplementedError: batch normalisation would have to be synchronised over devices in that epoch.

    Example:
        >>> from lowdim.train import MultigridBatchSampler, MultigridSchedule
        >>> schedule = MultigridSchedule(batch_size=8, num_frames=8, crop_size=32, lr_steps=(0, 3), max_epoch=4)
        >>> sampler = MultigridBatchSampler(range(200), schedule)
        >>> [(len(batch), *batch[0][1:]) for batch in sampler]
        [(128, 2, 16), (64, 2, 23), (8, 2, 23)]
        >>> sampler.set_epoch(schedule.max_epoch - 1)
        >>> next(iter(sampler))[0]
        (0, 8, 16)
    """

    def __init__(self, sampler: Any, schedule: MultigridSchedule, *, drop_last: bool = False, whole_run: bool = False):
        self.sampler, self.schedule = _checked_sampler(sampler), schedule
        self.drop_last, self.whole_run, self.epoch = drop_last, whole_run, 0
        self._counted: tuple[int, list[int]] = (-1, [])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; without effect if one pass is the whole run."""
        if self.whole_run:
            return
        refuse_synchronised(self.schedule, epoch)
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        if not self.whole_run:
            yield from self._batches(self.epoch)
            return
        for epoch in range(self.schedule.max_epoch):
            refuse_synchronised(self.schedule, epoch)
        with _own_order(self.sampler) as begin:
            for epoch in range(self.schedule.max_epoch):
                begin(epoch)
                yield from self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[list[tuple[int, int, int]]]:
        frames, crops = self.schedule.shape(epoch)[1], [self.schedule.crop(epoch, phase) for phase in range(3)]
        for batch in ShortCycleBatchSampler(self.sampler, self.schedule.short_cycle_batch_sizes(epoch), self.drop_last):
            yield [(index, frames, crops[phase]) for index, phase in batch]

    def __len__(self) -> int:
        ends = self._ends()
        return ends[-1] if self.whole_run else ends[self.epoch + 1] - ends[self.epoch]

    def _ends(self) -> list[int]:
        """Batches before each epoch, and before the end."""
        clips = len(self.sampler)
        if clips != self._counted[0]:
            sizes = map(self.schedule.short_cycle_batch_sizes, range(self.schedule.max_epoch))
            counts = (batch_count(clips, each, self.drop_last) for each in sizes)
            self._counted = (clips, list(accumulate(counts, initial=0)))
        return self._counted[1]

    def epoch_of(self, step: int) -> float:
        """Epochs of the run that are done before its step `step`, counted from 0, with their fraction."""
        ends = self._ends()
        check_int("step", step, 0, ends[-1])
        if step == ends[-1]:
            return float(self.schedule.max_epoch)
        epoch = bisect_right(ends, step) - 1
        return epoch + (step - ends[epoch]) / (ends[epoch + 1] - ends[epoch])


def refuse_synchronised(schedule: MultigridSchedule, epoch: int) -> None:
    """NotImplementedError where statistics of `bn_base_size` clips need more than one device."""
    devices, _ = schedule.bn(epoch)
    if devices > 1:
        options = schedule.to_dict()["options"]
        held, wanted = schedule.shape(epoch)[0] / options["num_devices"], options["bn_base_size"]
        raise NotImplementedError(
            f"epoch {epoch}: a device holds {held:g} clips, and statistics of bn_base_size={wanted} would have to be "
            f"synchronised over {devices} devices, which SubBatchNorm cannot; set bn_base_size <= {max(int(held), 1)}"
        )


def batch_count(clips: int, sizes: tuple[int, int, int], drop_last: bool) -> int:
    """Batches of one epoch, exactly."""
    rounds, full, rest = _divided(clips, sizes)
    return 3 * rounds + full + (rest > 0 and not drop_last)


def batch_sizes(clips: int, sizes: tuple[int, int, int], drop_last: bool) -> list[int]:
    """The sizes of batches that one epoch has; that of a last batch which is not full stands last."""
    rounds, full, rest = _divided(clips, sizes)
    return [*(sizes if rounds else sizes[:full]), *([rest] if rest and not drop_last else [])]


def _divided(clips: int, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Rounds of three batches, full batches after them, and the clips that are left."""
    rounds, rest = divmod(clips, sum(sizes))
    ends = list(accumulate(sizes, initial=0))
    full = bisect_right(ends, rest) - 1
    return rounds, full, rest - ends[full]


@contextmanager
def _own_order(sampler: Any) -> Iterator[Callable[[int], None]]:
    """Give a function to call before each epoch: the sampler's order is then that epoch's, whatever was drawn before."""
    follows = hasattr(sampler, "set_epoch")
    seeded = not follows and getattr(sampler, "generator", sampler) is None
    seed = torch.initial_seed() % 2**62

    def begin(epoch: int) -> None:
        if follows:
            sampler.set_epoch(epoch)
        elif seeded:
            sampler.generator = torch.Generator().manual_seed(seed + epoch)

    try:
        yield begin
    finally:
        if seeded:
            sampler.generator = None


def _checked_sampler(sampler: Any) -> Any:
    if not (hasattr(sampler, "__len__") and hasattr(sampler, "__iter__")):
        raise TypeError(f"sampler must be iterable and have a length; got {type(sampler).__name__}")
    return sampler
