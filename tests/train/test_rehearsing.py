"""Alarms and the rehearsal of saving."""

import random

import pytest
import torch
from torch import nn

from lowdim.optim import GaLore, param_groups
from lowdim.train import rehearsing
from lowdim.train.rehearsing import rehearse_saving
from lowdim.train.spikes import SpikeAlarm


def test_noise_is_no_spike_and_a_jump_is():
    draw = random.Random(0)
    alarm = SpikeAlarm()
    falling = [4.0 * 0.995**step + draw.gauss(0, 0.05) for step in range(400)]
    assert not [step for step, loss in enumerate(falling) if alarm.spike(loss)]
    assert alarm.spike(falling[-1] + 1.0)
    assert alarm.spike(falling[-1] + 1.0), "a spike does not become usual"
    assert not alarm.spike(falling[-1])


def test_spikes_do_not_move_the_alarm():
    alarm = SpikeAlarm(patience=4)
    for loss in (3.0, 2.9, 3.1, 2.8, 2.9):
        alarm.spike(loss)
    usual = alarm.threshold()
    assert [alarm.spike(9.0) for _ in range(20)] == [True] * 20
    assert alarm.threshold() == usual


def test_the_first_losses_are_never_called_spikes():
    alarm = SpikeAlarm(patience=5)
    assert not any(alarm.spike(loss) for loss in (1.0, 50.0, 2.0, 70.0, 3.0))


def test_a_constant_loss_leaves_room():
    alarm = SpikeAlarm(patience=3)
    assert not any(alarm.spike(2.0) for _ in range(10))
    assert not alarm.spike(2.3)
    assert alarm.spike(2.5)


def test_a_resumed_run_remembers():
    losses = [3.0 + 0.01 * (i % 5) for i in range(30)]
    alarm = SpikeAlarm()
    alarm.recall(losses)
    assert alarm.spike(9.0)


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def optimizer_of(model, **options):
    return GaLore(param_groups(model, rank=4), **{"lr": 0.01, **options})


@pytest.mark.parametrize("inner", ["adamw", "adamw8bit", "adafactor"])
def test_a_rehearsal_leaves_no_trace(inner, tmp_path):
    model = net()
    optimizer = optimizer_of(model, inner=inner)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rehearse_saving(model, optimizer, None, tmp_path / "not" / "yet", 3)
    assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "not").exists()


def test_a_disk_without_room(tmp_path, monkeypatch):
    def left(number):
        monkeypatch.setattr(rehearsing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": number})())

    model = net()
    left(5_000)
    with pytest.raises(OSError, match=r"it needs .* are free\); free some space, or set save_steps to 0"):
        rehearse_saving(model, optimizer_of(model), None, tmp_path, 3)
    left(15_000)
    assert "3 checkpoints of" in rehearse_saving(model, optimizer_of(model), None, tmp_path, 3)
    left(10**6)
    assert rehearse_saving(model, optimizer_of(model), None, tmp_path, 3) is None


def test_a_state_that_does_not_come_back(tmp_path):
    class Forgetful(GaLore):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            for state in self.state.values():
                state["step"] = 0

    model = net()
    with pytest.raises(ValueError, match="a state changed when it was saved and loaded again"):
        rehearse_saving(model, Forgetful(param_groups(model, rank=4)), None, tmp_path, 3)


def test_a_companion_goes_through_it_too(tmp_path):
    class Companion:
        def __init__(self):
            self.value, self.loaded = torch.ones(3), 0

        def state_dict(self):
            return {"value": self.value, "list": [1, "a"]}

        def load_state_dict(self, state):
            self.loaded += 1
            self.value = state["value"]

    companion = Companion()
    rehearse_saving(net(), torch.optim.AdamW(net().parameters()), companion, tmp_path, 3)
    assert companion.loaded == 1
