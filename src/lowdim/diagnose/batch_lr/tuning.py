"""Learning rate and momentum of SGD from the curvature of one batch, while training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lowdim.companion import Companion
from lowdim.diagnose.core.curvature import gradient_and_hessian
from lowdim.diagnose.core.quadrature import lanczos_quadrature
from lowdim.errors import check_choice, check_float, check_int, refuse_strange
from lowdim.linalg import Operator, stream

__all__ = ["RULES", "TuneSGD", "heavy_ball", "tune_sgd"]

RULES = ("heavy_ball", "gradient")


def heavy_ball(
    nodes: Any,  # (m,)
    *,
    floor: float = 1e-3,
) -> tuple[float, float]:
    """Polyak's learning rate and momentum for a spectrum.

    Formula: `lr = 4/(√top + √low)²`, `momentum = ((√top − √low)/(√top + √low))²`, with `top` the largest node and `low` the
    smallest one above `floor · top`. Negative nodes never count.

    Args:
        nodes: eigenvalues, or the nodes of `lanczos_quadrature`.
        floor: share of the largest below which nodes are noise, in [0, 1).

    Raises:
        ValueError: no positive node, nodes that are not finite, a floor out of range.

    Example:
        >>> from lowdim.diagnose import heavy_ball
        >>> heavy_ball([-0.5, 1.0, 4.0])
        (0.4444444444444444, 0.1111111111111111)

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964; set from Lanczos nodes while
    training: Granziol, Zohren, Roberts, arXiv 2006.09092. Floor and choice of `low` are ours.
    """
    check_float("floor", floor, 0.0, 1.0, high_open=True)
    values = torch.as_tensor(nodes).detach().double().reshape(-1)
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"nodes must be finite numbers; got {values.tolist()[:5]}")
    top = float(values.max())
    if top <= 0.0:
        raise ValueError(f"no positive node: the largest is {top:g}, so the curvature gives no learning rate")
    low = float(values[values > floor * top].min())
    sums, difference = top**0.5 + low**0.5, top**0.5 - low**0.5
    return 4.0 / sums**2, (difference / sums) ** 2


def tune_sgd(
    optimizer: Any,
    loss_closure: Callable[[], Tensor],
    *,
    rule: str = "heavy_ball",
    steps: int = 10,
    floor: float = 1e-3,
    seed: int = 0,
    scheduler: Any = None,
) -> tuple[float, float]:
    """Set learning rate and momentum of SGD from the curvature of a batch; call it once an epoch.

    Formula: `rule="heavy_ball"`: `heavy_ball` of the nodes of the batch's Hessian, plus `weight_decay` on its diagonal, which
    SGD's steps add to it, `steps` products. `rule="gradient"`: `lr = gᵀg / gᵀHg` with the batch's gradient `g` of the loss
    alone, one product; momentum stays.

    Args:
        optimizer: one whose groups have a `momentum` (torch's SGD), or accelerate's wrapper of one.
        loss_closure: gives the batch's loss without calling backward; called once, without moving the global random stream.
        rule: "heavy_ball" or "gradient".
        steps: Lanczos steps, >= 1.
        floor: as in `heavy_ball`, in [0, 1).
        seed: of Lanczos' start.
        scheduler: the optimizer's scheduler, if it has one, since it writes the rate at each step from its `base_lrs`: they get
            the new rate too. `LambdaLR` only, which all schedules of transformers are.

    Returns:
        `(lr, momentum)`, set in every group. Parameters, their `.grad` and the optimizer's buffers are untouched.

    Raises:
        TypeError: an optimizer without a momentum, or another of torch's that has one; a scheduler of another kind.
        ValueError: `rule="heavy_ball"` for groups with `nesterov` or `dampening`, whose steps are not Polyak's; `maximize`; an
            option out of range, no positive curvature, a loss that cannot be differentiated twice.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import tune_sgd
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
        >>> sgd = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        >>> lr, momentum = tune_sgd(sgd, lambda: (torch.tensor([2.0, 0.5]) * w**2).sum())  # curvatures 4 and 1
        >>> round(lr, 4), round(momentum, 4), sgd.param_groups[0]["lr"] == lr
        (0.4444, 0.1111, True)

    The rate is right for the batch that it was measured on: measure on batches of the size that is trained with. For Adam
    use `max_lr`.

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092; `rule="gradient"`: the first author's program MLRG_DeepCurvature.
    """
    groups, schedule = _checked(optimizer, scheduler, rule=rule, steps=steps, floor=floor)
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    kept = [p.grad for p in params]
    devices = sorted({p.device.index for p in params if p.device.type == "cuda" and p.device.index is not None})
    try:
        with torch.random.fork_rng(devices=devices):
            gradient, hessian = gradient_and_hessian(loss_closure, params)
    finally:
        for p, grad in zip(params, kept):
            p.grad = grad
    momentum = float(groups[0]["momentum"])
    if rule == "gradient":
        curvature, square = float(gradient @ hessian(gradient)), float(gradient @ gradient)
        if not curvature > 0.0:
            raise ValueError(
                f'rule="gradient" needs positive curvature along the gradient; got g\'Hg = {curvature:g} (|g|² = {square:g}). '
                'rule="heavy_ball" uses the positive part of the spectrum'
            )
        lr = square / curvature
    else:
        start = torch.randn(hessian.n, generator=stream(seed, "tune_sgd"), dtype=torch.float32)
        nodes = lanczos_quadrature(_with_decay(hessian, groups), start.to(gradient), steps=steps).nodes
        lr, momentum = heavy_ball(nodes, floor=floor)
    for group in groups:
        group["momentum"] = momentum if rule == "heavy_ball" else group["momentum"]
        _set_rate(group, lr)
    if schedule is not None:
        schedule.base_lrs = [lr] * len(groups)
        schedule._last_lr = [lr] * len(groups)
    return lr, momentum


class TuneSGD(Companion):
    """Learning rate and momentum of SGD from the curvature while a model trains: `tune_sgd` every so many epochs or steps.

    Args:
        optimizer, loss_closure, scheduler: as in `tune_sgd`. The closure is called at each measurement: let it use one
            fixed batch of the size that is trained with, in evaluation mode.
        interval: epochs or steps between two measurements, >= 1.
        unit: what `interval` counts. `"epochs"`: `epoch()` measures, called at the beginning of each, the first one included.
            `"steps"`: `step()` does, after every `interval` steps of the optimizer.
        **options: `rule`, `steps`, `floor` and `seed` of `tune_sgd`.

    Attributes:
        history: `{"step": …, "epoch": …, "lr": …, "momentum": …}` of each measurement: steps and epochs that were over.

    Raises:
        TypeError, ValueError: as `tune_sgd`, whatever can be checked without measuring at once; an unknown option.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import TuneSGD
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
        >>> sgd = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        >>> tuner = TuneSGD(sgd, lambda: (torch.tensor([2.0, 0.5]) * w**2).sum(), interval=2, unit="steps")
        >>> for _ in range(4):
        ...     tuner.step()  # after each sgd.step()
        >>> [(row["step"], round(row["lr"], 4)) for row in tuner.history]
        [(2, 0.4444), (4, 0.4444)]

    Rate and momentum are kept in the state of the optimizer and of its scheduler: a checkpoint needs theirs, too.

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092.
    """

    def __init__(
        self,
        optimizer: Any,
        loss_closure: Callable[[], Tensor],
        *,
        interval: int = 1,
        unit: Literal["epochs", "steps"] = "epochs",
        scheduler: Any = None,
        **options: Any,
    ):
        check_int("interval", interval, 1)
        check_choice("unit", unit, ("epochs", "steps"))
        self.check_options("TuneSGD", options)
        _checked(optimizer, scheduler, **options)
        self.optimizer, self.loss_closure, self.scheduler = optimizer, loss_closure, scheduler
        self.interval, self.unit, self.options = interval, unit, options
        self.history: list[dict[str, float]] = []
        self._steps = self._epochs = 0

    @staticmethod
    def check_options(who: str, options: Mapping[str, Any]) -> None:
        """Raise TypeError for an option that `tune_sgd` has not, in the name of `who`."""
        known = inspect.signature(tune_sgd).parameters.keys() - {"optimizer", "loss_closure", "scheduler"}
        refuse_strange(who, options, sorted(known))

    def update(self) -> tuple[float, float]:
        """Measure and set both now; returns `(lr, momentum)`."""
        lr, momentum = tune_sgd(self.optimizer, self.loss_closure, scheduler=self.scheduler, **self.options)
        self.history.append({"step": self._steps, "epoch": self._epochs, "lr": lr, "momentum": momentum})
        return lr, momentum

    def epoch(self) -> None:
        """Call at the beginning of each epoch."""
        if self.unit == "epochs" and self._epochs % self.interval == 0:
            self.update()
        self._epochs += 1

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count a step."""
        self._steps += 1
        if self.unit == "steps" and self._steps % self.interval == 0:
            self.update()

    def state_dict(self) -> dict[str, Any]:
        """The counts and the history."""
        return {"steps": self._steps, "epochs": self._epochs, "history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; nothing is measured."""
        self._steps, self._epochs = int(state["steps"]), int(state["epochs"])
        self.history = [dict(row) for row in state["history"]]


def _checked(
    optimizer: Any, scheduler: Any, *, rule: str = "heavy_ball", steps: int = 10, floor: float = 1e-3, seed: int = 0
) -> tuple[list[dict[str, Any]], Any]:
    """The optimizer's groups and the plain scheduler, where `tune_sgd` can use them."""
    check_choice("rule", rule, RULES)
    check_int("steps", steps, 1)
    check_float("floor", floor, 0.0, 1.0, high_open=True)
    plain, schedule = getattr(optimizer, "optimizer", optimizer), _plain_schedule(scheduler)
    if any("momentum" not in group for group in plain.param_groups):
        raise TypeError(f"tune_sgd needs an optimizer with a momentum, such as torch.optim.SGD; got {type(plain).__name__}")
    if isinstance(plain, (torch.optim.RMSprop, torch.optim.Muon)):
        raise TypeError(f"tune_sgd needs plain gradient steps, such as torch.optim.SGD's; {type(plain).__name__} changes them")
    for name in ("maximize", *(("nesterov", "dampening") if rule == "heavy_ball" else ())):
        strange = next((group[name] for group in plain.param_groups if group.get(name)), None)
        if strange is not None:
            raise ValueError(
                f"{name} must be {type(strange)(0)} for rule={rule!r}, whose rate is for other steps; got {strange!r}"
            )
    return plain.param_groups, schedule


def _with_decay(hessian: Operator, groups: list[dict[str, Any]]) -> Operator:
    """The Hessian of the loss plus `weight_decay / 2 · ‖θ‖²`."""
    rates = [(p, float(group.get("weight_decay") or 0.0)) for group in groups for p in group["params"] if p.requires_grad]
    if not any(rate for _, rate in rates):
        return hessian
    decay = torch.cat([torch.full((p.numel(),), rate, dtype=hessian.dtype, device=hessian.device) for p, rate in rates])
    return Operator(lambda v: hessian(v) + decay * v, hessian.n, dtype=hessian.dtype, device=hessian.device)


def _set_rate(group: dict[str, Any], lr: float) -> None:
    if "initial_lr" in group:
        group["initial_lr"] = lr
    if isinstance(group["lr"], Tensor):  # in place: captured graphs read it
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _plain_schedule(scheduler: Any) -> Any:
    if scheduler is None:
        return None
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        raise TypeError(
            f"scheduler must be a LambdaLR, whose base_lrs can be replaced; got {type(inner).__name__}, which would overwrite "
            "the rate. Leave it out, and call tune_sgd after each of its steps"
        )
    return inner
