"""From the name of a compression or a diagnostic to its function and options."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowdim.catalogue import BASELINES, FAMILIES, Entry, Variant, entries, variants
from lowdim.errors import UnknownNameError, listed, nearest, unknown
from lowdim.jobs.measures import MEASURES, Measure
from lowdim.jobs.options import Option, check_options, described, options_of

__all__ = ["Compressor", "Diagnostic", "compressor", "described_system", "diagnostic", "names_of"]


#: Help texts of options that a method does not describe itself.
_COMMON = {
    "target_modules": "which layers; null selects every linear layer but the head",
    "betas": "decay rates of Adam's two moments",
    "eps": "added to the root of the second moment",
    "weight_decay": "decoupled decay of the weights, as in AdamW",
    "stagger": "spread the refreshes of the layers' subspaces over the steps between two of them",
    "foreach": "update many tensors in one call",
}


def names_of(family: str) -> list[str]:
    """The slugs that a command can run today, in alphabetical order; without compressions that act while a model trains."""
    found = (e for e in entries() if e.family == family and e.available and not e.python_only)
    return sorted(e.slug for e in found if not _acts_in_training(e))


def _acts_in_training(entry: Entry) -> bool:
    """Whether it is a compression that `lowdim run` trains with, as opposed to one of a trained model."""
    return entry.family == "compress" and bool(entry.variants)


@dataclass(frozen=True)
class Compressor:
    """A compression: `function(model, config, batches)`, its config dataclass, and the defaults of its row.

    Attributes:
        needs_batches: whether it needs samples.
    """

    entry: Entry
    function: Callable[..., Any]
    config: type
    needs_batches: bool

    @property
    def options(self) -> dict[str, Option]:
        """The fields of the config."""
        return options_of(self.config)

    def build(self, given: Mapping[str, Any]) -> Any:
        """The config, with the row's default if the user set neither that option nor an alternative to it.

        Raises:
            UnknownNameError, ValueError: see `check_options`, and errors of the config itself.
        """
        known = self.options
        strangers = [name for name in given if name not in known]
        check_options(self.entry.slug, known, given, _owners(strangers[0]) if strangers else ())
        groups = getattr(self.config, "one_of", ())
        taken = set(given).union(*(group for group in groups if set(group) & set(given)))
        capping = {"cap_rank": True} if "cap_rank" in known else {}  # one small layer must not stop a command
        return self.config(**{**capping, **{n: v for n, v in self.entry.options.items() if n not in taken}, **given})


@dataclass(frozen=True)
class Diagnostic:
    """A measurement: `function(*measure.arguments(inputs), **options) -> result`."""

    entry: Entry
    function: Callable[..., Any]
    measure: Measure

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it needs, by the names of the command."""
        return self.measure.inputs

    @property
    def options(self) -> dict[str, Option]:
        """The keyword-only parameters, but for a function that is told of progress."""
        return {name: option for name, option in options_of(self.function).items() if name not in ("callback", "say")}


def compressor(name: str) -> Compressor:
    """The compression of this name.

    Raises:
        UnknownNameError: no system of `lowdim.compress` that works today, or one that only Python can call: the error says why.

    Example:
        >>> from lowdim.jobs import compressor
        >>> compressor("lord").config.__name__, compressor("welore").needs_batches
        ('LoRDConfig', False)
    """
    entry = _entry("compress", "--method", name)
    function = entry.build()
    hints = typing.get_type_hints(function)
    batches = inspect.signature(function).parameters.get("batches")
    return Compressor(entry, function, hints["config"], batches is not None and batches.default is batches.empty)


def diagnostic(name: str) -> Diagnostic:
    """The diagnostic of this name.

    Raises:
        UnknownNameError: no system of `lowdim.diagnose` that works today.

    Example:
        >>> from lowdim.jobs import diagnostic
        >>> diagnostic("intruders").inputs
        ('base', 'tuned')
    """
    entry = _entry("diagnose", "diagnostic", name)
    measure, function = MEASURES.get(name), entry.build()
    if measure is None:
        parameters = inspect.signature(function).parameters.values()
        measure = Measure(tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD))
    if measure.function:
        module, _, attribute = measure.function.rpartition(":")
        function = getattr(importlib.import_module(module or "lowdim.diagnose"), attribute)
    return Diagnostic(entry, function, measure)


def described_system(name: str) -> tuple[Entry | None, dict[str, dict[str, Option]]]:
    """The row of a system or method (None for a baseline), and the options of each way to use it.

    Raises:
        UnknownNameError: neither a family nor a system nor a method.

    Example:
        >>> from lowdim.jobs.systems import described_system
        >>> entry, options = described_system("lamda++")
        >>> entry.slug, list(options)
        ('lamda', ['lamda++'])
    """
    for baseline in BASELINES:
        if name == baseline.name:
            return None, {name: variant_options(baseline)}
    row = next((e for e in entries() if name == e.slug or name in (v.name for v in e.variants)), None)
    if row is None:
        known = [*FAMILIES, *(e.slug for e in entries()), *(v.name for v in variants().values())]
        raise UnknownNameError(f"no family, system or method is called {name!r}; nearest: {', '.join(nearest(name, known))}")
    if not row.available:
        return row, {}
    if row.python_only:
        return row, {name: options_of(typing.get_type_hints(row.build())["config"])}
    if row.family == "compress" and name == row.slug and not _acts_in_training(row):
        return row, {name: compressor(name).options}
    if row.family == "diagnose":
        return row, {name: diagnostic(name).options}
    return row, {v.name: variant_options(v) for v in row.variants if name in (row.slug, v.name)}


def variant_options(variant: Variant) -> dict[str, Option]:
    """The hyperparameters of a method that is trained, with the defaults of its catalogue row."""
    if not variant.target:
        return {}
    from lowdim.methods import strategy_for

    strategy = strategy_for(variant)
    parts = strategy.option_sources()
    known = {name: option for part in parts for name, option in options_of(part).items()}
    texts = _COMMON | {name: text for part in parts for name, text in described(part).items()}
    found = {}
    for name in strategy.option_names():
        option = known.get(name) or Option(name, Any, None, "")
        found[name] = dataclasses.replace(
            option, default=variant.options.get(name, option.default), help=option.help or texts.get(name, "")
        )
    return found


def _entry(family: str, argument: str, name: str) -> Entry:
    for entry in entries():
        if entry.family == family and entry.available and entry.slug == name:
            if _acts_in_training(entry):
                raise UnknownNameError(
                    f"{argument}: {name} acts while a model trains: a recipe of lowdim run with method: {name}, or lowdim "
                    f"compare --methods {name}. What is trained already is compressed by {', '.join(names_of(family))}"
                )
            if entry.python_only:
                raise UnknownNameError(f"{argument} must be one of {listed(names_of(family))}; not {name}: {entry.python_only}")
            return entry
    raise unknown(argument, name, names_of(family))


def _owners(option: str) -> list[str]:
    return [name for name in names_of("compress") if option in compressor(name).options]
