import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, RMSprop
from torch.optim.lr_scheduler import LambdaLR, StepLR

from lowdim.diagnose import TuneSGD, heavy_ball, tune_sgd
from lowdim.testing.agreement import refuses
from lowdim.testing.result_case import ValueCase

CURVATURES = torch.tensor([4.0, 1.0, 0.5, 1e-5, -3.0])


def quadratic():
    """A loss with these curvatures, and SGD over two groups."""
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([1.0, 1.0, 0.5]))
    optimizer = SGD([{"params": [a], "lr": 0.3}, {"params": [b]}], lr=0.1, momentum=0.9)
    return optimizer, lambda: 0.5 * (CURVATURES * torch.cat([a, b]) ** 2).sum(), (a, b)


class TestHeavyBall(ValueCase):
    def result(self):
        return heavy_ball(CURVATURES, floor=1e-3)

    def expected(self):
        """Between 4 and 0.5: 1e-5 is below the floor, −3 never counts."""
        top, low = 4.0**0.5, 0.5**0.5
        return 4 / (top + low) ** 2, ((top - low) / (top + low)) ** 2

    def refusals(self):
        return [
            (ValueError, "no positive node: the largest is -1", lambda: heavy_ball([-1.0, -2.0])),
            (ValueError, "no positive node", lambda: heavy_ball([0.0])),
            (ValueError, "nodes", lambda: heavy_ball([float("nan"), 1.0])),
            (ValueError, "nodes", lambda: heavy_ball([])),
            (ValueError, "floor", lambda: heavy_ball([1.0], floor=1.0)),
        ]

    def test_one_node_needs_no_momentum(self):
        assert heavy_ball([4.0, -1.0]) == (0.25, 0.0)
        assert heavy_ball([4.0, 1e-5], floor=0.0)[1] > 0.9


class TestTuneSGD(ValueCase):
    tolerance = 1e-5  # float32

    def result(self):
        optimizer, loss, _ = quadratic()
        return [tune_sgd(optimizer, loss), tune_sgd(optimizer, loss, rule="gradient")]

    def expected(self):
        top, low = 4.0**0.5, 0.5**0.5
        lr, momentum = 4 / (top + low) ** 2, ((top - low) / (top + low)) ** 2
        w = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5])
        g = CURVATURES * w
        return [[lr, momentum], [float(g @ g / (g @ (CURVATURES * g))), momentum]]

    def refusals(self):
        optimizer, loss, params = quadratic()
        one = nn.Parameter(torch.ones(1))
        hill = SGD([one], lr=0.1, momentum=0.5)
        ahead, damped = (SGD(params, momentum=0.9, **how) for how in ({"nesterov": True}, {"dampening": 0.5}))
        climber = SGD(params, momentum=0.9, maximize=True)
        down = lambda: -(one**2).sum()  # noqa: E731
        return [
            (ValueError, "rule must be one of heavy_ball, gradient", lambda: tune_sgd(optimizer, loss, rule="polyak")),
            (ValueError, "steps", lambda: tune_sgd(optimizer, loss, steps=0)),
            (ValueError, "floor", lambda: tune_sgd(optimizer, loss, floor=-0.1)),
            (TypeError, "with a momentum, such as torch.optim.SGD; got Adam", lambda: tune_sgd(Adam(params), loss)),
            (TypeError, "plain gradient steps, such as torch.optim.SGD's; RMSprop", lambda: tune_sgd(RMSprop(params), loss)),
            (ValueError, "nesterov must be False for rule='heavy_ball'", lambda: tune_sgd(ahead, loss)),
            (ValueError, "dampening must be 0.0 for rule='heavy_ball'", lambda: tune_sgd(damped, loss)),
            (ValueError, "maximize must be False for rule='gradient'", lambda: tune_sgd(climber, loss, rule="gradient")),
            (TypeError, "got StepLR", lambda: tune_sgd(optimizer, loss, scheduler=StepLR(optimizer, 3))),
            (ValueError, "no positive node", lambda: tune_sgd(hill, down)),
            (ValueError, "g'Hg = -8", lambda: tune_sgd(hill, down, rule="gradient")),
        ]


def test_weight_decay_is_part_of_the_curvature():
    """Of `½ Σ c w²` SGD's steps with decay d see `c + d`; by group."""
    optimizer, loss, _ = quadratic()
    for group, decay in zip(optimizer.param_groups, (2.0, 0.25), strict=True):
        group["weight_decay"] = decay
    want = heavy_ball(CURVATURES + torch.tensor([2.0, 2.0, 0.25, 0.25, 0.25]))
    assert tune_sgd(optimizer, loss) == pytest.approx(want, rel=1e-5)
    assert tune_sgd(optimizer, loss, rule="gradient")[0] == pytest.approx(TestTuneSGD().expected()[1][0], rel=1e-5)


@pytest.mark.parametrize("how", [{}, {"weight_decay": 0.5}])
def test_the_steps_converge_as_fast_as_the_momentum_says(how):
    """Polyak's rate: `‖w_k‖` falls like `(√β)^k`, and with `nesterov` at the same numbers it would grow."""
    curvatures = torch.tensor([20.0, 3.0, 0.5], dtype=torch.float64)

    def after(steps, **more):
        w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = SGD([w], lr=0.1, momentum=0.9, **how)
        _, momentum = tune_sgd(optimizer, lambda: 0.5 * (curvatures * w**2).sum())
        optimizer.param_groups[0].update(more)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (curvatures * w**2).sum()).backward()
            optimizer.step()
        return float(w.detach().norm()), momentum

    size, momentum = after(100)
    assert size < 200 * momentum**50
    assert after(100, nesterov=True)[0] > 1e3


def test_only_the_groups_are_changed():
    optimizer, loss, params = quadratic()
    loss().backward()
    optimizer.step()
    values = [p.detach().clone() for p in params]
    grads, buffers = [p.grad for p in params], [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    state = torch.random.get_rng_state()

    def noisy():
        torch.rand(3)
        return loss()

    lr, momentum = tune_sgd(optimizer, noisy)
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(lr, momentum)] * 2
    assert torch.equal(torch.random.get_rng_state(), state)
    for p, value, grad, buffer in zip(params, values, grads, buffers):
        assert torch.equal(p, value)
        assert p.grad is grad
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    p = nn.Parameter(torch.ones(2))
    rate = torch.tensor(0.1)
    optimizer = SGD([p], lr=rate, momentum=0.9, foreach=False)
    lr, _ = tune_sgd(optimizer, lambda: (p**2).sum())
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(lr)


def test_a_schedule_continues_from_the_new_rate():
    optimizer, loss, _ = quadratic()
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    lr, _ = tune_sgd(optimizer, loss, scheduler=schedule)
    assert schedule.get_last_lr() == [lr, lr]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 4, lr / 4])
    assert all(group["initial_lr"] == lr for group in optimizer.param_groups)


def small_training(**how):
    """A network whose curvature changes as it trains, its optimizer, schedule and tuner."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 3, generator=g), torch.randint(2, (16,), generator=g)
    optimizer = SGD(net.parameters(), lr=1e-2, momentum=0.1)
    schedule = LambdaLR(optimizer, lambda step: 0.9**step)
    tuner = TuneSGD(optimizer, lambda: nn.functional.cross_entropy(net(x), y), scheduler=schedule, steps=4, **how)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
        tuner.step(optimizer)

    return (net, optimizer, schedule, tuner), step


@pytest.mark.parametrize(
    ("how", "measured"),
    [
        ({"interval": 2, "unit": "epochs"}, [(0, 0), (6, 2)]),
        ({"interval": 2, "unit": "steps"}, [(2, 1), (4, 2), (6, 2), (8, 3)]),
        ({}, [(0, 0), (3, 1), (6, 2)]),
    ],
)
def test_the_companion_measures_when_it_is_due(how, measured):
    (_, optimizer, schedule, tuner), step = small_training(**how)
    for _ in range(3):
        tuner.epoch()
        for _ in range(3):
            step()
    assert [(row["step"], row["epoch"]) for row in tuner.history] == measured
    last = tuner.history[-1]
    assert len({row["lr"] for row in tuner.history}) == len(measured), "each time the curvature was measured anew"
    assert schedule.base_lrs == [last["lr"]]
    assert optimizer.param_groups[0]["momentum"] == last["momentum"]


def test_the_companions_measurement_is_tune_sgd():
    (_, _, _, tuner), step = small_training(interval=3, unit="steps")
    for _ in range(3):
        step()
    (_, optimizer, _, other), again = small_training(interval=100, unit="steps")
    for _ in range(3):
        again()
    assert tune_sgd(optimizer, other.loss_closure, steps=4) == (tuner.history[-1]["lr"], tuner.history[-1]["momentum"])


@pytest.mark.parametrize("how", [{"interval": 2, "unit": "steps"}, {"interval": 2}])
def test_a_resumed_companion_gives_the_same_bits(how):
    def train(step, tuner, steps):
        for i in steps:
            if i % 2 == 0:
                tuner.epoch()
            step()

    parts, step = small_training(**how)
    train(step, parts[-1], range(5))
    kept = copy.deepcopy([part.state_dict() for part in parts])
    train(step, parts[-1], range(5, 10))
    others, again = small_training(**how)
    for part, state in zip(others, kept):
        part.load_state_dict(state)
    train(again, others[-1], range(5, 10))
    assert others[-1].history == parts[-1].history
    assert len(others[-1].history) > len(kept[-1]["history"])
    assert all(torch.equal(p, q) for p, q in zip(parts[0].parameters(), others[0].parameters()))


def test_what_the_companion_refuses():
    optimizer, loss, params = quadratic()
    refuses(
        [
            (ValueError, "interval must be an int >= 1; got 0", lambda: TuneSGD(optimizer, loss, interval=0)),
            (ValueError, "unit must be one of epochs, steps", lambda: TuneSGD(optimizer, loss, unit="days")),
            (TypeError, "TuneSGD has no option 'stps'", lambda: TuneSGD(optimizer, loss, stps=3)),
            (ValueError, "rule must be one of", lambda: TuneSGD(optimizer, loss, rule="polyak")),
            (TypeError, "with a momentum, such as torch.optim.SGD; got Adam", lambda: TuneSGD(Adam(params), loss)),
            (TypeError, "got StepLR", lambda: TuneSGD(optimizer, loss, scheduler=StepLR(optimizer, 3))),
        ]
    )


def trained(tmp_path, folder, resume=None, epochs=2, **how):
    from transformers import Trainer, TrainingArguments

    from lowdim.train import TuneSGDCallback

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2))

        def forward(self, x, labels):
            logits = self.body(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    net, g = Net(), torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(3, generator=g), "labels": i % 2} for i in range(16)]
    batch = {"x": torch.stack([row["x"] for row in rows[:8]]), "labels": torch.tensor([row["labels"] for row in rows[:8]])}
    callback = TuneSGDCallback(batch, lambda model, given: model(**given)["loss"], steps=4, **how)
    arguments = TrainingArguments(
        tmp_path / folder, num_train_epochs=epochs, per_device_train_batch_size=4, save_strategy="steps", save_steps=3,
        report_to="none", lr_scheduler_type="linear", use_cpu=True, logging_strategy="no", disable_tqdm=True, seed=1,
    )  # fmt: skip
    optimizer = SGD(net.parameters(), lr=1e-3, momentum=0.1)
    trainer = Trainer(net, arguments, train_dataset=rows, callbacks=[callback], optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback, net


def test_the_trainers_callback(tmp_path):
    pytest.importorskip("transformers", reason="its trainer is used")
    trainer, callback, net = trained(tmp_path, "a")
    assert [each["epoch"] for each in callback.history] == [0.0, 1.0]
    assert net.training
    last = callback.history[-1]
    assert trainer.lr_scheduler.base_lrs == [last["lr"]]
    assert trainer.optimizer.param_groups[0]["momentum"] == last["momentum"]
    _, again, resumed = trained(tmp_path, "a", resume=str(tmp_path / "a" / "checkpoint-3"))  # within the first epoch
    assert again.history == callback.history[1:]
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), resumed.parameters()))


def test_the_trainers_callback_by_steps(tmp_path):
    pytest.importorskip("transformers", reason="its trainer is used")
    how = {"interval": 2, "unit": "steps"}
    _, callback, net = trained(tmp_path, "a", **how)
    assert [(each["step"], each["epoch"]) for each in callback.history] == [(2, 1), (4, 1), (6, 2), (8, 2)]
    _, again, resumed = trained(tmp_path, "a", resume=str(tmp_path / "a" / "checkpoint-3"), **how)
    assert again.history == callback.history[1:]
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), resumed.parameters()))


def test_the_callback_refuses_unknown_options():
    from lowdim.train import TuneSGDCallback

    refuses(
        [
            (TypeError, "TuneSGDCallback has no option 'stps'", lambda: TuneSGDCallback({}, stps=3)),
            (ValueError, "interval must be an int >= 1; got 0", lambda: TuneSGDCallback({}, interval=0)),
        ]
    )
