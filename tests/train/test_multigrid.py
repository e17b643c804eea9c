"""The schedule and the samplers of multigrid training: reference numbers, rules, wrong input."""

import json
import math

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

import vectors
from lowdim.testing.agreement import refuses
from lowdim.train import multigrid
from lowdim.train.multigrid import (
    GridDataset,
    MultigridBatchSampler,
    MultigridSchedule,
    ShortCycleBatchSampler,
    resample,
)

KINETICS = {"batch_size": 64, "num_frames": 32, "crop_size": 224, "lr_steps": (0, 94, 154, 196), "max_epoch": 239}
SMALL = {"batch_size": 8, "num_frames": 8, "crop_size": 32, "lr_steps": (0, 3, 4), "max_epoch": 5}


def schedule(**changes):
    return MultigridSchedule(**{**SMALL, **changes})


@pytest.mark.parametrize("case", ["kinetics", "short_only", "small_long_short"])
def test_reference_numbers(case):
    v = vectors.load("multigrid", case)
    how = dict(v.hyperparameters)
    clips = how.pop("n_data")
    made = MultigridSchedule(**how)
    epochs = range(made.max_epoch)
    columns = {
        "max_epoch": [made.max_epoch],
        "lr_steps": made.lr_steps,
        "epoch_shape": [made.shape(e) for e in epochs],
        "bn_sync_splits": [made.bn(e) for e in epochs],
        "max_sampling_rate": [made.max_sampling_rate(e) for e in epochs],
        "short_batch_sizes": [made.short_cycle_batch_sizes(e) for e in epochs],
        "schedule_step": [stage for stage, _, _ in made.entries],
        "schedule_shape": [shape for _, shape, _ in made.entries],
        "schedule_end": [end for _, _, end in made.entries],
    }
    rates = {"relative_lrs": made.relative_lrs, "epoch_lr": [made.lr(e + 0.5) for e in epochs]}
    batches = ShortCycleBatchSampler(range(clips), made.short_cycle_batch_sizes(made.max_epoch - 1))
    columns["batch_lengths"] = [len(batch) for batch in batches]
    columns["batch_phase"] = [batch[0][1] for batch in batches]
    columns["sampler_len"] = [len(batches)]
    assert v.tensors.keys() <= columns.keys() | rates.keys()
    for name in columns.keys() & v.tensors.keys():
        assert v[name].tolist() == [list(each) if isinstance(each, tuple) else each for each in columns[name]], name
    for name, values in rates.items():
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), v[name], rtol=1e-12, atol=0)


def test_relative_cost_is_the_share_of_pixels():
    """Kinetics as in the paper, the long cycle alone, Charades; and a schedule that is summed up by hand."""
    assert MultigridSchedule(**KINETICS).relative_cost() == pytest.approx(0.2915, abs=5e-4)
    assert MultigridSchedule(**KINETICS, short_cycle=False).relative_cost() == pytest.approx(0.455, abs=1e-3)
    charades = MultigridSchedule(batch_size=16, num_frames=64, crop_size=224, lr_steps=(0, 41, 49), max_epoch=57)
    assert charades.relative_cost() == pytest.approx(0.2881, abs=5e-4)
    short = schedule(long_cycle=False, epoch_factor=1.0)  # 32 clips at 16, 16 at 23, 8 at 32
    assert short.relative_cost() == pytest.approx((32 * 16**2 + 16 * 23**2 + 8 * 32**2) / 56 / 32**2, rel=1e-12)
    assert schedule(long_cycle=False, short_cycle=False).relative_cost() == 1.0


def test_kinetics_needs_3_4_times_fewer_iterations():
    clips = 240_000
    base = MultigridSchedule(**KINETICS, long_cycle=False, short_cycle=False).iterations(clips)
    assert base == 239 * 3750
    assert base / MultigridSchedule(**KINETICS).iterations(clips) == pytest.approx(3.42, abs=0.01)


def test_all_long_shapes_of_a_stage_get_equally_many_iterations():
    """Up to rounding to whole epochs; the cost of a step is about the baseline's."""
    made = MultigridSchedule(**KINETICS, epoch_factor=15.0)
    starts = [0, *(end for _, _, end in made.entries)]
    clips, stages = 10_000, {}
    for (stage, (b, frames, crop), end), start in zip(made.entries[:-1], starts, strict=False):
        sizes = made.short_cycle_batch_sizes(start)
        stages.setdefault(stage, []).append((end - start) * clips / (sum(sizes) / 3))
        assert b * frames * crop**2 == pytest.approx(32 * 224**2, rel=0.05)
    assert len(stages) == 3
    for counts in stages.values():
        assert max(counts) / min(counts) < 1.05


def test_an_end_on_a_half_is_rounded_to_even():
    """71 epochs stretched by 0.5 end at 35.5; operations in another order than the authors' fall below it, and end at 35."""
    factors = ((0.125, 1), (0.5, math.sqrt(0.5)), (1, 1))
    how = {"num_frames": 10, "crop_size": 30, "lr_steps": (0, 3, 40, 45, 51), "max_epoch": 71, "long_cycle_factors": factors}
    assert schedule(**how, short_cycle=False, epoch_factor=0.5).max_epoch == round(71 * 0.5) == 36


def test_without_the_short_cycle_all_phases_are_the_last_one():
    made = schedule(short_cycle=False)
    assert made.entries
    for epoch in range(made.max_epoch):
        batch, _, crop = made.shape(epoch)
        assert made.short_cycle_batch_sizes(epoch) == (batch, batch, batch)
        assert [made.crop(epoch, phase) for phase in range(3)] == [crop] * 3


def test_without_cycles_it_is_the_baseline():
    made = schedule(long_cycle=False, short_cycle=False, base_lr=0.5)
    assert (made.entries, made.max_epoch, made.lr_steps) == ([], 5, [0, 3, 4])
    assert [made.lr(e) for e in (0, 2.9, 3, 4.5, 5)] == pytest.approx([0.5, 0.5, 0.05, 0.005, 0.005])
    assert made.shape(4) == (8, 8, 32)


def test_the_rate_is_that_of_the_stage_times_the_batch():
    """`base_lr · gamma^stage · b`; within the last entry the first half keeps the rate of the entry before."""
    made = MultigridSchedule(**KINETICS, base_lr=0.1)
    starts = [0, *(end for _, _, end in made.entries)]
    for (stage, (b, *_), end), start in zip(made.entries[:-1], starts, strict=False):
        assert [made.lr(start), made.lr(end - 0.01)] == pytest.approx([0.1 * 0.1**stage * b] * 2)
    *_, (stage, (b, *_), start), (last, shape, end) = made.entries
    assert (b, shape, last) == (1, (1, 32, 224), stage + 1)
    half = (start + end) // 2
    assert [made.lr(e) for e in (start, half - 0.5, half, end)] == pytest.approx([0.1 * 0.1**stage] * 2 + [0.1 * 0.1**last] * 2)


def test_short_clips_may_be_read_at_a_larger_stride():
    """From `r` to `r · (T // t)`, so that they span what a whole clip spans."""
    made = schedule(sampling_rate=3)
    rates = {made.shape(e)[1]: made.max_sampling_rate(e) for e in range(made.max_epoch)}
    assert rates == {2: 12, 4: 6, 8: 3}


def test_the_short_cycle_alone_stretches_the_baseline():
    made = schedule(long_cycle=False)
    assert (made.entries, made.max_epoch, made.lr_steps) == ([], 7, [0, 4, 6])  # 1.5 times, rounded down
    assert [made.lr(e) for e in (3.9, 4, 6)] == pytest.approx([1, 0.1, 0.01])


def test_warm_up_ends_at_the_rate_of_the_schedule():
    made = schedule(long_cycle=False, short_cycle=False, base_lr=0.5, warmup_epochs=2.0, warmup_start_lr=0.1)
    assert [made.lr(e) for e in (0, 0.5, 1, 2)] == pytest.approx([0.1, 0.2, 0.3, 0.5])
    late = schedule(long_cycle=False, short_cycle=False, warmup_epochs=3.5)  # the rate at 3.5 is already divided by 10
    assert late.lr(1.75) == pytest.approx(0.05)


def test_the_record_is_json():
    made = schedule()
    record = json.loads(json.dumps(made.to_dict()))
    assert record["options"]["lr_steps"] == [0, 3, 4]
    assert record["max_epoch"] == made.max_epoch
    assert record["relative_lrs"] == made.relative_lrs
    assert record["entries"][0][1] == list(made.entries[0][1])
    options = record["options"]
    again = MultigridSchedule(**options)
    assert again.to_dict() == made.to_dict()
    assert "entries" in repr(made)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("clips", [1, 7, 56, 57, 100, 400, 517])
def test_lengths_are_those_of_the_batches(clips, drop_last):
    """Of each epoch and of the whole run, where each clip is seen once an epoch."""
    made = schedule()
    sampler = MultigridBatchSampler(SequentialSampler(range(clips)), made, drop_last=drop_last)
    whole = MultigridBatchSampler(SequentialSampler(range(clips)), made, drop_last=drop_last, whole_run=True)
    steps = []
    for epoch in range(made.max_epoch):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        indices = [index for batch in batches for index, _, _ in batch]
        assert indices == list(range(clips))[: len(indices)]
        assert drop_last or len(indices) == clips
        steps += batches
    assert list(whole) == steps
    assert len(whole) == len(steps) == made.iterations(clips, drop_last=drop_last)
    starts = [whole.epoch_of(step) for step in range(len(steps) + 1)]
    assert starts == sorted(set(starts))
    assert starts[-1] == made.max_epoch
    for step, batch in enumerate(steps):
        epoch = int(starts[step])
        assert batch[0][1] == made.shape(epoch)[1]
        assert batch[0][2] in {made.crop(epoch, phase) for phase in range(3)}
    if clips == 400 and not drop_last:  # epochs of 2 batches and more
        assert starts[1] == pytest.approx(1 / batches_of(made, 0, clips))


def batches_of(made, epoch, clips):
    sizes, left, count = made.short_cycle_batch_sizes(epoch), clips, 0
    while left > 0:
        left -= sizes[count % 3]
        count += 1
    return count


def test_the_items_say_the_shape_to_worker_processes():
    made = schedule()
    clips = torch.arange(60 * 8.0).view(60, 1, 8, 1, 1).expand(60, 1, 8, 32, 32)
    sampler = MultigridBatchSampler(range(60), made)
    data = GridDataset([(clip, i) for i, clip in enumerate(clips)])
    seen = {}
    for epoch in (0, made.max_epoch - 1):
        sampler.set_epoch(epoch)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=1 if epoch == 0 else 0)
        seen[epoch] = [(tuple(x.shape), labels.tolist()) for x, labels in loader]
    first = made.short_cycle_batch_sizes(0)
    assert seen[0][0][0] == (min(60, first[0]), 1, made.shape(0)[1], made.crop(0, 0), made.crop(0, 0))
    assert [shape[0] for shape, _ in seen[made.max_epoch - 1]] == [32, 16, 8, 4]
    assert [i for _, labels in seen[made.max_epoch - 1] for i in labels] == list(range(60))


def test_a_random_sampler_has_the_same_orders_again_in_one_pass():
    """Whatever else draws random numbers meanwhile: a resumed run sees the batches of the first."""
    made = schedule()
    runs = []
    for noise in (0, 3):
        torch.manual_seed(5)
        random = RandomSampler(range(50))
        sampler = MultigridBatchSampler(random, made, whole_run=True)
        runs.append([(torch.rand(noise), batch)[1] for batch in sampler])
        assert random.generator is None
    assert runs[0] == runs[1]
    epochs = [[i for i, *_ in runs[0][0]], [i for i, *_ in next(b for b in runs[0][1:] if b[0][2] == runs[0][0][0][2])]]
    assert epochs[0] != epochs[1]
    torch.manual_seed(6)
    assert list(MultigridBatchSampler(RandomSampler(range(50)), made, whole_run=True)) != runs[0]


def test_set_epoch_reaches_the_sampler():
    class Ordered(list):
        epochs = []  # noqa: RUF012

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    made, inner = schedule(), Ordered(range(9))
    MultigridBatchSampler(inner, made).set_epoch(2)
    whole = MultigridBatchSampler(inner, made, whole_run=True)
    whole.set_epoch(1)  # the trainer's pass; epochs are the sampler's own
    assert inner.epochs == [2]
    list(whole)
    assert inner.epochs == [2, *range(made.max_epoch)]


def test_resample_is_a_stride_and_a_bilinear_resize():
    clips = torch.rand(2, 3, 8, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = resample(clips, 3, 5, stride=2, offset=1)
    want = clips[:, :, [1, 3, 5]]  # half the size: the mean of 2 x 2 pixels
    want = (want[..., ::2, ::2] + want[..., 1::2, ::2] + want[..., ::2, 1::2] + want[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(resample(clips, 8, 10), clips)
    assert resample((255 * clips).byte(), 1, 20).dtype == torch.uint8
    assert resample(clips[:0], 2, 4).shape == (0, 3, 2, 4, 4)


def test_a_dataset_gives_what_the_transform_makes():
    data = GridDataset(["a", "b"], lambda item, frames, crop: f"{item}{frames}x{crop}")
    assert (data[(1, 4, 16)], len(data)) == ("b4x16", 2)
    clip = torch.rand(3, 8, 12, 12)
    assert torch.equal(GridDataset([clip])[(0, 2, 6)], resample(clip[None], 2, 6)[0])


def test_wrong_input_is_refused():
    clip = torch.zeros(1, 1, 4, 8, 8)
    long_only = {"short_cycle": False}
    refuses(
        [
            *[
                (ValueError, name, lambda name=name: schedule(**{name: 0}))
                for name in ("batch_size", "num_frames", "crop_size")
            ],
            *[(ValueError, name, lambda name=name: schedule(**{name: 0})) for name in ("bn_base_size", "num_devices", "gamma")],
            *[(ValueError, name, lambda name=name: schedule(**{name: -1})) for name in ("sampling_rate", "warmup_epochs")],
            *[
                (ValueError, "lr_steps", lambda steps=steps: schedule(lr_steps=steps))
                for steps in ((1, 3), (0, 3, 3), (), "03", 3)
            ],
            (ValueError, "at least two entries", lambda: schedule(lr_steps=(0,))),
            (ValueError, "above the last of lr_steps, 4; got 4", lambda: schedule(max_epoch=4)),
            (ValueError, "epoch_factor", lambda: schedule(epoch_factor=0)),
            (ValueError, "leaves no epoch", lambda: schedule(epoch_factor=0.01)),
            (ValueError, "the last of them (1, 1)", lambda: schedule(long_cycle_factors=((0.5, 0.5),))),
            (ValueError, "in (0, 1]", lambda: schedule(long_cycle_factors=((0.5, 1.5), (1, 1)))),
            (ValueError, "in (0, 1]", lambda: schedule(long_cycle_factors=())),
            (ValueError, "short_cycle_factors", lambda: schedule(short_cycle_factors=(0.5,))),
            (ValueError, "short_cycle_factors", lambda: schedule(short_cycle_factors=(0.0, 0.5))),
            (ValueError, "0 frames", lambda: schedule(long_cycle_factors=((0.01, 1), (1, 1)), **long_only)),
            (ValueError, "batches of 0 clips", lambda: schedule(long_cycle_factors=((1, 0.25), (1, 1)))),
            (ValueError, "epoch", lambda: schedule().shape(99)),
            (ValueError, "epoch", lambda: schedule().lr(-0.5)),
            (ValueError, "phase", lambda: schedule().crop(0, 3)),
            (ValueError, "num_clips", lambda: schedule().iterations(0)),
            (ValueError, "three positive ints; got (4, 2)", lambda: ShortCycleBatchSampler(range(4), (4, 2))),
            (ValueError, "three positive ints", lambda: ShortCycleBatchSampler(range(4), (4, 2, 0))),
            (TypeError, "sampler", lambda: ShortCycleBatchSampler(iter([1]), (4, 2, 1))),
            (TypeError, "sampler", lambda: MultigridBatchSampler(5, schedule())),
            (ValueError, "step", lambda: MultigridBatchSampler(range(8), schedule()).epoch_of(10_000)),
            (
                NotImplementedError,
                "bn_base_size <= 4",
                lambda: small_batches().set_epoch(small_batches().schedule.max_epoch - 1),
            ),
            (NotImplementedError, "2 devices", lambda: list(small_batches(whole_run=True))),
            (ValueError, "7 frames", lambda: resample(clip.repeat(1, 1, 2, 1, 1)[:, :, :7], 4, 8, stride=2, offset=1)),
            (ValueError, "(N, C, T, H, W)", lambda: resample(clip[0], 4, 8)),
            (ValueError, "int64", lambda: resample(clip.long(), 4, 8)),
            (ValueError, "crop", lambda: resample(clip, 4, 0)),
            (TypeError, "(index, frames, crop)", lambda: GridDataset([clip[0]])[0]),
            (TypeError, "(C, T, H, W)", lambda: GridDataset([clip])[(0, 2, 4)]),
            (TypeError, "str", lambda: GridDataset(["clip"])[(0, 2, 4)]),
        ]
    )


def small_batches(**how):
    return MultigridBatchSampler(range(8), schedule(batch_size=4), **how)


def test_the_length_of_the_authors_sampler():
    """It counts with the mean size; the batches themselves may be fewer."""
    sampler = ShortCycleBatchSampler(range(16), (16, 8, 4))
    assert (len(list(sampler)), len(sampler)) == (1, 2)
    assert len(sampler) == math.ceil(16 / (28 / 3))
    assert len(ShortCycleBatchSampler(range(27), (16, 8, 4), drop_last=True)) == 2


def test_everything_is_reached_from_one_module():
    from lowdim.train.multigrid_trainer import MultigridCallback

    assert multigrid.MultigridCallback is MultigridCallback
    assert all(getattr(multigrid, name).__doc__ for name in multigrid.__all__)
