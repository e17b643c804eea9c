"""The objective of the intermediate stage: the dense model teaches the factorized one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowdim.calibrate import call_model, capturing
from lowdim.compress.pela.factoring import PELAConfig
from lowdim.errors import NoMatchingModuleError, check_float, nearest, warn_caller
from lowdim.linalg import compute_dtype
from lowdim.modules import LowRankLinear
from lowdim.surgery import blocks_of, dense_matrix, describe, freeze, is_linear, named_layers, unwrap

__all__ = ["PELALoss", "PELAObjective", "perturbation_loss"]

#: Entries of a weight's change that are computed at once.
_ENTRIES = 2**22

TaskLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PELALoss:
    """The terms of a batch: `total = task + α feature + β logit + γ perturbation`; the total is differentiated.

    Attributes:
        total, task, feature, logit, perturbation: scalars, the last three before their weights; 0 for a term of weight 0.
        output: the student's output, as the model returned it.
    """

    total: Tensor
    task: Tensor
    feature: Tensor
    logit: Tensor
    perturbation: Tensor
    output: Any = field(repr=False)

    def to_dict(self) -> dict[str, float]:
        """The five scalars as numbers, for a log."""
        names = ("total", "task", "feature", "logit", "perturbation")
        return {name: float(getattr(self, name).detach()) for name in names}


class PELAObjective:
    """The loss of the intermediate stage, in which a frozen dense model teaches its factorized copy.

    Formula: `L = L_task + α L_feat + β L_logit + γ L_pert`, with `L_feat = (1/K) Σ_k mean((f_k^S − f_k^T)²)` over K feature
    modules, `L_logit = mean((logits_S − logits_T)²)`, and `L_pert` the `perturbation_loss` of the factorized layers. α, β, γ
    and ε are the config's.

    Args:
        teacher: the dense model; it is set to evaluation mode and frozen.
        student: a factorized copy; its mode and what it trains are left alone.
        config: the weights, ε and `feature_modules`.

    Raises:
        ValueError: a student without low-rank layers, or one that is not a copy of the teacher; a feature module that one of
            them does not have; no feature modules given and none found.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> from lowdim.compress import PELAConfig, PELAObjective, pela
        >>> torch.manual_seed(0) and None
        >>> teacher = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        >>> config = PELAConfig(compression_ratio=2, feature_modules=("1", "2"))
        >>> student = pela(copy.deepcopy(teacher), config)
        >>> objective = PELAObjective(teacher, student, config)
        >>> optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        >>> losses = []
        >>> for _ in range(30):
        ...     loss = objective(torch.randn(64, 16))       # without labels: no task loss
        ...     loss.total.backward(); optimizer.step(); optimizer.zero_grad()
        ...     losses.append(float(loss.feature.detach()))
        >>> losses[-1] < 0.9 * losses[0]
        True

    It is no nn.Module, so the teacher is not in the student's state dict. When not: where all data have labels, plain
    fine-tuning of the factorized model costs no second forward pass and did as well (`lowdim reproduce pela`).

    Source: Guo, Wang, Kankanhalli, "PELA", arXiv 2310.10700; the authors' program guoyang9/PELA.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, config: PELAConfig | None = None):
        self.config = PELAConfig() if config is None else config
        self.teacher, self.student = unwrap(teacher), unwrap(student)
        if self.teacher is self.student:
            raise ValueError("teacher and student are one model; factorize a copy: pela(copy.deepcopy(teacher), config)")
        self._pairs = _pairs(self.teacher, self.student)
        self.feature_modules = self._features() if self.config.feature_weight else ()
        self.teacher.eval()
        freeze(self.teacher)
        self._told = False

    def __call__(self, inputs: Any, task_loss: TaskLoss | None = None, *, model: nn.Module | None = None) -> PELALoss:
        """The terms for a batch; runs both models once.

        Args:
            inputs: of both models: a tensor, a tuple, or a mapping. Of a mapping `labels` is left out, and so is what
                the model's `forward` does not name, such as other columns of a data set.
            task_loss: `task_loss(student_logits) -> scalar`; None: no task loss, for data without labels.
            model: the student inside the wrapper with which it is trained (DistributedDataParallel), if there is one.

        Raises:
            TypeError: logits are needed, and a model returns neither a tensor nor something with `.logits`.
        """
        config = self.config
        theirs, wanted = _inputs(self.teacher, inputs), self.feature_modules
        with ExitStack() as stack:
            ours = stack.enter_context(capturing(self.student, wanted)) if wanted else {}
            output = call_model(self.student if model is None else model, _inputs(self.student, inputs))
        target = None
        with ExitStack() as stack:
            right = stack.enter_context(capturing(self.teacher, wanted)) if wanted else {}
            if wanted or config.logit_weight:
                with torch.no_grad():
                    target = call_model(self.teacher, theirs)
        self._check_gradients(ours)
        zero = next(iter(self._pairs.values()))[0].B.new_zeros(())
        needed = task_loss is not None or config.logit_weight > 0
        logits = _logits(output, self.student) if needed else None
        task = zero if task_loss is None else task_loss(cast(Tensor, logits))
        feature = _mean([_squared(ours[name], right[name]) for name in wanted]) if wanted else zero
        logit = _squared(cast(Tensor, logits), _logits(target, self.teacher)) if config.logit_weight else zero
        perturbation = zero
        if config.perturbation_weight:
            perturbation = perturbation_loss(self._weights(), config.perturbation_eps)
        total = task + config.feature_weight * feature + config.logit_weight * logit + config.perturbation_weight * perturbation
        return PELALoss(total, task, feature, logit, perturbation, output)

    def _weights(self) -> list[tuple[LowRankLinear, Tensor]]:
        return [(layer, dense_matrix(dense)) for layer, dense in self._pairs.values()]

    def _features(self) -> tuple[str, ...]:
        """The feature modules, which both models must have."""
        names = self.config.feature_modules
        if names is None:
            names = blocks_of(self.student, self._pairs)
            if not names:
                raise ValueError(
                    f"feature_modules must be given: {type(self.student).__name__} has no nn.ModuleList that holds a "
                    "factorized layer. Name the modules whose outputs are compared, or set feature_weight=0"
                )
        for role, model in (("teacher", self.teacher), ("student", self.student)):
            modules = dict(model.named_modules(remove_duplicate=False))
            for name in names:
                if name not in modules:
                    close = ", ".join(nearest(name, modules))
                    raise ValueError(f"feature_modules: {name!r} is not a module of the {role}; nearest: {close}")
        return names

    def _check_gradients(self, ours: Mapping[str, Tensor]) -> None:
        """Say once where a feature of the student gives no gradient, although it is trained."""
        if self._told or not torch.is_grad_enabled():
            return
        self._told = True
        dead = [name for name, value in ours.items() if not value.requires_grad]
        if dead and any(p.requires_grad for p in self.student.parameters()):
            warn_caller(
                f"feature module {dead[0]} of the student gives no gradient, so its term teaches nothing: no parameter before "
                "it is trained, or gradient checkpointing is reentrant (pass use_reentrant=False)"
            )


def perturbation_loss(pairs: Sequence[tuple[LowRankLinear, Tensor]], eps: float) -> Tensor:
    """How far the largest change of each weight is from `eps`.

    Formula: `(1/P) Σ_p (max|B_p A_p − W_p| − ε)²`, `max|·|` the entry of largest magnitude. The gradient goes through that
    entry alone, and pulls it towards ε from both sides. The product is computed in blocks of rows and never kept.

    Args:
        pairs: a low-rank layer, and the dense weight `(out, in)` that it stands for.
        eps: >= 0.

    Returns:
        A scalar in float32 or better.

    Raises:
        ValueError: no pairs, shapes that do not fit.

    Example:
        >>> import torch
        >>> from lowdim.compress import LowRankLinear, perturbation_loss
        >>> layer = LowRankLinear.from_factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]]))
        >>> perturbation_loss([(layer, torch.zeros(2, 2))], 0.5).item()  # the largest change is 2
        2.25

    Source: arXiv 2310.10700; the authors' program (`torch.norm(…, inf)` of a matrix is its largest absolute entry).
    """
    check_float("eps", eps, 0.0)
    if not pairs:
        raise ValueError("pairs must hold at least one low-rank layer with its dense weight; got none")
    return _mean([(_largest_change(layer, weight) - eps).square() for layer, weight in pairs])


def _largest_change(layer: LowRankLinear, weight: Tensor) -> Tensor:
    """`max|c B A − W|`, differentiable by the factors."""
    if tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise ValueError(
            f"the dense weight must have shape ({layer.out_features}, {layer.in_features}); got {tuple(weight.shape)}"
        )
    dtype = compute_dtype(torch.promote_types(layer.B.dtype, weight.dtype))
    weight = weight.detach()
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        A = layer.scale * layer.A.to(dtype)
        best = []
        rows = max(1, _ENTRIES // layer.in_features)
        for B, dense in zip(layer.B.split(rows), weight.split(rows)):
            change = (B.to(dtype) @ A).sub_(dense.to(dtype)).abs_().flatten()
            best.append(change.max(0))
        values = torch.stack([value for value, _ in best])
        block = values.argmax()
        place = torch.stack([index for _, index in best])[block] + block * rows * layer.in_features
        row, column = place // layer.in_features, place % layer.in_features
    b, a = layer.B.index_select(0, row[None])[0], layer.A.index_select(1, column[None])[:, 0]
    entry = weight.index_select(0, row[None]).index_select(1, column[None])[0, 0]
    return (layer.scale * (b.to(dtype) * a.to(dtype)).sum() - entry.to(dtype)).abs()


def _pairs(teacher: nn.Module, student: nn.Module) -> dict[str, tuple[LowRankLinear, nn.Module]]:
    """Each low-rank layer of the student with the teacher's layer of the same name."""
    dense = named_layers(teacher)
    seen: set[int] = set()
    found: dict[str, tuple[LowRankLinear, nn.Module]] = {}
    for name, layer in named_layers(student).items():
        if not isinstance(layer, LowRankLinear) or id(layer) in seen:
            continue
        seen.add(id(layer))
        twin = dense.get(name)
        if isinstance(twin, LowRankLinear):
            continue  # it was low-rank before
        if twin is None or not is_linear(twin):
            what = "has no such module" if twin is None else f"has a {describe(twin)} there"
            raise ValueError(f"layer {name} is low-rank in the student, and the teacher {what}; the student must be its copy")
        found[name] = (layer, twin)
    if not found:
        raise NoMatchingModuleError(
            f"student has no low-rank layer that is dense in the teacher ({type(student).__name__}); factorize it first: "
            "pela(copy.deepcopy(teacher), config)"
        )
    return found


def _inputs(model: nn.Module, inputs: Any) -> Any:
    """Of a mapping, what the model's forward names, without the labels."""
    if not isinstance(inputs, Mapping):
        return inputs
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return {key: value for key, value in inputs.items() if key != "labels" and (key in named or not named)}


def _logits(output: Any, model: nn.Module) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{type(model).__name__} returns a {type(output).__name__} without logits, which the task loss and logit_weight "
            "need; use a model with a head, or task_loss=None and logit_weight=0"
        )
    return logits


def _squared(ours: Tensor, theirs: Tensor) -> Tensor:
    """The mean squared difference, in float32 or better."""
    dtype = compute_dtype(ours.dtype)
    return (ours.to(dtype) - theirs.detach().to(dtype)).square().mean()


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values]).mean()
