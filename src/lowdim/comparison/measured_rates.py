"""A rate for each method from the curvature of the loss in what it trains, which the search tries beside the usual ones.

Adam's steps with their preconditioner held fixed grow above the rate

    (2 + 2 beta1) / ((1 - beta1) lambda),    lambda the largest eigenvalue of D^(-1/2) H D^(-1/2),    D = sqrt(v) + eps

(`lowdim.diagnose.core.preconditioned`). `H` is the Hessian of the loss in the trained parameters on one training batch, `v` the
mean of the squared gradients of four batches, that one among them. Both are measured in evaluation mode on a copy that was
trained through a warm-up and is thrown away: at the very start most adapters have a factor of zeros, so that the other factor
has curvature and no gradient, and `D` says nothing about it. Half of that rate is tried: batches differ, few Lanczos steps find
a little less than the largest eigenvalue, and the curvature grows while a model trains.

A projected optimizer (GaLore) moves a matrix by `scale P d`, `d` Adam's direction for `Pᵀ g`. With the subspace held fixed,
too, its limit is that of `Pᵀ H P` with `D = (√v + eps) / scale`, `v` of the projected gradients. Terms of the loss that have a
kink (the group lasso of Maestro) are part of the gradients and not of `H`: beside the kink their curvature has no bound, but
their gradient has one, so steps do not grow along them.

Source: Cohen and others, "Adaptive gradient methods at the edge of stability", arXiv 2207.14484, 2022; the subspace, the kinks,
the warm-up, the half and the range are ours.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate import evaluating
from lowdim.catalogue import Variant
from lowdim.companion import Companion
from lowdim.comparison.clock import Clock
from lowdim.comparison.ladder import sized
from lowdim.comparison.runs import Contest, Run, prepared
from lowdim.diagnose.core.curvature import twice_differentiable
from lowdim.diagnose.core.preconditioned import AdamGroup, AdamLimit, Subspace, adam_limit
from lowdim.errors import is_machine_failure
from lowdim.garbage import isolated_gc
from lowdim.linalg import derive_seed
from lowdim.methods import Applied
from lowdim.methods.setup import WARMUP
from lowdim.optim import AdamW, ProjectedOptimizer
from lowdim.optim.core.inner import AdamWRule
from lowdim.optim.core.projectors import Identity
from lowdim.records import MeasuredRate, MeasuredRates
from lowdim.train.settings import FitSettings
from lowdim.units import format_seconds

__all__ = ["HOW", "REACH", "SAFETY", "measure", "measured_rates", "rate_sentence"]

#: Of the stable limit: the rate that is tried.
SAFETY = 0.5
#: A rate is tried within this factor of the method's own smallest and largest.
REACH = 100.0
_BATCHES = 4  # whose squared gradients are averaged
_WARM = (4, 32)  # steps of the copy: those of the training's warm-up, at least and at most
_LANCZOS = 16
_SHARE = 0.1  # of a time limit may go to the measurements

HOW = (
    "Each method tries one more rate: half of the limit up to which the curvature of its loss keeps Adam's steps stable, "
    "measured on one batch after a warm-up on a copy. Differences are those to its best usual rate of the same size, at the "
    "last rung that both reached, with 95 % intervals over the validation rows; the search trains with one seed."
)


def measured_rates(
    bench: Contest,
    variants: Mapping[str, Variant],
    sizes: Mapping[str, Sequence[int | None]],
    seed: int,
    clock: Clock,
    say: Callable[[str, str], None] = lambda kind, line: None,
) -> list[MeasuredRate]:
    """The rate of each method at its first size; those that an earlier command has measured are read from `rates.json`.

    Args:
        say: called with a kind and a line for each method.

    Raises:
        CheckpointError: `rates.json` is damaged.
    """
    known = _known(bench)
    begun = time.monotonic()
    found = []
    for name, each in variants.items():
        size = sizes[name][0]
        rate = known.get((name, size))
        if rate is None and clock.limit is not None and time.monotonic() - begun > _SHARE * clock.limit:
            reason = f"the time limit of {format_seconds(clock.limit)} left no time to measure it"
            rate = MeasuredRate(method=name, label=each.label, size=size, reason=reason)
        elif rate is None:
            with isolated_gc():
                rate = measure(bench, sized(each, size), size, seed)
            known[name, size] = rate
            MeasuredRates(fingerprint=bench.fingerprint, rates=list(known.values())).write(bench.folder)
        say("rate", rate_sentence(rate))
        found.append(rate)
    return found


def measure(bench: Contest, chosen: Variant, size: int | None, seed: int, *, warm: int | None = None) -> MeasuredRate:
    """The rate of one method at its size; a method where it cannot be measured has a reason instead.

    Args:
        warm: steps of the copy before the measurement; None: those of the training's warm-up, from 4 to 32.
    """
    what: dict[str, Any] = {"method": chosen.name, "label": chosen.label, "size": size}
    rates = chosen.rates_for(bench.scratch)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            found = _limit(bench, chosen, size, rates[0], seed, warm)
    except Exception as error:
        if not (is_machine_failure(error) or isinstance(error, (ValueError, TypeError, RuntimeError, ArithmeticError))):
            raise
        return MeasuredRate(**what, reason=_first_sentence(error))
    low, high = min(rates) / REACH, max(rates) * REACH
    lr = SAFETY * found.lr
    kept = min(max(lr, low), high)
    numbers = {"limit": found.lr, "eigenvalue": found.eigenvalue, "error": found.error, "idle": found.idle}
    return MeasuredRate(**what, lr=kept, clipped=kept != lr, **numbers)


def rate_sentence(rate: MeasuredRate) -> str:
    """What was measured of a method, in one line.

    Example:
        >>> from lowdim.comparison.measured_rates import rate_sentence
        >>> from lowdim.records import MeasuredRate
        >>> rate_sentence(MeasuredRate(method="lora", label="LoRA", lr=0.019, limit=0.038, eigenvalue=1000.0, error=2.0))
        'LoRA: rate 0.019 from curvature, half of the limit 0.038 (largest eigenvalue 1000 ± 0.2 %)'
        >>> rate_sentence(MeasuredRate(method="full", label="Full", reason="no positive curvature"))
        'Full: no rate from curvature: no positive curvature'
    """
    if rate.lr is None or rate.limit is None:
        return f"{rate.label}: no rate from curvature: {rate.reason}"
    clipped = f", clipped to {REACH:g} times the range of its usual rates" if rate.clipped else ""
    return (
        f"{rate.label}: rate {rate.lr:.3g} from curvature, half of the limit {rate.limit:.3g} (largest eigenvalue "
        f"{rate.curvature}){clipped}"
    )


def _known(bench: Contest) -> dict[tuple[str, int | None], MeasuredRate]:
    """What an earlier command has measured for the same settings and data."""
    if not (bench.folder / MeasuredRates.file).is_file():
        return {}
    record = MeasuredRates.read(bench.folder)
    return {(each.method, each.size): each for each in record.rates} if record.fingerprint == bench.fingerprint else {}


def _limit(bench: Contest, chosen: Variant, size: int | None, lr: float, seed: int, warm: int | None) -> AdamLimit:
    """The stable limit on a copy that was trained through a warm-up."""
    strategy, applied = prepared(bench, Run(chosen, "trial", 0, lr, seed, bench.steps, size))
    steps = min(max(round(WARMUP * bench.steps), _WARM[0]), _WARM[1]) if warm is None else warm
    device = next(applied.model.parameters()).device
    batches = list(bench.task.sample_batches(_BATCHES + steps, bench.batch_size, device))
    loss = functools.partial(_loss, bench, applied)
    optimizer = applied.start(lr)
    _check(optimizer)
    _warm_up(applied, optimizer, loss, [batches[(_BATCHES + i) % len(batches)] for i in range(steps)], strategy.clips_itself())
    losses = [functools.partial(loss, batch) for batch in batches[:_BATCHES]]
    kinks = any(type(each).smooth_loss is not Companion.smooth_loss for each in applied.companions)
    smooth = functools.partial(_loss, bench, applied, batches[0], smooth=True) if kinks else None
    with evaluating(applied.model), twice_differentiable(applied.model):
        return adam_limit(losses, adam_groups(optimizer, lr), smooth=smooth, steps=_LANCZOS, seed=derive_seed(seed, "rate"))


def _loss(bench: Contest, applied: Applied, batch: Any, *, smooth: bool = False) -> Tensor:
    return applied.loss(batch, bench.task.loss_for(applied.variant), smooth=smooth).total


def _warm_up(applied: Applied, optimizer: Any, loss: Callable[[Any], Tensor], batches: Sequence[Any], clipped: bool) -> None:
    """Train on these batches, one a step, while the rate rises to the one that the optimizer was made with."""
    peaks: dict[int, float] = {}  # of the groups, by identity: a method that grows adds some on the way
    applied.model.train()
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = peaks.setdefault(id(group), float(group["lr"])) * step / len(batches)
        loss(batch).backward()
        if not clipped:
            nn.utils.clip_grad_norm_(applied.model.parameters(), FitSettings.max_grad_norm)
        optimizer.step()
        applied.after_step(optimizer)
        optimizer.zero_grad(set_to_none=True)


def _check(optimizer: Any) -> None:
    """Refuse an optimizer whose steps are not Adam's.

    Raises:
        TypeError: they are not; the message says why.
    """
    if not isinstance(optimizer, ProjectedOptimizer):
        if not isinstance(optimizer, (torch.optim.AdamW, AdamW)):
            raise TypeError(f"the limit holds for Adam's steps; the method's optimizer is {type(optimizer).__name__}")
        return
    if optimizer.hides_gradients:
        raise TypeError(f"the limit holds for Adam's steps in floating point; {optimizer.method} keeps weights in few bits")
    for group in optimizer.param_groups:
        for p in group["params"]:
            parts = optimizer.parts_of(p, group)
            if parts.residual.full_size:
                raise TypeError(
                    f"the limit holds for Adam's steps; {optimizer.method} also moves weights outside of its subspace"
                )
            if not isinstance(parts.inner, AdamWRule):
                raise TypeError(f"the limit holds for Adam's steps; the method's rule is {type(parts.inner).__name__}")


def adam_groups(optimizer: Any, lr: float) -> list[AdamGroup]:
    """What the optimizer trains, and how; of a projected one each matrix in the subspace that it holds now."""
    found = []
    for group in optimizer.param_groups:
        params, scale = [p for p in group["params"] if p.requires_grad], float(group["lr"]) / lr
        if not isinstance(optimizer, ProjectedOptimizer):
            found.append(AdamGroup(params, scale, group["betas"][0], group["eps"]))
            continue
        for p in params:
            parts, state = optimizer.parts_of(p, group), optimizer.state.get(p, {})
            if "step" not in state:  # no gradient has reached it
                continue
            projector, inner = parts.projector, parts.inner
            assert isinstance(inner, AdamWRule)
            projected = not isinstance(projector, Identity)
            subspace = Subspace(functools.partial(projector.down, state=state), functools.partial(projector.up, state=state))
            found.append(AdamGroup([p], scale * projector.scale, inner.betas[0], inner.eps, subspace if projected else None))
    return found


def _first_sentence(error: Exception) -> str:
    """What is wrong, without the advice that follows, which is for other callers."""
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return text.partition(". ")[0].rstrip(".")
