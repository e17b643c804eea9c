"""Several adapters on one model: add, activate, weigh, choose by row of the batch, combine, swap, merge."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.attach import adapt
from lowdim.adapters.core.combination import Combination, blank_lora, weighted_sum
from lowdim.adapters.core.files.checkpoint import load_adapter
from lowdim.adapters.core.guards import plain_model
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.merging import (
    MergeReport,
    Separated,
    dequantized,
    merged_layers,
    put_layers,
    tie_words,
    untie_words,
    warn_of_lost_zeros,
)
from lowdim.adapters.core.method import Method, ModelMethod, method_class, registered_methods
from lowdim.adapters.core.tensors import kept_tensors, load_kept
from lowdim.errors import check_float, check_int, unknown
from lowdim.files import read_json
from lowdim.surgery import replace_layers, submodule, with_matrix

__all__ = ["AdapterSet"]


class AdapterSet:
    """Named adapters on one model; any of them can be active.

    Formula: `y = W₀ x + Σ_a s_a · ΔW_a x` over the active adapters `a` with strengths `s_a`.

    Args:
        model: any nn.Module without adapters; for one with adapters, use `AdapterSet.of(first=adapted)`.

    Example:
        >>> import torch, lowdim
        >>> from lowdim.adapters import AdapterSet, LoRA
        >>> adapters = AdapterSet(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        >>> _ = adapters.add("french", LoRA(rank=1))
        >>> _ = adapters.add("german", LoRA(rank=2))
        >>> adapters.activate("french")
        >>> adapters.active
        {'french': 1.0}
        >>> with adapters.disabled():
        ...     y = adapters.model(torch.ones(1, 4))

    Methods that act on the whole model (SAID, aTLAS) cannot share it. A base weight is kept once, whatever the number of
    adapters; an adapter that replaces a part of it (LaMDA, SVFit) costs two more thin products when it is not the first.

    Source: common practice; the naming follows PEFT's.
    """

    def __init__(self, model: nn.Module):
        model = plain_model(model)
        if any(isinstance(module, AdaptedLayer) for module in model.modules()):
            raise ValueError(
                "model is already adapted: pass the plain model, or build the set with AdapterSet.of(name=adapted)"
            )
        self.model = model
        self.adapters: dict[str, Adapted] = {}
        self._strengths: dict[str, float] = {}
        self._merged: tuple[dict[str, nn.Module], dict[nn.Parameter, bool], Separated | None] | None = None

    @classmethod
    def of(cls, **adapters: Adapted) -> AdapterSet:
        """A set of the adapters that a model already has; pass all of them by name. The last one is active."""
        models = {id(adapted.model): adapted.model for adapted in adapters.values()}
        if len(models) != 1:
            raise ValueError(f"the adapters must belong to one model; got {len(models)} models")
        (model,) = models.values()
        mine = {layer for adapted in adapters.values() for layer in adapted.layers.values()}
        if any(isinstance(module, AdaptedLayer) and module not in mine for module in model.modules()):
            raise ValueError("the model has other adapters as well; pass all of them")
        made = cls.__new__(cls)
        made.model, made.adapters, made._strengths, made._merged = model, {}, {}, None
        for name, adapted in adapters.items():
            made._register(name, adapted)
        return made

    @property
    def names(self) -> list[str]:
        """All adapters, in the order in which they were added."""
        return list(self.adapters)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their strengths."""
        return {name: strength for name, strength in self._strengths.items() if strength}

    def __getitem__(self, name: str) -> Adapted:
        return self.adapters[self._check_known(name)]

    def __contains__(self, name: object) -> bool:
        return name in self.adapters

    def add(self, name: str, source: Method | str | Path, **options: Any) -> Adapted:
        """Attach a method, or load an adapter from its folder, under `name`; it becomes the only active one.

        Args:
            source: hyperparameters, or a folder that `Adapted.save` wrote, or PEFT with a LoRA.
            options: of `lowdim.adapt` or `lowdim.load_adapter`.

        Raises:
            ValueError: the name is in use or empty, the set is merged, the method acts on the whole model, or the folder has
                another state of a module that an adapter of the set saves whole (a head), of which the model has one. The set
                is then unchanged.
        """
        self._check_new(name)
        kind = type(source) if isinstance(source, Method) else _saved_kind(Path(source))
        if kind is not None and issubclass(kind, ModelMethod):
            raise ValueError(f"{kind.__name__} acts on the model as a whole and cannot share it with other adapters")
        if isinstance(source, Method):
            return self._register(name, adapt(self.model, source, **options))
        before = self._saved_whole()
        adapted = load_adapter(self.model, source, **options)
        self._keep_saved(before, adapted, source)
        return self._register(name, adapted)

    def activate(self, *names: str, train: bool = True, **strengths: float) -> None:
        """Activate these adapters, and deactivate all others.

        Args:
            names: with strength 1.
            train: whether the active ones are trained (those with strength 1); False freezes all.
            strengths: name -> factor of ΔW, for a weighted sum.

        Raises:
            UnknownNameError: there is no such adapter.
            ValueError: a strength that is not finite.
        """
        wanted = {**dict.fromkeys(names, 1.0), **strengths}
        for name, strength in wanted.items():
            self._check_known(name)
            check_float(f"strength of {name!r}", strength)
        self._check_unmerged("activate")
        for name, adapted in self.adapters.items():
            strength = float(wanted.get(name, 0.0))
            self._strengths[name] = strength
            for layer in adapted.layers.values():
                layer.strength, layer.rows = strength, None
            for parameter in adapted.trainable_here().values():
                parameter.requires_grad_(train and strength == 1.0)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The pre-trained model, inside the `with` block."""
        with self._restoring_choice():
            for layer in self._layers():
                layer.strength = 0.0
            yield self.model

    @contextmanager
    def rows(self, choice: Sequence[str | None]) -> Iterator[nn.Module]:
        """Choose an adapter for each row of the batch: `choice[i]` names the adapter of row `i`; None means no adapter.

        Only layers whose input has the batch dimension first apply the choice; the batch must have `len(choice)` rows.
        """
        for name in {name for name in choice if name is not None}:
            self._check_known(name)
        with self._restoring_choice():
            for name, adapted in self.adapters.items():
                rows = torch.tensor([i for i, chosen in enumerate(choice) if chosen == name], dtype=torch.int64)
                for layer in adapted.layers.values():
                    layer.strength, layer.rows = (1.0, rows) if len(rows) else (0.0, None)
            yield self.model

    def delete(self, name: str) -> None:
        """Remove an adapter from the model; the others stay. Its own copy of a base weight is removed too."""
        self._check_unmerged("delete")
        self._detach(self[name])
        del self.adapters[name], self._strengths[name]

    def _detach(self, gone: Adapted) -> None:
        """Take an adapter's layers out of the model."""
        freed = {place: plain for place, layer in gone.layers.items() if (plain := self._unwrapped(place, layer)) is not None}
        replace_layers(self.model, freed)
        gone.drop_shared()

    def _saved_whole(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the modules that adapters of the set save whole."""
        names = {module for adapted in self.adapters.values() for module in adapted.modules_to_save}
        return {name: {key: t.detach().clone() for key, t in kept_tensors(self.model, name).items()} for name in sorted(names)}

    def _keep_saved(self, before: Mapping[str, Mapping[str, Tensor]], adapted: Adapted, source: str | Path) -> None:
        """Refuse an adapter whose loading changed a module that another one saves whole; the model is as before."""
        changed = [
            name
            for name, state in before.items()
            if any(not torch.equal(t, state[key]) for key, t in kept_tensors(self.model, name).items())
        ]
        if not changed:
            return
        self._detach(adapted)
        for name in changed:
            load_kept(self.model, name, before[name])
        owner = next(name for name, mine in self.adapters.items() if changed[0] in mine.modules_to_save)
        raise ValueError(
            f"{source} has another state of module {changed[0]} than adapter {owner!r}, which saves it whole, too, and the "
            f"model has one: load each into a model of its own, or delete({owner!r}) first"
        )

    def swap(self, name: str, source: str | Path | Adapted) -> Adapted:
        """Write another adapter's numbers into the tensors of `name`: an optimizer over them stays valid.

        Args:
            source: an adapter, or a folder that `Adapted.save` wrote, or PEFT with a LoRA; its scale comes along.

        Raises:
            ValueError: another method, other layers or other ranks; nothing is changed. Use `delete` and `add`.
        """
        mine = self[name]
        other = source if isinstance(source, Adapted) else self._load_detached(mine, source)
        ours, theirs = mine.state_dict(), other.state_dict()
        wrong = sorted(set(ours) ^ set(theirs)) or [k for k in ours if ours[k].shape != theirs[k].shape]
        if wrong or type(mine.method) is not type(other.method):
            what = f"{type(other.method).__name__} with other tensors ({', '.join(wrong[:3])})" if wrong else str(other.method)
            raise ValueError(f"adapter {name!r} is {mine.method}; it cannot load the tensors of {what}")
        with torch.no_grad():
            for place, layer in mine.layers.items():
                weight = layer.original_weight()
                found = other.layers[place]
                layer.update.load_state_dict(found.update.state_dict(), strict=False)
                layer.dropout = found.dropout
                if hasattr(layer.update, "scaling"):  # alpha / rank is no tensor
                    layer.update.scaling = found.update.scaling
                matrix = layer.update.rebase(weight)
                if layer.rebased and matrix is not None:
                    layer.base = with_matrix(layer.base, matrix)
        for module in mine.modules_to_save:
            load_kept(mine.model, module, kept_tensors(other.model, module))
        mine.method = other.method
        return mine

    def combine(
        self, name: str, weights: Mapping[str, float], *, rank: int | None = None, dtype: torch.dtype | None = None
    ) -> Combination:
        """Add a LoRA that is the weighted sum of other adapters' ΔW.

        Formula: `ΔW = Σ wᵢ ΔWᵢ`, from thin factors where every adapter has them (then exact up to rounding), else from the
            dense
        sum; truncated to `rank` by its best approximation.

        Args:
            weights: adapter -> factor.
            rank: maximum rank of the result; None keeps the full rank of a low-rank sum, and a quarter of the smaller side
                otherwise.

        Returns:
            A `Combination` with the rank and error of each layer.

        Raises:
            UnknownNameError, ValueError: an unknown adapter, no adapter, a factor that is not finite, rank below 1.
        """
        self._check_new(name)
        if not weights:
            raise ValueError("weights must name at least one adapter; got {}")
        for part, factor in weights.items():
            self._check_known(part)
            check_float(f"weight of {part!r}", factor)
        if rank is not None:
            check_int("rank", rank, 1)
        parts: dict[str, list[tuple[float, AdaptedLayer]]] = {}
        for part, factor in weights.items():
            for place, layer in self.adapters[part].layers.items():
                parts.setdefault(place, []).append((float(factor), layer))
        factors = {place: weighted_sum(found, rank) for place, found in parts.items()}
        largest = max(A.shape[0] for A, _, _ in factors.values())
        # One LoRA method serves all layers: shorter factors are padded with zeros, which changes nothing.
        method = method_class("LoRA")(rank=largest, alpha=largest, target_modules=list(factors))
        self._register(name, blank_lora(self.model, method, factors, dtype))
        return Combination({p: len(A) for p, (A, _, _) in factors.items()}, {p: e for p, (_, _, e) in factors.items()})

    @torch.no_grad()
    def merge(self, *, keep_mask: bool = False) -> MergeReport:
        """Put plain layers with the active adapters' `W_eff` into the model; `unmerge()` restores everything bit for bit.

        Args:
            keep_mask: leave 0 what was exactly 0 before the adapters.
        """
        self._check_unmerged("merge")
        outer = {place: submodule(self.model, place) for adapted in self.adapters.values() for place in adapted.layers}
        flags = {p: p.requires_grad for p in self.model.parameters()}
        plain, changes = merged_layers(cast("dict[str, AdaptedLayer]", outer), keep_mask=keep_mask)
        put_layers(self.model, plain)
        self._merged = (outer, flags, untie_words(self.model))
        tied = {name for adapted in self.adapters.values() for name in adapted.tied}
        now_plain = dequantized(cast("dict[str, AdaptedLayer]", outer), plain)
        warn_of_lost_zeros(changes, now_plain)
        return MergeReport(changes, tuple(place for place in outer if place in tied), now_plain)

    def unmerge(self) -> None:
        """Undo `merge()`."""
        if self._merged is None:
            raise ValueError("there is nothing to unmerge")
        layers, flags, separated = self._merged
        if separated is not None:
            tie_words(self.model, separated)
        put_layers(self.model, layers)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        self._merged = None

    def _register(self, name: str, adapted: Adapted) -> Adapted:
        self.adapters[name] = adapted
        self.activate(name)
        return adapted

    def _check_new(self, name: str) -> None:
        self._check_unmerged("add")
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a non-empty string; got {name!r}")
        if name in self.adapters:
            raise ValueError(f"adapter {name!r} already exists; delete it first, or replace its numbers with swap()")

    def _check_known(self, name: str) -> str:
        if name not in self.adapters:
            raise unknown("adapter", name, self.adapters)
        return name

    def _check_unmerged(self, what: str) -> None:
        if self._merged is not None:
            raise ValueError(f"the adapters are merged: call unmerge() before {what}()")

    def _layers(self) -> Iterable[AdaptedLayer]:
        return (layer for adapted in self.adapters.values() for layer in adapted.layers.values())

    @contextmanager
    def _restoring_choice(self) -> Iterator[None]:
        self._check_unmerged("disabled() or rows")
        before = [(layer, layer.strength, layer.rows) for layer in self._layers()]
        try:
            yield
        finally:
            for layer, strength, rows in before:
                layer.strength, layer.rows = strength, rows

    def _unwrapped(self, place: str, gone: AdaptedLayer) -> nn.Module | None:
        """Remove one wrapper from the chain at `place`; the layer to put there if the wrapper is the outermost."""
        layer: nn.Module = submodule(self.model, place)
        if layer is gone:
            return gone.released()
        while isinstance(layer, AdaptedLayer) and layer.base is not gone:
            layer = layer.base
        assert isinstance(layer, AdaptedLayer)
        layer.base = gone.released()
        return None

    def _load_detached(self, mine: Adapted, folder: str | Path) -> Adapted:
        """The adapter in `folder`, attached to placeholders for the layers that `mine` adapts and copies of what it saves."""
        bare = nn.Module()
        kept = {place: copy.deepcopy(submodule(mine.model, place)) for place in mine.modules_to_save}
        for place, layer in (*mine.layers.items(), *kept.items()):
            parent = bare
            *path, leaf = place.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, layer)
        return load_adapter(bare, folder)


def _saved_kind(folder: Path) -> type[Method] | None:
    """The method of a saved adapter, from its description; None if that cannot be read, which loading will report."""
    if not (folder / "adapter.json").is_file():
        return None
    about = read_json(folder / "adapter.json")
    return registered_methods().get(str(about.get("method"))) if isinstance(about, dict) else None
