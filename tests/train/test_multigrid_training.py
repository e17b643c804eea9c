"""Multigrid training: a plain loop and `transformers.Trainer` take the same steps, also after an interruption."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler

from lowdim.linalg import stream
from lowdim.testing.agreement import refuses
from lowdim.train.multigrid import (
    GridDataset,
    MultigridBatchSampler,
    MultigridCallback,
    MultigridSchedule,
    SubBatchNorm,
    set_bn_splits,
)

CLIPS = 56
HOW = {"batch_size": 4, "num_frames": 4, "crop_size": 8, "lr_steps": (0, 3), "max_epoch": 4, "bn_base_size": 4}
LR = 0.05


class Net(nn.Module):
    """A convolution, sub-batch norm, dropout, the mean over time and space, a head."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.conv, self.norm, self.head = nn.Conv3d(1, 4, 3, padding=1), SubBatchNorm(4), nn.Linear(4, 2)
        self.seen = []

    def forward(self, clips, labels):
        if self.training:
            self.seen.append((tuple(clips.shape), self.norm.num_splits))
        x = F.dropout(F.relu(self.norm(self.conv(clips))).mean((2, 3, 4)), self.dropout, self.training)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def data():
    labels = torch.arange(CLIPS) % 2
    clips = torch.randn(CLIPS, 1, 4, 8, 8, generator=stream(0, "clips")) * (1 + labels.view(-1, 1, 1, 1, 1))
    return GridDataset(list(zip(clips, labels, strict=True)))


def collate(items):
    clips, labels = zip(*items, strict=True)
    return {"clips": torch.stack(clips), "labels": torch.stack(labels)}


def model(**how):
    torch.manual_seed(1)
    return Net(**how)


def sampler_of(schedule, **how):
    return MultigridBatchSampler(RandomSampler(range(CLIPS), generator=torch.Generator().manual_seed(2)), schedule, **how)


def by_hand(schedule):
    """The loop of the docs page."""
    net, sampler = model(), sampler_of(schedule)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    loader, rates = DataLoader(data(), batch_sampler=sampler, collate_fn=collate), []
    for epoch in range(schedule.max_epoch):
        sampler.set_epoch(epoch)
        set_bn_splits(net, schedule.bn(epoch)[1])
        for done, batch in enumerate(loader):
            rates.append(LR * schedule.lr(epoch + done / len(sampler)))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            optimizer.zero_grad()
            net(**batch)["loss"].backward()
            optimizer.step()
    return net, rates


def trainer(folder, schedule, net=None, **changes):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    sampler = sampler_of(schedule, whole_run=True)
    loader = DataLoader(data(), batch_sampler=sampler, collate_fn=collate)

    class Multigrid(Trainer):
        def get_train_dataloader(self):
            return loader

        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9)
            return self.optimizer

    class Rates(TrainerCallback):
        def __init__(self):
            self.rates = []

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    rates = Rates()
    how = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "max_grad_norm": 0, "learning_rate": LR, "seed": 3}
    how |= {"report_to": [], "use_cpu": True, "save_steps": 5, "save_strategy": "steps", "disable_tqdm": True, **changes}
    made = Multigrid(
        model=net or model(),
        args=TrainingArguments(output_dir=str(folder), **how),
        train_dataset=data(),
        callbacks=[MultigridCallback(schedule, sampler), rates],
    )
    return made, rates.rates


def test_a_loop_follows_the_schedule():
    schedule = MultigridSchedule(**HOW)
    net, rates = by_hand(schedule)
    assert len(net.seen) == schedule.iterations(CLIPS)
    step = 0
    for epoch in range(schedule.max_epoch):
        sizes, left = schedule.short_cycle_batch_sizes(epoch), CLIPS
        while left:
            shape, parts = net.seen[step]
            assert shape[2] == schedule.shape(epoch)[1]
            assert shape[0] in {min(size, left) for size in sizes}
            assert parts == schedule.bn(epoch)[1]
            left, step = left - shape[0], step + 1
    assert max(rates) == LR * max(schedule.relative_lrs)
    assert rates[-1] == pytest.approx(LR * 0.1)


def test_the_trainer_takes_the_steps_of_the_loop(tmp_path):
    """To the bit: shapes, parts of batch norm, rates, parameters and statistics."""
    schedule = MultigridSchedule(**HOW)
    want, rates = by_hand(schedule)
    made, got = trainer(tmp_path, schedule)
    made.train()
    assert made.model.seen == want.seen
    assert got == rates
    for (name, a), b in zip(made.model.state_dict().items(), want.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_resumed_run_is_the_same_run(tmp_path):
    """From a checkpoint in the middle, into a model with another number of parts."""
    schedule = MultigridSchedule(**HOW)
    whole, rates = trainer(tmp_path, schedule, net=model(dropout=0.1))
    whole.train()
    again, rest = trainer(tmp_path, schedule, net=Net(dropout=0.1))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.model.seen == whole.model.seen[5:]
    assert rest == rates[5:]
    for (name, a), b in zip(again.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_would_not_follow_the_schedule_is_refused(tmp_path):
    schedule = MultigridSchedule(**HOW)
    whole = sampler_of(schedule, whole_run=True)
    uneven = MultigridSchedule(**{**HOW, "batch_size": 6})  # three clips of 6, in parts of 4: 18 clips in 4 parts
    small = MultigridSchedule(**{**HOW, "bn_base_size": 8})

    def begun(schedule=schedule, net=None, steps=1, **changes):
        args = SimpleNamespace(world_size=1, gradient_accumulation_steps=1, lr_scheduler_type="constant")
        args.__dict__.update(changes)
        callback = MultigridCallback(schedule, sampler_of(schedule, whole_run=True))
        callback.on_train_begin(args, SimpleNamespace(max_steps=steps), None, model=net or Net())

    def trained(**changes):
        trainer(tmp_path, schedule, **changes)[0].train()

    begun()
    begun(uneven, net=nn.Linear(2, 2))  # no batch norm: nothing to divide
    refuses(
        [
            (NotImplementedError, "one process; got 2", lambda: begun(world_size=2)),
            (ValueError, "gradient_accumulation_steps must be 1", lambda: begun(gradient_accumulation_steps=2)),
            (
                ValueError,
                "lr_scheduler_type must be 'constant'",
                lambda: trainer(tmp_path, schedule, lr_scheduler_type="linear")[0].train(),
            ),
            (ValueError, "num_train_epochs=1", lambda: trainer(tmp_path, schedule, num_train_epochs=2)[0].train()),
            (ValueError, "layer norm: in epoch 0 a batch of", lambda: begun(uneven)),
            (NotImplementedError, "bn_base_size <= 4", lambda: begun(small)),
            (ValueError, "whole_run=True", lambda: MultigridCallback(schedule, sampler_of(schedule))),
            (ValueError, "it has another", lambda: MultigridCallback(MultigridSchedule(**HOW), whole)),
            (TypeError, "range", lambda: MultigridCallback(schedule, range(4))),
        ]
    )
