"""PELA: what the intermediate stage recovers without labels, and what is left of it after fine-tuning on few."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.compress import PELAConfig, PELAObjective, pela
from lowdim.linalg import derive_seed, stream
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

_TRAIN, _TEST, _LABELLED = 10_000, 4_000, 300
_RATIO, _BATCH, _RATE = 8.0, 128, 1e-3
_TEACHER, _STAGE, _TUNING = 600, 150, 100
_FEATURES = ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
Loss = Callable[[nn.Module, Tensor], Tensor]
#: Objectives of the stage, by what they add to the task loss.
_ARMS: dict[str, dict[str, Any]] = {"L_feat": {"perturbation_weight": 0.0}, "L_feat + L_pert": {}}


def run(context: Context) -> Outcome:
    """Three seeds: plain SVD, then two objectives of the stage, each before and after the same fine-tuning."""
    outcome = Outcome(
        "pela",
        f"Fashion-MNIST, first {_TRAIN} training and {_TEST} test images; residual MLP 784-128, four blocks 128-256-128 with"
        f" LayerNorm and GELU, {_TEACHER} steps of AdamW {_RATE:g} (weight decay 0.01, cosine), batch {_BATCH}."
        f" compression_ratio={_RATIO:g}; stage: {_STAGE} steps on all images without labels; then {_TUNING} steps on"
        f" {_LABELLED} labelled images, same optimizer. Test accuracy (x 100), mean of three seeds.",
    )
    data = _Data(context)
    seeds = range(1 if context.quick else 3)
    scores: dict[str, list[float]] = {}

    def note(name: str, net: nn.Module) -> None:
        scores.setdefault(name, []).append(data.accuracy(net))

    for seed in seeds:
        teacher = _train(_Net(seed), data.all, _TEACHER, seed, "teacher", context.quick, data.task)
        note("teacher", teacher)
        plain = _student(teacher, _config())
        note("SVD", plain)
        stage: dict[str, nn.Module] = {"SVD": plain}
        for name, changes in _ARMS.items():
            config = _config(**changes)
            student = _student(teacher, config)
            loss = data.objective(teacher, student, config, labels=False)
            stage[name] = _train(student, data.all, _STAGE, seed, "stage", context.quick, loss)
            note(name, student)
        for name, net in stage.items():
            tuned = _train(copy.deepcopy(net), data.few, _TUNING, seed, "tuning", context.quick, data.task)
            note(f"{name}, tuned on {_LABELLED}", tuned)
        for name, changes in {"SVD": None, **_ARMS}.items():
            config = _config(**(changes or {}))
            student = _student(teacher, config)
            loss = data.task if changes is None else data.objective(teacher, student, config, labels=True)
            note(f"{name}, all labels in the stage", _train(student, data.all, _STAGE, seed, "stage", context.quick, loss))
        context.say(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in scores.items()))
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    sizes = {"teacher": _size(_Net(0)), "SVD": _size(pela(_Net(0), _config()))}
    for name, values in scores.items():
        row: dict[str, Any] = {"arm": name, "accuracy": round(mean[name], 2), "seeds": " ".join(f"{v:.2f}" for v in values)}
        outcome.rows.append(row | ({"parameters": sizes[name]} if name in sizes else {}))
    _check(outcome, mean)
    return outcome


def _check(outcome: Outcome, mean: dict[str, float]) -> None:
    ours, tuned = "L_feat + L_pert", f", tuned on {_LABELLED}"
    lost = mean["teacher"] - mean["SVD"]
    share = (mean[ours] - mean["SVD"]) / lost if lost > 0 else float("nan")
    outcome.checks += [
        Check("accuracy after fine-tuning, PELA above SVD", mean[ours + tuned], ">=", mean["SVD" + tuned]),
        Check(
            "accuracy after the stage without labels, at least SVD + fine-tuning + 1", mean[ours], ">=", mean["SVD" + tuned] + 1
        ),
        Check("share of the SVD's loss that the stage recovers", share, ">=", 0.7),
    ]
    every = ", all labels in the stage"
    outcome.notes += [
        f"L_pert: {mean[ours]:.2f} with it and {mean['L_feat']:.2f} without it after the stage, {mean[ours + tuned]:.2f} and"
        f" {mean['L_feat' + tuned]:.2f} after fine-tuning. No effect of it is claimed.",
        f"With all {_TRAIN} labels and the task loss in the stage: {mean['SVD' + every]:.2f} for the task loss alone,"
        f" {mean['L_feat' + every]:.2f} with L_feat, {mean[ours + every]:.2f} with L_feat and L_pert.",
        "The paper's models (DeiT-B, Swin-B, DeiT-III-L, ALBEF) and ImageNet are out of reach here.",
    ]


class _Net(nn.Module):
    """Stem, four residual blocks, head."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "pela", "model"))
            self.stem = nn.Linear(784, 128)
            self.blocks = nn.ModuleList(_Block() for _ in range(4))
            self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class _Block(nn.Module):
    """`x + down(gelu(up(norm(x))))`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(128), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class _Data:
    """Images with mean 0 and deviation 1; all of them, and the few whose labels are known."""

    def __init__(self, context: Context):
        x, y, tx, ty = fashion_mnist(context)
        x, tx = x[:_TRAIN].float(), tx[:_TEST].float()
        mean, std = x.mean(), x.std()
        self.x, self.y = (x - mean) / std, y[:_TRAIN]
        self.tx, self.ty = (tx - mean) / std, ty[:_TEST]
        self.all = torch.arange(_TRAIN)
        self.few = torch.randperm(_TRAIN, generator=stream(0, "pela", "labelled"))[:_LABELLED]

    def task(self, net: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(net(self.x[rows]), self.y[rows])

    def objective(self, teacher: nn.Module, student: nn.Module, config: PELAConfig, *, labels: bool) -> Loss:
        """The loss of the intermediate stage."""
        terms = PELAObjective(teacher, student, config)

        def loss(_: nn.Module, rows: Tensor) -> Tensor:
            task = (lambda logits: F.cross_entropy(logits, self.y[rows])) if labels else None
            return terms(self.x[rows], task).total

        return loss

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        return 100 * float((net(self.tx).argmax(1) == self.ty).float().mean())


def _config(**changes: Any) -> PELAConfig:
    return PELAConfig(compression_ratio=_RATIO, exclude=("head",), feature_modules=_FEATURES, **changes)


def _student(teacher: nn.Module, config: PELAConfig) -> nn.Module:
    """A factorized copy, all parameters of which are trained: those of a teacher are frozen once it has taught."""
    return pela(copy.deepcopy(teacher).requires_grad_(True), config)


def _train(net: nn.Module, rows: Tensor, steps: int, seed: int, what: str, quick: bool, loss: Loss) -> nn.Module:
    """AdamW with a cosine schedule; the same batches for every arm of a seed. Left in eval mode."""
    steps = 10 if quick else steps
    optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = stream(seed, "pela", what)
    net.train()
    for _ in range(steps):
        loss(net, rows[torch.randint(len(rows), (_BATCH,), generator=draw)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
