"""Shared by the tests of `lowdim compare`: a comparison by settings, and what to compare of two."""

import io
import os
import signal

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import lowdim
from lowdim.comparison import compare
from lowdim.comparison.live import LiveTable
from lowdim.comparison.setting_up import make_contest
from lowdim.comparison.workbench import workbench
from lowdim.files import read_json
from lowdim.train import own_task
from lowdim.train.metrics import METRICS

METHODS = ("linear-probe", "lora", "full", "lamda", "monarch")
ACCURACY, PERPLEXITY = METRICS["accuracy"], METRICS["perplexity"]
#: What a clock decides, and not the seed.
TIMED = {"seconds_per_step", "created", "seconds", "command"}
#: What of a comparison says who trained it.
WHO = {"settings", "command"}


def run(settings, folder, **options):
    """Compares; returns the result and what was said."""
    said = io.StringIO()
    result = compare(settings, folder, console=Console(file=said, width=200), **options)
    return result, said.getvalue()


def interrupted_after(ticks, settings, folder, monkeypatch):
    """A comparison that ends at this step, counted over all runs."""
    left = [ticks]
    original = LiveTable.tick

    def tick(self):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(LiveTable, "tick", tick)
        with pytest.raises(KeyboardInterrupt):
            run(settings, folder)


def numbers(value):
    """A result without what the clock decides."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in TIMED}
    return [numbers(v) for v in value] if isinstance(value, list) else value


def by_name(result):
    """The methods that were compared; rows of what was never trained are no candidates."""
    return {row["name"]: row for row in result["methods"] if not row.get("trivial")}


def finals(result):
    """The rows that were trained with new seeds."""
    return {name: row for name, row in by_name(result).items() if row["status"] == "ok"}


def records(folder, pattern="*"):
    return {p.parent.relative_to(folder / "runs").as_posix(): read_json(p) for p in (folder / "runs").rglob("run.json")
            if p.parent.match(pattern)}  # fmt: skip


def rebuilt(settings, folder):
    bench = workbench(settings)
    return make_contest(settings, bench, folder, lambda kind, line: None)


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def same(folder, other, result, expected):
    """Check that two comparisons found the same, and wrote the same files."""
    for part in set(expected) - WHO - TIMED:
        assert numbers(result[part]) == numbers(expected[part]), part
    assert numbers(records(folder)) == numbers(records(other))
    assert names(folder) == names(other)


def network():
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 4))


def quadrants(before_loss=lambda: None):
    """A task of functions that only this process knows."""
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        before_loss()
        return cross_entropy(model(batch[0]), batch[1])

    return own_task(
        TensorDataset(x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()),
        loss=loss,
        values=lambda model, batch: (model(batch[0]).argmax(-1) == batch[1]).float(),
        metric="accuracy",
        head="2",
        name="quadrants",
    )


def own(out, task, **changes):
    usual = {"methods": "full,lora", "steps": 4, "rates": 1, "sizes": 1, "seeds": 1, "pretrained": False, "model": network}
    return lowdim.compare(**{**usual, "task": task, "out": out, **changes})


def dies(first_time=None):
    """A function that ends a process that is not the first one; with a path, only as long as there is no such file."""
    home = os.getpid()

    def die():
        if os.getpid() != home and (first_time is None or not first_time.exists()):
            if first_time is not None:
                first_time.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return die
