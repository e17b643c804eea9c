"""Rows of the catalogue: `Entry`, and the `Variant`s with which a system is trained."""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["BASELINES", "BY_FARMS", "FAMILIES", "KINDS", "NESTED", "Entry", "Variant"]

FAMILIES = ("adapters", "optim", "layers", "compress", "represent", "diagnose", "solve", "train")
#: How the systems of a family are trained, unless a row gives another `kind`.
KINDS = {"adapters": "adapter", "optim": "optimizer", "layers": "layer", "compress": "compress"}

#: How an embedding can be trained at several sizes at once, with any method, and what that is called.
NESTED = {"matryoshka": "Matryoshka", "starbucks": "Starbucks"}


#: The end of the name of a method whose ranks by layer come from FARMS.
BY_FARMS = "+farms"
_MAPPINGS = ("options", "exponents")


#: Learning rates tried for most methods, in this order.
RATES = (1e-3, 3e-4, 3e-3, 1e-4, 1e-2)


def _named(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Variant:
    """A named way to train with a system: what `lowdim compare`, `plan` and `run` call a method.

    A row of the catalogue omits what follows from its place: see `Entry.placed`.

    Attributes:
        name: as the user types it.
        label: its name in tables; if a row omits it, the system's name.
        target: `"module:attribute"` of the class that is built; in a row the class's name alone, or omitted if it is the
            system's; empty for baselines that need none.
        options: its hyperparameters here; others have the class's defaults.
        rates: learning rates in the order of trials, for tuning a trained model.
        scratch_rates: the same for training from random weights; empty if `rates` are used for both.
        companion: `"module:attribute"` of its `Companion`, in a row the class's name alone. It is built as
            `companion(model, optimizer, **options)` with the options in its constructor (`lowdim.methods`). Empty for most.
        kind: how a model is trained with it: `"probe"`, `"full"`, `"adapter"`, `"optimizer"`, `"layer"` or `"compress"`
            (`lowdim.methods`). A row omits it if it is its family's (`KINDS`).
        pretrained: it tunes weights that stay frozen and so needs a trained model, as every adapter does.
        nested: a name of `NESTED` where an embedding is trained at several sizes; no row has one, users write
            `lora+starbucks`.
        ranks: `"uniform"`, or `"farms"`: each layer's rank follows its tail exponent, at the cost of one rank for all.
        exponents: layer -> its exponent, for `"farms"`; empty: they are measured on the model when it is prepared.
    """

    name: str
    label: str = ""
    target: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    scratch_rates: tuple[float, ...] = ()
    companion: str = ""
    kind: str = ""
    pretrained: bool = False
    nested: str = ""
    ranks: str = "uniform"
    exponents: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            object.__setattr__(self, name, types.MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be sent to another process
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return type(self), tuple(dict(value) if name in _MAPPINGS else value for name, value in values.items())

    def by_farms(self, exponents: Mapping[str, float] | None = None) -> Variant:
        """The method with ranks by layer from tail exponents.

        Example:
            >>> from lowdim.catalogue import variant
            >>> twin = variant("lora").by_farms()
            >>> twin.name, twin.label
            ('lora+farms', 'LoRA + FARMS')
        """
        found = dict(self.exponents if exponents is None else exponents)
        if self.ranks == "farms":
            return replace(self, exponents=found)
        return replace(self, name=self.name + BY_FARMS, label=f"{self.label} + FARMS", ranks="farms", exponents=found)

    def build(self) -> Any:
        """The class or function itself (imports its module)."""
        return _named(self.target)

    def build_companion(self) -> Any:
        """The companion's class, or None."""
        return _named(self.companion) if self.companion else None

    def rates_for(self, scratch: bool) -> tuple[float, ...]:
        """Learning rates for training from random weights, or for tuning."""
        return self.scratch_rates if scratch and self.scratch_rates else self.rates

    def unfit(self, task: str) -> str | None:
        """Why the method makes no sense for a task; None if it does."""
        if self.nested and task != "embed":
            return f"{NESTED[self.nested]} trains embeddings of several sizes; it is for --task embed"
        if self.kind == "probe" and task in ("causal-lm", "pretrain", "instruct"):
            return "a language model has no new head to probe; it is for --task classify"
        if (self.kind == "adapter" or self.pretrained) and task == "pretrain":
            what = "an adapter" if self.kind == "adapter" else self.label
            return f"{what} needs a trained model; --task pretrain starts from random weights"
        return None


@dataclass(frozen=True)
class Entry:
    """One system.

    A row holds only what nothing else determines; `placed` fills in the rest.

    Attributes:
        number: its place among the sixty.
        slug: names its vectors, docs page, reproduction and result file.
        name: its name in tables; its target's name if omitted.
        family: its package, which is also the name of the module that holds the row.
        paper, arxiv: title, and identifier if there is one.
        claim: the paper's main claim, in one sentence.
        target: `"module:attribute"` of its main public name, in a row that name alone; empty while it is not built.
        variants: the names under which it can be trained by `compare`, `plan` and `run`; the first is the default.
        options: defaults of `lowdim compress`, used if the user sets neither that option nor an alternative to it.
        tuned: `"module:function"` that returns the parameters to train afterwards, in a row the function's name alone;
            empty if there is none.
        stage: `"module:Class"` of the objective with which the dense model teaches the compressed one, built as
            `Class(teacher, student, config)`; in a row the class's name alone.
        python_only: why `lowdim compress` has no such method, and what to call instead; empty for most.
    """

    number: int
    slug: str
    name: str = ""
    family: str = ""
    paper: str = ""
    arxiv: str = ""
    claim: str = ""
    target: str = ""
    variants: tuple[Variant, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: str = ""
    stage: str = ""
    python_only: str = ""

    def placed(self, family: str) -> Entry:
        """The row with everything filled in that follows from its place and its target.

        Example:
            >>> from lowdim.catalogue import Entry, Variant
            >>> row = Entry(number=36, slug="nola", target="NOLA", variants=(Variant("nola"),)).placed("adapters")
            >>> row.target, row.reproduction, row.variants[0].label, row.variants[0].kind
            ('lowdim.adapters:NOLA', 'lowdim.reproduce.nola:run', 'NOLA', 'adapter')
        """

        def full(target: str) -> str:
            return f"lowdim.{family}:{target}" if target and ":" not in target else target

        name = self.name or self.target
        variants = tuple(
            replace(
                variant,
                label=variant.label or name,
                target=full(variant.target or self.target),
                companion=full(variant.companion),
                kind=variant.kind or KINDS.get(family, ""),
            )
            for variant in self.variants
        )
        names = {field: full(getattr(self, field)) for field in ("target", "tuned", "stage")}
        return replace(self, name=name, family=family, variants=variants, **names)

    @property
    def reproduction(self) -> str:
        """`"module:function"` of its experiment; empty while it is not built."""
        return f"lowdim.reproduce.{self.slug.replace('-', '_')}:run" if self.available else ""

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

    def build_stage(self) -> Any:
        """The objective's class, `(teacher, student, config) -> objective`."""
        return _named(self.stage)

    def build_reproduction(self) -> Any:
        """The experiment, `context -> Outcome`."""
        return _named(self.reproduction)


#: The baselines of every comparison.
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
