import time

import torch

from lowdim.plan.fake import fake_mode
from lowdim.plan.tracker import Tracker
from lowdim.plan.work import Speed, Work, _seconds, speed


def count(run, at=None):
    work = Work(at or Speed(1e9, 1e9, 0.0))
    work.on = True
    with fake_mode():
        x = torch.ones(64, 32)
        with Tracker(work=work.count):
            run(x)
    return work


def test_a_product_counts_its_multiplications_and_additions():
    assert count(lambda x: x @ x.T).flops == 2 * 64 * 32 * 64


def test_the_slower_of_arithmetic_and_traffic_counts():
    product = 2 * 64 * 32 * 64
    traffic = 4 * (64 * 32 * 2 + 64 * 64)
    assert count(lambda x: x @ x.T, Speed(1e6, 1e12, 0)).seconds == product / 1e6
    assert count(lambda x: x @ x.T, Speed(1e12, 1e6, 0)).seconds == traffic / 1e6


def test_views_cost_nothing_and_launches_something():
    assert count(lambda x: x.view(-1), Speed(1, 1, 1)).seconds == 0
    assert count(lambda x: x + 1, Speed(1e30, 1e30, 2.0)).seconds == 2.0


def test_attention_on_a_cpu_is_counted():
    def run(x):
        q = x.view(1, 2, 32, 32).requires_grad_()
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    forward = 2 * 2 * 32 * 32 * (32 + 32)
    assert count(run).flops == forward + forward * 5 // 2


def test_speed_is_measured_once():
    first = speed(torch.float32, "cpu", 1)
    assert first is speed(torch.float32, "cpu", 1)
    assert first.flops > 1e6
    assert first.bytes > 1e6
    assert 0 < first.launch < 0.1


def test_a_call_slower_than_the_budget_is_still_timed():
    assert 0.01 <= _seconds(lambda: time.sleep(0.01), "cpu", 0.0) < 10
