"""The result of `lowdim.adapt`: a model with adapted layers, and the operations on them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.files.layout import write_adapter
from lowdim.adapters.core.guards import FusedPaths, whole_parameters
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.merging import (
    MergeReport,
    Separated,
    allow_training,
    dequantized,
    merged_layers,
    put_layers,
    tie_words,
    untie_words,
    warn_of_lost_zeros,
)
from lowdim.adapters.core.method import Method
from lowdim.adapters.core.shared import SHARED, free_name, shared_prefix
from lowdim.adapters.core.tensors import UPDATE, below, by_layer, kept_tensors, load_kept
from lowdim.adapters.core.update import WeightUpdate
from lowdim.calibrate import LossFn
from lowdim.companion import Companion, warn_of_lost_updates
from lowdim.errors import NoGradientError, check_choice, warn_caller
from lowdim.linalg import gather, is_sharded, one_writes
from lowdim.modules import quantized_scheme
from lowdim.results import html_table
from lowdim.surgery import freeze_statistics, plain_name, release_statistics, submodule

__all__ = ["EXPORTERS", "Adapted"]

#: Format -> `write(adapted, folder, **options)`. A module that writes a format registers itself here.
EXPORTERS: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class _Merged:
    """What `unmerge` needs."""

    layers: dict[str, AdaptedLayer]
    shared: nn.Module | None
    flags: dict[nn.Parameter, bool]
    separated: Separated | None


class Adapted(Companion):
    """A model with adapted layers. Made by `lowdim.adapt` and `lowdim.load_adapter`.

    Attributes:
        model: the model that was given, layers swapped in place; train it with any loop. What it was wrapped in (compiled,
            data-parallel) is left out here and keeps working: it holds the same layers.
        layers: name -> AdaptedLayer.
        method: the hyperparameters.
        modules_to_save: names of other modules that are trained and saved whole (a new head).
        fingerprints: name -> digest of the weight before attaching.
        tied: names of adapted layers whose weight was shared with another module before attaching.
        shared: the module that all layers share, if the method has one; in the model it is called `lowdim_shared`.
        merge_report: the changes of the last `merge()`.
        capped_ranks: layer -> its own rank, where the method's is above what the layer allows (`adapt(..., cap_rank=True)`).
        layer_ranks: layer -> the rank that it was given (`adapt(..., ranks=...)`).
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        layers: Mapping[str, AdaptedLayer],
        fingerprints: Mapping[str, str],
        modules_to_save: Iterable[str],
        seed: int,
        tied: Iterable[str] = (),
        shared: nn.Module | None = None,
    ):
        self.model, self.method, self.layers, self.seed = model, method, dict(layers), seed
        self.fingerprints, self.modules_to_save = dict(fingerprints), tuple(modules_to_save)
        self.tied, self.shared = frozenset(tied), shared
        if shared is not None:
            model.add_module(free_name(model), shared)
            for name, layer in self.layers.items():
                layer.update.connect(shared, name)
        self._fused = FusedPaths(model, self.layers.values())
        self._fused.disable()
        self._statistics = freeze_statistics(model)
        self._merged: _Merged | None = None
        self._awaits_gradient = True
        self._regularized = False
        self._looked_at_optimizer = False
        self.allow_unused = False
        self.merge_report: MergeReport | None = None
        self.capped_ranks: dict[str, Any] = {}
        self.layer_ranks: dict[str, int] = {}

    #: Whether a training without the regularizer is the method, too: `step()` does not ask for it then.
    optional_regularizer: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note calls of a method's own `regularizer`."""
        super().__init_subclass__(**kwargs)
        if "regularizer" in vars(cls):
            cls.regularizer = _noted(cls.regularizer)  # type: ignore[method-assign]

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call once after each optimizer step: advances schedules, allocates ranks, applies proximal steps.

        Raises:
            NoGradientError: in the first step with gradients, some adapted layers got none (see `check_gradients`).
            RuntimeError: the method has a regularizer, and `regularizer()` was not called since the last step.

        Warns:
            UserWarning: in the first step, if the optimizer is given and loses small updates of 16-bit weights.
        """
        if self._awaits_gradient and self._has_gradients():
            self.check_gradients()
        if optimizer is not None and not self._looked_at_optimizer:
            self._looked_at_optimizer = True
            warn_of_lost_updates(optimizer)
        self._check_regularized()
        for layer in self.layers.values():
            layer.update.step()

    def loss(self, forward: Callable[[], Any], logits: Any) -> Tensor | float:
        """`regularizer()`, as training loops that know a `Companion` call it."""
        return self.regularizer()

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.trainable().values())

    def _check_regularized(self) -> None:
        asked, self._regularized = self._regularized, False
        if asked or self.optional_regularizer or not self._has_gradients():
            return
        with torch.enable_grad():
            value = self.regularizer()
        self._regularized = False
        if isinstance(value, Tensor) and value.requires_grad:
            name = type(self.method).__name__
            raise RuntimeError(
                f"adapted.step(): {name} has a regularizer, which was not added to the loss since the last step. Add "
                "adapted.regularizer() to the loss before backward(); for a transformers Trainer there is "
                "lowdim.train.AdaptedTrainerMixin. To train without it, set its weight to 0 in the method"
            )

    def check_gradients(self) -> None:
        """After the first backward pass: every adapted layer must have a gradient, or it would never learn.

        Raises:
            NoGradientError: names the layers without one. Set `allow_unused = True` on this object if this is intended
                (experts that some batches do not reach).
        """
        self._awaits_gradient = False
        if self.allow_unused:
            return
        lost = []
        for name, layer in self.layers.items():
            own = [p for p in layer.update.parameters() if p.requires_grad and p.numel()]
            if own and all(p.grad is None for p in own):
                lost.append(name)
        if lost:
            shown = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
            raise NoGradientError(
                f"{len(lost)} of {len(self.layers)} adapted layers got no gradient from the first backward pass: {shown}. Does "
                "the model use them (not another copy of the model, a skipped layer, or code that only reads their weight)? "
                "With reentrant gradient checkpointing call model.enable_input_require_grads(), or use use_reentrant=False. "
                "Set allow_unused=True on the Adapted if this is intended"
            )

    def before_training(
        self,
        batches: list[Any],
        loss_fn: LossFn | None,
        lr: float,
        steps: int,
        make_optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] | None = None,
    ) -> int:
        """Called by `lowdim run` and `lowdim compare` before a training of `steps` steps; for methods that search first.

        Args:
            make_optimizer: `(weights, lr)` -> the optimizer of the training; None: torch's AdamW without decay.

        Returns:
            The number of steps that the search has used; the training has that many fewer.
        """
        return 0

    def follow(self, scheduler: Any, *, warmup: int, total: int) -> None:
        """Called by `AdaptedCallback` after each step: a method that adds optimizer groups adds them to the scheduler too."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name in the model.

        Parameters that a schedule has frozen meanwhile are included, so an optimizer made after a resume has the same groups as
        the run that it continues; without a gradient they are not changed.
        """
        own, mine = self._own(), set(self.layers.values())
        foreign = {
            id(p)
            for layer in self.model.modules()
            if isinstance(layer, AdaptedLayer) and layer not in mine
            for p in layer.update.parameters()
        } | {
            id(p)
            for name, module in self.model.named_children()
            if name.startswith(SHARED) and module is not self.shared
            for p in module.parameters()
        }
        return {
            plain_name(name): p
            for name, p in self.model.named_parameters()
            if id(p) in own or (p.requires_grad and id(p) not in foreign)
        }

    def trainable_here(self) -> dict[str, nn.Parameter]:
        """`trainable()` without the modules that are saved whole."""
        own = self._own()
        return {plain_name(name): p for name, p in self.model.named_parameters() if id(p) in own}

    def _own(self) -> set[int]:
        own = {id(p) for layer in self.layers.values() for p in layer.update.parameters()}
        return own if self.shared is None else own | {id(p) for p in self.shared.parameters()}

    def param_groups(self, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups for all trained parameters, with the rates the method asks for.

        Parameters on which decay would pull the pre-trained weight towards zero get `weight_decay=0`, with a warning if a
        decay was requested.
        """
        protected = {
            id(parameter)
            for layer in self.layers.values()
            for name, parameter in layer.update.named_parameters()
            if name in layer.update.no_decay
        }
        if protected and weight_decay:
            warnings.warn(
                f"weight_decay={weight_decay} is not applied to {type(self.method).__name__}'s parameters that stand for the "
                "pre-trained weight itself; it would pull that weight towards zero",
                stacklevel=2,
            )
        groups = []
        for group in self.method.param_groups(self.trainable(), lr):
            plain = [p for p in group["params"] if id(p) not in protected]
            guarded = [p for p in group["params"] if id(p) in protected]
            if plain:
                groups.append({**group, "params": plain, **({} if weight_decay is None else {"weight_decay": weight_decay})})
            if guarded:
                groups.append({**group, "params": guarded, "weight_decay": 0.0})
        return groups

    def regularizer(self) -> Tensor | float:
        """A scalar to add to the loss, or 0. `step()` raises if a method has one and this was not called."""
        self._regularized = True
        own = (getattr(layer.update.regularizer, "__func__", None) for layer in self.layers.values())
        if all(method is WeightUpdate.regularizer for method in own):
            return 0.0
        with whole_parameters(self.model) if self._spread() else nullcontext():
            terms = [term for layer in self.layers.values() if (term := layer.update.regularizer()) is not None]
        return torch.stack(terms).sum() if terms else 0.0

    def _spread(self) -> bool:
        return any(is_sharded(p) for layer in self.layers.values() for p in layer.update.parameters())

    def check(self) -> dict[str, float]:
        """`‖ΔW‖_F` of each layer; warns of layers whose ΔW is zero: they have learnt nothing."""
        norms = {name: layer.delta_norm() for name, layer in self.layers.items()}
        zero = [name for name, norm in norms.items() if norm == 0.0]
        if zero:
            shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
            warnings.warn(f"ΔW is zero in {len(zero)} of {len(norms)} adapted layers: {shown}", stacklevel=2)
        return norms

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: each update's, and the modules that are saved whole.

        Tensors that FSDP2 has sharded are gathered, so every process must call it.
        """
        state = {
            f"{name}{UPDATE}{key}": gather(value)
            for name, layer in self.layers.items()
            for key, value in layer.update.saved().items()
        }
        if self.shared is not None:
            prefix = shared_prefix(self.modules_to_save)
            state.update({f"{prefix}{key}": gather(value) for key, value in self.shared.state_dict().items()})
        for module in self.modules_to_save:
            state.update({f"{module}.{key}": gather(value) for key, value in kept_tensors(self.model, module).items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state of `state_dict`, in one process and on the same base model; schedules continue from there.

        Raises:
            CheckpointError: tensors that are missing, unexpected or of the wrong shape.
        """
        own = by_layer(state, self.layers)
        for name, layer in self.layers.items():
            layer.update.restore(own[name], layer.pristine_weight())
        if self.shared is not None:
            self.shared.load_state_dict(below(state, shared_prefix(self.modules_to_save)))
        for module in self.modules_to_save:
            load_kept(self.model, module, below(state, f"{module}."))

    def description(self) -> dict[str, Any]:
        """The description in a checkpoint: the method and its hyperparameters, the base model, each layer."""
        config = getattr(self.model, "config", None)
        return {
            "method": type(self.method).__name__,
            "config": self.method.config(),
            "seed": self.seed,
            "base_model": {
                "class": type(self.model).__name__,
                "name_or_path": getattr(config, "_name_or_path", None) or None,
                **({"quantize": scheme} if (scheme := quantized_scheme(self.model)) is not None else {}),
            },
            "modules_to_save": list(self.modules_to_save),
            "layers": {
                name: {
                    "shape": [layer.out_features, layer.in_features],
                    "fingerprint": self.fingerprints.get(name),
                    "meta": {**self._given(name), **layer.update.meta(), **self._capped(name)},
                }
                for name, layer in self.layers.items()
            },
        }

    def _given(self, name: str) -> dict[str, Any]:
        return {"rank": self.layer_ranks[name], "given_rank": self.layer_ranks[name]} if name in self.layer_ranks else {}

    def _capped(self, name: str) -> dict[str, Any]:
        return {"rank": self.capped_ranks[name], "capped": True} if name in self.capped_ranks else {}

    def save(self, folder: str | Path) -> Path:
        """Write `adapter.safetensors` and `adapter.json`, atomically; returns the folder.

        Where FSDP2 has spread the model over processes, all of them call it, and the first writes.

        Raises:
            ValueError: the model has been merged.
        """
        if not self._attached():
            raise ValueError("there is no adapter to save: the model has been merged")
        self.warn_of_unsaved()
        tensors = {**self.state_dict(), **self.method.saved()}
        with one_writes(self.model.parameters()) as writes:
            return write_adapter(Path(folder), self.description(), tensors) if writes else Path(folder)

    def warn_of_unsaved(self) -> None:
        """Warn of parameters that are trained and that no file of the adapter would hold."""
        mine = set(self.layers.values())
        if any(isinstance(module, AdaptedLayer) and module not in mine for module in self.model.modules()):
            return  # they may be the modules that another adapter saves
        held = self._own() | {id(p) for name in self.modules_to_save for p in submodule(self.model, name).parameters()}
        lost = [name for name, parameter in self.trainable().items() if id(parameter) not in held]
        if lost:
            shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
            warn_caller(
                f"{shown} can be trained and will not be saved with the adapter: name the module in modules_to_save of "
                "lowdim.adapt, or freeze it"
            )

    def _attached(self) -> bool:
        return bool(self.layers)

    def export(self, folder: str | Path, format: str = "peft", **options: Any) -> Any:
        """Write the adapter for another tool; returns a report of the loss. See `lowdim.adapters.to_peft` for the options."""
        check_choice("format", format, tuple(EXPORTERS))
        return EXPORTERS[format](self, folder, **options)

    @torch.no_grad()
    def merge(self, *, keep_mask: bool = False) -> nn.Module:
        """Put plain layers with `W_eff` back into the model, and return it. `merge_report` lists the changes.

        Merging runs in float32 or better and rounds once. A weight that is tied to another (an output head to the
        embedding) can no longer be shared: it is separated, `config.tie_word_embeddings` is set to False, and the report
        lists it. A quantized layer that is adapted becomes a plain one in the dtype that it computes in; one that is not stays
        quantized (`lowdim.layers.densify` makes it plain). The adapted layers are kept for `unmerge()` as long as this object
        lives.

        Args:
            keep_mask: leave 0 what was exactly 0 before the adapter, so that a sparse model (N:M, pruned) stays sparse; the
                report says what part of each update is dropped.

        Raises:
            ValueError: one of the layers has another adapter (`AdapterSet.merge` merges several), or a merged weight has
                entries that its dtype cannot hold. The model is then unchanged, and the adapter still attached.
        """
        for name, layer in self.layers.items():
            if submodule(self.model, name) is not layer or isinstance(layer.base, AdaptedLayer):
                raise ValueError(f"layer {name} has several adapters; delete the others first, or use AdapterSet.merge()")
        plain, changes = merged_layers(self.layers, keep_mask=keep_mask)
        now_plain = dequantized(self.layers, plain)
        flags = {p: p.requires_grad for p in self.model.parameters()}
        put_layers(self.model, plain)
        self._merged = _Merged(self.layers, self.shared, flags, untie_words(self.model))
        allow_training(self.model)
        self.drop_shared()
        self._fused.restore()
        release_statistics(self.model, self._statistics)
        self.merge_report = MergeReport(changes, tuple(name for name in self.layers if name in self.tied), now_plain)
        self.layers = {}
        warn_of_lost_zeros(changes, now_plain)
        return self.model

    def unmerge(self) -> nn.Module:
        """Restore the adapted layers that the last `merge()` replaced: base weights bit for bit, and training can continue.

        Raises:
            ValueError: nothing has been merged.
        """
        before = self._merged
        if before is None:
            raise ValueError("there is nothing to unmerge: merge() was not called, or was undone already")
        if before.separated is not None:
            tie_words(self.model, before.separated)
        put_layers(self.model, before.layers)
        if before.shared is not None:
            self.model.add_module(free_name(self.model), before.shared)
        for parameter, flag in before.flags.items():
            parameter.requires_grad_(flag)
        self._fused.disable()
        self._statistics = freeze_statistics(self.model)
        self.layers, self.shared, self._merged, self.merge_report = before.layers, before.shared, None, None
        return self.model

    def drop_shared(self) -> None:
        """Remove the method's shared module from the model."""
        if self.shared is not None:
            names = [name for name, module in self.model.named_children() if module is self.shared]
            for name in names:
                delattr(self.model, name)
            self.shared = None

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.trainable().values())
        return f"Adapted({type(self.model).__name__}, {self.method!r}, layers={len(self.layers)}, trained={count:,})"

    def _repr_html_(self) -> str:
        trained = sum(p.numel() for p in self.trainable().values())
        share = trained / max(sum(p.numel() for p in self.model.parameters()), 1)
        rows = [
            {
                "layer": name,
                "shape": f"{layer.out_features} x {layer.in_features}",
                "trained": sum(p.numel() for p in layer.update.parameters() if p.requires_grad),
            }
            for name, layer in self.layers.items()
        ]
        return html_table(f"{self.method}: {trained:,} parameters trained ({share:.2%}), {len(rows)} adapted layers", rows)


def _noted(regularizer: Callable[..., Any]) -> Callable[..., Any]:
    """A method's `regularizer` that notes its call, for `step()`."""

    @functools.wraps(regularizer)
    def call(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        self._regularized = True
        return regularizer(self, *args, **kwargs)

    return call
