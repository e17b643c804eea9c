"""What a row of the catalogue says: `Entry`, and the `Variant`s under which a system is trained."""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["BASELINES", "FAMILIES", "KINDS", "Entry", "Variant"]

FAMILIES = ("adapters", "optim", "layers", "compress", "represent", "diagnose", "solve", "train")
#: How the systems of a family are trained, where a row does not state another `kind`.
KINDS = {"adapters": "adapter", "optim": "optimizer", "layers": "layer"}


def _named(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Variant:
    """A named way to train with a system: what `lowdim compare`, `plan` and `run` call a method.

    Attributes:
        name: what the user types.
        label: what tables print.
        target: `"module:attribute"` of the class that is built; empty for baselines that need none.
        options: its hyperparameters here; others keep the class's defaults.
        rates: learning rates in the order in which they are tried, for tuning a trained model.
        scratch_rates: the same for training from random weights; empty where `rates` serve for both.
        companion: `"module:attribute"` of what must act beside training, built as `companion(model, optimizer, **options)`; it
            takes those options that its constructor names (`lowdim.methods`). Empty for most.
        kind: how a model is trained with it: `"probe"`, `"full"`, `"adapter"`, `"optimizer"` or `"layer"` (`lowdim.methods`). A
            row leaves it out where it is its family's (`KINDS`).
    """

    name: str
    label: str
    target: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (1e-3, 3e-3, 3e-4, 1e-2, 1e-4)
    scratch_rates: tuple[float, ...] = ()
    companion: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", types.MappingProxyType(dict(self.options)))

    def build(self) -> Any:
        """The class or function itself (imports its module)."""
        return _named(self.target)

    def build_companion(self) -> Any:
        """The companion's class, or None."""
        return _named(self.companion) if self.companion else None

    def rates_for(self, scratch: bool) -> tuple[float, ...]:
        """Learning rates for training from random weights, or for tuning."""
        return self.scratch_rates if scratch and self.scratch_rates else self.rates


@dataclass(frozen=True)
class Entry:
    """One system.

    Attributes:
        number: its place among the sixty; 0 for a baseline.
        slug: names its vectors, docs page, reproduction and result file.
        family: the package where it lives.
        paper, arxiv: title, and identifier where there is one.
        claim: what the paper says it achieves, in one sentence.
        target: `"module:attribute"` of its main public name; empty while it is not built.
        variants: the names under which it can be trained by `compare`, `plan` and `run`; the first is the default.
        reproduction: `"module:function"`, or empty.
        options: what `lowdim compress` takes where the user chooses neither that option nor an alternative to it.
        tuned: `"module:function"` that gives the parameters which training afterwards changes; empty where there is none.
    """

    number: int
    slug: str
    name: str
    family: str
    paper: str
    arxiv: str = ""
    claim: str = ""
    target: str = ""
    variants: tuple[Variant, ...] = ()
    reproduction: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: str = ""

    def __post_init__(self) -> None:
        kind = KINDS.get(self.family, "")
        stated = tuple(v if v.kind else replace(v, kind=kind) for v in self.variants)
        object.__setattr__(self, "variants", stated)

    @property
    def available(self) -> bool:
        """Whether it works today."""
        return bool(self.target)

    def build(self) -> Any:
        """Its main public name itself (imports its module)."""
        return _named(self.target)

    def build_tuned(self) -> Any:
        """`model -> parameters` for training after a compression."""
        return _named(self.tuned)

    def build_reproduction(self) -> Any:
        """The experiment, `context -> Outcome`."""
        return _named(self.reproduction)


#: What every comparison must hold up against.
BASELINES: tuple[Variant, ...] = (
    Variant("linear-probe", "Linear probe", rates=(1e-3, 3e-3, 1e-2, 3e-4, 1e-4), kind="probe"),
    Variant("lora", "LoRA", "lowdim.adapters:LoRA", {"rank": 8, "alpha": 16}, (1e-3, 3e-4, 3e-3, 1e-4, 1e-2), kind="adapter"),
    Variant(
        "full",
        "Full fine-tuning",
        kind="full",
        rates=(5e-5, 2e-5, 1e-4, 1e-5, 2e-4),
        scratch_rates=(1e-3, 3e-3, 3e-4, 1e-2, 1e-4),
    ),
)
