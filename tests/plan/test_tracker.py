"""The tracker against torch's own, and by kind."""

import pytest
import torch
from torch import nn

from lowdim.plan import measure
from lowdim.plan.fake import fake_mode
from lowdim.plan.tracker import Tracker, tensors_in, unique_bytes

SIZE = 64 * 64 * 4


def step(model, optimizer, x):
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def make():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return model, torch.optim.AdamW(model.parameters(), fused=True), torch.ones(32, 64)


def tracked(steps=1):
    model, optimizer, x = make()
    tracker = Tracker()
    tracker.add(model.parameters(), "weights")
    tracker.add([x], "activations")
    with tracker:
        for _ in range(steps):
            step(model, optimizer, x)
    return tracker


@pytest.mark.parametrize("steps", [1, 2])
def test_fake_and_real_tensors_and_the_allocator_agree(steps):
    with fake_mode():
        fake = tracked(steps).peaks["start"].total
    real = tracked(steps).peaks["start"].total
    model, optimizer, x = make()
    allocated = measure(lambda: [step(model, optimizer, x) for _ in range(steps)], model=model, tensors=[x]).bytes
    assert fake == real
    assert fake == pytest.approx(allocated, abs=64)  # a few scalars inside kernels


def test_torchs_own_tracker_agrees():
    module = pytest.importorskip("torch.distributed._tools.mem_tracker")
    with fake_mode():
        own = tracked().peaks["start"].total
        model, optimizer, x = make()
        other = module.MemTracker()
        other.track_external(model, optimizer, x)
        with other:
            step(model, optimizer, x)
    (peak,) = other.get_tracker_snapshot("peak").values()
    assert own == peak["Total"]


def test_relabelling_reaches_back_into_the_peak():
    tracker = Tracker()
    with tracker:
        a = torch.ones(64, 64)
        b = torch.ones(64, 64)
        del b
        tracker.add([a], "optimizer_state")
        late = torch.ones(8, 8)
        tracker.add([late], "gradients")
    peak = tracker.peaks["start"]
    assert peak.total == 2 * SIZE
    assert peak.by_kind == {
        "weights": 0, "gradients": 0, "optimizer_state": SIZE, "activations": SIZE, "workspace": 0
    }  # fmt: skip


def test_views_and_in_place_operations_take_nothing():
    x = torch.ones(64, 64)
    tracker = Tracker()
    tracker.add([x], "activations")
    with tracker:
        x.view(-1)[3:].add_(1).t()
    assert tracker.peaks["start"].total == SIZE


def test_stretches_are_kept_apart():
    tracker = Tracker()
    with tracker:
        tracker.enter("one")
        x = torch.ones(64, 64)
        tracker.enter("two")
        y = torch.ones(64, 64)
        del x, y
        tracker.enter("three")
    totals = {name: peak.total for name, peak in tracker.peaks.items() if name != "start"}
    assert totals == {"one": SIZE, "two": 2 * SIZE, "three": 0}


def test_sizes_are_rounded_up_to_blocks():
    tracker = Tracker(granularity=512)
    with tracker:
        x = torch.ones(1)
    assert tracker.total == 512
    del x
    assert tracker.total == 0


def test_helpers():
    a, b = torch.ones(4), torch.ones(2)
    assert tensors_in({"x": [a, (b, 3)], "y": None}) == [a, b]
    assert unique_bytes([a, a[:2], b]) == 24
