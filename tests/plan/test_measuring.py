"""The allocator's own record of what code takes."""

import pytest
import torch
from torch import nn

from lowdim.plan import PeakMemory, measure

SIZE = 64 * 64 * 4


def test_peak_is_not_the_sum_and_not_the_end():
    def run():
        a = torch.ones(64, 64)
        b = torch.ones(64, 64)
        del a
        c = torch.ones(64, 64)
        return b + c

    assert measure(run).bytes == 3 * SIZE


def test_what_is_held_counts_once():
    layer = nn.Linear(64, 64, bias=False)
    tied = nn.ModuleList([layer, layer])
    layer(torch.ones(1, 64)).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    held = measure(lambda: None, model=tied, optimizer=optimizer, tensors=[layer.weight[:2]])
    assert held.bytes == held.start_bytes == 4 * SIZE + 4  # weight, gradient, two moments, and the step counter


def test_a_wrapped_optimizer_is_looked_into():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    weight = nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones(64, 64)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    assert measure(lambda: None, optimizer=Wrapper(optimizer)).bytes == 2 * SIZE + 4


def test_an_earlier_recording_does_not_count():
    kept = []
    first = measure(lambda: kept.append(torch.ones(640, 640)))
    second = measure(lambda: torch.ones(64, 64))
    assert (first.bytes, second.bytes) == (100 * SIZE, SIZE)
    third = measure(kept.clear)
    assert third.bytes == 0


def test_the_hidden_buffers_of_a_kernel_are_seen():
    matrix = torch.randn(64, 64)
    outputs = 2 * SIZE + 64 * 4
    assert measure(lambda: torch.linalg.svd(matrix)).bytes > outputs


def test_as_context_manager():
    memory = PeakMemory()
    with pytest.raises(RuntimeError, match="after the with-block"):
        _ = memory.bytes
    with memory:
        torch.ones(64, 64)
    assert memory.bytes == SIZE
    assert memory.measured.to_dict() == {"bytes": SIZE, "start_bytes": 0, "device": "cpu"}


def test_an_error_inside_comes_through_and_the_next_measurement_works():
    with pytest.raises(ZeroDivisionError), PeakMemory():
        _ = torch.ones(64, 64) / (1 // 0)
    assert measure(lambda: torch.ones(64, 64)).bytes == SIZE


def test_measuring_is_silent():
    import subprocess
    import sys

    code = "import torch; from lowdim.plan import measure; measure(lambda: torch.ones(3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
