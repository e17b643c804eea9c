"""What runs will take, from what earlier ones took around their steps and in them."""

import pytest

from lowdim.comparison.clock import Clock


def test_setting_up_is_not_taken_for_steps():
    clock = Clock(limit=100.0)
    clock.note("lora", 5.0, 3, per_step=0.1)  # 4.7 s around the steps
    assert clock.estimate([("lora", 60)]) == pytest.approx(4.7 + 60 * 0.1)
    clock.note("lora", 8.0, 20, per_step=0.2)  # 4 s around them
    assert clock.estimate([("lora", 10)]) == pytest.approx((4.7 + 4.0) / 2 + 10 * (0.3 + 4.0) / 23)


def test_without_the_time_of_a_step_all_counts_for_the_steps():
    clock = Clock()
    clock.note("lora", 6.0, 2)
    assert clock.estimate([("lora", 4)]) == pytest.approx(12.0)


def test_a_method_that_has_not_run_takes_what_all_took():
    clock = Clock()
    assert clock.estimate([("full", 7)]) == 0.0
    clock.note("lora", 3.0, 10, per_step=0.1)
    clock.note("lamda", 6.0, 10, per_step=0.3)
    assert clock.estimate([("full", 5)]) == pytest.approx((2.0 + 3.0) / 2 + 5 * (1.0 + 3.0) / 20)


def test_runs_of_an_earlier_command_tell_the_time_of_a_step_alone():
    clock = Clock()
    clock.note_rate("lora", 0.5, 10)
    assert clock.estimate([("lora", 4)]) == pytest.approx(2.0)
    clock.note("lora", 4.0, 10, per_step=0.1)
    assert clock.estimate([("lora", 4)]) == pytest.approx(3.0 + 4 * (5.0 + 1.0) / 20)


def test_lanes_share_the_runs_but_no_run_is_shared():
    clock = Clock(lanes=2)
    clock.note("lora", 1.0, 1, per_step=1.0)
    assert clock.estimate([("lora", 2), ("lora", 4)]) == pytest.approx(4.0)
    assert clock.estimate([("lora", 2)] * 6) == pytest.approx(6.0)


def test_the_search_has_a_part_of_the_limit():
    clock = Clock(limit=1000.0)
    clock.note("lora", 10.0, 10, per_step=1.0)
    assert clock.has_room([("lora", 550)], searching=True)
    assert not clock.has_room([("lora", 650)], searching=True)
    assert clock.has_room([("lora", 650)])
    assert not clock.has_room([("lora", 650)], after=400.0)
    assert Clock().has_room([("lora", 10**9)])
